"""How slow this computer is: one factor for time-outs and for how long a test run will take."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

from voip_stack import settings

# Additions per second of each core of a fast computer, all cores at work: 20 million alone take 1.4 s there.
_FAST = 18_000_000
_SECONDS = 0.4  # several periods of a CPU quota
_LOOP = f"""
import time
begin, done = time.monotonic(), 0
while time.monotonic() - begin < {_SECONDS}:
    for _ in range(10000):
        done += 1
print(done)
"""


@functools.cache
def slowness() -> float:
    """How many times slower than a fast one this computer is now, with what else runs on it; less than 1: faster.

    VOIP_SLOWNESS, or measured for half a second on all cores.
    """
    return settings.load().slowness or measure()


def measure() -> float:
    """slowness() as it is now."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loops = [
        subprocess.Popen([sys.executable, "-S", "-E", "-c", _LOOP], stdout=subprocess.PIPE, text=True)
        for _ in range(cores)
    ]
    done = sum(int(loop.communicate()[0]) for loop in loops)
    return _FAST * cores * _SECONDS / done


def patient(seconds: float) -> float:
    """A time-out that is `seconds` on a fast computer, for this one; never less than that."""
    return seconds * max(1.0, slowness())
