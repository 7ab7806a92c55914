"""What tests know of the scenario that they run in."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from voip_stack import secrets


class Result(Protocol):
    """How a command on a guest ended."""

    rc: int
    stdout: str
    stderr: str
    stdout_bytes: bytes


class Host(Protocol):
    """What tests ask of a guest: testinfra's Host, whose modules have no types.

    https://testinfra.readthedocs.io/en/latest/modules.html#host
    """

    file: Callable[[str], Any]
    interface: Callable[[str], Any]
    package: Callable[[str], Any]
    sysctl: Callable[[str], Any]

    def run(self, command: str, *args: str) -> Result: ...

    def check_output(self, command: str, *args: str) -> str: ...


Guest = Callable[[str], Host]  # the fixture guest: a guest by its name

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
