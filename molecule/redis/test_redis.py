"""Each component's user does its daemon's work and nothing else, and what was written is there after a crash."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from guests import Host, inventory_of, secret

from voip_stack import lab

ADDRESS = inventory_of("redis-1")["internal_address"]
PASSWORDS = {"default": secret("redis_password_rtpengine"), "kamailio": "kamailio's own"}


class Client:
    """One connection from this computer, as a daemon's (https://redis.io/docs/latest/develop/reference/protocol-spec/)."""

    def __init__(self) -> None:
        self.connection = lab.current().connect(ADDRESS, 6379, timeout=10)
        self.file = self.connection.makefile("rb")

    def __call__(self, *words: str) -> Any:
        """The answer to a command: a string, or a list of them."""
        self.connection.sendall(f"*{len(words)}\r\n".encode() + b"".join(_bulk(word) for word in words))
        return self._answer()

    def _answer(self) -> Any:
        line = self.file.readline().decode().strip()
        if line[0] == "$" and line != "$-1":
            return self.file.read(int(line[1:]) + 2)[:-2].decode()
        if line[0] == "*":
            return [self._answer() for _ in range(int(line[1:]))]
        return line


def _bulk(word: str) -> bytes:
    return f"${len(word.encode())}\r\n{word}\r\n".encode()


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    yield made
    made.file.close()
    made.connection.close()


def test_listens_inside_and_on_loopback_only(host: Host) -> None:
    found = {line.split()[3] for line in host.check_output("ss -Hltn 'sport = :6379'").splitlines()}
    assert found == {f"{ADDRESS}:6379", "127.0.0.1:6379"}


def test_rtpengine_keeps_its_sessions_with_a_password_alone(client: Client) -> None:
    assert client("AUTH", PASSWORDS["default"]) == "+OK"
    assert client("SELECT", "1") == "+OK"
    assert "role:master" in client("INFO")
    assert client("SET", "a-call@id", "{}") == "+OK"
    assert client("EXPIRE", "a-call@id", "60") == ":1"
    assert client("GET", "a-call@id") == "{}"
    assert client("TYPE", "calls") == "+none"
    assert client("KEYS", "*") == ["a-call@id"]
    assert client("DEL", "a-call@id") == ":1"


def test_nobody_does_anything_without_a_password(client: Client) -> None:
    for words in (("PING",), ("GET", "a"), ("ACL", "WHOAMI"), ("CONFIG", "GET", "*")):
        assert client(*words).startswith("-NOAUTH"), words


def test_a_wrong_password_is_refused(client: Client) -> None:
    assert client("AUTH", "wrong").startswith("-WRONGPASS")
    assert client("AUTH", "kamailio", PASSWORDS["default"]).startswith("-WRONGPASS")
    assert client("AUTH", "nobody", "wrong").startswith("-WRONGPASS")


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ("default", ("FLUSHALL",)),
        ("default", ("CONFIG", "SET", "dir", "/etc")),
        ("default", ("ACL", "SETUSER", "default", "+@all")),
        ("default", ("EVAL", "return 1", "0")),
        ("default", ("SHUTDOWN",)),
        ("default", ("REPLICAOF", "192.0.2.1", "6379")),
        ("kamailio", ("GET", "a-call@id")),
        ("kamailio", ("DEL", "ban:192.0.2.1")),
        ("kamailio", ("KEYS", "*")),
    ],
)
def test_nothing_else(client: Client, user: str, words: tuple[str, ...]) -> None:
    assert client("AUTH", user, PASSWORDS[user]) == "+OK"
    assert client(*words).startswith("-NOPERM")


def test_a_component_has_its_own_keys(client: Client) -> None:
    assert client("AUTH", "kamailio", PASSWORDS["kamailio"]) == "+OK"
    assert client("SET", "ban:192.0.2.1", "1") == "+OK"
    assert client("GET", "ban:192.0.2.1") == "1"


def test_full_memory_is_an_error_and_evicts_nothing(client: Client) -> None:
    client("AUTH", PASSWORDS["default"])
    try:
        answers = [client("SET", f"full-{n}", "x" * 4_000_000) for n in range(20)]
        kept = len(client("KEYS", "full-*"))
    finally:
        for n in range(20):
            client("DEL", f"full-{n}")
    assert answers[0] == "+OK"
    assert answers[-1].startswith("-OOM")
    assert kept == answers.count("+OK")


@pytest.mark.outage
def test_what_was_written_survives_a_crash(host: Host, client: Client) -> None:
    value = uuid.uuid4().hex
    client("AUTH", PASSWORDS["default"])
    assert client("SET", "survivor", value) == "+OK"
    time.sleep(2)  # appendfsync everysec
    pid = host.check_output("systemctl show --value -p MainPID redis-server")
    host.check_output("kill -KILL %s", pid)
    deadline = time.monotonic() + 30
    while host.run("systemctl is-active redis-server").stdout.strip() != "active":
        assert time.monotonic() < deadline, "Redis did not come back"
        time.sleep(0.5)
    assert host.check_output("systemctl show --value -p MainPID redis-server") != pid
    again = Client()
    assert again("AUTH", PASSWORDS["default"]) == "+OK"
    assert again("GET", "survivor") == value


def test_nobody_else_reads_its_files(host: Host) -> None:
    for file in ("/etc/redis/users.acl", "/etc/redis/redis.conf"):
        assert host.file(file).mode == 0o640
        assert (host.file(file).user, host.file(file).group) == ("root", "redis")
    assert host.file("/var/lib/redis").mode == 0o750


def test_more_connections_than_there_may_be_are_refused() -> None:
    clients = [Client() for _ in range(21)]
    try:
        answers = [c("AUTH", PASSWORDS["default"]) for c in clients]
    finally:
        for c in clients:
            c.file.close()
            c.connection.close()
    assert answers == ["+OK"] * 20 + ["-ERR max number of clients reached"]
