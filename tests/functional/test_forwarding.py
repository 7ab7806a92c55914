"""Where a phone sends a call on to, and how a call ends whose phone has vanished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from voip_stack import calls
from voip_stack.calls import probes
from voip_stack.calls.phone import Phone
from voip_stack.calls.sipp import Refused

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


def test_a_phone_can_not_forward_a_stranger_to_what_only_users_may_call(phones: list[Phone], trunk: str) -> None:
    with phones[0].call(trunk, seconds=2) as call:
        call.finish()  # a user may
    with phones[1].forward(trunk) as forwards, phones[0].call(phones[1].number) as call:
        with pytest.raises(Refused):
            call.finish()
        forwards.finish()


def test_a_phone_can_not_forward_a_caller_into_a_voicemail_box(phones: list[Phone]) -> None:
    with phones[1].forward("*97") as forwards, phones[0].call(phones[1].number) as call:
        with pytest.raises(Refused):
            call.finish()
        forwards.finish()


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
