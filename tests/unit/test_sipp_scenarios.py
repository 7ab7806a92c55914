"""The scenarios for a plain SIPp, against a SIPp on loopback that challenges as the proxy does."""

import hashlib
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from voip_stack import paths, settings
from voip_stack.deadline import Deadline

pytestmark = pytest.mark.skipif(not shutil.which("sipp"), reason="sipp is not installed")

SCENARIOS = paths.REPOSITORY / "tests/sipp/scenarios"
HOST, PORT = "127.64.66.10", 15060
REPLY = """
  <send><![CDATA[
      SIP/2.0 {status}
      [last_Via:]
      [last_From:]
      [last_To:];tag=far
      [last_Call-ID:]
      [last_CSeq:]
      {header}
      Content-Length: 0
  ]]></send>"""
CHALLENGE = 'Digest realm="sip.local", nonce="0123", algorithm=MD5, qop="auth"'
RECORD = f"Record-Route: <sip:{HOST}:{PORT};lr;inside>\n      Contact: <sip:600@{HOST}:{PORT};far>"


def reply(status: str, header: str = "X-Nothing: 1") -> str:
    return REPLY.format(status=status, header=header)


REGISTRAR = [
    '<recv request="REGISTER"/>',
    reply("401 Unauthorized", f"WWW-Authenticate: {CHALLENGE}"),
    '<recv request="REGISTER"/>',
]
ECHO = [
    '<recv request="INVITE"/>',
    reply("407 Proxy Authentication Required", f"Proxy-Authenticate: {CHALLENGE}"),
    '<recv request="ACK"/>',
    '<recv request="INVITE" rrs="true"/>',
    reply("100 Trying"),
]
ANSWERED = [reply("200 OK", RECORD), '<recv request="ACK"/><recv request="BYE"/>', reply("200 OK")]
REFUSED = [reply("403 Forbidden")]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """run(scenario, far end, option...): SIPp's exit status, and the far end's received messages."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        argv = ["sipp", *words, "-m", "1", "-nostdin", "-timeout", "30"]
        running.append(subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return running[-1]

    def listens() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((HOST, PORT))
            except OSError:
                return True
        return False

    def run(scenario: str, far: list[str], *options: str) -> tuple[int, str]:
        (tmp_path / "far.xml").write_text(f'<?xml version="1.0"?><scenario name="far">{"".join(far)}</scenario>')
        trace = ["-trace_msg", "-message_file", "far.log"]
        server = start("-sf", "far.xml", "-i", HOST, "-p", str(PORT), *trace)
        Deadline(10).wait(listens, "the far end listens", every=0.05)
        address = ["-i", "127.64.66.101", "-p", "5070"]
        code = start(f"{HOST}:{PORT}", "-sf", str(SCENARIOS / f"{scenario}.xml"), *address, *options).wait(40)
        server.wait(40)
        return code, (tmp_path / "far.log").read_text()

    yield run
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait(5)


def is_signed(received: str, method: str) -> bool:
    """Whether the one request with credentials has those of 1000 with the password `right` (RFC 2617, 3.2.2)."""
    (line,) = re.findall(r"uthorization: Digest (.*)", received)
    said: dict[str, str] = dict(re.findall(r'(\w+)="?([^",]*)', line))

    def md5(*words: str) -> str:
        return hashlib.md5(":".join(words).encode(), usedforsecurity=False).hexdigest()

    a1, a2 = md5("1000", "sip.local", "right"), md5(method, said["uri"])
    good = {"username": "1000", "response": md5(a1, "0123", said["nc"], said["cnonce"], "auth", a2)}
    return good.items() <= said.items()


def test_register_binds_a_number_with_its_password(run: Run) -> None:
    code, received = run("register", [*REGISTRAR, reply("200 OK")], "-s", "1000", "-ap", "right")
    assert code == 0
    assert is_signed(received, "REGISTER")
    assert received.count(f"REGISTER sip:{settings.parse('', {}).sip_domain} SIP/2.0") == 2
    assert "Contact: <sip:1000@127.64.66.101:5070;transport=UDP>;expires=60" in received


@pytest.mark.parametrize(("scenario", "far"), [("register", REGISTRAR), ("uac", ECHO)])
def test_a_refusal_is_a_failure(run: Run, scenario: str, far: list[str]) -> None:
    code, _ = run(scenario, [*far, *REFUSED], "-s", "1000", "-ap", "wrong")
    assert code == 1


@pytest.mark.parametrize("domain", ["", "example.org"])
def test_uac_calls_the_echo_test_acknowledges_and_hangs_up(run: Run, domain: str) -> None:
    options = ["-set", "domain", domain] if domain else []
    code, received = run("uac", [*ECHO, *ANSWERED], "-s", "1000", "-ap", "right", *options)
    assert code == 0
    assert is_signed(received, "INVITE")
    requests = [line.split(" SIP/2.0")[0] for line in received.splitlines() if line.endswith(" SIP/2.0")]
    to = f"sip:600@{domain or settings.parse('', {}).sip_domain}"
    far = f"sip:600@{HOST}:{PORT};far"
    assert requests == [f"INVITE {to}", f"ACK {to}", f"INVITE {to}", f"ACK {far}", f"BYE {far}"]
    assert received.count(f"Route: <sip:{HOST}:{PORT};lr;inside>") >= 2  # of ACK and BYE
