"""The tests of the full stack, which is up: those of calls in parallel, then those marked `alone` one at a time.

`python -m voip_stack.suites [--part core|rest] [--until SECONDS-SINCE-1970] [arguments of pytest]`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from voip_stack import cli, inventory, paths, vms
from voip_stack.errors import VmError
from voip_stack.host import speed

# In this order when time is short.
SUITES = ("integration", "security", "functional", "quality")
_WORKERS = 3  # voip_phones has addresses for three workers; the tests mostly wait
_SECONDS = 1800  # time limit of one test on a fast computer
_OVER = 600  # seconds that a hanging test may run beyond the end
_NO_TESTS = 5  # pytest's exit status when none was selected


def _pytest(name: str, marks: str, workers: int, until: float | None, arguments: list[str]) -> int:
    """Run pytest with the tests of this mark; returns its exit status."""
    seconds = speed.patient(_SECONDS)
    if until:
        seconds = min(seconds, max(until - time.time(), 0) + _OVER)
    command = [sys.executable, "-m", "pytest", "--durations=12", f"--timeout={seconds:.0f}", "-m", marks]
    command += [f"--numprocesses={workers}", f"--junit-xml={paths.REPOSITORY / 'junit' / f'integration-{name}.xml'}"]
    command += [f"--until={until:.0f}"] if until else []
    return subprocess.run([*command, *arguments], cwd=paths.REPOSITORY, env=os.environ, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s integration --", description=__doc__, allow_abbrev=False)
    parser.add_argument("--part", choices=("core", "rest"), help="the tests that always run, or the others")
    parser.add_argument("--until", type=float, help="start no test that would not be done by then")
    parser.add_argument("-m", dest="marks", default="", help="of these tests, those with such marks")
    options, others = parser.parse_known_args()
    down = [state.name for state in vms.status(list(inventory.load().machines.values())) if not state.ssh]
    if down:
        raise VmError(f"not up: {', '.join(down)}", "./voip up")
    part = {"core": "core", "rest": "not core"}.get(options.part, "")
    marks = " and ".join(f"({m})" for m in (part, options.marks) if m)
    arguments = others or [f"tests/{suite}" for suite in SUITES]
    statuses = []
    for name, alone, workers in (("calls", "not alone", _WORKERS), ("alone", "alone", 0)):
        chosen = f"{marks} and {alone}" if marks else alone
        statuses.append(_pytest(f"{options.part or 'all'}-{name}", chosen, workers, options.until, arguments))
    # Either may be empty, but not both: a misspelt name selects no test.
    sys.exit(any(status not in (0, _NO_TESTS) for status in statuses) or set(statuses) == {_NO_TESTS})


if __name__ == "__main__":
    cli.guard(main)
