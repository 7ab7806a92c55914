"""A devstack-core instead of infra-1: its addresses, its services' answers, and this stack's objects in it."""

import dataclasses
import http.server
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from voip_stack import inventory, lab, paths, secrets, settings
from voip_stack.deadline import Deadline
from voip_stack.errors import VmError, VoipError
from voip_stack.lab import namespace
from voip_stack.lab.namespace import NamespaceLab
from voip_stack.lab.netns import Namespace
from voip_stack.services import database, devstack, make, rabbitmq
from voip_stack.services.devstack import Login
from voip_stack.services.rabbitmq import Definitions


class _Lab:
    """Loopback."""

    def connect(self, address: str, port: int, timeout: float) -> socket.socket:
        return socket.create_connection((address, port), timeout)


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "current", _Lab)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[inventory.Inventory]:
    conf = settings.parse("VOIP_INFRA=devstack\nVOIP_DEVSTACK_ADDRESS=192.168.64.77", {})
    monkeypatch.setattr(settings, "load", lambda: conf)
    inventory.load.cache_clear()
    yield inventory.load()
    inventory.load.cache_clear()


def test_with_it_no_machine_of_ours_gives_services(chosen: inventory.Inventory) -> None:
    assert chosen.infra() == ("devstack-core", inventory.Address("192.168.64.77"))
    assert list(chosen.machines) == ["sip-1", "media-1", "pbx-1"]
    assert not chosen.components["redis"].enabled
    assert "redis" not in {service.name for service in chosen.services}
    assert chosen.devstack_ports == [8200, 5432, 6379, 5672]
    assert chosen.servers("pbx_servers") == [("pbx-1", inventory.Address("192.168.64.30"))]


def test_infra_is_understood_without_the_prefix_in_our_file_only() -> None:
    assert settings.parse("INFRA=devstack", {}).infra == "devstack"
    assert settings.parse("", {"INFRA": "production"}).infra == "embedded"


