"""Files that are there whole or not at all, and locks that a killed process lets go of."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from voip_stack.deadline import Deadline
from voip_stack.errors import VoipError


class BusyError(VoipError):
    """Another command has the lock."""


def write(path: Path, content: str | bytes, mode: int = 0o600) -> None:
    """Write `path` whole or not at all, and make its directory. Until then readers see the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as new:
        try:
            new.write(content.encode() if isinstance(content, str) else content)
            new.flush()
            Path(new.name).chmod(mode)
            Path(new.name).replace(path)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def locked(path: Path, seconds: float | None = None, what: str = "") -> Iterator[None]:
    """One process, and one thread of it, at a time holds the lock file `path`; it is made, and left behind.

    Others wait for it, `seconds` at most when that is given; then BusyError says that somebody is at work on `what`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if seconds is None:
            fcntl.flock(file, fcntl.LOCK_EX)
        elif not Deadline(seconds).until(lambda: _try(file.fileno())):
            raise BusyError(f"another command is at work on {what or path.name}", "wait for it to end, or stop it")
        yield


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_new(path: Path, content: str) -> None:
    """Write `path`, mode 0600, unless somebody else has meanwhile: then theirs stays."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.") as new:
        new.write(content)
        new.flush()
        with contextlib.suppress(FileExistsError):
            os.link(new.name, path)
