"""Snapshots of the whole stack: saved memory and a frozen disk layer per machine, so a booted stack is back in seconds.

libvirt's own snapshots are not used: some releases can't revert them. A snapshot is `<machine>/snapshots/NAME/` with
the memory and the name of the disk layer that belongs to it; the layer's name is the same on all machines that were
saved at that moment. Layers stand on each other and stay until the machine is destroyed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import libvirt

from voip_stack import files
from voip_stack.errors import VmError
from voip_stack.inventory import Machine
from voip_stack.tell import Progress, nobody
from voip_stack.vms import ready, ssh, store, tools
from voip_stack.vms.connection import connect, connect_if_up, errors
from voip_stack.vms.lifecycle import find, in_parallel, require_running, switch_off

# The clock of the guest's board follows the computer's; the kernel's own slept with the guest.
_SET_CLOCK = "date --utc --set=@$(cat /sys/class/rtc/rtc0/since_epoch)"


def _directory(machine: str, name: str) -> Path:
    return store.directory(machine) / "snapshots" / name


def snapshots(machine: str) -> list[str]:
    """The names of the snapshots of `machine`, the oldest first."""
    found = (store.directory(machine) / "snapshots").glob("[!.]*")
    return [d.name for d in sorted(found, key=lambda d: d.stat().st_mtime)]


def overlay(machine: str, layer: Path) -> None:
    """A new disk of `machine` on top of the frozen `layer`, in one step."""
    disk = store.directory(machine) / "disk.qcow2"
    partial = disk.with_name(f".{disk.name}.partial")
    tools.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(layer), "-F", "qcow2", str(partial), writes=partial)
    partial.replace(disk)


@contextlib.contextmanager
def _locked(machines: Sequence[Machine]) -> Any:
    with contextlib.ExitStack() as stack:
        for machine in machines:
            stack.enter_context(store.locked(machine.name))
        yield


def snapshot(machines: Sequence[Machine], name: str = "default", progress: Progress = nobody) -> None:
    """Save memory and disk of all `machines` at one moment; they run on. A snapshot of that name is replaced.

    Raises VmError when one of them is off or can't be saved: the machines run on and an older snapshot stays.
    """
    if "/" in name or name.startswith("."):
        raise VmError(f"{name!r} is no name for a snapshot", "take a word: ./voip vms.snapshot --name before-upgrade")
    require_running(machines)
    layer = f"layer-{time.time_ns()}.qcow2"
    with _locked(machines), connect() as connection:
        domains = {m.name: find(connection, m.name) for m in machines}

        def save(machine: Machine, _stop: threading.Event) -> None:
            partial = _directory(machine.name, f".{name}")
            shutil.rmtree(partial, ignore_errors=True)  # a killed snapshot's
            partial.mkdir(parents=True)
            with errors(machine.name):
                domains[machine.name].save(str(partial / "memory"))

        def run_on(machine: Machine, _stop: threading.Event) -> None:
            _restore(connection, machine.name, name if frozen else f".{name}")

        frozen = False
        try:
            # All stop before the first is saved: no machine sees another one's future.
            for machine, domain in domains.items():
                with errors(machine):
                    domain.suspend()
            in_parallel(machines, save)
            for machine in domains:
                _freeze(machine, name, layer)
            frozen = True
        finally:
            in_parallel(machines, run_on)
            _resume(domains)
        for machine in domains:
            progress(machine, f"saved as {name}")
    set_clocks(machines)


def _freeze(machine: str, name: str, layer: str) -> None:
    """Make the disk of a saved machine a layer under a new one; the snapshot takes its name when all is there."""
    directory, partial, final = store.directory(machine), _directory(machine, f".{name}"), _directory(machine, name)
    os.link(directory / "disk.qcow2", directory / layer)  # at no moment is there no disk
    overlay(machine, directory / layer)
    files.write(partial / "layer", layer)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _restore(connection: Any, machine: str, name: str) -> None:
    """The machine's memory of snapshot `name` into a domain, unless that still runs."""
    with errors(machine):
        domain = find(connection, machine)
        if not (domain and domain.isActive()):
            connection.restore(str(_directory(machine, name) / "memory"))


def _resume(domains: dict[str, Any]) -> None:
    """Let domains run that were stopped in order to be saved."""
    for machine, domain in domains.items():
        with errors(machine):
            if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()


def revert(machines: Sequence[Machine], name: str = "default", progress: Progress = nobody) -> None:
    """Bring `machines` back to their snapshot `name`, running. It can be reverted to again.

    Raises VmError when one of them has no snapshot of that name, or not of the same moment; nothing is changed then.
    """
    notes = {m.name: _directory(m.name, name) / "layer" for m in machines}
    lacking = [machine for machine, note in notes.items() if not note.exists()]
    if lacking:
        there = sorted({s for m in machines for s in snapshots(m.name)})
        hint = f"there is: {', '.join(there)}" if there else "./voip vms.snapshot makes one"
        raise VmError(f"no snapshot {name!r} of {', '.join(lacking)}", hint)
    layers = {machine: note.read_text() for machine, note in notes.items()}
    if len(set(layers.values())) > 1:
        raise VmError(
            f"the snapshots {name!r} are not of one moment", "revert those machines by name that belong together"
        )
    with _locked(machines), connect() as connection:

        def work(machine: Machine, _stop: threading.Event) -> None:
            overlay(machine.name, store.directory(machine.name) / layers[machine.name])
            _restore(connection, machine.name, name)
            progress(machine.name, "back in memory")

        for machine in layers:
            with errors(machine):
                switch_off(find(connection, machine))
        in_parallel(machines, work)
        _resume({machine: find(connection, machine) for machine in layers})
    set_clocks(machines)


@contextlib.contextmanager
def paused(machines: Sequence[Machine]) -> Iterator[None]:
    """Those of `machines` that run stand still meanwhile: they keep their memory and take no processor time."""
    with _locked(machines), connect_if_up() as connection:
        found = {m.name: find(connection, m.name) for m in machines} if connection else {}
        domains = {name: domain for name, domain in found.items() if domain and domain.isActive()}
        try:
            for machine, domain in domains.items():
                with errors(machine):
                    domain.suspend()
            yield
        finally:
            _resume(domains)
            set_clocks([m for m in machines if m.name in domains])


def set_clocks(machines: Sequence[Machine]) -> None:
    """Guests wake in the past: nonces, certificates and CDRs need today's time."""

    def work(machine: Machine, stop: threading.Event) -> None:
        def set_clock(left: float) -> bool:
            return ssh.run(machine.name, "sh", "-c", _SET_CLOCK, sudo=True, timeout=min(left, 15)).returncode == 0

        need = ready.Requirement("ssh answers and the clock is set", set_clock, f"./voip vms.logs {machine.name}")
        # Seconds on an idle computer; beside machines that boot or compile, an emulated one may take minutes.
        ready.wait(machine, [need], ready.timeout(), nobody, stop)

    in_parallel(machines, work)
