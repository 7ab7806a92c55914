"""Guests for the tests of one role: each in a slot with its own addresses, restored from saved memory in seconds.

A slot is a machine like those of the inventory, called molecule-N, at .200+N on both networks. The first guest of a
kind in a slot is booted once, and its memory and disk are kept as a template: a saved guest keeps name and addresses.
Who a guest belongs to is a note in libvirt's own definition of it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from voip_stack import files, host, images, inventory, lab, paths, settings, vms
from voip_stack.errors import HostError, InventoryError, VmError
from voip_stack.images.store import digest
from voip_stack.inventory import Address, Machine
from voip_stack.tell import Tell, lines
from voip_stack.vms import lifecycle, ready, saved, ssh, store
from voip_stack.vms.connection import connect, connect_if_up, errors

SLOTS = len(inventory.SLOTS)
_OWNER = "urn:voip-stack:guest"
_TRY = 15  # seconds for one ssh
_SPARE_MIB = 512  # of this computer's memory, left to others
_OVERHEAD_MIB = 256  # what QEMU itself takes beside a guest's memory


@dataclass(frozen=True)
class Wanted:
    """A guest that a scenario asks for. `image` is PLAIN or PEERS; memory in MiB."""

    host: str
    image: str = images.PLAIN
    memory_mib: int = 1024
    vcpus: int = 1
    networks: tuple[str, ...] = ("internal", "external")


@dataclass(frozen=True)
class Owner:
    """Whose a guest is: a scenario of a checkout, and the process that works with it."""

    scenario: str
    repository: str
    host: str
    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """Whether that process still runs, and is not another one with the same number."""
        return _ps(self.pid, "lstart=") == self.started

    def __str__(self) -> str:
        where = "" if self.repository == str(paths.REPOSITORY) else f" of {self.repository}"
        state = f"process {self.pid}, since {self.started}" if self.alive else "nobody works with it any more"
        return f"{self.scenario}{where} ({state})"


def _ps(pid: int, columns: str) -> str:
    command = ["ps", "-o", columns, "-p", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    return done.stdout.strip()


def _worker() -> int:
    """The process that works with the guests: the nearest Molecule above this one, else whoever started this one."""
    pid = os.getpid()
    while pid > 1:
        command = _ps(pid, "args=").split()
        if any(Path(word).name == "molecule" for word in command[:2]):
            return pid
        pid = int(_ps(pid, "ppid=") or 1)
    return os.getppid()


def me(scenario: str, guest: str = "") -> Owner:
    """The owner that this process would be of the guest `guest`."""
    pid = _worker()
    return Owner(scenario, str(paths.REPOSITORY), guest, pid, _ps(pid, "lstart="))


def slot_names() -> list[str]:
    return [f"molecule-{n}" for n in range(1, SLOTS + 1)]


def slot(name: str, wanted: Wanted) -> Machine:
    """The machine that slot `name` is when `wanted` lives in it.

    Raises InventoryError for an unknown image or network.
    """
    stack = inventory.load()
    last = inventory.SLOTS[int(name.rpartition("-")[2]) - 1]
    for network in wanted.networks:
        if network not in stack.networks:
            names = ", ".join(stack.networks)
            raise InventoryError(f"{wanted.host}: there is no network {network!r}", f"name one of: {names}")
    networks = [n for n in stack.networks.values() if n.name in wanted.networks]
    if wanted.image not in (images.PLAIN, images.PEERS):
        hint = f"name one of: {images.PLAIN}, {images.PEERS}"
        raise InventoryError(f"{wanted.host}: there is no image {wanted.image!r}", hint)
    return Machine(
        name=name,
        groups=(),
        memory_mib=wanted.memory_mib,
        vcpus=wanted.vcpus,
        disk_gib=images.PLAIN_GIB,
        addresses={n.name: Address(int(n.subnet.network_address) + last) for n in networks},
        macs={n.name: f"{n.mac_prefix}:{last:02x}" for n in networks},
        image=wanted.image,
    )


def _owner(domain: Any) -> Owner | None:
    """The note in `domain`; None when it has none."""
    with errors("libvirt"):
        try:
            flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
            note = ET.fromstring(domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, _OWNER, flags))  # noqa: S314  # ours
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_NO_DOMAIN):
                return None
            raise
    text = {key: note.get(key, "") for key in ("scenario", "repository", "host", "started")}
    return Owner(**text, pid=int(note.get("pid", "0")))


def _set_owner(domain: Any, owner: Owner) -> None:
    note = ET.tostring(ET.Element("guest", {k: str(v) for k, v in asdict(owner).items()}), encoding="unicode")
    with errors(domain.name()):
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, note, "voipguest", _OWNER, flags)


def owners(connection: Any) -> dict[str, Owner]:
    """The slots that belong to somebody."""
    found = {name: lifecycle.find(connection, name) for name in slot_names()}
    return {name: owner for name, domain in found.items() if domain and (owner := _owner(domain))}


def _mine(connection: Any, scenario: str) -> dict[str, Owner]:
    """The slots of `scenario` of this checkout. Raises VmError when another process works with them."""
    mine = {
        name: owner
        for name, owner in owners(connection).items()
        if (owner.scenario, owner.repository) == (scenario, str(paths.REPOSITORY))
    }
    for owner in mine.values():
        if owner.alive and owner.pid != _worker():
            raise VmError(
                f"the scenario {scenario} is held by process {owner.pid}, since {owner.started}",
                f"wait for it to end, or end it: kill {owner.pid}",
                _ps(owner.pid, "pid=,args="),
            )
    return mine


def guests_of(scenario: str) -> dict[str, str]:
    """The slots of the guests of `scenario` of this checkout, by host name."""
    with connect_if_up() as connection:
        found = owners(connection) if connection else {}
    mine = (scenario, str(paths.REPOSITORY))
    return {owner.host: name for name, owner in found.items() if (owner.scenario, owner.repository) == mine}


def create(scenario: str, wanted: Sequence[Wanted], tell: Tell) -> dict[str, Machine]:
    """The guests of `scenario` by host name, running and ready; those that it has already are kept.

    Raises VmError when another process works with the scenario, or no slot is free; HostError for too little memory.
    """
    lab.current().up()
    for name in {w.image for w in wanted}:
        images.prepare()
        images.ensure(name, lines(tell))
    with connect() as connection, store.locked(f"scenario-{scenario}", seconds=0), contextlib.ExitStack() as locks:
        mine = {owner.host: name for name, owner in _mine(connection, scenario).items()}
        _require_memory([w for w in wanted if w.host not in mine])
        names = {w.host: mine.get(w.host) or _take(connection, w, locks) for w in wanted}
        guests = {w.host: slot(names[w.host], w) for w in wanted}

        def make(want: Wanted) -> None:
            machine = guests[want.host]
            domain = lifecycle.find(connection, machine.name)
            if not (want.host in mine and domain and domain.isActive()):
                tell(f"{want.host}: {machine.name}, {machine.internal}")
                _restore(connection, machine, me(scenario, want.host), tell)

        with concurrent.futures.ThreadPoolExecutor(max(1, len(wanted))) as pool:
            list(pool.map(make, wanted))
    return guests


def _require_memory(wanted: Sequence[Wanted]) -> None:
    needed = sum(w.memory_mib + _OVERHEAD_MIB for w in wanted)
    free = host.current().available_mib - _SPARE_MIB
    if wanted and needed > free:
        raise HostError(
            f"{len(wanted)} guests need {needed} MiB of memory, and {max(free, 0)} MiB are free",
            "stop what you don't need, e.g.: ./voip vms.stop; molecule destroy --all",
        )


def _take(connection: Any, want: Wanted, locks: contextlib.ExitStack) -> str:
    """A free slot, locked in `locks`: one that has a template for `want`, else one that has none at all."""
    taken = owners(connection)
    free = [name for name in slot_names() if name not in taken]
    free.sort(key=lambda name: (not _template(slot(name, want)).exists(), any(root().glob(f"{name}-*"))))
    for name in free:
        with contextlib.suppress(files.BusyError):
            locks.enter_context(store.locked(f"{name}-guest", seconds=0))
            domain = lifecycle.find(connection, name)
            if not (domain and _owner(domain)):  # taken while we looked
                return name
    lines = "\n".join(f"{name}: {owner}" for name, owner in taken.items())
    raise VmError(f"all {SLOTS} slots for guests are taken", "molecule destroy -s SCENARIO frees one", lines)


def _template(machine: Machine) -> Path:
    """Where the saved memory of `machine` lies: one directory for each slot and whatever the saved guest depends on."""
    image = images.ensure(machine.image_name)
    disk = image.disk.stat()
    hardware = lifecycle.hardware_for([image])
    vcpus = 1 if hardware.domain_type == "qemu" else machine.vcpus  # as libvirt/domain.xml.j2 has it
    sizes = (machine.memory_mib, vcpus, machine.disk_gib, sorted(machine.addresses))
    same = (image.key, disk.st_ino, disk.st_mtime_ns)  # the same recipe made again is another disk
    parts = (same, sizes, paths.LIBVIRT, ssh.public(ssh.identity()), hardware)
    return root() / f"{machine.name}-{machine.image_name}-{digest(*parts)}"


def root() -> Path:
    """Where templates lie. What is there can be removed at any time; it is made again."""
    return settings.load().cache_dir / "guests"


def _save(connection: Any, machine: Machine, template: Path, tell: Tell) -> None:
    """Boot `machine`, save it, and make the template of what it then is."""
    tell(f"{machine.name}: booted once, then saved")
    vms.create([machine], recreate=True)
    partial = template.with_name(f".{machine.name}")  # also of a killed save: the slot is ours alone
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)
    try:
        with errors(machine.name):
            lifecycle.find(connection, machine.name).save(str(partial / "memory"))
        files = store.directory(machine.name)
        (files / "disk.qcow2").rename(partial / "layer.qcow2")
        for name in ("seed.iso", "ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"):
            (files / name).rename(partial / name)
        for older in root().glob(f"{machine.name}-*"):
            shutil.rmtree(older)
        partial.rename(template)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        vms.destroy([machine.name])


def _restore(connection: Any, machine: Machine, owner: Owner, tell: Tell) -> None:
    template = _template(machine)
    if not template.exists():
        _save(connection, machine, template, tell)
    vms.destroy([machine.name])  # what a killed run left here
    with store.locked(machine.name):
        files = store.directory(machine.name)
        files.mkdir(parents=True, mode=0o700)
        for name in ("seed.iso", "ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"):
            shutil.copy(template / name, files / name)
        saved.overlay(machine.name, template / "layer.qcow2")
        store.console_log(machine.name).touch(mode=0o600)
        ssh.write_config(machine, files / "ssh_host_ed25519_key")
        image = images.ensure(machine.image_name)
        domain = lifecycle.define(connection, machine, image, lifecycle.hardware_for([image]))
        _set_owner(domain, owner)
        with errors(machine.name):
            connection.restore(str(template / "memory"))
    saved.set_clocks([machine])


def claim(scenario: str) -> None:
    """Say that this process now works with the guests of `scenario`. Raises VmError when another one does."""
    with connect() as connection:
        for name, owner in _mine(connection, scenario).items():
            mine = me(scenario)
            _set_owner(lifecycle.find(connection, name), replace(owner, pid=mine.pid, started=mine.started))


def reboot(scenario: str, wanted: Wanted) -> None:
    """Reboot a guest of `scenario` from inside and wait until it is ready. Raises VmError with the console's end."""
    machine = slot(guests_of(scenario)[wanted.host], wanted)

    def boot_id(left: float) -> str:
        return ssh.run(machine.name, "cat", "/proc/sys/kernel/random/boot_id", timeout=min(left, _TRY)).stdout

    before = boot_id(_TRY)
    ssh.run(machine.name, "systemctl", "--no-block", "reboot", sudo=True, timeout=_TRY)
    with connect() as connection:
        runs, *_, up = ready.requirements(machine, lifecycle.find(connection, machine.name))
        rebooted = ready.Requirement(
            "it has rebooted", lambda left: boot_id(left) not in ("", before), "see its console"
        )
        ready.wait(machine, [runs, rebooted, up], ready.timeout(), lambda _name, _what: None, threading.Event())


