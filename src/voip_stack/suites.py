"""The tests of the full stack, which is up: first those of calls side by side, then those that want it for themselves.

`python -m voip_stack.suites [--part core|rest] [--until SECONDS-SINCE-1970] [what pytest takes]`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from voip_stack import cli, paths
from voip_stack.host import speed

# In this order where time is short.
SUITES = ("integration", "security", "functional", "quality")
_WORKERS = 3  # voip_phones has addresses for so many; the tests mostly wait
_SECONDS = 1800  # for one test on a fast computer
_NO_TESTS = 5  # pytest's exit status when none was selected


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s integration --", description=__doc__, allow_abbrev=False)
    parser.add_argument("--part", choices=("core", "rest"), help="what is always run, or all that is not")
    parser.add_argument("--until", help="start no test that would not be done by then")
    options, others = parser.parse_known_args()
    part = {"core": "core and ", "rest": "not core and "}.get(options.part, "")
    arguments = others or [f"tests/{suite}" for suite in SUITES]
    arguments += [f"--until={options.until}"] if options.until else []
    junit = paths.REPOSITORY / "junit"
    junit.mkdir(exist_ok=True)
    failed = False
    for name, marks, workers in (("calls", f"{part}not alone", _WORKERS), ("alone", f"{part}alone", 0)):
        command = [sys.executable, "-m", "pytest", "--durations=12", f"--timeout={speed.patient(_SECONDS):.0f}"]
        command += [f"--numprocesses={workers}", "-m", marks, f"--junit-xml={junit / f'integration-{name}.xml'}"]
        done = subprocess.run([*command, *arguments], cwd=paths.REPOSITORY, env=os.environ, check=False)
        failed |= done.returncode not in (0, _NO_TESTS)
    sys.exit(failed)


if __name__ == "__main__":
    cli.guard(main)
