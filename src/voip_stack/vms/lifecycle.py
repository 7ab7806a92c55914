"""Machines come and go: create, start, stop, destroy. Each can be called again, whatever a killed call left behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from voip_stack import host, images, inventory, lab
from voip_stack.deadline import Deadline
from voip_stack.errors import VmError
from voip_stack.images import Image
from voip_stack.inventory import Machine
from voip_stack.tell import Progress, nobody
from voip_stack.vms import domain as xml
from voip_stack.vms import ready, seed, ssh, store, tools
from voip_stack.vms.connection import NAMESPACE_URI, absent, connect, connect_if_up, errors

_SHUTDOWN_SECONDS = 20  # for a guest to power itself off; host.patience() makes more of it
_POWER_BUTTON_SECONDS = 10
_FREE_SECONDS = 0.5  # for whoever has a machine's address to answer


Then = Callable[[Machine, Progress], None]  # what its caller does with a machine that is ready


def _nothing(_machine: Machine, _progress: Progress) -> None:
    """Leave it as it is."""


def find(connection: Any, name: str) -> Any:
    """The domain of machine `name`, None when there is none. Raises VmError when it is somebody else's."""
    with errors(name):
        try:
            domain = connection.lookupByName(name)
        except libvirt.libvirtError as error:
            if absent(error):
                return None
            raise
    if not image_key(domain):
        raise VmError(
            f"libvirt has a machine {name} that is not of this stack",
            f"rename one of the two: that one, when it is off, with: virsh domrename {name} NEW-NAME",
        )
    return domain


def image_key(domain: Any) -> str:
    """The key of the image that a domain stands on; empty when it is none of ours, or gone by now."""
    with errors("libvirt"):
        try:
            text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE_URI)
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_NO_DOMAIN):
                return ""
            raise
    return ET.fromstring(text).get("image", "")  # noqa: S314  # what we wrote, from libvirt


def existing(connection: Any = None) -> set[str]:
    """The names of the machines of the inventory that are defined."""
    with contextlib.ExitStack() as stack:
        connection = connection or stack.enter_context(connect())
        return {name for name in inventory.load().machines if find(connection, name)}


def _reach(names: Iterable[str]) -> None:
    """Bring the lab up when it has some of these machines: definitions and guests can outlive libvirt's daemon."""
    if any(store.directory(name).exists() for name in names):
        lab.current().up()


def image_keys() -> set[str]:
    """The keys of the images that machines stand on."""
    _reach(store.names())
    with connect_if_up() as connection:
        return {image_key(d) for d in connection.listAllDomains()} - {""} if connection else set()


def in_parallel(machines: Sequence[Machine], work: Callable[[Machine, threading.Event], None]) -> None:
    """`work` for each machine in a thread of its own; the first failure stops the others and is raised."""
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(max(1, len(machines))) as pool:
        # Those first that the others wait for.
        ordered = sorted(machines, key=lambda machine: "infra" not in machine.groups)
        futures = [pool.submit(work, machine, stop) for machine in ordered]
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


def create(
    machines: Sequence[Machine], progress: Progress = nobody, recreate: bool = False, then: Then = _nothing
) -> None:
    """Make the machines that are not there, start those that are off, and wait until all are ready.

    With `recreate` those that stand on another image than today's are made anew; else they are only named. `then` is
    done with each that was there before.
    Raises VmError, ImageError, LabError, HostError.
    """
    lab.current().up()
    with connect() as connection:
        for machine in machines:
            domain = find(connection, machine.name)
            if domain and recreate and image_key(domain) != images.key(machine.image_name):
                progress(machine.name, "stands on an older image: made anew")
                with store.locked(machine.name):
                    _remove(connection, machine.name)
        missing = [m for m in machines if not _whole(connection, m.name)]
        made = {m.name: images.ensure(m.image_name, progress) for m in missing}
        hardware = hardware_for(made.values())

        def work(machine: Machine, stop: threading.Event) -> None:
            with store.locked(machine.name):
                if machine.name in made:
                    progress(machine.name, "made")
                    _make(connection, machine, made[machine.name], hardware)
                domain = find(connection, machine.name)
                if image_key(domain) != images.key(machine.image_name):
                    progress(machine.name, "stands on an older image; provisioning brings it along")
                _boot(machine, domain, progress, stop)
                if machine.name not in made:  # in a new one nothing is set up yet
                    then(machine, progress)

        in_parallel(machines, work)


def hardware_for(made: Iterable[Image]) -> host.Hardware:
    """What this computer gives a guest, found out with one of the images `made`, or with any there is."""
    image = next(iter(made), None) or next(iter(images.list_images()), None)
    if image is None:
        image = images.ensure(images.PLAIN)
    return host.hardware(str(image.kernel), str(image.initrd))


def _whole(connection: Any, name: str) -> bool:
    """Whether the machine is defined and has its disk: definition is the last step of making one."""
    return bool(find(connection, name)) and (store.directory(name) / "disk.qcow2").exists()


def define(connection: Any, machine: Machine, image: Image, hardware: host.Hardware) -> Any:
    """libvirt's domain of `machine`, whose files are in its directory. Raises VmError."""
    links = [xml.Link(mac, lab.current().interface(network)) for network, mac in machine.macs.items()]
    with errors(machine.name):
        return connection.defineXML(xml.render(machine, image, hardware, links, store.directory(machine.name)))


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
    define(connection, machine, image, hardware)


