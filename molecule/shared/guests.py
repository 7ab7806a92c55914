"""What tests know of the scenario that they run in."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from voip_stack import secrets

INVENTORY = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], "inventory")


@functools.cache
def _hosts() -> dict[str, dict[str, Any]]:
    return dict(json.loads((INVENTORY / "guests.json").read_text())["all"]["hosts"])


NAMES = list(_hosts())  # in the order of hosts.yml


def inventory_of(name: str) -> dict[str, Any]:
    """The variables of a guest: addresses, and how it is reached."""
    return _hosts()[name]


def secret(name: str) -> str:
    """A secret as the roles got it."""
    return secrets.get(name)
