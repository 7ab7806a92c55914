"""The virtual machines: all of them, or those named: `./voip vms.stop sip-1 pbx-1`."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from voip_stack import inventory, lab, ui, vms
from voip_stack.errors import VmError
from voip_stack.inventory import Machine
from voip_stack.secrets import vault

_NAMES = "machines or groups, comma-separated; all when left out"


def _chosen(names: str) -> list[Machine]:
    return inventory.load().select([n for n in names.split(",") if n])


def _dry(c: Context, what: str, machines: Sequence[Machine]) -> bool:
    if c.config.run.dry:
        ui.say(f"would {what}: {', '.join(m.name for m in machines)}")
    return bool(c.config.run.dry)


@task(positional=[], help={"names": _NAMES, "recreate": "make machines with an old image again"})
def create(c: Context, names: str = "", recreate: bool = False) -> None:
    """Make and start machines, and wait until they are ready; existing ones are left."""
    if not _dry(c, "create", _chosen(names)):
        vms.create(_chosen(names), ui.teller(), recreate=recreate, then=vault.reopen)


@task(positional=[], help={"names": _NAMES})
def start(c: Context, names: str = "") -> None:
    """Start machines and wait until they are ready."""
    if not _dry(c, "start", _chosen(names)):
        vms.start(_chosen(names), ui.teller(), then=vault.reopen)


@task(positional=[], help={"names": _NAMES})
def stop(c: Context, names: str = "") -> None:
    """Shut machines down."""
    if not _dry(c, "stop", _chosen(names)):
        vms.stop(_chosen(names), ui.teller())


@task(positional=[], help={"names": _NAMES})
def destroy(c: Context, names: str = "") -> None:
    """Remove machines with their disks and snapshots; images stay cached."""
    if not _dry(c, "destroy", _chosen(names)):
        vms.destroy([m.name for m in _chosen(names)], ui.teller())


def _uptime(seconds: float | None) -> str:
    if seconds is None:
        return ""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


@task(positional=[], help={"names": _NAMES, "json": "print JSON"})
def status(_c: Context, names: str = "", json: bool = False) -> None:
    """A table of the machines: state, addresses, memory, disk, ssh, uptime."""
    found = vms.status(_chosen(names))
    if json:
        ui.as_json([dataclasses.asdict(s) for s in found])
        return
    ui.table(
        ["machine", "state", "internal", "external", "vCPU", "MiB", "disk MiB", "ssh", "uptime", "image"],
        [
            (
                *(s.name, s.state, s.internal, s.external or "-", s.vcpus, s.memory_mib, s.disk_mib),
                *("yes" if s.ssh else "no", _uptime(s.uptime), s.image),
            )
            for s in found
        ],
    )


@task(positional=["machine"], help={"machine": "its name", "command": "run this command instead of a shell"})
def ssh(c: Context, machine: str, command: str = "") -> None:
    """A shell on a machine, or the command that follows `--`."""
    name = inventory.load().machine(machine).name
    vms.require_running([inventory.load().machine(name)])
    words = ["sh", "-c", command or c.remainder] if command or c.remainder else []
    raise Exit(code=subprocess.run(vms.ssh.argv(name, *words), check=False).returncode)


@task(positional=["machine"], help={"machine": "its name"})
def console(_c: Context, machine: str) -> None:
    """A machine's serial console; Ctrl-] leaves it."""
    name = inventory.load().machine(machine).name
    raise Exit(code=subprocess.run(["virsh", "-c", lab.current().uri, "console", name], check=False).returncode)


@task(positional=["machine"], help={"machine": "its name", "lines": "number of lines", "follow": "wait for more"})
def logs(_c: Context, machine: str, lines: int = 40, follow: bool = False) -> None:
    """The end of a machine's console log."""
    path = vms.console_log(inventory.load().machine(machine).name)
    if not path.exists():
        raise VmError(f"{machine} has written nothing yet", f"./voip vms.create {machine}")
    more = ["-f"] if follow else []
    raise Exit(code=subprocess.run(["tail", "-n", str(lines), *more, str(path)], check=False).returncode)


@task(positional=[], help={"names": _NAMES, "name": "the snapshot's name"})
def snapshot(c: Context, names: str = "", name: str = "default") -> None:
    """Save the running machines, memory and disk."""
    if not _dry(c, f"save as {name}", _chosen(names)):
        vms.snapshot(_chosen(names), name, ui.teller())


@task(positional=[], help={"names": _NAMES, "name": "the snapshot's name"})
def revert(c: Context, names: str = "", name: str = "default") -> None:
    """Restore machines from a snapshot, running."""
    if not _dry(c, f"revert to {name}", _chosen(names)):
        vms.revert(_chosen(names), name, ui.teller())
