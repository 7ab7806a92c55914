import re
import time
from collections.abc import Callable

import pytest

from voip_stack import calls
from voip_stack.calls import audio
from voip_stack.calls.phone import Phone
from voip_stack.calls.sipp import Refused
from voip_stack.deadline import Deadline


@pytest.mark.core
def test_a_busy_phone_sounds_busy_to_the_caller(phones: list[Phone]) -> None:
    with phones[1].busy() as callee, phones[0].call(phones[1].number) as caller:
        with pytest.raises(Refused) as caught:
            caller.finish()
        callee.finish()
    assert caught.value.status == 486


@pytest.mark.takes(40)
def test_a_call_that_nobody_answers_goes_to_voicemail(phones: list[Phone], ssh: Callable[..., str]) -> None:
    box = f"/var/spool/asterisk/voicemail/default/{phones[1].number}/INBOX"
    ssh("pbx_servers", "rm", "-rf", box)
    with phones[1].ring() as callee, phones[0].call(phones[1].number, seconds=15) as caller:
        caller.wait_for("answered")
        assert "cancelled" in callee.events, "the callee still rings while voicemail answers"
        caller.finish()
    heard = Deadline(20)
    assert heard.until(lambda: ".txt" in ssh("pbx_servers", "find", box, "-name", "msg*", check=False), every=1)


def test_a_caller_who_gives_up_stops_the_ringing(phones: list[Phone]) -> None:
    with phones[1].ring() as callee, phones[0].cancel(phones[1].number) as caller:
        caller.finish()
        callee.finish()
    assert "cancelled" in callee.events


@pytest.mark.core
def test_the_echo_gives_the_caller_their_own_sound_back(phones: list[Phone]) -> None:
    with calls.Capture(phones=phones) as capture, phones[0].call("600", seconds=6) as caller:
        caller.finish()
    heard = capture.heard_by(phones[0])
    assert heard.tone_hz == pytest.approx(phones[0].tone_hz, abs=5)
    assert heard.level_dbm0 > -30


@pytest.mark.takes(30)
def test_three_in_a_conference_hear_each_other(phones: list[Phone]) -> None:
    with calls.Capture(phones=phones) as capture:
        legs = [phone.call("8000", seconds=14) for phone in phones]
        try:
            for leg in legs:
                leg.finish()
        finally:
            for leg in legs:
                leg.stop()
    for phone in phones:
        others = {other.tone_hz for other in phones} - {phone.tone_hz}
        for tone in others:
            assert capture.level_of(phone, tone) > -35, f"{phone.number} does not hear {tone} Hz"


def test_hold_silences_and_resume_brings_the_sound_back(phones: list[Phone]) -> None:
    with (
        calls.Capture(phones=phones) as capture,
        phones[1].answer() as callee,
        phones[0].hold(phones[1].number) as caller,
    ):
        caller.wait_for("held")
        held = time.time()
        caller.wait_for("resumed")
        resumed = time.time()
        caller.finish()
        callee.finish()
    recording = capture.recording()

    def heard(since: float, until: float) -> float:
        return audio.level(recording.heard(phones[1].address, since, until), phones[0].tone_hz)

    assert heard(held - 2.5, held - 0.5) > -20
    assert heard(held + 1, resumed - 0.5) < -40
    assert heard(resumed + 1, resumed + 3) > -20


def test_the_pbx_hears_every_digit(phones: list[Phone], ssh: Callable[..., str]) -> None:
    name = f"dtmf-{int(time.time())}"
    ssh("pbx_servers", "asterisk", "-rx", f"logger add channel {name} dtmf")
    try:
        with phones[0].dial("600", digits="15937#", seconds=8) as caller:
            caller.finish()
        log = ssh("pbx_servers", "cat", f"/var/log/asterisk/{name}")
    finally:
        ssh("pbx_servers", "asterisk", "-rx", f"logger remove channel {name}")
        ssh("pbx_servers", "rm", "-f", f"/var/log/asterisk/{name}")
    assert "".join(re.findall(r"DTMF end '([0-9*#])' received", log)).startswith("15937#")


def test_a_number_that_nobody_has_is_not_found(phones: list[Phone]) -> None:
    with phones[0].call("5555") as caller, pytest.raises(Refused) as caught:
        caller.finish()
    assert caught.value.status == 404
