import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from voip_stack import calls, lab, secrets, settings
from voip_stack.calls.phone import Phone
from voip_stack.calls.sipp import Refused


def _refusal(phone: Phone) -> Refused:
    with pytest.raises(Refused) as caught:
        phone.register()
    return caught.value


@pytest.mark.core
def test_a_subscriber_registers_and_unregisters(phones: list[Phone]) -> None:
    phones[0].register(expires=120)
    phones[0].unregister()


@pytest.mark.core
def test_a_wrong_password_and_an_unknown_user_get_the_same_answer(phones: list[Phone]) -> None:
    wrong = _refusal(dataclasses.replace(phones[0], password="not-the-password"))
    unknown = _refusal(dataclasses.replace(phones[0], number="2999999", password="not-the-password"))
    assert wrong.status == unknown.status
    assert wrong.response.reason == unknown.response.reason


@pytest.mark.core
def test_nobody_registers_for_another_number(phones: list[Phone]) -> None:
    thief = dataclasses.replace(phones[0], number=phones[1].number, login=phones[0].number)
    assert _refusal(thief).status == 403


@pytest.mark.core
def test_a_phone_that_trusts_our_ca_registers_and_calls_by_tls(phones: list[Phone]) -> None:
    phone = dataclasses.replace(phones[0], transport="tls", ca=secrets.provider().authority())
    phone.register()
    with calls.Capture(phones=phones) as capture, phone.call("600", seconds=4) as caller:
        caller.finish()
    assert capture.heard_by(phone).tone_hz == pytest.approx(phone.tone_hz, abs=5)
    phone.unregister()


def test_a_phone_is_called_by_the_tls_connection_that_it_registered_with(phones: list[Phone], tmp_path: Path) -> None:
    callee, caller = phones[:2]
    callee.unregister()  # removes its other binding
    (tmp_path / "ca.pem").write_text(secrets.provider().authority())
    (tmp_path / "password").write_text(callee.password)
    program = Path(__file__).with_name("tls_phone.py")
    domain = settings.load().sip_domain
    words = [str(callee.proxy), domain, str(tmp_path / "ca.pem"), callee.number, str(tmp_path / "password")]
    with subprocess.Popen(
        lab.current().outside(sys.executable, str(program), *words), stdout=subprocess.PIPE, text=True
    ) as phone:
        try:
            assert phone.stdout
            assert phone.stdout.readline() == "registered\n"
            with caller.call(callee.number) as calling, pytest.raises(Refused) as busy:
                calling.finish()
            assert phone.wait(30) == 0
        finally:
            phone.kill()
    assert busy.value.status == 486