def destroy(scenario: str, tell: Tell) -> None:
    """Remove the guests of `scenario`, and what killed runs left half-made.

    Raises VmError when another process works with them.
    """
    with connect_if_up() as connection:
        if connection is None:
            return
        for name, owner in _mine(connection, scenario).items():
            _end_orphans(owner)
            tell(f"{name} removed")
            vms.destroy([name])
        for name in _abandoned(connection):
            tell(f"{name}: removed what a killed run left")


def _end_orphans(owner: Owner) -> None:
    """End what a killed run has left running: its Ansible would go on with the next guest at the same address.

    A process group outlives its leader, and nobody gets the leader's number as long as it does.
    """
    if not _ps(owner.pid, "pid="):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(owner.pid, signal.SIGTERM)


def _abandoned(connection: Any) -> Iterator[str]:
    """Remove slots that were being made when their process died: files or a domain, but nobody's note."""
    for name in slot_names():
        domain = lifecycle.find(connection, name)
        if not (domain or store.directory(name).exists()) or (domain and _owner(domain)):
            continue
        with contextlib.suppress(files.BusyError), store.locked(f"{name}-guest", seconds=0):
            domain = lifecycle.find(connection, name)
            if not (domain and _owner(domain)):
                vms.destroy([name])
                yield name


def forget() -> None:
    """Remove all templates."""
    shutil.rmtree(root(), ignore_errors=True)
