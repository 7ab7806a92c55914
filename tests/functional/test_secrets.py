"""Secrets come from Vault, are rotated during calls, and are shown to nobody."""

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest

from voip_stack import calls, inventory, paths, secrets, settings, vms
from voip_stack.calls import probes
from voip_stack.calls.phone import Phone
from voip_stack.deadline import Deadline
from voip_stack.errors import CallError
from voip_stack.secrets import rotation, vault

FILES = {  # by group: a file on each of its machines
    "sip_proxies": ("/etc/kamailio/secrets.cfg",),
    "media_servers": ("/etc/rtpengine/secrets.env",),
    "pbx_servers": ("/etc/asterisk/secret_manager.conf", "/etc/cdr/publisher/rabbitmq"),
}
# The servers among PostgreSQL, RabbitMQ and Redis that accept the passwords on standard input, one per line.
LOG_IN = """
import socket, sys

address, *servers = sys.argv[1:]

def postgresql(password):
    import psycopg
    try:
        psycopg.connect(host=address, dbname="cdr", user="cdr", password=password).close()
    except psycopg.OperationalError as error:
        return "password authentication failed" not in str(error)  # what else goes wrong is not a refusal
    return True

def rabbitmq(password):
    import pika
    try:
        pika.BlockingConnection(pika.URLParameters(f"amqp://cdr_reader:{password}@{address}/voip")).close()
    except pika.exceptions.AMQPConnectionError as error:
        return "ACCESS_REFUSED" not in repr(error)
    return True

def redis(password):
    with socket.create_connection((address, 6379), timeout=30) as connection:
        connection.sendall(f"AUTH {password}\\r\\n".encode())
        return not connection.makefile().readline().startswith("-WRONGPASS")

for server in servers:
    if globals()[server](input()):
        print(server)
"""
SERVERS = {  # by group: the servers that let its machines in
    "pbx_servers": {
        "postgresql": "postgresql_password_cdr",
        "rabbitmq": "rabbitmq_password_cdr_reader",
    },
    "media_servers": {"redis": "redis_password_rtpengine"},
}
# Maximum seconds between the ends of two consecutive calls of 2 s, while an emulated proxy or RTPEngine restarts.
NO_NEW_CALL = 60
_DURATION = -3  # the column of `core show channels concise` with a channel's seconds

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(settings.load().secrets == "file", reason="VOIP_SECRETS=file: there is no Vault"),
]


@pytest.mark.takes(40)
def test_a_file_that_was_removed_comes_back_from_vault(ssh: Callable[..., str]) -> None:
    def back(group: str) -> bool:
        there = ssh(group, "ls", *FILES[group], check=False).split()
        return len(there) == len(FILES[group]) * len(probes.machines(group))

    before = {group: ssh(group, "cat", *files) for group, files in FILES.items()}
    for group, files in FILES.items():
        ssh(group, "rm", *files)
    for group, files in FILES.items():
        assert Deadline(90).until(partial(back, group), every=2), f"{files} in {group} did not come back"
    assert {group: ssh(group, "cat", *files) for group, files in FILES.items()} == before


def let_in(values: dict[str, str]) -> list[str]:
    """The servers that accept these secrets, each once per machine that logs in."""
    address = str(inventory.load().group("infra")[0].internal)
    found = []
    for group, servers in SERVERS.items():
        passwords = "".join(f"{values[name]}\n" for name in servers.values())
        command = "python3", "-c", LOG_IN, address, *servers
        for machine in probes.machines(group):
            found += vms.ssh.run(machine, *command, input=passwords, check=True, timeout=120).stdout.split()
    return found


@pytest.mark.usefixtures("unlimited")
@pytest.mark.takes(150)
def test_all_secrets_are_renewed_during_ten_calls_and_new_calls_are_made_meanwhile(
    phones: list[Phone], ssh: Callable[..., str], record_property: Callable[[str, object], None]
) -> None:
    old = {name: secrets.get(name) for name in secrets.catalogue()}
    caller, callee, another = phones
    nine = replace(another, sip_port=5070, media_port=7000)
    with (
        calls.Capture(phones=(caller, callee)) as capture,
        callee.answer(seconds=1700) as answering,
        caller.call(callee.number, seconds=1700) as calling,
        nine.stay("600", seconds=1700, count=9) as others,
    ):
        try:
            calling.wait_for("answered")
            assert Deadline(60).until(lambda: others.events.count("answered") == 9, every=0.5)
            ends, refused = [time.monotonic()], 0
            with ThreadPoolExecutor(1) as pool:
                rotating = pool.submit(rotation.rotate, "all", lambda _: None)
                while not rotating.done():
                    try:
                        with another.call("600", seconds=2) as new_call:
                            new_call.finish()
                        ends.append(time.monotonic())
                    except CallError:  # while the proxy or RTPEngine restarts
                        refused += 1
                rotating.result()
            with another.call("600", seconds=2) as new_call:
                new_call.finish()
            ends.append(time.monotonic())
            took, made = ends[-1] - ends[0], len(ends) - 2
            record_property(
                "rotation of all secrets; calls meanwhile completed, refused", f"{took:.0f} s; {made}, {refused}"
            )
            longest = max(later - earlier for earlier, later in pairwise(ends))
            record_property("longest time between two calls' ends", f"{longest:.0f} s")
            assert longest < NO_NEW_CALL
            # The proxy's restart may leave half of a new call at the PBX; the ten are older.
            channels = ssh("pbx_servers", "asterisk", "-rx", "core show channels concise").splitlines()
            assert sum(int(channel.split("!")[_DURATION]) >= took for channel in channels if channel) == 9 + 2
        finally:
            ssh("pbx_servers", "asterisk", "-rx", "channel request hangup all")
        for leg in (calling, answering, others):
            leg.finish()
    for speaker, listener in ((caller, callee), (callee, caller)):
        assert capture.level_of(listener, speaker.tone_hz) > -20
    new = {name: secrets.get(name) for name in secrets.catalogue()}
    assert not set(old.values()) & set(new.values())
    assert let_in(new) == [s for group, servers in SERVERS.items() for _ in probes.machines(group) for s in servers]
    assert let_in(old) == []


@pytest.mark.takes(40)
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
            said = vms.ssh.run(machine, "sh", "-c", f"{command} || :", sudo=True, timeout=300).stdout
            assert said, f"{machine} told nothing of {where}"
            found += [(machine, where) for value in values if value in said]
    tracked = subprocess.run(
        ["git", "grep", "-qF", "-f", "-"], cwd=paths.REPOSITORY, input="\n".join(values), text=True, check=False
    )
    assert tracked.returncode == 1
    assert found == []
