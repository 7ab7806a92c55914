"""SIP subscribers of the SIP domain: an account at the proxy and a voicemail box at the PBX, as rows in PostgreSQL."""

from __future__ import annotations

import hashlib
import json
import secrets
import string
from dataclasses import dataclass, field

from voip_stack import components, settings
from voip_stack.errors import VoipError
from voip_stack.services import database

NUMBERS = range(1000, 3000)
_PIN_DIGITS = range(4, 11)
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Subscriber:
    """A subscriber; `password` and the PIN of the voicemail box are known only right after they are set."""

    number: str
    password: str | None = field(default=None, repr=False)
    pin: str | None = field(default=None, repr=False)


def ha1(user: str, realm: str, password: str) -> str:
    """The digest of user, realm and password (RFC 2617, 3.2.2.2)."""
    return hashlib.md5(f"{user}:{realm}:{password}".encode(), usedforsecurity=False).hexdigest()


def _checked(number: str) -> str:
    if not (number.isascii() and number.isdigit() and int(number) in NUMBERS):
        raise VoipError(f"{number!r} is no subscriber's number", f"take one from {NUMBERS[0]} to {NUMBERS[-1]}")
    return number


def _account(number: str, password: str) -> str:
    domain = settings.load().sip_domain
    ha1b = ha1(f"{number}@{domain}", domain, password)
    return ", ".join(database.quoted(v) for v in (number, domain, ha1(number, domain, password), ha1b))


def _is(number: str) -> str:
    return f"username = {database.quoted(number)} AND {_ours()}"


def _ours() -> str:
    """Accounts of another domain stay: their passwords work only there (the realm is in their HA1)."""
    return f"domain = {database.quoted(settings.load().sip_domain)}"


def add(number: str, password: str | None = None) -> Subscriber:
    """Add a subscriber with a voicemail box; the password is generated when none is given.

    Raises VoipError for a number that is out of range or taken, VmError when the database can't be reached.
    """
    _checked(number)
    if number in {s.number for s in list_()}:
        raise VoipError(f"{number} is a subscriber already", f"./voip subscribers.passwd {number}")
    password = password or "".join(secrets.choice(_LETTERS) for _ in range(20))
    pin = _new_pin(number)
    database.run(
        f"\\connect {components.database_of('proxy')}\n"
        f"INSERT INTO subscriber (username, domain, ha1, ha1b) VALUES ({_account(number, password)});\n"
        f"\\connect {components.database_of('pbx')}\n"
        f"INSERT INTO voicemail (mailbox, password) VALUES ({database.quoted(number)}, {database.quoted(pin)})"
        " ON CONFLICT (context, mailbox) DO UPDATE SET password = EXCLUDED.password;\n"
    )
    return Subscriber(number, password, pin)


def remove(number: str) -> None:
    """Remove a subscriber, its registrations and its voicemail box. Raises VoipError for an unknown one."""
    _known(number)
    database.run(
        f"\\connect {components.database_of('proxy')}\n"
        f"DELETE FROM location WHERE username = {database.quoted(number)};\n"
        f"DELETE FROM subscriber WHERE {_is(number)};\n"
        f"\\connect {components.database_of('pbx')}\n"
        f"DELETE FROM voicemail WHERE mailbox = {database.quoted(number)};\n"
    )


def passwd(number: str, password: str | None = None) -> Subscriber:
    """Give a subscriber a new password, generated when none is given. Raises VoipError for an unknown one."""
    _known(number)
    password = password or "".join(secrets.choice(_LETTERS) for _ in range(20))
    database.run(
        f"\\connect {components.database_of('proxy')}\n"
        f"UPDATE subscriber SET (username, domain, ha1, ha1b) = ({_account(number, password)})"
        f" WHERE {_is(number)};\n"
    )
    return Subscriber(number, password)


def set_pin(number: str, pin: str | None = None) -> Subscriber:
    """Give a subscriber's voicemail box a new PIN, generated when none is given.

    Raises VoipError for an unknown subscriber, and for a PIN that voicemail would refuse.
    """
    if pin is not None and (not (pin.isascii() and pin.isdigit() and len(pin) in _PIN_DIGITS) or pin == number):
        raise VoipError(
            "that is no PIN", f"{_PIN_DIGITS[0]} to {_PIN_DIGITS[-1]} digits, and not the subscriber's number"
        )
    _known(number)
    pin = pin or _new_pin(number)
    database.run(
        f"\\connect {components.database_of('pbx')}\n"
        f"UPDATE voicemail SET password = {database.quoted(pin)} WHERE mailbox = {database.quoted(number)};\n"
    )
    return Subscriber(number, pin=pin)


def _new_pin(number: str) -> str:
    while (pin := "".join(secrets.choice(string.digits) for _ in range(6))).startswith(number):
        pass
    return pin


def _known(number: str) -> None:
    if _checked(number) not in {s.number for s in list_()}:
        raise VoipError(f"there is no subscriber {number}", f"./voip subscribers.add {number}")


def list_() -> list[Subscriber]:
    """All subscribers, by number. Raises VmError when the database can't be reached."""
    rows = database.run(
        f"\\connect {components.database_of('proxy')}\n"
        "SELECT coalesce(json_agg(username ORDER BY username), '[]') FROM subscriber"
        f" WHERE {_ours()};\n"
    )
    return [Subscriber(number) for number in json.loads(rows)]
