from functools import partial

import pytest

from voip_stack import settings, subscribers
from voip_stack.errors import VoipError
from voip_stack.services import database


def test_ha1_is_that_of_the_rfc() -> None:
    # RFC 2617, 3.5: the user, realm and password of its example.
    assert subscribers.ha1("Mufasa", "testrealm@host.com", "Circle Of Life") == "939e7578ed9e3c518a452acee763bce9"


def test_a_quote_stays_inside_the_constant() -> None:
    assert database.quoted("x'; DROP TABLE subscriber; --") == "'x''; DROP TABLE subscriber; --'"


@pytest.mark.parametrize("number", ["999", "3000", "", "10a0", "-1000", "1000;", "\u0661\u0660\u0660\u0660"])
def test_only_subscribers_numbers_are_taken(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "run", lambda _script: pytest.fail("it reached the database"))
    for command in (subscribers.add, subscribers.remove, subscribers.passwd, subscribers.set_pin):
        with pytest.raises(VoipError, match="number"):
            command(number)


def test_a_password_never_reaches_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts: list[str] = []

    def run(script: str) -> str:
        scripts.append(script)
        return "[]"

    monkeypatch.setattr(database, "run", run)
    added = subscribers.add("1000", "Circle Of Life")
    assert added.password == "Circle Of Life"
    assert "Circle" not in "".join(scripts)
    assert subscribers.ha1("1000", "sip.local", "Circle Of Life") in "".join(scripts)


def test_the_accounts_of_another_domain_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their HA1 is for their realm. The same number is free in our domain: the table's key is number and domain."""
    scripts: list[str] = []

    def run(script: str) -> str:
        scripts.append(script)
        return '["1000"]'

    monkeypatch.setattr(database, "run", run)
    conf = settings.parse("SIP_DOMAIN=example.org", {})
    monkeypatch.setattr(settings, "load", lambda: conf)
    subscribers.passwd("1000", "x")
    subscribers.remove("1000")
    statements = [line for line in "".join(scripts).splitlines() if "subscriber" in line]
    assert len(statements) == 4  # a list before each of the two
    assert all("domain = 'example.org'" in line for line in statements)


@pytest.mark.parametrize("pin", ["123", "12345678901", "12a4", "", "1000", "\u0661\u0660\u0660\u0661"])
def test_a_pin_that_voicemail_would_not_take_is_refused(pin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "run", lambda _script: pytest.fail("it reached the database"))
    with pytest.raises(VoipError, match="no PIN") as caught:
        subscribers.set_pin("1000", pin)
    assert "4 to 10 digits" in caught.value.hint


def test_the_pin_that_is_shown_is_the_one_in_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts: list[str] = []

    def run(script: str) -> str:
        scripts.append(script)
        return '["1001"]'

    monkeypatch.setattr(database, "run", run)
    for command in (
        partial(subscribers.add, "1000", "x"),
        partial(subscribers.set_pin, "1001"),
        partial(subscribers.set_pin, "1001", "8642"),
    ):
        made = command()
        assert made.pin
        assert f"'{made.pin}'" in scripts[-1]
        assert "voicemail" in scripts[-1]
        assert "\\connect asterisk\n" in scripts[-1]
