"""Where a phone sends a call on to, and how a call ends whose phone has vanished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from voip_stack import calls
from voip_stack.calls import probes
from voip_stack.calls.phone import Phone
from voip_stack.deadline import Deadline

TRUNK = "0998"  # stands for a number that only a user of this stack may call


@pytest.fixture
def trunk(ssh: Callable[..., str]) -> Iterator[str]:
    """A number beyond the users, as a trunk adds it to the context from-proxy; it answers."""
    for step in (f"{TRUNK},1,Answer", f"{TRUNK},2,Wait(5)"):
        ssh("pbx_servers", "asterisk", "-rx", f"dialplan add extension {step} into from-proxy")
    yield TRUNK
    ssh("pbx_servers", "asterisk", "-rx", f"dialplan remove extension {TRUNK}@from-proxy")


@pytest.mark.takes(30)
def test_a_phone_that_forwards_its_calls_sends_them_to_another_phone(phones: list[Phone]) -> None:
    caller, away, friend = phones
    with (
        calls.Capture(phones=phones) as capture,
        friend.answer() as answers,
        away.forward(friend.number) as forwards,
        caller.call(away.number, seconds=6) as call,
    ):
        call.finish()
        forwards.finish()
        answers.finish()
    assert capture.heard_by(caller).tone_hz == pytest.approx(friend.tone_hz, abs=5)
    assert capture.heard_by(friend).tone_hz == pytest.approx(caller.tone_hz, abs=5)


@pytest.mark.takes(40)
@pytest.mark.parametrize("number", [TRUNK, "*97"])
def test_a_phone_forwards_to_nothing_that_the_caller_did_not_dial(phones: list[Phone], trunk: str, number: str) -> None:
    """A trunk, a voicemail box. The caller gets the voicemail of who is away."""
    caller, away, _ = phones
    assert trunk
    with caller.call(number, seconds=1) as call:
        call.finish()  # whoever dials it reaches it
    assert Deadline(60).until(lambda: bool(probes.cdrs(caller.number, number)), every=1)
    dialled = len(probes.cdrs(caller.number, number))
    known = len(probes.cdrs(caller.number, away.number))
    with away.forward(number) as forwards, caller.call(away.number, seconds=2) as call:
        call.finish()
        forwards.finish()
    assert Deadline(60).until(lambda: len(probes.cdrs(caller.number, away.number)) > known, every=1)
    assert len(probes.cdrs(caller.number, number)) == dialled


@pytest.mark.alone
@pytest.mark.takes(120)
def test_the_call_of_a_phone_that_vanished_ends_within_90_seconds(phones: list[Phone]) -> None:
    before = probes.held()
    with phones[1].answer() as callee, phones[0].call(phones[1].number, seconds=200) as caller:
        caller.wait_for("answered")
        caller.stop()  # no BYE, no more RTP
        vanished = time.monotonic()
        callee.finish()  # the PBX hangs up
    assert time.monotonic() - vanished < 90
    assert probes.released(10, before) == {}
