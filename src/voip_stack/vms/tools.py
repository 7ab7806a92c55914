"""Small programs that make files: qemu-img, xorriso, ssh-keygen."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

from voip_stack.errors import HostError, VmError

TIMEOUT = 120  # seconds; each of them is done in one or two
_FULL = 16 * 1024**2


def run(program: str, *args: str, writes: Path) -> str:
    """The output of `program`, which writes the file `writes`.

    Raises HostError when it is missing, VmError when it fails.
    """
    try:
        done = subprocess.run(
            [program, *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise HostError(f"{program} is missing", "./voip doctor --fix") from None
    except subprocess.TimeoutExpired:
        raise VmError(f"{program} did not end within {TIMEOUT} s", f"is the disk of {writes.parent} working?") from None
    if done.returncode != 0:
        if shutil.disk_usage(writes.parent).free < _FULL:
            raise full(writes.parent)
        raise VmError(f"{program} could not make {writes}", "the lines above say why", done.stderr[-2000:])
    return done.stdout


def full(directory: Path) -> VmError:
    return VmError(f"the disk of {directory} is full", "free some space, e.g. with: ./voip images.prune")


def out_of_space(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
