"""How slow this computer is: one factor for time-outs and for how long a test run will take."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

from voip_stack import files, settings

# Additions per second of each core of a fast computer, all cores at work: 20 million alone take 1.4 s there.
_FAST = 18_000_000
_SECONDS = 0.4  # several periods of a CPU quota
_KEEP = 600  # seconds that a measurement is good for
_LOOP = f"""
import time
begin, done = time.monotonic(), 0
while time.monotonic() - begin < {_SECONDS}:
    for _ in range(10000):
        done += 1
print(done)
"""


def slowness() -> float:
    """How many times slower than a fast one this computer is, with what else runs on it; less than 1: faster.

    VOIP_SLOWNESS, else as it was measured in the last ten minutes, else measured now.
    """
    with _alone():
        if _kept().exists() and time.time() - _kept().stat().st_mtime < _KEEP:
            return settings.load().slowness or float(_kept().read_text())
        return _measure()


def measure() -> float:
    """slowness() as it is now; takes half a second."""
    with _alone():
        return _measure()


def _kept() -> Path:
    """The file with the last measurement."""
    return settings.load().cache_dir / "slowness"


def _alone() -> AbstractContextManager[None]:
    """Two that measure at once would take each other's time."""
    return files.locked(_kept().with_suffix(".lock"))


def _measure() -> float:
    if forced := settings.load().slowness:
        return forced
    # A few: in a container that may use less than it sees, a loop on each would take the others' time.
    cores = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    command = [sys.executable, "-S", "-E", "-c", _LOOP]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(cores)]
    done = sum(int(loop.communicate()[0]) for loop in loops)
    found = _FAST * cores * _SECONDS / done
    files.write(_kept(), f"{found:.3f}")
    return found


def patient(seconds: float) -> float:
    """A time-out that is `seconds` on a fast computer, for this one; never less than that."""
    return seconds * max(1.0, slowness())