def _boot(machine: Machine, domain: Any, progress: Progress, stop: threading.Event) -> None:
    """Start the domain unless it runs, and wait until the machine is ready."""
    with _turn(machine, progress, stop):
        with errors(machine.name):
            state, _ = domain.state()
            if state == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()
            elif state != libvirt.VIR_DOMAIN_RUNNING:
                _require_free(machine)
                domain.create()
        begin = time.monotonic()
        ready.wait(machine, ready.requirements(machine, domain), ready.timeout(), progress, stop)
        progress(machine.name, f"ready ({time.monotonic() - begin:.0f} s)")


_TURNS = threading.BoundedSemaphore(max(2, os.cpu_count() or 2))


@contextlib.contextmanager
def _turn(machine: Machine, progress: Progress, stop: threading.Event) -> Iterator[None]:
    """Emulated machines boot as many at a time as there are cores: else each takes as long as all of them."""
    if not host.emulates():
        yield
        return
    if not _TURNS.acquire(blocking=False):
        progress(machine.name, "waiting: others boot first")
        while not _TURNS.acquire(timeout=1):
            if stop.is_set():
                raise ready.CancelledError
    try:
        yield
    finally:
        _TURNS.release()


def _require_free(machine: Machine) -> None:
    """Raise VmError when somebody answers at the address of `machine`, which is off."""
    address = str(machine.internal)
    try:
        lab.current().connect(address, 22, _FREE_SECONDS).close()
    except ConnectionRefusedError:
        pass
    except OSError:
        return  # nobody there
    raise VmError(
        f"the address {address} of {machine.name} is occupied: somebody answers there, though {machine.name} is off",
        f"see who: ./voip lab.shell --command 'ip neigh show {address}; ip addr show to {address}'",
    )


def _need(connection: Any, machines: Sequence[Machine]) -> None:
    missing = [m.name for m in machines if not find(connection, m.name)]
    if missing:
        raise VmError(f"not there: {', '.join(missing)}", f"./voip vms.create {','.join(missing)}")


def start(machines: Sequence[Machine], progress: Progress = nobody, then: Then = _nothing) -> None:
    """Start machines that exist, wait until they are ready, and do `then` with each. Raises VmError, HostError."""
    lab.current().up()
    with connect() as connection:
        _need(connection, machines)

        def work(machine: Machine, stop: threading.Event) -> None:
            with store.locked(machine.name):
                _boot(machine, find(connection, machine.name), progress, stop)
                then(machine, progress)

        in_parallel(machines, work)


def stop(machines: Sequence[Machine], progress: Progress = nobody) -> None:
    """Shut machines down by ACPI; one that does not power off in time is switched off. Raises VmError, HostError."""
    _reach(m.name for m in machines)
    with connect_if_up() as connection:

        def work(machine: Machine, cancelled: threading.Event) -> None:
            with store.locked(machine.name), errors(machine.name):
                domain = find(connection, machine.name) if connection else None
                if domain is None or not domain.isActive():
                    progress(machine.name, "is off")
                    return
                deadline = Deadline(host.patience(_SHUTDOWN_SECONDS))
                while not deadline.is_due and domain.isActive():
                    _press_power_button(domain)  # again: a guest that still boots does not hear it
                    pause = Deadline(min(_POWER_BUTTON_SECONDS, deadline.left))
                    pause.until(lambda: cancelled.is_set() or not domain.isActive())
                    if cancelled.is_set():
                        raise ready.CancelledError
                if domain.isActive():
                    switch_off(domain)
                    progress(machine.name, f"did not power off within {deadline.seconds:.0f} s: switched off")
                else:
                    progress(machine.name, f"off ({deadline.elapsed:.0f} s)")

        in_parallel(machines, work)


def _press_power_button(domain: Any) -> None:
    try:
        if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            domain.resume()
        domain.shutdown()
    except libvirt.libvirtError as error:
        if not absent(error):
            raise


def switch_off(domain: Any) -> None:
    """Pull the plug of a domain; one that is off, or None, is no error. Raises libvirtError."""
    try:
        if domain and domain.isActive():
            domain.destroy()
    except libvirt.libvirtError as error:
        if not absent(error):
            raise


def destroy(names: Sequence[str], progress: Progress = nobody) -> None:
    """Remove machines: domain, disks, seed, snapshots, keys; absent ones are no error. Raises VmError, HostError."""
    _reach(names)
    with connect_if_up() as connection:
        for name in names:
            with store.locked(name):
                progress(name, "removed" if _remove(connection, name) else "was not there")
            (store.root() / f".{name}.lock").unlink(missing_ok=True)


def _remove(connection: Any, name: str) -> bool:
    domain = find(connection, name) if connection else None
    if domain:
        with errors(name):
            flags = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            if "<nvram" in domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE):
                flags |= libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
            if domain.snapshotNum():
                flags |= libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            switch_off(domain)
            domain.undefineFlags(flags)
    return bool(store.remove(name)) or domain is not None


def require_running(machines: Sequence[Machine]) -> None:
    """Raise VmError, naming them, when some of `machines` are not there or off."""
    with connect_if_up() as connection, errors("libvirt"):
        domains = {m.name: find(connection, m.name) if connection else None for m in machines}
        off = [name for name, domain in domains.items() if domain is None or not domain.isActive()]
    if off:
        raise VmError(f"not running: {', '.join(off)}", f"./voip vms.create {','.join(off)}")
