"""Vault's actions in playbooks: their effect on this computer, and their error messages."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleActionFail

from voip_stack import paths
from voip_stack.secrets.vault import Vault, VaultError
from voip_stack.services import Step, vault_setup

ACTIONS = paths.ANSIBLE / "plugins" / "action"


def act(action: str, arguments: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """The result of an action, as a strategy gets it."""
    task = SimpleNamespace(action=action, args=arguments, async_val=0, check_mode=check)
    connection = SimpleNamespace(_shell=SimpleNamespace(tmpdir=None))
    plugin = runpy.run_path(str(ACTIONS / f"{action}.py"))["ActionModule"]
    return dict(plugin(task, connection, None, None, None, None).run(task_vars={}))


@pytest.fixture
def server(tmp_path: Path) -> dict[str, Any]:
    keys = tmp_path / "keys"
    keys.write_text("s.root\n")
    return {"name": "vault-1", "address": "192.0.2.1", "port": 8200, "keys": str(keys)}


def test_what_vault_lacks_is_made_and_named(server: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def lacking(*of: Any) -> Iterator[Step]:
        asked.append(of)
        yield "the mount secret", lambda: asked.append("made")

    monkeypatch.setattr(vault_setup, "plan", lacking)
    machines = {"pbx": {"pbx-1": ["192.0.2.2"]}}
    made = {"changed": True, "made": ["the mount secret"]}
    assert act("voip_vault_setup", {"server": server, "machines": machines}, check=True) == made
    assert asked == [(Vault("vault-1", "192.0.2.1", 8200, None, "s.root"), machines)]
    assert act("voip_vault_setup", {}) == made
    assert asked[1:] == [(None, None), "made"]
    monkeypatch.setattr(vault_setup, "plan", lambda *_: iter(()))
    assert act("voip_vault_setup", {}) == {"changed": False, "made": []}


def test_a_vault_that_is_not_there_fails_a_run_with_what_to_do_and_leaves_a_check(server: dict[str, Any]) -> None:
    Path(server["keys"]).unlink()
    failed = act("voip_vault_setup", {"server": server})
    assert failed == {"failed": True, "msg": f"Vault's keys are missing ({server['keys']}); ./voip provision"}
    assert act("voip_vault_setup", {"server": server}, check=True) == {"skipped": True, "msg": failed["msg"]}


def test_a_vault_that_refuses_fails_a_check_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Iterator[Step]:
        raise VaultError("sealed", "unseal it", 503)

    monkeypatch.setattr(vault_setup, "plan", refused)
    assert act("voip_vault_setup", {}, check=True) == {"failed": True, "msg": "sealed; unseal it"}


def test_a_login_is_of_one_class_machine_and_address(server: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    login, wanted = {"role_id": "r", "wrapping_token": "w"}, ("s.root", "pbx", "pbx-1", "192.0.2.2")
    monkeypatch.setattr(vault_setup, "login", lambda at, *of: login if (at.token, *of) == wanted else {})
    arguments = {"server": server, "class": "pbx", "machine": "pbx-1", "address": "192.0.2.2"}
    assert act("voip_vault_login", arguments) == {"changed": True, "login": login}
    assert act("voip_vault_login", arguments, check=True) == {"changed": True}
    Path(server["keys"]).unlink()
    assert "Vault's keys are missing" in act("voip_vault_login", arguments)["msg"]


@pytest.mark.parametrize("action", ["voip_vault_setup", "voip_vault_login"])
def test_arguments_are_those_of_the_documentation(action: str, server: dict[str, Any]) -> None:
    loaded = runpy.run_path(str(ACTIONS / f"{action}.py"))
    documented = yaml.safe_load(loaded["DOCUMENTATION"])["options"]["server"]["suboptions"]
    for name, option in documented.items():
        assert {k: v for k, v in option.items() if k != "description"} == loaded["_SERVER"][name]
    with pytest.raises(AnsibleActionFail, match="port"):
        act(action, {"server": server | {"port": "https"}, "class": "pbx", "machine": "pbx-1"})


def test_ansible_finds_them(server: dict[str, Any]) -> None:
    arguments = {"server": server, "class": "pbx", "machine": "pbx-1"}
    argv = [str(Path(sys.executable).with_name("ansible")), "pbx-1", "--check", "-o", "-m", "voip_vault_login"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(paths.ANSIBLE / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(
        [*argv, "-a", json.dumps(arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert "pbx-1 | CHANGED" in done.stdout, done.stdout + done.stderr
