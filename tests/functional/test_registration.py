import dataclasses

import pytest

from voip_stack import calls, certificates
from voip_stack.calls.phone import Phone
from voip_stack.calls.sipp import Refused


def _refusal(phone: Phone) -> Refused:
    with pytest.raises(Refused) as caught:
        phone.register()
    return caught.value


def test_a_subscriber_registers_and_unregisters(phones: list[Phone]) -> None:
    phones[0].register(expires=120)
    phones[0].unregister()


def test_a_wrong_password_and_an_unknown_user_get_the_same_answer(phones: list[Phone]) -> None:
    wrong = _refusal(dataclasses.replace(phones[0], password="not-the-password"))
    unknown = _refusal(dataclasses.replace(phones[0], number="2999999", password="not-the-password"))
    assert wrong.status == unknown.status
    assert wrong.response.reason == unknown.response.reason


def test_nobody_registers_for_another_number(phones: list[Phone]) -> None:
    thief = dataclasses.replace(phones[0], number=phones[1].number, login=phones[0].number)
    assert _refusal(thief).status == 403


def test_a_phone_that_trusts_our_ca_registers_and_calls_by_tls(phones: list[Phone]) -> None:
    phone = dataclasses.replace(phones[0], transport="tls", ca=certificates.authority())
    phone.register()
    with calls.Capture() as capture, phone.call("600", seconds=4) as caller:
        caller.finish()
    assert capture.heard_by(phone).tone_hz == pytest.approx(phone.tone_hz, abs=5)
    phone.unregister()
