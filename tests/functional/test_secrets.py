"""Secrets come from Vault, are renewed under way, and are told to nobody."""

import subprocess
import time
from collections.abc import Callable

import pytest

from voip_stack import calls, inventory, paths, rotation, secrets, settings, vault, vms
from voip_stack.calls.phone import Phone
from voip_stack.deadline import Deadline

FILES = {
    "sip-1": ("/etc/kamailio/secrets.cfg",),
    "media-1": ("/etc/rtpengine/secrets.env",),
    "pbx-1": ("/etc/asterisk/secret_manager.conf", "/etc/cdr/publisher/rabbitmq"),
}
# Whether PostgreSQL lets the login cdr in with the password on standard input.
LOG_IN = """
import psycopg, sys
try:
    psycopg.connect(host=sys.argv[1], dbname="cdr", user="cdr", password=input()).close()
except psycopg.OperationalError as error:
    sys.exit("password authentication failed" not in str(error) or 3)
"""

pytestmark = pytest.mark.skipif(settings.load().secrets == "file", reason="VOIP_SECRETS=file: there is no Vault")


def test_a_file_that_was_removed_comes_back_from_vault(ssh: Callable[..., str]) -> None:
    for machine, files in FILES.items():
        before = ssh(machine, "cat", *files)
        ssh(machine, "rm", *files)
        back = Deadline(90).wait(
            lambda m=machine, f=files: len(ssh(m, "ls", *f, check=False).split()) == len(f), every=2
        )
        assert back, f"{files} on {machine} did not come back"
        assert ssh(machine, "cat", *files) == before


def test_passwords_are_renewed_during_a_call(
    phones: list[Phone], record_property: Callable[[str, object], None]
) -> None:
    stack = inventory.load()
    old = {name: secrets.get(name) for name in secrets.catalogue()}
    with (
        calls.Capture() as capture,
        phones[1].answer() as callee,
        phones[0].call(phones[1].number, seconds=180) as caller,
    ):
        caller.wait_for("answered")
        begin = time.monotonic()
        rotation.rotate("all", lambda _: None)
        record_property("rotation of all secrets", f"{time.monotonic() - begin:.0f} s")
        with phones[2].call("600", seconds=5) as another:  # the echo
            another.finish()
        caller.finish()
        callee.finish()
    for speaker, listener in ((phones[0], phones[1]), (phones[1], phones[0])):
        assert capture.level_of(listener, speaker.tone_hz) > -20
    new = {name: secrets.get(name) for name in secrets.catalogue()}
    assert not set(old.values()) & set(new.values())
    address = str(stack.group("infra")[0].internal)
    for password, status in ((new["postgresql_password_cdr"], 0), (old["postgresql_password_cdr"], 3)):
        argv = vms.ssh_argv("pbx-1", "python3", "-c", LOG_IN, address)
        done = subprocess.run(argv, input=f"{password}\n", capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status, done.stderr


def test_no_secret_is_told_to_anybody(stack: inventory.Inventory) -> None:
    keys = vault.Keys.read(vault.keys_dir() / f"{stack.group('infra')[0].name}.json")
    values = [*(secrets.get(name) for name in secrets.catalogue()), keys.root_token, *keys.unseal]
    commands = {
        "the journal": "journalctl --no-pager -o cat",
        "the process list": "ps -eo args",
        "files that anybody reads": "find / -xdev -type f -perm -o=r -mmin -600 -size -900k -exec cat {} + 2>/dev/null",
    }
    found = []
    for machine in stack.machines:
        for where, command in commands.items():
            argv = vms.ssh_argv(machine, "sudo", "sh", "-c", f"{command} || :")
            said = subprocess.run(argv, capture_output=True, timeout=300, check=False).stdout.decode(errors="replace")
            assert said, f"{machine} told nothing of {where}"
            found += [(machine, where) for value in values if value in said]
    tracked = subprocess.run(
        ["git", "grep", "-qF", "-f", "-"], cwd=paths.REPOSITORY, input="\n".join(values), text=True, check=False
    )
    assert tracked.returncode == 1
    assert found == []
