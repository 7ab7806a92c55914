"""What the tests of the proxy share: subscribers, their phones outside, and a PBX that calls."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import Guest, inventory_of

from voip_stack import inventory, settings
from voip_stack import secrets as stored
from voip_stack.calls.phone import Phone
from voip_stack.inventory import Address

STACK = inventory.load()
DOMAIN = settings.load().sip_domain


@pytest.fixture(scope="session")
def sql(guest: Guest) -> Callable[[str], str]:
    """sql(statement): in the proxy's database, as its owner."""
    return lambda statement: guest("peer").check_output(
        "runuser -u postgres -- psql --no-psqlrc -tAqc %s kamailio", statement
    )


@pytest.fixture(scope="session")
def passwords(sql: Callable[[str], str]) -> dict[str, str]:
    """Two subscribers, number to password."""
    made = {number: secrets.token_hex(8) for number in ("1001", "1002")}
    for number, password in made.items():
        ha1 = hashlib.md5(f"{number}:{DOMAIN}:{password}".encode(), usedforsecurity=False).hexdigest()
        sql(
            f"INSERT INTO subscriber (username, domain, ha1) VALUES ('{number}', '{DOMAIN}', '{ha1}')"
            " ON CONFLICT (username, domain) DO UPDATE SET ha1 = EXCLUDED.ha1"
        )
    return made


@pytest.fixture
def phones(passwords: dict[str, str], tmp_path: Path) -> list[Phone]:
    """Two phones outside, the caller and another."""
    return [
        Phone(
            number,
            password,
            address,
            tone_hz=tone,
            traces=tmp_path,
            proxy=Address(inventory_of("kamailio-1")["external_address"]),
            ca=stored.provider().authority(),
        )
        for (number, password), address, tone in zip(passwords.items(), STACK.phones, (440, 1020), strict=False)
    ]


@pytest.fixture
def trunk(tmp_path: Path) -> Phone:
    """pbx-2, which is this computer; at ports of its own: other scenarios may be at work from this address."""
    return Phone(
        "600",
        "",
        STACK.networks["internal"].computer,
        tone_hz=1570,
        traces=tmp_path,
        proxy=Address(inventory_of("kamailio-1")["internal_address"]),
        inside=True,
        sip_port=5070,
        media_port=6070,
    )
