"""How slow this computer is: one factor for time-outs and for how long a test run will take."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from voip_stack import settings

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
    if forced := settings.load().slowness:
        return forced
    with _kept() as file:
        text = file.read()
        if text and time.time() - os.fstat(file.fileno()).st_mtime < _KEEP:
            return float(text)
        return _measure(file)


def measure() -> float:
    """slowness() as it is now; takes half a second."""
    with _kept() as file:
        return settings.load().slowness or _measure(file)


@contextlib.contextmanager
def _kept() -> Iterator[TextIO]:
    """The file with the last measurement, locked: two that measure at once would take each other's time."""
    path = settings.load().cache_dir / "slowness"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


def _measure(file: TextIO) -> float:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command = [sys.executable, "-S", "-E", "-c", _LOOP]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(cores)]
    done = sum(int(loop.communicate()[0]) for loop in loops)
    found = _FAST * cores * _SECONDS / done
    file.truncate(0)
    file.write(f"{found:.3f}")
    return found


def patient(seconds: float) -> float:
    """A time-out that is `seconds` on a fast computer, for this one; never less than that."""
    return seconds * max(1.0, slowness())
