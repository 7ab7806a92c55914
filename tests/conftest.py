"""Fixtures of the full stack's tests. The unit tests use none of them.

Tests of calls run in parallel in several workers, each with its own numbers and phone addresses. Tests marked `alone`
take a part of the stack away, or measure all of it: they run one at a time, with no other test beside them.
"""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from voip_stack import inventory, subscribers, vms
from voip_stack.calls.phone import TONES_HZ, Phone
from voip_stack.host import speed

Ssh = Callable[..., str]

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
NUMBERS = tuple(f"29{WORKER}{n}" for n in (1, 2, 3))
_SECONDS = 20  # time limit of a test on a fast computer, unless its mark allows more


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, help="start no test that would not be done by then, in seconds since 1970")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that don't fit into the time. The reason names the test: pytest's own summary only gives a count."""
    mark = item.get_closest_marker("takes")
    until = item.config.getoption("--until")
    if until and time.time() + (mark.args[0] if mark else _SECONDS) * speed.slowness() > until:
        pytest.skip(f"left, too little time: {item.name}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Figures measured by tests (record_property), at the end of the run."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session")
def stack() -> inventory.Inventory:
    """The inventory; its machines are up (voip_stack.suites has checked)."""
    return inventory.load()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End the run when a machine has died: every later test would wait for it, and fail for that reason alone."""
    report = yield
    if report.failed and "stack" in getattr(item, "fixturenames", ()):
        dead = [s.name for s in vms.status(list(inventory.load().machines.values())) if not s.ssh]
        report.sections += [(f"{name} does not answer", vms.console_end(name, 60)) for name in dead]
        if dead:
            item.session.shouldfail = f"{', '.join(dead)} died during {item.nodeid}"
    return report


@pytest.fixture(scope="session")
def ssh(stack: inventory.Inventory) -> Ssh:
    """ssh(where, *command): the output of a command, run as root on a machine, or on all of a group at once."""

    def run(where: str, *command: str, check: bool = True) -> str:
        def on(machine: inventory.Machine) -> str:
            return vms.ssh.run(machine.name, *command, sudo=True, check=check, timeout=120).stdout

        chosen = stack.select([where])
        with concurrent.futures.ThreadPoolExecutor(len(chosen)) as pool:
            return "".join(pool.map(on, chosen))

    return run


@pytest.fixture
def unlimited(ssh: Ssh) -> Iterator[None]:
    """An account may make any number of calls, also after a restart of the proxy."""
    before = {name: ssh("sip_proxies", "kamcmd", "cfg.get", "limits", name).split()[0] for name in ("calls", "minute")}
    file = "/etc/kamailio/kamailio.cfg"
    ssh("sip_proxies", "sed", "-i.limited", "-E", r"s/^(limits\.(calls|minute) = )[0-9]+/\11000/", file)
    for name in before:
        ssh("sip_proxies", "kamcmd", "cfg.set_now_int", "limits", name, "1000")
    yield
    ssh("sip_proxies", "mv", f"{file}.limited", file)
    for name, value in before.items():
        ssh("sip_proxies", "kamcmd", "cfg.set_now_int", "limits", name, value)


@pytest.fixture(scope="session")
def accounts(stack: inventory.Inventory) -> Iterator[dict[str, str]]:
    """Three subscribers with voicemail boxes, number to password; removed at the end."""
    assert stack.machines
    for number in NUMBERS:
        if number in {s.number for s in subscribers.list_()}:
            subscribers.remove(number)
    yield {number: str(subscribers.add(number).password) for number in NUMBERS}
    for number in NUMBERS:
        subscribers.remove(number)


@pytest.fixture
def phones(accounts: dict[str, str], stack: inventory.Inventory, tmp_path: Path) -> Iterator[list[Phone]]:
    """Three phones outside, registered, each with its own tone."""
    made = [
        Phone(number, password, address, tone_hz=tone, traces=tmp_path)
        for (number, password), address, tone in zip(
            accounts.items(), stack.phones[WORKER * len(NUMBERS) :], TONES_HZ, strict=False
        )
    ]
    assert len(made) == len(NUMBERS), "voip_phones has too few addresses for so many workers"
    for phone in made:
        phone.register()
    yield made
    for phone in made:
        phone.unregister()
