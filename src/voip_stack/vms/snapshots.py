"""Snapshots of the whole stack: saved memory and a frozen disk layer per machine, so a booted stack is back in seconds.

libvirt's own snapshots are not used: some releases can't revert them. A snapshot is `<machine>/snapshots/NAME/` with
the memory, and the layer's name; layers stand on each other and stay until the machine is destroyed.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voip_stack.errors import VmError
from voip_stack.inventory import Machine
from voip_stack.vms import ready, ssh, store, tools
from voip_stack.vms.connection import connect, errors
from voip_stack.vms.lifecycle import find, in_parallel, require_running, teller
from voip_stack.vms.ready import Progress

_CLOCK_SECONDS = 60  # for a restored machine to answer and take the time


def _directory(machine: str, name: str) -> Path:
    return store.directory(machine) / "snapshots" / name


def snapshots(machine: str) -> list[str]:
    """The names of the snapshots of `machine`, the oldest first."""
    found = (store.directory(machine) / "snapshots").glob("[!.]*")
    return [d.name for d in sorted(found, key=lambda d: d.stat().st_mtime)]


def _overlay(disk: Path, layer: Path) -> None:
    """A new `disk` on top of the frozen `layer`."""
    partial = disk.with_name(f".{disk.name}.partial")
    partial.unlink(missing_ok=True)
    tools.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(layer), "-F", "qcow2", str(partial), writes=partial)
    partial.replace(disk)


def snapshot(machines: Sequence[Machine], name: str = "default", progress: Progress | None = None) -> None:
    """Save memory and disk of all `machines` at one moment; they run on. A snapshot of that name is replaced.

    Raises VmError when one of them is off, HostError without a libvirtd.
    """
    progress = progress or teller()
    require_running(machines)
    with connect() as connection:
        domains = {m.name: find(connection, m.name) for m in machines}
        # All stop before the first is saved: no machine sees another one's future.
        for machine, domain in domains.items():
            with errors(machine):
                domain.suspend()

        def work(machine: Machine, _stop: threading.Event) -> None:
            with store.locked(machine.name):
                _save(connection, machine.name, domains[machine.name], name)
            progress(machine.name, f"saved as {name}")

        try:
            in_parallel(machines, work)
        except BaseException:
            for domain in domains.values():
                if domain.isActive():
                    domain.resume()
            raise
    _set_clocks(machines)


def _save(connection: Any, machine: str, domain: Any, name: str) -> None:
    directory = store.directory(machine)
    partial = _directory(machine, f".{name}")
    shutil.rmtree(partial, ignore_errors=True)  # a killed snapshot's
    partial.mkdir(parents=True)
    disk, memory = directory / "disk.qcow2", partial / "memory"
    layer = directory / f"layer-{time.time_ns()}.qcow2"
    with errors(machine):
        domain.save(str(memory))
    disk.rename(layer)
    _overlay(disk, layer)
    store.write(partial / "layer", layer.name)
    final = _directory(machine, name)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    with errors(machine):
        connection.restore(str(final / "memory"))
        if not domain.isActive():
            raise VmError(f"{machine} did not come back after it was saved", f"./voip vms.start {machine}")
        _resume(find(connection, machine))


def _resume(domain: Any) -> None:
    """Let a domain run that was saved while it was paused."""
    if domain.info()[0] != 1:  # VIR_DOMAIN_RUNNING
        domain.resume()


def revert(machines: Sequence[Machine], name: str = "default", progress: Progress | None = None) -> None:
    """Bring `machines` back to their snapshot `name`, running. It can be reverted to again.

    Raises VmError when one of them has no snapshot of that name; nothing is changed then.
    """
    progress = progress or teller()
    lacking = [m.name for m in machines if not (_directory(m.name, name) / "layer").exists()]
    if lacking:
        there = sorted({s for m in machines for s in snapshots(m.name)})
        hint = f"there is: {', '.join(there)}" if there else "./voip vms.snapshot makes one"
        raise VmError(f"no snapshot {name!r} of {', '.join(lacking)}", hint)
    with connect() as connection:

        def work(machine: Machine, _stop: threading.Event) -> None:
            directory = _directory(machine.name, name)
            with store.locked(machine.name), errors(machine.name):
                domain = find(connection, machine.name)
                if domain is not None and domain.isActive():
                    domain.destroy()
                layer = store.directory(machine.name) / (directory / "layer").read_text()
                _overlay(store.directory(machine.name) / "disk.qcow2", layer)
                connection.restore(str(directory / "memory"))
                _resume(find(connection, machine.name))
            progress(machine.name, "back in memory")

        in_parallel(machines, work)
    _set_clocks(machines)


def _set_clocks(machines: Sequence[Machine]) -> None:
    """Guests wake in the past: nonces, certificates and CDRs need today's time."""

    def work(machine: Machine, stop: threading.Event) -> None:
        def set_clock(left: float) -> bool:
            now = f"@{time.time():.3f}"
            return ssh.run(machine.name, "sudo", "date", "--utc", "--set", now, timeout=min(left, 15)).returncode == 0

        need = ready.Requirement("ssh answers and the clock is set", set_clock, f"./voip vms.logs {machine.name}")
        ready.wait(machine, [need], _CLOCK_SECONDS, lambda _name, _what: None, stop)

    in_parallel(machines, work)
