import contextlib
import dataclasses
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pika import frame, spec

from voip_stack import inventory, secrets, status, vms
from voip_stack.components import Component
from voip_stack.errors import VmError, VoipError

SAID = """== postgresql active
figure 3 events of CDRs wait
figure 9 of 100 connections
== redis failed
== rabbitmq active
figure 12 events wait in the queue cdr
== others
fault logrotate.service has failed
"""


def components(machine: str = "infra-1") -> list[Component]:
    stack = inventory.load()
    return [component for component in stack.components_of(stack.machine(machine)) if component.away]


def parts(said: str) -> dict[str, status.Part]:
    return {p.name: p for p in status._parts(inventory.load().machine("infra-1"), components(), said)}


def test_a_daemon_that_works_shows_what_it_carries() -> None:
    found = parts(SAID)
    assert (found["postgresql"].state, found["postgresql"].faults) == ("active", ())
    assert found["postgresql"].figures == "3 events of CDRs wait, 9 of 100 connections"


def test_a_daemon_that_failed_says_what_calls_lack_and_where_to_look() -> None:
    (fault,) = parts(SAID)["redis"].faults
    assert fault == "redis-server.service is failed: a restart of RTPEngine takes the sound from its calls"
    assert "vms.ssh infra-1" in parts(SAID)["redis"].hint
    assert "redis-server.service" in parts(SAID)["redis"].hint


def test_other_units_that_failed_are_told_too() -> None:
    assert parts(SAID)["others"].faults == ("logrotate.service has failed",)
    assert "others" not in parts(SAID.replace("fault ", ""))


def test_a_machine_is_asked_for_what_it_uses_on_others_and_no_more() -> None:
    used = status._reach(inventory.load().machine("pbx-1"))
    assert "/dev/tcp/192.168.64.40/5432" in used
    assert "/dev/tcp/192.168.64.40/5672" in used
    assert "6379" not in used


@pytest.mark.parametrize("name", ["sip-1", "media-1", "pbx-1", "infra-1"])
def test_what_a_machine_is_asked_is_a_shell_script(name: str) -> None:
    stack = inventory.load()
    machine = stack.machine(name)
    script = status._script(components(name), machine)
    done = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"== {c.name} " in script for c in components(name))


def test_no_machine_at_all_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    off = vms.Status("sip-1", "off", "192.168.64.10", "", 1, 2048, 0, False, None, "current")
    monkeypatch.setattr(vms, "status", lambda machines: [dataclasses.replace(off, name=m.name) for m in machines])
    with pytest.raises(VmError, match="no machine") as caught:
        status.look()
    assert caught.value.hint == "./voip up"


def test_a_machine_that_is_off_is_named_with_the_way_to_start_it() -> None:
    off = vms.Status("media-1", "off", "192.168.64.20", "", 1, 2048, 0, False, None, "current")
    (part,) = status._look(inventory.load().machine("media-1"), off)
    assert part.faults == ("it is off: calls get a 503",)
    assert part.hint == "./voip vms.start media-1"


def test_systemd_that_answers_late_is_no_fault() -> None:
    silent = parts("== redis \n")["redis"]  # systemctl prints no state
    assert (silent.state, silent.faults) == ("unknown", ())


METRICS = b"""# HELP rtpengine_sessions Sessions
rtpengine_sessions{type="own"} 2
rtpengine_sessions{type="foreign"} 7
rtpengine_mediastreams{type="userspace"} 9
rtpengine_mediastreams{type="kernel"} 4
"""


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (METRICS, ["figure 2 sessions", "figure 4 streams in the kernel"]),
        (b"", ["fault its metrics do not answer: 'NoneType' object has no attribute 'group'"]),
        (None, ["figure metrics unknown: no answer within 10 s"]),
    ],
)
def test_rtpengine_is_asked_what_it_carries_and_a_late_answer_is_no_fault(
    tmp_path: Path, page: bytes | None, said: list[str]
) -> None:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if page is None:
                time.sleep(6)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page or b"")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    conf = tmp_path / "rtpengine.conf"
    conf.write_text(f"listen-ng = 127.0.0.1:2223\nlisten-http = 127.0.0.1:{server.server_address[1]}\n")
    script = inventory.load().components["rtpengine"].status
    for old, new in (("timeout 10", "timeout 3"), ("/etc/rtpengine/rtpengine.conf", str(conf))):
        assert old in script
        script = script.replace(old, new)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    server.shutdown()
    assert [line for line in done.stdout.splitlines() if "kernel module" not in line] == said


# RabbitMQ's answers to our methods.
ANSWERS: dict[type, Any] = {
    spec.Connection.StartOk: spec.Connection.Tune(10, 131072, 0),
    spec.Connection.Open: spec.Connection.OpenOk(),
    spec.Channel.Open: spec.Channel.OpenOk(),
    spec.Queue.Declare: spec.Queue.DeclareOk("cdr", 12, 0),
    spec.Channel.Close: spec.Channel.CloseOk(),
    spec.Connection.Close: spec.Connection.CloseOk(),
}