def _play(expression: str, **environment: str) -> str:
    """The value of an Ansible expression, with the stack's inventory."""
    argv = [
        Path(sys.executable).with_name("ansible"),
        "sip-1",
        "-i",
        paths.INVENTORY / "development.yml",
        "-m",
        "debug",
    ]
    argv += ["-a", f"msg={expression}", "-c", "local", "-o"]
    env = {**os.environ, "ANSIBLE_CONFIG": str(paths.ANSIBLE / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", **environment}
    done = subprocess.run(list(map(str, argv)), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ansible_and_python_agree_on_where_services_are() -> None:
    both = "{{ voip_infra_name }}@{{ voip_infra_address }}"
    assert "infra-1@192.168.64.40" in _play(both)
    assert "devstack-core@192.168.64.1" in _play(both, VOIP_INFRA="devstack")
    assert "devstack-core@192.0.2.7" in _play(both, VOIP_INFRA="devstack", VOIP_DEVSTACK_ADDRESS="192.0.2.7")


def _redis(replies: list[bytes]) -> socketserver.TCPServer:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for reply in replies:
                for _ in range(5):  # an array of two words
                    self.rfile.readline()
                self.wfile.write(reply)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _info(text: str) -> bytes:
    return f"${len(text)}\r\n{text}\r\n".encode()


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([b"+OK\r\n", _info("redis_version:7.4.1\r\nredis_mode:cluster\r\n")], ("7.4.1", "it is a cluster")),
        ([b"+OK\r\n", _info("redis_version:8.0.2\r\nredis_mode:standalone\r\n")], ("8.0.2", "")),
        ([b"-WRONGPASS invalid username-password pair\r\n", b"-NOAUTH\r\n"], "refuses our login: -WRONGPASS"),
        ([b"HTTP/1.1 400 Bad Request\r\n", b"\r\n"], "refuses our login: HTTP/1.1 400"),
    ],
)
def test_redis_is_asked_for_its_version_and_whether_it_is_a_cluster(
    replies: list[bytes], expected: tuple[str, str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = _redis(replies)
    port = int(server.server_address[1])
    monkeypatch.setattr(devstack, "login", lambda *_, **__: Login("Redis", "127.0.0.1", port, "", "secret"))
    try:
        if isinstance(expected, str):
            with pytest.raises(VoipError, match=expected):
                devstack.redis()
        else:
            version, why = devstack.redis()
            assert (version, why[:15]) == (expected[0], expected[1])
    finally:
        server.shutdown()
        server.server_close()


def _password(name: str) -> str:
    return "it's" if name == "postgresql_password_cdr" else name


@pytest.fixture(scope="module")
def wanted() -> Definitions:
    return rabbitmq.definitions(_password)


def test_the_layout_is_that_of_the_roles(wanted: Definitions) -> None:
    layout = database.layout(_password)
    assert layout.databases == {"kamailio": ["kamailio"], "asterisk": ["asterisk"], "cdr": ["cdr", "cdr_publisher"]}
    assert "PASSWORD 'it''s'" in layout.sql
    assert "it's" not in repr(layout)
    assert [vhost["name"] for vhost in wanted["vhosts"]] == ["voip"]
    assert [user["name"] for user in wanted["users"]] == ["cdr_publisher", "cdr_reader"]


def test_the_layout_is_to_the_letter_what_ansible_makes_of_the_roles(wanted: Definitions) -> None:
    roles = paths.ANSIBLE / "roles"
    argv = [str(Path(sys.executable).with_name("ansible")), "infra-1", "-m", "debug", "-c", "local", "-o"]
    argv += ["-e", json.dumps({name: _password(name) for name in secrets.catalogue()})]
    for role in ("postgresql", "rabbitmq"):
        argv += [f"-e@{roles / role / part / 'main.yml'}" for part in ("defaults", "vars")]
    files = [roles / "postgresql/templates/setup.sql.j2", roles / "rabbitmq/templates/definitions.json.j2"]
    argv += ["-a", f"msg={{{{ query('ansible.builtin.template', {', '.join(repr(str(f)) for f in files)}) }}}}"]
    env = {**os.environ, "ANSIBLE_CONFIG": str(paths.ANSIBLE / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    env["ANSIBLE_FILTER_PLUGINS"] = str(roles / "rabbitmq/filter_plugins")
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sql, definitions = json.loads(done.stdout.partition(" => ")[2])["msg"]
    assert database.layout(_password).sql == sql
    assert wanted == json.loads(definitions)


class _Broker(http.server.BaseHTTPRequestHandler):
    """RabbitMQ's management API, as far as the stack uses it: definitions are merged."""

    held: dict[str, list[dict[str, Any]]]

    def answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        status = 200 if self.headers["Authorization"] == "Basic YWRtaW46cHc=" else 401  # admin:pw
        if status == 200 and self.command == "POST":
            for section, items in body.items():
                self.held[section] += items
        elif status == 200 and self.command == "DELETE":
            kind, name = self.path.removeprefix("/api/").split("/")
            self.held[kind] = [item for item in self.held[kind] if item["name"] != name]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(self.held if self.command == "GET" else {}).encode())

    do_GET = do_POST = do_DELETE = answer  # noqa: N815  # http.server's names

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch, wanted: Definitions) -> Iterator[type[_Broker]]:
    class Handler(_Broker):
        pass

    Handler.held = {section: [] for section in wanted}
    Handler.held["vhosts"] = [{"name": "dev_vhost", "description": ""}]
    monkeypatch.setattr(lab, "current", _Lab)
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    login = Login("RabbitMQ", "127.0.0.1", server.server_port, "admin", "pw", "dev_vhost")
    monkeypatch.setattr(rabbitmq, "administrator", lambda: login)
    yield Handler
    server.shutdown()
    server.server_close()


def test_what_rabbitmq_lacks_is_made_once_and_removed_again(broker: type[_Broker], wanted: Definitions) -> None:
    made = list(make(rabbitmq.plan(wanted)))
    assert made[:3] == [
        "RabbitMQ: the virtual host voip",
        "RabbitMQ: the user cdr_publisher",
        "RabbitMQ: the user cdr_reader",
    ]
    assert "RabbitMQ: the policy keep" in made
    assert list(rabbitmq.plan(wanted)) == []
    broker.held["users"][1]["password_hash"] = "another"
    assert [title for title, _ in rabbitmq.plan(wanted)] == ["RabbitMQ: the user cdr_reader"]
    list(make(rabbitmq.removal(wanted)))
    assert broker.held["users"] == []
    assert [v["name"] for v in broker.held["vhosts"]] == ["dev_vhost"]
    assert list(rabbitmq.removal(wanted)) == []


def test_a_virtual_host_of_somebody_else_is_neither_used_nor_removed(
    broker: type[_Broker], wanted: Definitions
) -> None:
    broker.held["vhosts"].append({"name": "voip", "description": "another stack"})
    with pytest.raises(VoipError, match="has a virtual host voip that this stack has not made"):
        list(rabbitmq.plan(wanted))
    assert list(rabbitmq.removal(wanted)) == []


def test_a_user_of_somebody_else_is_not_taken_over(broker: type[_Broker], wanted: Definitions) -> None:
    broker.held["users"].append({"name": "cdr_reader", "password_hash": "theirs"})
    with pytest.raises(VoipError, match="has a user cdr_reader that this stack has not made"):
        list(make(rabbitmq.plan(wanted)))
    assert [v["name"] for v in broker.held["vhosts"]] == ["dev_vhost"]
    assert list(rabbitmq.removal(wanted)) == []


@pytest.mark.usefixtures("broker")
def test_a_broker_that_lets_nobody_in_or_is_away_is_named(wanted: Definitions, monkeypatch: pytest.MonkeyPatch) -> None:
    login = rabbitmq.administrator()
    monkeypatch.setattr(rabbitmq, "administrator", lambda: Login("RabbitMQ", "127.0.0.1", login.port, "admin", "wrong"))
    with pytest.raises(VoipError, match="refuses admin as an administrator"):
        list(rabbitmq.plan(wanted))
    monkeypatch.setattr(rabbitmq, "administrator", lambda: Login("RabbitMQ", "127.0.0.1", 1, "admin", "pw"))
    with pytest.raises(VmError, match=r"RabbitMQ on devstack-core \(127.0.0.1:1\) can't be reached"):
        list(rabbitmq.plan(wanted))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["13.9\n"], "is version 13.9"),
        (["17.5\n", "database|cdr|\n"], "has a database cdr that this stack has not made"),
        (["17.5\n", "role|kamailio|of the billing\n"], "has a role kamailio that this stack has not made"),
    ],
)
def test_a_postgresql_that_is_too_old_or_holds_somebody_elses_is_left_alone(
    rows: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(rows)
    monkeypatch.setattr(database, "run", lambda _: next(answers))
    monkeypatch.setattr(database, "superuser", lambda: Login("PostgreSQL", "192.0.2.1", 5432, "dev_admin", "pw"))
    with pytest.raises(VoipError, match=message):
        list(database.plan(database.layout(_password)))


@pytest.mark.parametrize(
    ("said", "status", "kind", "message"),
    [
        ("FATAL:  sorry, too many clients already", 2, VmError, "can't be reached"),
        ("ERROR:  permission denied", 3, VoipError, "refused"),
    ],
)
@pytest.mark.usefixtures("chosen")
def test_what_psql_says_is_shown(
    said: str,
    status: int,
    kind: type[VoipError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    psql = tmp_path / "psql"
    psql.write_text(f"#!/bin/sh\ncat >/dev/null\necho '{said}' >&2\nexit {status}\n")
    psql.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(database, "superuser", lambda: Login("PostgreSQL", "192.0.2.1", 5432, "dev_admin", "pw"))

    class Inside:
        def inside(self, *argv: str) -> list[str]:
            return list(argv)

    monkeypatch.setattr(lab, "current", Inside)
    with pytest.raises(kind, match=message) as caught:
        database.run("SELECT 1;")
    assert "192.168.64.77" in caught.value.message
    assert said in caught.value.details


@pytest.fixture
def inner() -> Iterator[Namespace]:
    namespace = Namespace("voip-test-relay")
    namespace.make()
    yield namespace
    namespace.remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_machines_in_the_lab_reach_what_this_computer_publishes(inner: Namespace) -> None:

    class Echo(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"you said " + self.rfile.read())

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = int(server.server_address[1])
    argv = [sys.executable, "-m", "voip_stack.lab.relay", inner.name, "127.0.0.1", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(paths.REPOSITORY / "src")}
    with subprocess.Popen(argv, env=environment) as relay:
        try:

            def listens() -> bool:
                with inner.open_socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            assert Deadline(20).until(listens, every=0.1)
            with inner.open_socket() as client:
                client.settimeout(10)
                client.connect(("127.0.0.1", port))
                client.sendall(b"x" * 300_000)
                client.shutdown(socket.SHUT_WR)
                with client.makefile("rb") as answer:
                    assert answer.read() == b"you said " + b"x" * 300_000
        finally:
            relay.terminate()
            server.shutdown()
            server.server_close()


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_the_lab_opens_a_way_once_and_shuts_it(
    inner: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = inventory.load()
    computer = stock.networks["internal"].computer
    conf = settings.parse("", {"VOIP_CACHE_DIR": str(tmp_path)})
    home = NamespaceLab(conf, dataclasses.replace(stock, devstack=computer))
    monkeypatch.setattr(namespace, "RUN", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(paths.REPOSITORY / "src"))
    monkeypatch.setattr(home, "inner", inner)
    (home.state / "log").mkdir(parents=True)
    inner.ip("address", "add", f"{computer}/32", "dev", "lo")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
        home.let_in(port)
        relay = home._relay(str(port))
        try:
            before = relay.pid
            home.let_in(port)
            assert relay.pid == before
            with home.connect(str(computer), port, 5) as client:
                client.sendall(b"hello")
                while True:  # connections of port checks come first
                    connection, _ = server.accept()
                    with connection:
                        if connection.recv(5) == b"hello":
                            break
        finally:
            relay.stop()
        with pytest.raises(ConnectionRefusedError):
            home.connect(str(computer), port, 5)
