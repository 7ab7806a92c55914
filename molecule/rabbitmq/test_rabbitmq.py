"""Each user does its daemon's work and nothing else, and what was confirmed is there after a crash."""

from __future__ import annotations

import json
import re
import socket
import time
import types
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pika
import pytest
from guests import Host, inventory_of, secret
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils import connection_workflow
from pika.exceptions import (
    ChannelClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    UnroutableError,
)

from voip_stack import lab

ADDRESS = inventory_of("rabbitmq-1")["internal_address"]
PASSWORDS = {user: secret(f"rabbitmq_password_{user}") for user in ("cdr_publisher", "cdr_reader")}
PASSWORDS['watch "2"'] = 'wachmann\'s "Schlüssel"'
PERSISTENT = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
# pika makes its own sockets: these are the lab's.
SOCKETS = types.SimpleNamespace(**{**vars(socket), "socket": lambda *_: lab.current().open_socket()})


@contextmanager
def logged_in(user: str, password: str | None = None, vhost: str = "voip") -> Iterator[BlockingChannel]:
    """A channel from this computer, as a daemon's, where publishing waits for the confirmation."""
    parameters = pika.ConnectionParameters(
        ADDRESS,
        5672,
        vhost,
        pika.PlainCredentials(user, password or PASSWORDS[user]),
        socket_timeout=20,
        stack_timeout=60,
        blocked_connection_timeout=30,
    )
    with mock.patch.object(connection_workflow, "socket", SOCKETS):
        connection = pika.BlockingConnection(parameters)
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
    finally:
        if connection.is_open:
            connection.close()


def publish(channel: BlockingChannel, body: str, exchange: str = "cdr", key: str = "call.end") -> None:
    channel.basic_publish(exchange, key, body, PERSISTENT, mandatory=True)


def bodies(channel: BlockingChannel, queue: str = "cdr") -> list[str]:
    """All that is in a queue; it is empty then."""
    found: list[str] = []
    while True:
        method, _, body = channel.basic_get(queue, auto_ack=True)
        if method is None:
            return found
        found.append(body.decode())


def main_pid(host: Host) -> str:
    return host.check_output("systemctl show --value -p MainPID rabbitmq-server")


def test_listens_inside_for_clients_and_on_loopback_for_erlang(host: Host) -> None:
    found = {line.split()[3] for line in host.check_output("ss -Hltnp").splitlines() if '"beam' in line}
    assert found == {f"{ADDRESS}:5672", "127.0.0.1:25672"}
    found = {line.split()[3] for line in host.check_output("ss -Hltn 'sport = :4369'").splitlines()}
    assert found == {"127.0.0.1:4369"}


def test_a_cdr_goes_from_the_publisher_to_the_reader() -> None:
    body = uuid.uuid4().hex
    with logged_in("cdr_publisher") as channel:
        publish(channel, body)
        with pytest.raises(UnroutableError):
            publish(channel, body, key="elsewhere")
    with logged_in("cdr_reader") as channel:
        assert bodies(channel)[-1] == body


def test_a_user_of_any_name_and_password_has_its_own_queue() -> None:
    with logged_in('watch "2"') as channel:
        publish(channel, "fire", exchange="alarm", key="")
        assert bodies(channel, "alarm") == ["fire"]


@pytest.mark.parametrize(
    ("user", "password", "vhost", "refusal", "said"),
    [
        ("cdr_reader", "wrong", "voip", ProbableAuthenticationError, "Login was refused"),
        ("cdr_reader", PASSWORDS["cdr_publisher"], "voip", ProbableAuthenticationError, "Login was refused"),
        ("nobody", "wrong", "voip", ProbableAuthenticationError, "Login was refused"),
        ("guest", "guest", "voip", ProbableAuthenticationError, "Login was refused"),
        ("cdr_reader", None, "/", ProbableAccessDeniedError, "vhost / not found"),
    ],
)
def test_a_wrong_login_is_refused(
    user: str, password: str | None, vhost: str, refusal: type[Exception], said: str
) -> None:
    with pytest.raises(refusal, match=said), logged_in(user, password, vhost):
        pass


