"""Which accelerator runs guests here: decided by booting one.

A device that opens and answers proves nothing: nested virtualization may offer /dev/kvm and kill every guest kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
from collections.abc import Callable
from pathlib import Path

from voip_stack import files, settings
from voip_stack.deadline import Deadline
from voip_stack.errors import HostError
from voip_stack.host.platforms import Platform, current

PROBE_SECONDS = 60  # hardware takes 2 seconds; a busy computer and a slow one get their chance
_MEMORY_MIB = 256
_ALIVE = b"Run /init as init process"  # the kernel's last word before the initrd's first program
_DEAD = (b"KVM internal error", b"Kernel panic")


Answer = tuple[bool, str]  # whether it boots a guest, and the end of the console when it does not


def accelerator(kernel: str, initrd: str) -> str:
    """kvm, hvf or tcg: what VOIP_ACCELERATOR says if that boots `kernel`, else the best that does. Kept for this boot.

    Raises HostError when the one that is forced does not work.
    """
    found = _settle(lambda platform, candidate: _decide(platform, candidate, kernel, initrd))
    assert found  # noqa: S101  # _decide always answers
    return found


def verdict() -> str | None:
    """The accelerator, or None as long as only a boot could tell. Raises HostError as accelerator() does."""
    return _settle(lambda _platform, _candidate: None)


def _settle(decide: Callable[[Platform, str], Answer | None]) -> str | None:
    """The accelerator; `decide` is asked where no probe has answered yet, and None from it is the answer then."""
    forced = settings.load().accelerator
    if forced == "tcg":
        return forced
    platform = current()
    for candidate in platform.accelerators if forced == "auto" else (forced,):
        # What the computer does not offer is not kept: the user may yet be added to the group kvm.
        answer: Answer | None = (False, f"this computer does not offer {candidate} to this user")
        if platform.offers(candidate):
            answer = _load(platform).get(candidate) or decide(platform, candidate)
        if answer is None:
            return None
        works, evidence = answer
        if works:
            return candidate
        if forced != "auto":
            raise HostError(
                f"VOIP_ACCELERATOR={forced}: no guest boots with it here", "use auto or tcg in .env", evidence
            )
    return "tcg"


def probe(
    platform: Platform, candidate: str, kernel: str, initrd: str, seconds: float = PROBE_SECONDS
) -> tuple[bool, str]:
    """Boot `kernel` with `candidate` until it starts its first program: whether it did, and the end of its console."""
    command = [
        *(platform.emulator, "-machine", platform.architecture.machine, "-accel", candidate),
        *("-cpu", "max" if candidate == "tcg" else "host", "-smp", "2", "-m", str(_MEMORY_MIB)),
        *("-kernel", kernel, "-initrd", initrd),
        *("-append", f"console={platform.architecture.console} panic=-1 loglevel=7"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
    ]
    deadline = Deadline(seconds)
    console = b""
    with (
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout  # noqa: S101  # the pipe asked for above
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while not deadline.is_due and _ALIVE not in console and not any(d in console for d in _DEAD):
                if selector.select(deadline.left):
                    chunk = os.read(process.stdout.fileno(), 65536)
                    if not chunk:
                        break
                    console += chunk
        finally:
            process.kill()
    return _ALIVE in console, console.decode(errors="replace")[-1500:]


def _decide(platform: Platform, candidate: str, kernel: str, initrd: str) -> Answer:
    """Probe, and keep the answer."""
    works, evidence = probe(platform, candidate, kernel, initrd)
    known = _load(platform) | {candidate: (works, "" if works else evidence)}
    files.write(_file(), json.dumps({"boot_id": platform.boot_id, "emulator": platform.emulator, "answers": known}))
    return works, evidence


def _load(platform: Platform) -> dict[str, Answer]:
    """What probes since this computer's start have found, with this QEMU."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        state = json.loads(_file().read_text())
        if state["boot_id"] == platform.boot_id and state["emulator"] == platform.emulator:
            return {name: (works, evidence) for name, (works, evidence) in state["answers"].items()}
    return {}


def _file() -> Path:
    return settings.load().cache_dir / "accelerator.json"
