"""What the machines are and do at this moment."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import libvirt

from voip_stack import images
from voip_stack.inventory import Machine
from voip_stack.vms import ssh, store
from voip_stack.vms.connection import connect_if_up, errors
from voip_stack.vms.lifecycle import find, image_key

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutting down",
    libvirt.VIR_DOMAIN_SHUTOFF: "off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended",
}
_SSH_SECONDS = 15


@dataclass(frozen=True)
class Status:
    """One machine. `disk_mib` is what its own files take, the image not counted; `uptime` in seconds."""

    name: str
    state: str
    internal: str
    external: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    ssh: bool
    uptime: float | None
    image: str  # current, older, or empty


def status(machines: Sequence[Machine]) -> list[Status]:
    """The state of each of `machines`; `absent` for one that is not made."""
    with connect_if_up() as connection, concurrent.futures.ThreadPoolExecutor(8) as pool:
        if connection is None:
            return [_status(m, None, "no libvirtd" if store.directory(m.name).exists() else "absent") for m in machines]
        return list(pool.map(lambda m: _status(m, find(connection, m.name)), machines))


def _status(machine: Machine, domain: Any, state: str = "absent") -> Status:
    image, uptime, vcpus = "", None, machine.vcpus
    if domain is not None:
        with errors(machine.name):
            state = _STATES.get(domain.state()[0], "unknown")
            vcpus = domain.info()[3]
        image = "current" if image_key(domain) == images.key(machine.image_name) else "older"
        if state == "running":
            done = ssh.run(machine.name, "cat", "/proc/uptime", timeout=_SSH_SECONDS)
            uptime = float(done.stdout.split()[0]) if done.returncode == 0 else None
    return Status(
        name=machine.name,
        state=state,
        internal=str(machine.internal),
        external=str(machine.external or ""),
        vcpus=vcpus,
        memory_mib=machine.memory_mib,
        disk_mib=store.bytes_used(machine.name) // 1024**2,
        ssh=uptime is not None,
        uptime=uptime,
        image=image,
    )
