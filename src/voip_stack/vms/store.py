"""A machine's files: `<cache>/vms/NAME/`. What a machine is and does, libvirt knows; here lies what it is made of."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from voip_stack import files, settings
from voip_stack.vms import tools

LOCK_TIMEOUT = 30  # seconds


def root() -> Path:
    return settings.load().cache_dir / "vms"


def directory(name: str) -> Path:
    return root() / name


def console_log(name: str) -> Path:
    return directory(name) / "console.log"


def names() -> list[str]:
    """The machines that have files, whole or half-made."""
    return sorted(d.name for d in root().glob("[!.]*") if d.is_dir())


def remove(name: str) -> bool:
    """Remove all files of machine `name`; whether there were any."""
    there = directory(name).exists()
    if there:
        shutil.rmtree(directory(name))
    return there


def bytes_used(name: str) -> int:
    """Bytes that the machine's own files take, snapshots included, the image under it not."""
    return sum(f.stat().st_blocks * 512 for f in directory(name).rglob("*") if f.is_file())


@contextlib.contextmanager
def locked(name: str, seconds: float | None = None) -> Iterator[None]:
    """One command at a time changes machine `name`.

    Raises BusyError when another does not end within `seconds` (LOCK_TIMEOUT), VmError when the disk is full.
    """
    try:
        with files.locked(root() / f".{name}.lock", LOCK_TIMEOUT if seconds is None else seconds, name):
            yield
    except OSError as error:
        if tools.out_of_space(error):
            raise tools.full(root()) from None
        raise


def console_end(name: str, lines: int = 20) -> str:
    """The last lines of the machine's serial console, with a heading."""
    try:
        with console_log(name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"--- the console of {name} can't be read: {error.strerror}"
    kept = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return "\n".join([f"--- the console of {name} ends with", *kept[-lines:]]) if kept else f"--- {name} wrote nothing"