def serve(listener: socket.socket, answers: dict[type, Any]) -> None:
    """RabbitMQ for one client; an answer of None is a connection lost."""
    connection, _ = listener.accept()
    with connection, contextlib.suppress(OSError):
        connection.recv(8)
        connection.sendall(frame.Method(0, spec.Connection.Start(0, 9, {}, "PLAIN", "en_US")).marshal())
        data = b""
        while more := connection.recv(4096):
            data += more
            while (found := frame.decode_frame(data))[1]:
                data = data[found[0] :]
                asked = found[1].method
                assert not isinstance(asked, spec.Queue.Declare) or asked.passive
                if type(asked) in answers:
                    if answers[type(asked)] is None:
                        return
                    connection.sendall(frame.Method(found[1].channel_number, answers[type(asked)]).marshal())


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """ask(answers): status' lines for a RabbitMQ with these answers, within two seconds."""
    (tmp_path / "python3").symlink_to(sys.executable)
    listener = socket.create_server(("127.0.0.1", 0))
    conf = tmp_path / "rabbitmq.conf"
    conf.write_text(f"listeners.tcp.internal = 127.0.0.1:{listener.getsockname()[1]}\n")

    def run(answers: dict[type, Any] | None = None, password: str = "secret") -> list[str]:  # noqa: S107
        if answers is None:
            listener.close()
        else:
            threading.Thread(target=serve, args=(listener, answers), daemon=True).start()
        script = inventory.load().components["rabbitmq"].status
        for old, new in (("timeout 30", "timeout 2"), ("/etc/rabbitmq/rabbitmq.conf", str(conf))):
            assert old in script
            script = script.replace(old, new)
        script = f"read -r rabbitmq_password_cdr_reader\n{script}"
        done = subprocess.run(
            ["sh", "-c", script],
            input=password + "\n",
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        return done.stdout.splitlines()

    yield run
    listener.close()


def test_a_broker_is_asked_how_much_waits_in_the_queue(ask: Callable[..., list[str]]) -> None:
    assert ask(ANSWERS) == ["figure 12 events wait in the queue cdr"]


@pytest.mark.parametrize("late", [*ANSWERS][:4])
def test_a_broker_that_is_slow_to_answer_is_not_degraded(ask: Callable[..., list[str]], late: type) -> None:
    (said,) = ask({method: answer for method, answer in ANSWERS.items() if method is not late})
    assert said == "figure queue cdr unknown: no answer within 30 s"


def test_a_broker_that_gives_a_slow_client_up_is_not_degraded(ask: Callable[..., list[str]]) -> None:
    (said,) = ask(ANSWERS | {spec.Connection.StartOk: None})
    assert said.startswith("figure queue cdr unknown: ")


@pytest.mark.parametrize(
    ("method", "refusal"),
    [
        (spec.Connection.StartOk, spec.Connection.Close(403, "ACCESS_REFUSED - Login was refused", 0, 0)),
        (spec.Connection.Open, spec.Connection.Close(530, "NOT_ALLOWED - vhost voip not found", 10, 40)),
        (spec.Queue.Declare, spec.Channel.Close(404, "NOT_FOUND - no queue 'cdr' in vhost 'voip'", 50, 10)),
    ],
)
def test_a_broker_that_refuses_its_reader_is_degraded(
    ask: Callable[..., list[str]], method: type, refusal: Any
) -> None:
    (said,) = ask(ANSWERS | {method: refusal})
    assert said.startswith("fault it refuses cdr_reader: ")
    assert refusal.reply_text in said


def test_a_broker_that_does_not_listen_is_degraded(ask: Callable[..., list[str]]) -> None:
    assert ask() == ["fault it refuses connections: events of CDRs wait in PostgreSQL"]


def test_without_the_readers_password_a_broker_is_not_degraded(ask: Callable[..., list[str]]) -> None:
    assert ask(password="") == ["figure queue cdr unknown: its reader's password can't be had"]


def test_the_readers_password_goes_to_rabbitmqs_machine_alone_by_standard_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: dict[str, str] = {}

    def run(name: str, *command: str, input: str, sudo: bool) -> subprocess.CompletedProcess[str]:  # noqa: A002
        assert sudo
        assert "q7Kp" not in command[-1]
        told[name] = input
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(vms.ssh, "run", run)
    monkeypatch.setattr(secrets, "get", lambda name: f"q7Kp {name}")
    on = vms.Status("", "running", "192.168.64.10", "", 1, 2048, 0, True, 60.0, "current")
    for machine in inventory.load().machines.values():
        status._look(machine, on)
    assert {name for name, text in told.items() if "q7Kp" in text} == {"infra-1"}

    def sealed(_name: str) -> str:
        raise VoipError("Vault is sealed")

    monkeypatch.setattr(secrets, "get", sealed)
    status._look(inventory.load().machine("infra-1"), on)
    assert told["infra-1"] == "\n"
