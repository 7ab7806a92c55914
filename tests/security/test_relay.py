import dataclasses

import pytest

from voip_stack.calls.phone import Phone
from voip_stack.calls.sipp import Refused

pytestmark = pytest.mark.core


def _call(phone: Phone, to: str) -> int:
    with phone.call(to, seconds=1) as leg, pytest.raises(Refused) as caught:
        leg.finish()
    return caught.value.status


@pytest.mark.parametrize("to", ["alice@example.org", "600@192.0.2.7", "2902@pbx-1.voip.local"])
def test_nobody_is_relayed_to_a_foreign_domain(phones: list[Phone], to: str) -> None:
    assert _call(phones[0], to) in (403, 404)


def test_a_call_without_the_right_password_goes_nowhere(phones: list[Phone]) -> None:
    assert _call(dataclasses.replace(phones[0], password="wrong"), phones[1].number) in (401, 403, 407)


def test_the_caller_is_who_authenticated(phones: list[Phone]) -> None:
    thief = dataclasses.replace(phones[0], number=phones[1].number, login=phones[0].number)
    assert _call(thief, "600") == 403