@pytest.mark.parametrize(
    ("user", "what", "said"),
    [
        ("cdr_publisher", lambda c: c.basic_get("cdr"), "read access to queue 'cdr'"),
        ("cdr_publisher", lambda c: c.basic_consume("cdr", print), "read access to queue 'cdr'"),
        ("cdr_publisher", lambda c: c.queue_purge("cdr"), "read access to queue 'cdr'"),
        ("cdr_publisher", lambda c: c.queue_delete("cdr"), "configure access to queue 'cdr'"),
        ("cdr_publisher", lambda c: c.queue_declare("mine", durable=True), "configure access to queue 'mine'"),
        ("cdr_publisher", lambda c: c.exchange_declare("mine"), "configure access to exchange 'mine'"),
        ("cdr_publisher", lambda c: publish(c, "x", exchange=""), "write access to exchange 'amq.default'"),
        ("cdr_publisher", lambda c: publish(c, "x", exchange="alarm"), "write access to exchange 'alarm'"),
        ("cdr_publisher", lambda c: publish(c, "x", exchange="amq.topic"), "write access to exchange 'amq.topic'"),
        ("cdr_reader", lambda c: publish(c, "x"), "write access to exchange 'cdr'"),
        ("cdr_reader", lambda c: publish(c, "x", exchange="", key="cdr"), "write access to exchange 'amq.default'"),
        ("cdr_reader", lambda c: c.basic_get("alarm"), "read access to queue 'alarm'"),
        ("cdr_reader", lambda c: c.queue_delete("cdr"), "configure access to queue 'cdr'"),
        ("cdr_reader", lambda c: c.queue_bind("cdr", "alarm"), "write access to queue 'cdr'"),
    ],
)
def test_nothing_else(user: str, what: Callable[[BlockingChannel], object], said: str) -> None:
    with logged_in(user) as channel, pytest.raises(ChannelClosedByBroker, match=f"ACCESS_REFUSED - {said}"):
        what(channel)


def test_there_is_no_other_user(host: Host) -> None:
    users = json.loads(host.check_output("rabbitmqctl list_users --silent --formatter=json"))
    assert {user["user"]: user["tags"] for user in users} == {user: [] for user in PASSWORDS}


def test_no_node_ran_before_there_were_definitions(host: Host) -> None:
    """Such a node makes the user guest, and has the machine's name."""
    found = host.file("/var/lib/rabbitmq/mnesia").listdir()
    assert found
    assert not [name for name in found if not name.startswith("rabbit@localhost")]


def test_only_a_name_and_its_password_let_in() -> None:
    with lab.current().connect(ADDRESS, 5672, timeout=20) as connection:
        connection.sendall(b"AMQP\0\0\x09\x01")
        start = connection.recv(4096)  # connection.start: properties, mechanisms, locales
    assert b"\0\0\0\x05PLAIN\0\0\0\x05en_US" in start


def test_parameters_are_in_force(host: Host) -> None:
    with logged_in("cdr_reader") as channel:
        assert channel.connection._impl.params.channel_max == 20
    said = host.check_output("journalctl --boot --unit rabbitmq-server --output cat")  # rabbitmqctl takes ten seconds
    assert set(re.findall("Memory high watermark set to (.*?) \\(", said)) == {"300 MiB"}
    assert set(re.findall("Disk free limit set to (.*)", said)) == {"200MB"}
    assert set(re.findall("startup complete; (.*) plugins", said)) == {"0"}


def test_a_cdr_that_is_given_back_again_and_again_is_kept() -> None:
    """By default a quorum queue drops a message when it is given back for the 21st time."""
    body = uuid.uuid4().hex
    with logged_in("cdr_reader") as channel:
        channel.queue_purge("cdr")
    with logged_in("cdr_publisher") as channel:
        publish(channel, body)
    with logged_in("cdr_reader") as channel:
        for _ in range(25):
            method, _, found = channel.basic_get("cdr")
            assert found.decode() == body
            channel.basic_nack(method.delivery_tag, requeue=True)
        assert bodies(channel) == [body]


@pytest.mark.outage
def test_what_was_confirmed_survives_a_crash(host: Host) -> None:
    body = uuid.uuid4().hex
    with logged_in("cdr_publisher") as channel:
        publish(channel, body)
    pid = main_pid(host)
    host.check_output("kill -KILL %s", pid)
    deadline = time.monotonic() + 180  # Erlang starts slowly under emulation
    while main_pid(host) == pid or host.run("systemctl is-active rabbitmq-server").stdout.strip() != "active":
        assert time.monotonic() < deadline, "RabbitMQ did not come back"
        time.sleep(1)
    with logged_in("cdr_reader") as channel:
        assert bodies(channel)[-1] == body


def test_nobody_else_reads_its_secrets(host: Host) -> None:
    files = {
        "/etc/rabbitmq/definitions.json": ("root", "rabbitmq", 0o640),
        "/var/lib/rabbitmq/.erlang.cookie": ("rabbitmq", "rabbitmq", 0o400),
        "/var/lib/rabbitmq/mnesia": ("rabbitmq", "rabbitmq", 0o750),
    }
    assert {f: (host.file(f).user, host.file(f).group, host.file(f).mode) for f in files} == files


def test_no_password_is_seen(host: Host) -> None:
    for seen in ("ps -eo args", "cat /etc/rabbitmq/*", "journalctl --no-pager"):
        said = host.check_output(seen)
        assert "rabbitmq" in said
        assert not [user for user, password in PASSWORDS.items() if password in said], seen


def test_a_broken_node_gains_nothing(host: Host) -> None:
    status = dict(line.split(":\t") for line in host.check_output("cat /proc/%s/status", main_pid(host)).splitlines())
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapBnd"], 16) == 0
    assert status["Seccomp"] == "2"
    write = "nsenter --target %s --mount -- touch /etc/rabbitmq/definitions.json /usr/bin/rabbit"
    assert host.run(write, main_pid(host)).stderr.count("Read-only file system") == 2
