"""The PBX answers its proxy and nobody else: calls with sound, AMI, ARI, and a CDR of each call in the spool."""

from __future__ import annotations

import base64
import csv
import dataclasses
import http.client
import json
import re
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import Guest, Host, inventory_of, secret

from voip_stack import calls, inventory, lab, settings
from voip_stack.calls.phone import Phone
from voip_stack.calls.sip import Message
from voip_stack.calls.sipp import Refused
from voip_stack.deadline import Deadline
from voip_stack.inventory import Address

STACK = inventory.load()
PBX = Address(inventory_of("asterisk-1")["internal_address"])
RTP_PORTS = next(s.ports for s in STACK.services if s.name == "pbx-rtp")
COMPUTER = STACK.networks["internal"].computer
Cdrs = Callable[[str], list[dict[str, str]]]

# One request over UDP, and the first line of what comes back; for guests that have nothing but Python.
ASK = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.settimeout(8)
    s.connect((sys.argv[1], 5060))
    s.send(sys.argv[2].replace("LOCAL", "%s:%s" % s.getsockname()).encode())
    print(s.recv(4096).decode().splitlines()[0])
"""


def test_whoever_logs_in_has_the_console(host: Host) -> None:
    path = "PATH=/usr/local/bin:/usr/bin:/bin"  # as sshd gives it
    assert host.check_output(f"runuser -u {STACK.user} -- env {path} asterisk -rx 'core show uptime'")


def request(method: str, user: str = "") -> str:
    to = f"sip:{user}@{PBX}" if user else f"sip:{PBX}"
    tag = uuid.uuid4().hex
    lines = [
        f"{method} {to} SIP/2.0",
        f"Via: SIP/2.0/UDP LOCAL;branch=z9hG4bK{tag};rport",
        f"From: <sip:1001@{settings.load().sip_domain}>;tag={tag}",
        f"To: <{to}>",
        f"Call-ID: {tag}",
        f"CSeq: 1 {method}",
        "Contact: <sip:1001@LOCAL>",
        "Max-Forwards: 70",
        "Content-Length: 0",
    ]
    return "\r\n".join([*lines, "", ""])


@pytest.fixture
def proxy(tmp_path: Path) -> Phone:
    """At ports of its own: other scenarios may be at work from this address."""
    return Phone("1001", "", COMPUTER, traces=tmp_path, proxy=PBX, inside=True, sip_port=5080, media_port=6080)


@pytest.fixture(scope="session")
def cdrs(host: Host) -> Cdrs:
    """cdrs(number): the records of calls to it, as they stand in the spool, with the names of its columns."""
    fields = host.check_output("sed -n 's/^fields = //p' /etc/asterisk/cdr_custom.conf")
    names = re.sub(r"\(.*?\)", "", fields).split(",")

    def read(number: str) -> list[dict[str, str]]:
        spool = host.file("/var/log/asterisk/cdr-custom/cdr.csv")
        lines = spool.content_string.splitlines() if spool.exists else []  # the first call makes it
        return [row for row in csv.DictReader(lines, names, strict=True) if row["dst"] == number]

    return read


def test_options_from_the_proxy_are_answered() -> None:
    with lab.current().open_socket(socket.SOCK_DGRAM) as client:
        client.settimeout(8)
        client.connect((str(PBX), 5060))
        client.send(request("OPTIONS").replace("LOCAL", "{}:{}".format(*client.getsockname())).encode())
        answer = Message(client.recv(4096).decode())
    assert answer.status == 200
    assert "INVITE" in answer.header("Allow")


def test_a_stranger_is_challenged(guest: Guest) -> None:
    answer = guest("peer").check_output("python3 -c %s %s %s", ASK, str(PBX), request("INVITE", "600"))
    assert answer == "SIP/2.0 401 Unauthorized"


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_the_echo_sends_the_callers_sound_back_and_a_cdr_tells(proxy: Phone, cdrs: Cdrs, transport: str) -> None:
    before = len(cdrs("600"))
    caller = dataclasses.replace(proxy, transport=transport)
    with calls.Capture() as capture, caller.call("600", seconds=4) as leg:
        leg.finish()
    heard = capture.heard_by(caller)
    assert heard.tone_hz == pytest.approx(caller.tone_hz, abs=5)
    assert heard.level_dbm0 > -30
    assert all(s.source_port in RTP_PORTS for s in capture.recording().streams_to(caller.address))
    assert Deadline(60).until(lambda: len(cdrs("600")) > before, every=1)
    cdr = cdrs("600")[-1]
    assert cdr["disposition"] == "ANSWERED"
    assert 3 <= int(cdr["billsec"]) <= 6
    assert float(cdr["end"]) - float(cdr["answer"]) == pytest.approx(int(cdr["billsec"]), abs=1)
    assert float(cdr["end"]) == pytest.approx(time.time(), abs=90)


def test_a_callers_name_does_not_break_the_line_of_a_cdr(proxy: Phone, cdrs: Cdrs) -> None:
    with proxy.call("698") as leg:
        leg.finish()
    assert Deadline(60).until(lambda: bool(cdrs("698")), every=1)
    assert cdrs("698")[-1]["clid"] == '"Ann \\"the, boss\\"" <1001>'


@pytest.mark.parametrize(("number", "status"), [("5555", 404), ("699", 403)])
def test_the_dialplan_refuses(proxy: Phone, number: str, status: int) -> None:
    """A number that nobody has; and what asterisk_dialplan_extra says."""
    with proxy.call(number) as leg, pytest.raises(Refused) as caught:
        leg.finish()
    assert caught.value.status == status


def test_the_codecs_are_those_of_the_variables(host: Host) -> None:
    assert "(alaw|g722)" in host.check_output("asterisk -rx 'pjsip show endpoint proxy'")


def test_realtime_reads_endpoints_from_the_database(guest: Guest, host: Host) -> None:
    insert = "INSERT INTO ps_endpoints (id, context) VALUES ('trunk-9', 'from-proxy') ON CONFLICT DO NOTHING"
    guest("peer").check_output("runuser -u postgres -- psql --no-psqlrc -q -c %s asterisk", insert)
    assert "trunk-9" in host.check_output("asterisk -rx 'pjsip show endpoint trunk-9'")


class Manager:
    """A connection to AMI: actions and their answers."""

    def __init__(self) -> None:
        self.file = lab.current().connect(str(PBX), 5038, timeout=15).makefile("rw", newline="\r\n")
        assert self.file.readline().startswith("Asterisk Call Manager")

    def ask(self, action: str, **values: str) -> dict[str, str]:
        lines = [f"Action: {action}", f"ActionID: {action}", *(f"{k}: {v}" for k, v in values.items()), "", ""]
        self.file.write("\n".join(lines))
        self.file.flush()
        while True:  # events come in between
            answer = dict(
                line.split(": ", 1) for line in iter(lambda: self.file.readline().strip(), "") if ": " in line
            )
            if answer.get("ActionID") == action:
                return answer


def test_ami_lets_the_right_secret_in_and_shows_calls() -> None:
    manager = Manager()
    assert manager.ask("Login", Username="voip", Secret=secret("asterisk_ami_secret"))["Response"] == "Success"
    assert manager.ask("CoreShowChannels")["Response"] == "Success"
    refused = manager.ask("Command", Command="core show version")
    assert refused["Response"] == "Error"
    assert refused["Message"] == "Permission denied"


def test_ami_refuses_a_wrong_secret() -> None:
    answer = Manager().ask("Login", Username="voip", Secret="wrong")
    assert answer["Response"] == "Error"
    assert answer["Message"] == "Authentication failed"


def ari(password: str) -> tuple[int, bytes]:
    http_ = http.client.HTTPConnection(str(PBX), 8088)
    http_.sock = lab.current().connect(str(PBX), 8088, timeout=15)
    login = base64.b64encode(f"voip:{password}".encode()).decode()
    http_.request("GET", "/ari/asterisk/info", headers={"Authorization": f"Basic {login}"})
    response = http_.getresponse()
    return response.status, response.read()


def test_ari_lets_the_right_password_in() -> None:
    status, body = ari(secret("asterisk_ari_password"))
    assert status == 200
    assert json.loads(body)["system"]["version"].startswith("22.")


def test_ari_refuses_a_wrong_password() -> None:
    assert ari("wrong")[0] == 401


def test_admins_come_from_this_computer_only(guest: Guest) -> None:
    login = f"Action: Login\r\nUsername: voip\r\nSecret: {secret('asterisk_ami_secret')}\r\n\r\n"
    script = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5038), timeout=15) as s:
    s.send(sys.argv[2].encode())
    s.settimeout(8)
    text = b""
    while b"Response" not in text and (more := s.recv(4096)):
        text += more
    print(text.decode())
"""
    answer = guest("peer").check_output("python3 -c %s %s %s", script, str(PBX), login)
    assert "Response: Error" in answer


@pytest.mark.outage
def test_without_the_database_there_are_calls_and_their_cdrs(guest: Guest, proxy: Phone, cdrs: Cdrs) -> None:
    before = len(cdrs("600"))
    guest("peer").check_output("systemctl stop postgresql@17-main")
    try:
        with proxy.call("600", seconds=1) as leg:
            leg.finish()
        assert Deadline(60).until(lambda: len(cdrs("600")) > before, every=1)
    finally:
        guest("peer").check_output("systemctl start postgresql@17-main")


def test_nothing_listens_on_the_external_network(host: Host) -> None:
    found = {line.split()[4] for line in host.check_output("ss -Hlntup | grep asterisk").splitlines()}
    fixed = {local for local in found if not 32768 <= int(local.rpartition(":")[2]) <= 60999}
    assert fixed == {f"{PBX}:5060", f"{PBX}:5038", f"{PBX}:8088"}
