"""Making, starting, stopping and removing machines. libvirt keeps the state; every step can be cut short and done again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any
from xml.etree import ElementTree

import libvirt

from voip_stack import images, inventory, lab, ui
from voip_stack.deadline import Deadline
from voip_stack.errors import VmError
from voip_stack.images import Image
from voip_stack.inventory import Machine
from voip_stack.vms import platform, ready, seed, ssh, store, tools
from voip_stack.vms import domain as xml
from voip_stack.vms.connection import NAMESPACE_URI, absent, connect, errors
from voip_stack.vms.ready import Cancelled, Progress

STOP_TIMEOUT = 60  # seconds for a guest to power itself off
_POWER_BUTTON_AGAIN = 10  # seconds; a guest that still boots does not hear the first press


def _silent(_name: str, _text: str) -> None:
    pass


def find(connection: Any, name: str) -> Any | None:
    """The domain of machine `name`, None when there is none. Raises VmError when a domain of that name is not ours."""
    try:
        domain = connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if absent(error):
            return None
        raise
    if image_key(domain) is None:
        raise VmError(
            f"libvirt has a domain {name} that this stack has not made",
            f"rename it (virsh domrename {name} NEW), or the machine in the inventory",
        )
    return domain


def image_key(domain: Any) -> str | None:
    """The key of the image that `domain` was made from; None when the domain is not of this stack."""
    try:
        text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE_URI)
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_NO_DOMAIN):
            return None
        raise
    return ElementTree.fromstring(text).get("image", "")  # noqa: S314  # libvirt's own answer


def ours(connection: Any) -> list[Any]:
    """All domains that this stack has made, whether or not the inventory still has them."""
    return [d for d in connection.listAllDomains() if image_key(d) is not None]


def existing() -> list[str]:
    """Names of the machines that are defined, running or not; none when no libvirtd of the lab runs."""
    if not lab.current().is_up():
        return []
    with connect() as connection:
        return sorted(d.name() for d in ours(connection))


def image_keys() -> set[str]:
    """Keys of the images that existing machines stand on."""
    if not lab.current().is_up():
        return set()
    with connect() as connection:
        return {image_key(d) or "" for d in ours(connection)}


def require_running(machines: Sequence[Machine]) -> None:
    """Raises VmError naming the machines that do not run."""
    if not lab.current().is_up():
        raise VmError("no machine runs: the lab is down", "./voip vms.create")
    with connect() as connection:
        running = {d.name() for d in ours(connection) if d.isActive()}
    missing = [m.name for m in machines if m.name not in running]
    if missing:
        raise VmError(f"not running: {', '.join(missing)}", f"./voip vms.create {','.join(missing)}")


def create(
    machines: Sequence[Machine],
    progress: Progress = _silent,
    *,
    recreate: bool = False,
    image: Callable[[str], Image] = images.ensure,
) -> None:
    """Bring `machines` to run, in parallel, and wait until each is ready.

    A machine that exists is started if need be and keeps its disk, also when its image is not the current one, unless
    `recreate`. What a killed create left is removed first. `image` gives the image for a machine's name.

    Raises VmError for machines that could not be made or are not ready in time (the others are completed), ImageError.
    """
    lab.current().up()
    with connect() as connection:

        def one(machine: Machine, stop: threading.Event) -> None:
            with store.locked(machine.name), errors(machine.name):
                domain = find(connection, machine.name)
                if domain and (recreate or not (store.directory(machine.name) / "disk.qcow2").exists()):
                    progress(machine.name, "removing the old machine")
                    _remove(connection, machine.name)
                    domain = None
                if domain is None:
                    progress(machine.name, "making disk and seed")
                    domain = _make(connection, machine, chosen[machine.name])
                _run(domain, machine, progress, stop)
                progress(machine.name, _done(domain, chosen.get(machine.name)))

        # One image after the other: baking takes all of the computer by itself.
        chosen: dict[str, Image] = {}
        for machine in machines:
            with errors(machine.name):
                if recreate or find(connection, machine.name) is None:
                    progress(machine.name, "looking for its image")
                    chosen[machine.name] = image(machine.name)
        in_parallel(machines, one)


def start(machines: Sequence[Machine], progress: Progress = _silent) -> None:
    """Start machines that exist and wait until they are ready. Raises VmError, also for a machine that was never made."""
    lab.current().up()
    with connect() as connection:

        def one(machine: Machine, stop: threading.Event) -> None:
            with store.locked(machine.name), errors(machine.name):
                domain = find(connection, machine.name)
                if domain is None:
                    raise VmError(f"{machine.name} does not exist", f"./voip vms.create {machine.name}")
                _run(domain, machine, progress, stop)
                progress(machine.name, "ready")

        in_parallel(machines, one)


def stop(machines: Sequence[Machine], progress: Progress = _silent, seconds: float = STOP_TIMEOUT) -> None:
    """Power machines off as their power button would; after `seconds` without a pause for them."""
    if not lab.current().is_up():
        return
    with connect() as connection:

        def one(machine: Machine, stopped: threading.Event) -> None:
            with store.locked(machine.name), errors(machine.name):
                domain = find(connection, machine.name)
                if domain is None or not domain.isActive():
                    progress(machine.name, "is off" if domain else "does not exist")
                    return
                progress(machine.name, "shutting down")
                asked = -float(_POWER_BUTTON_AGAIN)
                deadline = Deadline(seconds)

                def is_off() -> bool:
                    nonlocal asked
                    if stopped.is_set():
                        raise Cancelled
                    if domain.isActive() and deadline.elapsed - asked >= _POWER_BUTTON_AGAIN:
                        asked = deadline.elapsed
                        with contextlib.suppress(libvirt.libvirtError):  # it may go off, or be paused, just now
                            domain.shutdown()
                    return not domain.isActive()

                if not deadline.wait(is_off):
                    _power_off(domain)
                progress(machine.name, "off" if not deadline.is_due else f"switched off after {seconds:.0f} s")

        in_parallel(machines, one)


def destroy(machines: Sequence[Machine], progress: Progress = _silent) -> None:
    """Remove machines with all that belongs to them: domain, disk, seed, snapshots, keys. Nothing to remove is no error."""
    if not lab.current().is_up():
        # No libvirtd, no domains: the lab takes its own with it. The files are left.
        for machine in machines:
            with store.locked(machine.name):
                progress(machine.name, "removed" if store.remove(machine.name) else "does not exist")
        return
    with connect() as connection:

        def one(machine: Machine, _stop: threading.Event) -> None:
            with store.locked(machine.name), errors(machine.name):
                progress(machine.name, "removed" if _remove(connection, machine.name) else "does not exist")

        in_parallel(machines, one)


def in_parallel(machines: Sequence[Machine], work: Callable[[Machine, threading.Event], None]) -> None:
    """Do `work` for all machines at once. Ctrl-C sets the event and waits for no more than one step of each.

    Raises VmError when it failed for some of them; the others are completed.
    """
    if not machines:
        return
    cancel = threading.Event()
    failed: dict[str, VmError] = {}
    with ThreadPoolExecutor(len(machines)) as pool:
        futures: dict[Future[None], str] = {pool.submit(work, m, cancel): m.name for m in machines}
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    error = future.exception()
                    if isinstance(error, VmError):
                        failed[futures[future]] = error
                    elif error:
                        raise error
        finally:
            cancel.set()
    if len(failed) == 1:
        raise next(iter(failed.values()))
    if failed:
        raise VmError(
            f"{len(failed)} of {len(machines)} machines failed:\n"
            + "\n".join(f"  {e.message}" for e in failed.values()),
            "\n".join(dict.fromkeys(e.hint for e in failed.values() if e.hint)),
            "\n".join(e.details for e in failed.values() if e.details),
        )


def _make(connection: Any, machine: Machine, image: Image) -> Any:
    """A defined machine. Defining is the last step: files without a domain are leftovers."""
    _remove(connection, machine.name)
    directory = store.directory(machine.name)
    directory.mkdir(parents=True)
    host_key = ssh.ensure_key(directory / "ssh_host_ed25519_key", machine.name)
    seed.write(directory / "seed.iso", seed.render(machine, inventory.load(), image, host_key, platform.gateway()))
    ssh.write_config(machine, host_key)
    overlay(directory / "disk.qcow2", image.disk, "raw", max(machine.disk_gib * 1024**3, image.disk.stat().st_size))
    store.console_log(machine.name).touch()
    return connection.defineXML(xml.render(machine, image, platform.hardware(), platform.links(machine), directory))
