"""Machines come and go: create, start, stop, destroy. Each can be called again, whatever a killed call left behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from voip_stack import host, images, inventory, lab, ui
from voip_stack.deadline import Deadline
from voip_stack.errors import VmError
from voip_stack.images import Image
from voip_stack.inventory import Machine
from voip_stack.vms import domain as xml
from voip_stack.vms import ready, seed, ssh, store, tools
from voip_stack.vms.connection import NAMESPACE_URI, absent, connect, errors
from voip_stack.vms.ready import Progress

SHUTDOWN_SECONDS = {"kvm": 45, "hvf": 45, "tcg": 90}  # for a guest to power itself off


def teller() -> Progress:
    """A Progress that prints one line per machine and event, with the seconds since now."""
    begin = time.monotonic()

    def tell(name: str, what: str) -> None:
        ui.say(f"  {time.monotonic() - begin:5.0f} s  {name:<10} {what}")

    return tell


def find(connection: Any, name: str) -> Any:
    """The domain called `name`, None when there is none."""
    with errors(name):
        try:
            return connection.lookupByName(name)
        except libvirt.libvirtError as error:
            if absent(error):
                return None
            raise


def image_key(domain: Any) -> str:
    """The key of the image that a domain stands on; empty when it is none of ours."""
    try:
        text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE_URI)
    except libvirt.libvirtError:
        return ""
    return ET.fromstring(text).get("image", "")  # noqa: S314  # what we wrote, from libvirt


def existing(connection: Any = None) -> set[str]:
    """The names of the machines of the inventory that are defined."""
    with contextlib.ExitStack() as stack:
        connection = connection or stack.enter_context(connect())
        return {name for name in inventory.load().machines if find(connection, name)}


def image_keys() -> set[str]:
    """The keys of the images that machines stand on; none where no libvirtd runs."""
    if not all(part.up for part in lab.current().status()):
        return set()
    with connect() as connection:
        return {image_key(d) for d in connection.listAllDomains()} - {""}


def in_parallel(machines: Sequence[Machine], work: Callable[[Machine, threading.Event], None]) -> None:
    """`work` for each machine in a thread of its own; the first failure stops the others and is raised."""
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(max(1, len(machines))) as pool:
        futures = [pool.submit(work, machine, stop) for machine in machines]
        try:
            done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        except BaseException:
            stop.set()
            raise
        failed = [e for f in done if (e := f.exception()) and not isinstance(e, ready.CancelledError)]
        if failed:
            stop.set()
    if failed:
        raise failed[0]


def create(machines: Sequence[Machine], progress: Progress | None = None, recreate: bool = False) -> None:
    """Make the machines that are not there, start those that are off, and wait until all are ready.

    With `recreate` those that stand on another image than today's are made anew; else they are only named.
    Raises VmError, ImageError, LabError, HostError.
    """
    progress = progress or teller()
    lab.current().up()
    with connect() as connection:
        for machine in machines:
            domain = find(connection, machine.name)
            if domain and recreate and image_key(domain) != images.key(machine.name):
                progress(machine.name, "stands on an old image: made anew")
                _remove(connection, machine.name)
        missing = [m.name for m in machines if not _whole(connection, m.name)]
        made = {name: images.ensure(name) for name in missing}
        hardware = _hardware(made)

        def work(machine: Machine, stop: threading.Event) -> None:
            with store.locked(machine.name):
                if machine.name in made:
                    progress(machine.name, "made")
                    _make(connection, machine, made[machine.name], hardware)
                domain = find(connection, machine.name)
                if image_key(domain) != images.key(machine.name):
                    progress(machine.name, "stands on an older image; provisioning brings it along")
                _boot(machine, domain, progress, stop)

        in_parallel(machines, work)


def _hardware(made: dict[str, Image]) -> host.Hardware:
    image = next(iter(made.values()), None) or next(iter(images.list_images()), None)
    if image is None:
        image = images.ensure(images.PLAIN)
    return host.hardware(str(image.kernel), str(image.initrd))


def _accelerator() -> str:
    return host.verdict() or "tcg"


def _whole(connection: Any, name: str) -> bool:
    """Whether the machine is defined and has its disk: definition is the last step of making one."""
    return bool(find(connection, name)) and (store.directory(name) / "disk.qcow2").exists()


def _make(connection: Any, machine: Machine, image: Image, hardware: host.Hardware) -> None:
    _remove(connection, machine.name)  # what a killed create left
    directory = store.directory(machine.name)
    directory.mkdir(parents=True, mode=0o700)
    disk = directory / "disk.qcow2"
    size = f"{machine.disk_gib}G"
    tools.run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image.disk), "-F", "raw", str(disk), size, writes=disk
    )
    host_key = ssh.ensure_key(directory / "ssh_host_ed25519_key", machine.name)
    seed.write(directory / "seed.iso", seed.render(machine, inventory.load(), image, host_key, None))
    store.console_log(machine.name).touch(mode=0o600)
    ssh.write_config(machine, host_key)
    links = [xml.Link(mac, lab.current().interface(network)) for network, mac in machine.macs.items()]
    with errors(machine.name):
        connection.defineXML(xml.render(machine, image, hardware, links, directory))


def _boot(machine: Machine, domain: Any, progress: Progress, stop: threading.Event) -> None:
    """Start the domain unless it runs, and wait until the machine is ready."""
    with errors(machine.name):
        state, _ = domain.state()
        if state == libvirt.VIR_DOMAIN_PAUSED:
            domain.resume()
        elif state != libvirt.VIR_DOMAIN_RUNNING:
            domain.create()
    begin = time.monotonic()
    ready.wait(machine, ready.requirements(machine, domain), ready.timeout(_accelerator()), progress, stop)
    progress(machine.name, f"ready ({time.monotonic() - begin:.0f} s)")


def _need(connection: Any, machines: Sequence[Machine]) -> None:
    missing = [m.name for m in machines if not find(connection, m.name)]
    if missing:
        raise VmError(f"not there: {', '.join(missing)}", f"./voip vms.create {','.join(missing)}")


def start(machines: Sequence[Machine], progress: Progress | None = None) -> None:
    """Start machines that exist and wait until they are ready. Raises VmError, HostError."""
    progress = progress or teller()
    lab.current().up()
    with connect() as connection:
        _need(connection, machines)
        in_parallel(machines, lambda m, stop: _boot(m, find(connection, m.name), progress, stop))


def stop(machines: Sequence[Machine], progress: Progress | None = None) -> None:
    """Shut machines down by ACPI; one that does not power off in time is switched off. Raises VmError, HostError."""
    progress = progress or teller()
    with connect() as connection:

        def work(machine: Machine, cancelled: threading.Event) -> None:
            domain = find(connection, machine.name)
            if domain is None or not domain.isActive():
                progress(machine.name, "is off")
                return
            with store.locked(machine.name), errors(machine.name):
                domain.shutdown()
                off = Deadline(SHUTDOWN_SECONDS[_accelerator()])
                if not off.wait(lambda: cancelled.is_set() or not domain.isActive()):
                    progress(machine.name, f"did not power off within {off.seconds:.0f} s: switched off")
                    _switch_off(domain)
            progress(machine.name, f"off ({off.elapsed:.0f} s)")

        in_parallel(machines, work)


def _switch_off(domain: Any) -> None:
    try:
        domain.destroy()
    except libvirt.libvirtError as error:
        if not absent(error):
            raise


def destroy(names: Sequence[str], progress: Progress | None = None) -> None:
    """Remove machines: domain, disks, seed, snapshots, keys. What is not there is no error. Raises VmError, HostError."""
    progress = progress or teller()
    with contextlib.ExitStack() as stack:
        # Without a lab there is no domain to remove, but there may be files.
        runs = all(part.up for part in lab.current().status())
        connection = stack.enter_context(connect()) if runs else None
        for name in names:
            with store.locked(name):
                progress(name, "removed" if _remove(connection, name) else "was not there")
            (store.root() / f".{name}.lock").unlink(missing_ok=True)


def _remove(connection: Any, name: str) -> bool:
    domain = find(connection, name) if connection else None
    if domain:
        with errors(name):
            _switch_off(domain)
            domain.undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
            )
    return bool(store.remove(name)) or domain is not None


@functools.cache
def _lab_is_up() -> bool:
    return all(part.up for part in lab.current().status())


def require_running(machines: Sequence[Machine]) -> None:
    """Raise VmError, naming them, when some of `machines` are not there or off."""
    if not _lab_is_up():
        raise VmError("the lab is not up", "./voip up")
    with connect() as connection:
        off = [m.name for m in machines if not ((d := find(connection, m.name)) and d.isActive())]
    if off:
        raise VmError(f"not running: {', '.join(off)}", f"./voip vms.create {','.join(off)}")
