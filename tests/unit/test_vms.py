"""Machines against libvirt's own test driver, and the files rendered for the real one."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt
import pytest
import yaml

from voip_stack import host, inventory
from voip_stack.errors import HostError, VmError
from voip_stack.host.machine import ARM, X86, Hardware
from voip_stack.images import Image
from voip_stack.lab import Interface
from voip_stack.vms import connection, domain, lifecycle, ready, seed, ssh, store

MACHINE = inventory.load().machines["media-1"]
KVM = Hardware("kvm", X86, "host-passthrough", "/usr/bin/qemu-system-x86_64")
TCG = dataclasses.replace(KVM, accelerator="tcg", cpu_mode="maximum")
HVF = Hardware("hvf", ARM, "host-passthrough", "/opt/qemu-system-aarch64", "/opt/edk2-code.fd", "/opt/edk2-vars.fd")


@pytest.fixture
def image(tmp_path: Path) -> Image:
    for name in ("disk.raw", "vmlinuz", "initrd.img"):
        (tmp_path / name).write_bytes(b"\0" * 512)
    return Image(
        "media-1", "0123abcd", tmp_path / "disk.raw", tmp_path / "vmlinuz", tmp_path / "initrd.img", "root=/dev/vda"
    )


def _links(interface: Interface) -> list[domain.Link]:
    return [domain.Link(mac, interface) for mac in MACHINE.macs.values()]


@pytest.mark.parametrize("hardware", [KVM, TCG, HVF], ids=["kvm", "tcg", "hvf"])
@pytest.mark.parametrize(
    "interface",
    [Interface("bridge", "voip-int"), Interface("network", "voip-int"), Interface(vmnet_socket="/var/run/v.sock")],
    ids=["bridge", "network", "vmnet"],
)
def test_the_domain_is_valid_for_libvirt(
    image: Image, hardware: Hardware, interface: Interface, tmp_path: Path
) -> None:
    if not shutil.which("virt-xml-validate"):
        pytest.skip("virt-xml-validate is missing")
    xml = tmp_path / "domain.xml"
    xml.write_text(domain.render(MACHINE, image, hardware, _links(interface), tmp_path))
    done = subprocess.run(["virt-xml-validate", str(xml), "domain"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_an_emulated_guest_is_kept_to_one_processor(image: Image, tmp_path: Path) -> None:
    def processors(hardware: Hardware) -> str | None:
        return ET.fromstring(domain.render(MACHINE, image, hardware, [], tmp_path)).findtext("vcpu")  # noqa: S314

    assert processors(TCG) == "1"
    assert processors(KVM) == str(MACHINE.vcpus) != "1"


def test_interfaces_keep_the_order_of_the_inventory(image: Image, tmp_path: Path) -> None:
    xml = domain.render(MACHINE, image, TCG, _links(Interface("bridge", "b")), tmp_path)
    macs = [xml.index(mac) for mac in (MACHINE.macs["internal"], MACHINE.macs["external"])]
    slots = [xml.index(f'slot="{n}"') for n in (4, 5)]
    assert macs == sorted(macs)
    assert slots == sorted(slots)


def test_the_seed_says_who_may_come_and_what_the_addresses_are(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "identity", lambda: tmp_path / "id")
    (tmp_path / "id.pub").write_text("ssh-ed25519 AAAA user\n")
    (tmp_path / "host").write_text("PRIVATE\nKEY\n")
    (tmp_path / "host.pub").write_text("ssh-ed25519 BBBB host\n")
    files = seed.render(MACHINE, inventory.load(), image, tmp_path / "host", None)
    user = yaml.safe_load(files["user-data"])
    assert user["users"][0]["ssh_authorized_keys"] == ["ssh-ed25519 AAAA user"]
    assert user["users"][0]["lock_passwd"] is True
    assert user["ssh_pwauth"] is False
    network = yaml.safe_load(files["network-config"])["ethernets"]
    assert network["eth0"]["addresses"] == ["192.168.64.20/24"]
    assert network["eth1"]["match"]["macaddress"] == MACHINE.macs["external"]
    assert network["eth0"]["dhcp4"] is False
    assert "routes" not in network["eth0"]


@pytest.fixture
def driver() -> Iterator[Any]:
    with connection.connect("test:///default") as opened:
        yield opened


def test_a_machine_that_is_not_there_is_found_as_none(driver: Any) -> None:
    assert lifecycle.find(driver, "no-such-machine") is None


def test_a_domain_remembers_its_image(driver: Any, image: Image, tmp_path: Path) -> None:
    xml = domain.render(MACHINE, image, TCG, _links(Interface("network", "default")), tmp_path)
    made = driver.defineXML(xml.replace('type="qemu"', 'type="test"', 1))
    assert lifecycle.image_key(made) == image.key
    assert lifecycle.find(driver, MACHINE.name).UUIDString() == domain.identifier(MACHINE.name)
    assert lifecycle.image_key(driver.lookupByName("test")) == ""


def test_removing_a_machine_twice_leaves_nothing(
    driver: Any, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "root", lambda: tmp_path / "vms")
    xml = domain.render(MACHINE, image, TCG, _links(Interface("network", "default")), tmp_path)
    driver.defineXML(xml.replace('type="qemu"', 'type="test"', 1)).create()
    store.directory(MACHINE.name).mkdir(parents=True)
    assert lifecycle._remove(driver, MACHINE.name) is True
    assert lifecycle._remove(driver, MACHINE.name) is False
    assert lifecycle.find(driver, MACHINE.name) is None
    assert not store.directory(MACHINE.name).exists()


def test_no_libvirtd_is_one_clear_message() -> None:
    with (
        pytest.raises(HostError, match="libvirtd does not answer"),
        connection.connect("qemu+unix:///system?socket=/no"),
    ):
        pass


@pytest.mark.parametrize("code", [libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_SYSTEM_ERROR])
def test_a_libvirtd_that_was_killed_during_a_call_is_named(code: int) -> None:
    error = libvirt.libvirtError("client socket is closed")
    error.err = (code, libvirt.VIR_FROM_RPC, "client socket is closed", 2, "", None, None, 0, 0)
    with pytest.raises(HostError, match="libvirtd does not answer"), connection.errors("sip-1"):
        raise error


def test_a_machine_that_never_gets_ready_is_named_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "root", lambda: tmp_path)
    store.directory(MACHINE.name).mkdir()
    store.console_log(MACHINE.name).write_text("Booting\nKernel panic - not syncing: no root\n")
    needs = [
        ready.Requirement("it runs", lambda _: True, ""),
        ready.Requirement("it answers", lambda _: False, "do this"),
    ]
    with pytest.raises(VmError) as caught:
        ready.wait(MACHINE, needs, 0.2, lambda _name, _what: None, threading.Event())
    assert "media-1 is not ready" in caught.value.message
    assert "it answers" in caught.value.message
    assert "2 of 2" in caught.value.message
    assert caught.value.hint == "do this"
    assert "Kernel panic" in caught.value.details


def test_the_hardware_of_this_computer_is_known() -> None:
    assert host.current().architecture in (X86, ARM)
