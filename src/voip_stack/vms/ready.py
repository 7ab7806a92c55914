"""When a machine is ready: a list of requirements in order, one deadline for all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libvirt

from voip_stack import host, settings
from voip_stack.deadline import Deadline
from voip_stack.errors import VmError
from voip_stack.inventory import Machine
from voip_stack.tell import Progress
from voip_stack.vms import ssh, store, tools
from voip_stack.vms.connection import errors

# Seconds from start to ready. An emulated machine has taken 530 beside two busy ones, on a slow computer.
_BOOT_SECONDS = 90  # host.patience() makes more of it
_TRY = 15  # seconds for one ssh; under emulation a login takes one to three
_UP = 30  # seconds for one look at the boot's end; between two looks a stopped command ends

# Accounts are closed until systemd-user-sessions removes /run/nologin; result.json is the last that cloud-init writes;
# is-system-running --wait returns when the boot's job queue is empty. A failed unit ("degraded") is left to the roles.
# cloud-init is for the first boot alone: it would take half of every later one under emulation to find nothing to do.
_SYSTEM_UP = """
once=/etc/cloud/cloud-init.disabled
until { [ -e /run/cloud-init/result.json ] || [ -e $once ]; } && [ ! -e /run/nologin ]; do sleep 0.5; done
case $(systemctl is-system-running --wait) in running|degraded) ;; *) exit 1;; esac
[ -e $once ] || sudo touch $once
"""


@dataclass(frozen=True)
class Requirement:
    """One thing that must hold: `check` gets the seconds that are left, and is asked again until it is true."""

    description: str
    check: Callable[[float], bool]
    hint: str


class CancelledError(Exception):
    """The user stopped the command, or another machine of it failed beyond repair."""


def timeout() -> float:
    """Seconds for a machine to become ready: the user's setting, else by accelerator and this computer's speed."""
    return settings.load().boot_timeout or host.patience(_BOOT_SECONDS)


def requirements(machine: Machine, domain: Any) -> list[Requirement]:
    """What makes `machine` ready."""
    name, address = machine.name, str(machine.internal)
    return [
        Requirement("the domain runs", lambda _left: _runs(name, domain), f"./voip vms.start {name}"),
        Requirement(
            f"{address} answers at port 22",
            lambda left: ssh.banner(address, min(left, _TRY)),
            f"./voip vms.console {name}; ./voip lab.status",
        ),
        Requirement(
            "ssh login works",
            lambda left: ssh.run(name, "true", timeout=min(left, _TRY)).returncode == 0,
            f"made with another key than {ssh.identity()}? Then: ./voip vms.destroy {name}; ./voip vms.create {name}",
        ),
        Requirement(
            "the system is up, and cloud-init done at the first boot",
            lambda left: ssh.run(name, "sh", "-c", _SYSTEM_UP, timeout=min(left, _UP)).returncode == 0,
            f"./voip vms.ssh {name} -- systemctl list-jobs",
        ),
    ]


def _runs(name: str, domain: Any) -> bool:
    with errors(name):
        state, reason = domain.state()
    if (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR):
        raise tools.full(store.root())  # QEMU stops a guest rather than lose what it writes
    if state in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED):
        raise VmError(
            f"{name} went off while it booted",
            f"./voip vms.logs {name}; ./voip vms.start {name}",
            store.console_end(name),
        )
    return bool(state == libvirt.VIR_DOMAIN_RUNNING)


def wait(machine: Machine, needs: list[Requirement], seconds: float, progress: Progress, stop: threading.Event) -> None:
    """Wait until all of `needs` hold, `seconds` at most together.

    Raises VmError naming the requirement that does not hold, with its hint and the end of the console; CancelledError
    once `stop` is set.
    """
    deadline = Deadline(seconds)
    for number, need in enumerate(needs, 1):
        progress(machine.name, f"waiting: {need.description} ({number} of {len(needs)})")

        def holds(check: Callable[[float], bool] = need.check) -> bool:
            if stop.is_set():
                raise CancelledError
            # A machine that went off will not answer, however long we wait.
            return (check is needs[0].check or needs[0].check(deadline.left)) and check(max(deadline.left, 1.0))

        if not deadline.until(holds):
            raise VmError(
                f"{machine.name} is not ready after {seconds:.0f} s: {need.description}: no "
                f"(requirement {number} of {len(needs)})",
                need.hint,
                store.console_end(machine.name),
            )
