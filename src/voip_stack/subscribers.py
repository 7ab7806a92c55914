"""SIP subscribers: an account at the proxy and a voicemail box at the PBX, as rows in PostgreSQL on infra-1."""

from __future__ import annotations

import hashlib
import json
import secrets
import string
import subprocess
from dataclasses import dataclass, field

from voip_stack import inventory, vms
from voip_stack.errors import VmError, VoipError

NUMBERS = range(1000, 3000)
_LETTERS = string.ascii_letters + string.digits
_SECONDS = 60  # for one ssh with one transaction


@dataclass(frozen=True)
class Subscriber:
    """A subscriber; `password` is known only where it has just been set."""

    number: str
    password: str | None = field(default=None, repr=False)


def ha1(user: str, realm: str, password: str) -> str:
    """The digest of user, realm and password (RFC 2617, 3.2.2.2)."""
    return hashlib.md5(f"{user}:{realm}:{password}".encode(), usedforsecurity=False).hexdigest()


def quoted(text: str) -> str:
    """`text` as an SQL string constant (PostgreSQL, 4.1.2.1); a NUL can't be in one."""
    return "'" + text.replace("\0", "").replace("'", "''") + "'"


def _checked(number: str) -> str:
    if not (number.isascii() and number.isdigit() and int(number) in NUMBERS):
        raise VoipError(f"{number!r} is no subscriber's number", f"take one from {NUMBERS[0]} to {NUMBERS[-1]}")
    return number


def _sql(script: str) -> str:
    """The output of an SQL script on the database server; by standard input, where no process list shows it."""
    servers = inventory.load().group("infra")
    if not servers:
        raise VoipError("the inventory has no machine in the group infra", "see ansible/inventory/hosts.yml")
    psql = ["sudo", "-u", "postgres", "psql", "--no-psqlrc", "--quiet", "--no-align", "--tuples-only"]
    argv = vms.ssh_argv(servers[0].name, *psql, "--set=ON_ERROR_STOP=1")
    try:
        done = subprocess.run(argv, input=script, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise VmError(f"{servers[0].name} does not answer within {_SECONDS} s", "./voip vms.status") from None
    if done.returncode == 255:  # ssh's own
        raise VmError(f"{servers[0].name} can't be reached", "./voip vms.status", done.stderr)
    if done.returncode != 0:
        raise VoipError(f"PostgreSQL on {servers[0].name} refused", "./voip provision --limit infra-1", done.stderr)
    return done.stdout


def _account(number: str, password: str) -> str:
    domain = inventory.load().domain
    ha1b = ha1(f"{number}@{domain}", domain, password)
    return ", ".join(quoted(v) for v in (number, domain, ha1(number, domain, password), ha1b))


def add(number: str, password: str | None = None) -> Subscriber:
    """Add a subscriber with a voicemail box; the password is generated when none is given.

    Raises VoipError for a number that is out of range or taken, VmError when the database can't be reached.
    """
    _checked(number)
    if number in {s.number for s in list_()}:
        raise VoipError(f"{number} is a subscriber already", f"./voip subscribers.passwd {number}")
    password = password or "".join(secrets.choice(_LETTERS) for _ in range(20))
    pin = "".join(secrets.choice(string.digits) for _ in range(6))
    _sql(
        "\\connect kamailio\n"
        f"INSERT INTO subscriber (username, domain, ha1, ha1b) VALUES ({_account(number, password)});\n"
        "\\connect asterisk\n"
        f"INSERT INTO voicemail (mailbox, password) VALUES ({quoted(number)}, {quoted(pin)}) ON CONFLICT DO NOTHING;\n"
    )
    return Subscriber(number, password)


def remove(number: str) -> None:
    """Remove a subscriber, its registrations and its voicemail box. Raises VoipError for one that is not there."""
    _known(number)
    _sql(
        "\\connect kamailio\n"
        f"DELETE FROM location WHERE username = {quoted(number)};\n"
        f"DELETE FROM subscriber WHERE username = {quoted(number)};\n"
        "\\connect asterisk\n"
        f"DELETE FROM voicemail WHERE mailbox = {quoted(number)};\n"
    )


def passwd(number: str, password: str | None = None) -> Subscriber:
    """Give a subscriber a new password, generated when none is given. Raises VoipError for one that is not there."""
    _known(number)
    password = password or "".join(secrets.choice(_LETTERS) for _ in range(20))
    _sql(
        "\\connect kamailio\n"
        f"UPDATE subscriber SET (username, domain, ha1, ha1b) = ({_account(number, password)})"
        f" WHERE username = {quoted(number)};\n"
    )
    return Subscriber(number, password)


def _known(number: str) -> None:
    if _checked(number) not in {s.number for s in list_()}:
        raise VoipError(f"there is no subscriber {number}", f"./voip subscribers.add {number}")


def list_() -> list[Subscriber]:
    """All subscribers, by number. Raises VmError when the database can't be reached."""
    rows = _sql("\\connect kamailio\nSELECT coalesce(json_agg(username ORDER BY username), '[]') FROM subscriber;\n")
    return [Subscriber(number) for number in json.loads(rows)]
