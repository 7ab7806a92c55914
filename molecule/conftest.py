"""Fixtures that the tests of all roles share."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import testinfra

from voip_stack.roletest.scenarios import REBOOTED
from voip_stack.vms import ssh

sys.path.insert(0, str(Path(__file__).parent / "shared"))

from guests import NAMES, Guest, Host, inventory_of


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After the reboot, which is an outage itself, leave out the tests that make others: they cost minutes each."""
    if Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], REBOOTED).exists():
        left_out = [item for item in items if item.get_closest_marker("outage")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def guest() -> Iterator[Guest]:
    """guest(name): that host of the scenario, as root.

    By one ssh connection per guest: under emulation a login takes a second, and a command through Ansible several.
    """
    with tempfile.TemporaryDirectory(prefix="molecule-") as sockets:

        @functools.cache
        def connect(name: str) -> Host:
            machine, options = inventory_of(name)["ansible_host"], {"ssh_config": str(ssh.config_path()), "sudo": True}
            connected: Host = testinfra.get_host(f"ssh://{machine}", controlpath=f"{sockets}/{machine}", **options)
            return connected

        yield connect
        for name in NAMES:
            machine = inventory_of(name)["ansible_host"]
            end = ["ssh", "-o", f"ControlPath={sockets}/{machine}", "-O", "exit", machine]
            subprocess.run(end, capture_output=True, check=False)


@pytest.fixture(scope="session")
def host(guest: Guest) -> Host:
    """The guest that the role is tested on: the scenario's first."""
    return guest(NAMES[0])
