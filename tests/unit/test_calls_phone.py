"""Phones against phones over loopback: real SIPp, no machine between them."""

import re
import shutil
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from voip_stack import calls, lab
from voip_stack.calls import sipp
from voip_stack.errors import CallError

pytestmark = pytest.mark.skipif(not shutil.which("sipp"), reason="sipp is not installed")

CHALLENGE = """
  <recv request="INVITE"/>
  <send><![CDATA[
      SIP/2.0 407 Proxy Authentication Required
      [last_Via:]
      [last_From:]
      [last_To:];tag=challenge
      [last_Call-ID:]
      [last_CSeq:]
      Proxy-Authenticate: Digest realm="sip.local", nonce="0123", algorithm=MD5, qop="auth"
      Content-Length: 0
  ]]></send>
  <recv request="ACK"/>
  <recv request="INVITE" rrs="true"/>
"""
REGISTRAR = """<?xml version="1.0" encoding="UTF-8"?>
<scenario name="registrar">
  <recv request="REGISTER"/>
  <send><![CDATA[
      SIP/2.0 401 Unauthorized
      [last_Via:]
      [last_From:]
      [last_To:];tag=challenge
      [last_Call-ID:]
      [last_CSeq:]
      WWW-Authenticate: Digest realm="sip.local", nonce="0123", algorithm=MD5, qop="auth"
      Content-Length: 0
  ]]></send>
  <recv request="REGISTER">
    <action>
      <log message="answered"/>
      <verifyauth assign_to="good" username="2999" password="right"/>
    </action>
  </recv>
  <nop test="good" next="good"/>
  <send next="end"><![CDATA[
      SIP/2.0 401 Unauthorized
      [last_Via:]
      [last_From:]
      [last_To:];tag=challenge
      [last_Call-ID:]
      [last_CSeq:]
      WWW-Authenticate: Digest realm="sip.local", nonce="0124", algorithm=MD5, qop="auth"
      Content-Length: 0
  ]]></send>
  <label id="good"/>
  <send><![CDATA[
      SIP/2.0 200 OK
      [last_Via:]
      [last_From:]
      [last_To:];tag=challenge
      [last_Call-ID:]
      [last_CSeq:]
      Content-Length: 0
  ]]></send>
  <label id="end"/>
</scenario>
"""


class Here:
    """A lab without namespaces."""

    def outside(self, *argv: str) -> list[str]:
        return list(argv)

    inside = outside


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Phones on loopback; answering ones challenge first, as the proxy would."""
    monkeypatch.setattr(lab, "current", Here)
    copies = tmp_path / "scenarios"
    shutil.copytree(sipp.SCENARIOS, copies)
    for file in copies.glob("uas_*.xml"):
        text, changes = re.subn(r'\s*<recv request="INVITE"( rrs="true")?/>', CHALLENGE, file.read_text(), count=1)
        assert changes == 1
        file.write_text(text)
    (copies / "registrar.xml").write_text(REGISTRAR)
    monkeypatch.setattr(sipp, "SCENARIOS", copies)


@pytest.fixture
def phones(tmp_path: Path) -> tuple[calls.Phone, calls.Phone]:
    """Two phones; the first has the second as its proxy."""
    near, far = IPv4Address("127.64.65.101"), IPv4Address("127.64.65.102")
    return (
        calls.Phone("2998", "right", near, traces=tmp_path, proxy=far),
        calls.Phone("2999", "right", far, tone_hz=1020, traces=tmp_path, proxy=near),
    )


def registrar(phone: calls.Phone) -> calls.Leg:
    return phone._listen("registrar", "answered", lifetime=20)


def test_a_phone_registers_with_its_password(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, b = phones
    with registrar(b):
        calls.Phone("2999", "right", a.address, traces=a.traces, proxy=b.address).register()


def test_a_wrong_password_is_a_refusal_with_its_status(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, b = phones
    with registrar(b), pytest.raises(calls.Refused) as caught:
        calls.Phone("2999", "wrong", a.address, traces=a.traces, proxy=b.address).register()
    assert caught.value.status == 401
    assert caught.value.message == "2999 -> 127.64.65.102: 401 Unauthorized to REGISTER"
    assert "right" not in str(caught.value.details)


def test_the_caller_hangs_up(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, b = phones
    with b.answer(ring=0.2) as callee, a.call("2999", seconds=1) as caller:
        caller.wait_for("answered")
        caller.finish()
        callee.finish()
    assert caller.events == ["ringing", "answered"]
    assert callee.events == ["ringing", "answered", "hung up by the far end"]
    invite = next(m.message for m in reversed(callee.messages) if m.message.method == "INVITE")
    assert not (caller.directory / "fields.csv").exists()
    assert invite


def test_the_callee_hangs_up(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, b = phones
    with b.answer(ring=0.2, seconds=0.5) as callee, a.call("2999", seconds=20) as caller:
        callee.finish()
        caller.finish()
    assert "hung up by the far end" in caller.events


def test_a_quiet_call_lasts_until_the_far_end_hangs_up(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, b = phones
    with b.answer(ring=0, seconds=3) as callee, a.stay("2999", seconds=20) as caller:
        callee.finish()
        caller.finish()
    assert caller.events == ["ringing", "answered", "silent", "hung up by the far end"]


def test_hold_is_answered_recvonly_and_resumed(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, b = phones
    with b.answer(ring=0) as callee, a.hold("2999", seconds=0.5) as caller:
        caller.finish()
        callee.finish()
    directions = re.findall(r"a=(sendrecv|sendonly|recvonly)", "".join(m.message.text for m in callee.messages))
    assert directions[-4:] == ["sendonly", "recvonly", "sendrecv", "sendrecv"]


def test_digits_are_sent_as_telephone_events(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, b = phones
    with b.answer(ring=0), a.dial("2999", "12#", seconds=2) as caller:
        caller.finish()


def test_a_busy_callee_is_a_refusal(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, b = phones
    with b.busy() as callee, a.call("2999") as caller:
        with pytest.raises(calls.Refused) as caught:
            caller.wait_for("answered")
        callee.finish()
    assert caught.value.status == 486


def test_a_caller_gives_up(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, b = phones
    with b.ring() as callee, a.cancel("2999", seconds=0.2) as caller:
        caller.finish()
        callee.finish()
    assert callee.events == ["ringing", "cancelled"]


def test_silence_is_named_with_its_leg(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, _ = phones
    with a.call("2999") as caller:
        with pytest.raises(CallError, match="not answered within 1 s"):
            caller.wait_for("answered", timeout=1)
        caller.stop()
        with pytest.raises(CallError, match="2998 -> 127.64.65.102: no answer to INVITE"):
            caller.finish()


def test_many_calls_are_one_leg(phones: tuple[calls.Phone, calls.Phone]) -> None:
    a, b = phones
    with b._run("uas_answer", "answered", phase=0, talk=30, lifetime=60, count=5) as callee:
        callee.wait_until_listening()
        with a.call("2999", seconds=0.5, count=5, at_once=3) as caller:
            caller.wait()
        callee.wait()
    assert caller.events.count("answered") == 5
    assert caller.returncode == 0
