"""The same stack with its secrets in files of this computer, and then in Vault again: daemons see no difference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from voip_stack import calls, paths, provision, settings

pytestmark = pytest.mark.skipif(
    settings.load().secrets == "file", reason="VOIP_SECRETS=file is what the stack runs with"
)


def invoke(*command: str) -> str:
    environment = {**os.environ, "VOIP_SECRETS": "file"}
    argv = [sys.executable, "-m", "invoke", *command]
    done = subprocess.run(
        argv, cwd=paths.REPOSITORY, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_calls_complete_with_secrets_in_files_and_in_vault_again(ssh: Callable[..., str]) -> None:
    files = {  # by group: a file on each of its machines
        "sip_proxies": "/etc/kamailio/secrets.cfg",
        "media_servers": "/etc/rtpengine/secrets.env",
        "pbx_servers": "/etc/asterisk/secret_manager.conf",
    }
    described = {group: ssh(group, "stat", "--format=%U:%G %a %n", file) for group, file in files.items()}
    kept = {group: ssh(group, "cat", file) for group, file in files.items()}
    try:
        invoke("provision")
        invoke("calls.verify")
        for group, file in files.items():
            assert set(ssh(group, "systemctl", "is-active", "vault-agent", check=False).split()) == {"inactive"}
            assert ssh(group, "stat", "--format=%U:%G %a %n", file) == described[group]
            assert ssh(group, "cat", file) != kept[group]
    finally:
        provision.run()
    calls.verify()
    assert {group: ssh(group, "cat", file) for group, file in files.items()} == kept
