"""The life of machines and of their snapshots, played on libvirt's own test driver with real files."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from voip_stack import files, host, images, inventory, lab, settings, vms
from voip_stack.deadline import Deadline
from voip_stack.errors import HostError, VmError
from voip_stack.host.machine import X86, Hardware
from voip_stack.images import Image
from voip_stack.vms import connection, lifecycle, ready, saved, seed, ssh, store, tools
from voip_stack.vms import domain as xml

STACK = inventory.load()
SIP, PBX = STACK.machines["sip-1"], STACK.machines["pbx-1"]
URI = "test:///default"

needs_tools = pytest.mark.skipif(
    not all(shutil.which(t) for t in ("qemu-img", "xorriso", "ssh-keygen")),
    reason="the tools that make disks are missing",
)
pytestmark = needs_tools


class FakeLab:
    uri = URI

    def up(self) -> None: ...

    def interface(self, _network: str) -> lab.Interface:
        return lab.Interface("network", "default")

    def proxy_command(self) -> str:
        return "ip netns exec lab socat - TCP:%h:%p"

    def connect(self, _address: str, _port: int, _timeout: float) -> socket.socket:
        raise TimeoutError  # nobody there


class Story:
    """The progress messages about the machines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, _name: str, what: str) -> None:
        self.lines.append(what)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    for name in ("disk.raw", "vmlinuz", "initrd.img"):
        (tmp_path / name).write_bytes(b"\0" * 1024)
    return Image("any", "today", tmp_path / "disk.raw", tmp_path / "vmlinuz", tmp_path / "initrd.img", "root=/dev/vda")


@pytest.fixture
def driver(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """libvirt's test driver as the lab's; its state lives as long as this connection."""
    monkeypatch.setenv("VOIP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("VOIP_SECRETS_DIR", str(tmp_path / "secrets"))
    monkeypatch.setattr(lab, "current", FakeLab)
    monkeypatch.setattr(images, "ensure", lambda *_: image)
    monkeypatch.setattr(images, "key", lambda _name: image.key)
    monkeypatch.setattr(
        lifecycle, "hardware_for", lambda _made: Hardware("test", X86, "host-passthrough", "/usr/bin/qemu")
    )
    monkeypatch.setattr(host, "emulates", lambda: True)
    monkeypatch.setattr(ready, "requirements", lambda m, d: [ready.Requirement("runs", lambda _: _runs(m, d), "")])
    monkeypatch.setattr(saved, "set_clocks", lambda _machines: None)
    settings.load.cache_clear()
    with connection.connect(URI) as opened:
        yield opened
        for domain in lifecycle_domains(opened):
            lifecycle.switch_off(domain)
            domain.undefine()
    settings.load.cache_clear()


def _runs(machine: inventory.Machine, domain: Any) -> bool:
    return ready._runs(machine.name, domain)


def lifecycle_domains(opened: Any) -> list[Any]:
    return [d for d in opened.listAllDomains() if d.name() in STACK.machines]


def _mark(machine: str) -> Path:
    """A file that lives as long as the machine."""
    mark = store.directory(machine) / "mark"
    mark.touch()
    return mark


def running(opened: Any) -> set[str]:
    return {d.name() for d in lifecycle_domains(opened) if d.isActive()}


def test_machines_are_made_started_stopped_and_removed(driver: Any) -> None:
    vms.create([SIP, PBX], Story())
    assert running(driver) == {"sip-1", "pbx-1"}
    vms.stop([SIP], Story())
    assert running(driver) == {"pbx-1"}
    vms.start([SIP], Story())
    assert running(driver) == {"sip-1", "pbx-1"}
    for expected in ("removed", "was not there"):
        story = Story()
        vms.destroy(["sip-1", "pbx-1"], story)
        assert story.lines == [expected] * 2
    assert not lifecycle_domains(driver)
    assert not list(store.root().iterdir())


@pytest.mark.usefixtures("driver")
def test_only_a_machine_of_before_has_a_vault_to_unseal() -> None:
    asked: list[str] = []

    def unseal(machine: inventory.Machine, _progress: object) -> None:
        asked.append(machine.name)

    vms.create([SIP], then=unseal)
    assert asked == []
    vms.create([SIP, PBX], then=unseal)
    assert asked == ["sip-1"]
    vms.start([PBX], then=unseal)
    assert asked == ["sip-1", "pbx-1"]


def test_a_running_machine_is_left_as_it_is(driver: Any) -> None:
    vms.create([SIP], Story())
    before, mark = driver.lookupByName("sip-1").ID(), _mark("sip-1")
    vms.create([SIP], Story())
    assert driver.lookupByName("sip-1").ID() == before
    assert mark.exists()


def test_a_machine_that_is_off_or_paused_is_woken_with_its_disk(driver: Any) -> None:
    vms.create([SIP, PBX], Story())
    mark = _mark("sip-1")
    driver.lookupByName("sip-1").destroy()
    driver.lookupByName("pbx-1").suspend()
    vms.create([SIP, PBX], Story())
    assert driver.lookupByName("pbx-1").state()[0] == libvirt.VIR_DOMAIN_RUNNING
    assert running(driver) == {"sip-1", "pbx-1"}
    assert mark.exists()


@pytest.mark.parametrize(("accelerator", "most"), [("tcg", 2), ("kvm", 4)])
def test_emulated_machines_boot_as_many_at_a_time_as_there_are_cores(
    driver: Any, monkeypatch: pytest.MonkeyPatch, accelerator: str, most: int
) -> None:
    booting: list[str] = []
    together: list[int] = []

    def wait(machine: inventory.Machine, *_: object) -> None:
        booting.append(machine.name)
        together.append(len(booting))
        Deadline(30).until(lambda: max(together) == most)
        time.sleep(0.1)  # one more would come now
        together.append(len(booting))
        booting.remove(machine.name)

    monkeypatch.setattr(ready, "wait", wait)
    monkeypatch.setattr(host, "emulates", lambda: accelerator == "tcg")
    monkeypatch.setattr(lifecycle, "_TURNS", threading.BoundedSemaphore(2))
    vms.create(list(STACK.machines.values()))
    assert max(together) == most
    assert driver


def test_a_machine_whose_address_is_occupied_is_not_started(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vms.create([PBX], Story())

    def refused(_self: FakeLab, _address: str, _port: int, _timeout: float) -> socket.socket:
        raise ConnectionRefusedError

    monkeypatch.setattr(FakeLab, "connect", refused)
    with pytest.raises(VmError, match=r"the address 192\.168\.64\.10 of sip-1 is occupied"):
        vms.create([SIP, PBX], Story())
    assert running(driver) == {"pbx-1"}


@pytest.mark.parametrize("killed_in", ["qemu-img", "ssh-keygen", "xorriso", "define"])
def test_a_create_killed_at_any_step_can_be_run_again(
    driver: Any, killed_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException): ...

    def die(program: str, *args: str, writes: Path) -> str:
        if program == killed_in:
            writes.parent.mkdir(parents=True, exist_ok=True)
            writes.write_text("half")
            raise KilledError
        return real(program, *args, writes=writes)

    real = tools.run
    with monkeypatch.context() as patch:
        patch.setattr(tools, "run", die)
        if killed_in == "define":
            patch.setattr(xml, "render", lambda *_: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            vms.create([SIP], Story())
    shutil.rmtree(settings.load().secrets_dir, ignore_errors=True)
    assert not running(driver)
    vms.create([SIP], Story())
    assert running(driver) == {"sip-1"}
    assert (
        subprocess.run(["qemu-img", "check", "-q", store.directory("sip-1") / "disk.qcow2"], check=False).returncode
        == 0
    )


def test_a_machine_whose_disk_was_lost_is_made_anew(driver: Any) -> None:
    vms.create([SIP], Story())
    shutil.rmtree(store.directory("sip-1"))
    vms.create([SIP], Story())
    assert (store.directory("sip-1") / "disk.qcow2").exists()
    assert running(driver) == {"sip-1"}


def test_an_older_image_is_told_and_left_unless_the_user_wants_it_anew(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vms.create([SIP], Story())
    monkeypatch.setattr(images, "key", lambda _name: "tomorrow")
    mark = _mark("sip-1")
    story = Story()
    vms.create([SIP], story)
    assert any("older image" in line for line in story.lines)
    assert mark.exists()
    vms.create([SIP], Story(), recreate=True)
    assert not mark.exists()
    assert running(driver) == {"sip-1"}


def test_a_domain_of_the_user_by_the_same_name_is_never_touched(driver: Any) -> None:
    theirs = driver.defineXML(
        '<domain type="test"><name>sip-1</name><memory>8192</memory><os><type>hvm</type></os></domain>'
    )
    for command in (vms.create, vms.start, vms.stop, vms.snapshot):
        with pytest.raises(VmError, match="not of this stack"):
            command([SIP])
    with pytest.raises(VmError, match="not of this stack"):
        vms.destroy(["sip-1"], Story())
    assert driver.lookupByName("sip-1").UUIDString() == theirs.UUIDString()


def test_starting_a_machine_that_was_never_made_says_what_to_do(driver: Any) -> None:
    with pytest.raises(VmError, match="sip-1") as caught:
        vms.start([SIP], Story())
    assert caught.value.hint == "./voip vms.create sip-1"
    with pytest.raises(VmError, match="not running: sip-1"):
        vms.require_running([SIP])
    assert not lifecycle_domains(driver)


def test_a_machine_that_goes_off_while_it_boots_is_not_waited_for(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vms.create([SIP], Story())

    def dies(_left: float) -> bool:
        lifecycle.switch_off(driver.lookupByName("sip-1"))
        return False

    def two(machine: inventory.Machine, domain: Any) -> list[ready.Requirement]:
        return [
            ready.Requirement("runs", lambda _: _runs(machine, domain), ""),
            ready.Requirement("answers", dies, ""),
        ]

    monkeypatch.setattr(ready, "requirements", two)
    with pytest.raises(VmError, match="went off while it booted"):
        vms.create([SIP], Story())


def test_a_guest_that_qemu_stopped_for_a_full_disk_is_told_so() -> None:
    class Stopped:
        def state(self) -> tuple[int, int]:
            return libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR

    with pytest.raises(VmError, match="is full"):
        ready._runs("sip-1", Stopped())


def test_a_full_disk_is_one_clear_message_and_leaves_no_machine(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: full)
        patch.setattr(subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, 1, "", "No space left"))
        with pytest.raises(VmError, match="the disk of .* is full"):
            vms.create([SIP], Story())
    assert not lifecycle_domains(driver)


def test_one_command_at_a_time_works_on_a_machine(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_TIMEOUT", 0.1)
    with store.locked("sip-1"), pytest.raises(files.BusyError, match="another command is at work on sip-1"):
        vms.create([SIP], Story())
    assert not lifecycle_domains(driver)


def test_the_failure_of_one_machine_is_raised_and_a_stop_is_not() -> None:
    def work(machine: inventory.Machine, stop: Any) -> None:
        if machine is SIP:
            raise VmError("broken")
        stop.wait(10)
        raise ready.CancelledError

    with pytest.raises(VmError, match="broken"):
        lifecycle.in_parallel([SIP, PBX], work)


def test_no_libvirtd_means_no_machine_but_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(FakeLab, "uri", f"qemu+unix:///system?socket={tmp_path}/none")
    monkeypatch.setattr(lab, "current", FakeLab)
    monkeypatch.setattr(store, "root", lambda: tmp_path)
    store.directory("pbx-1").mkdir()
    assert [s.state for s in vms.status([SIP, PBX])] == ["absent", "no libvirtd"]
    assert vms.image_keys() == set()
    vms.stop([SIP], Story())
    vms.destroy(["sip-1"], Story())
    with pytest.raises(VmError, match="not running: sip-1"):
        vms.require_running([SIP])
    with pytest.raises(HostError, match="libvirtd does not answer"):
        vms.start([SIP], Story())


@pytest.mark.usefixtures("driver")
def test_ssh_knows_a_machine_by_all_its_names_and_its_key() -> None:
    vms.create([SIP], Story())
    for name in ("sip-1", "sip-1.voip.local", "192.168.64.10"):
        done = subprocess.run([*vms.ssh.argv(name, options=["-G"])], capture_output=True, text=True, check=True)
        config = dict(line.split(" ", 1) for line in done.stdout.splitlines())
        assert config["hostname"] == "192.168.64.10"
        assert config["user"] == "voip"
        assert config["stricthostkeychecking"] == "true"
        assert config["identityfile"] == str(ssh.identity())
        assert config["proxycommand"] == FakeLab().proxy_command()
        known = Path(config["userknownhostsfile"]).read_text().split()
        key = store.directory("sip-1") / "ssh_host_ed25519_key"
        assert [config["hostkeyalias"], *ssh.public(key).split()[:2]] == known
    assert ssh.identity().stat().st_mode & 0o777 == 0o600
    plain = ["env", f"PATH={ssh.commands()}:{os.environ['PATH']}", "ssh", "-G"]
    for words in (["voip@192.168.64.10"], ["-l", "voip", "sip-1"]):
        done = subprocess.run([*plain, *words], capture_output=True, text=True, check=True)
        assert f"identityfile {ssh.identity()}" in done.stdout.splitlines()
    vms.destroy(["sip-1"], Story())
    done = subprocess.run([*vms.ssh.argv("sip-1", options=["-G"])], capture_output=True, text=True, check=True)
    assert "192.168.64.10" not in done.stdout


def test_the_seed_is_a_cdrom_that_cloud_init_finds(tmp_path: Path) -> None:
    seed.write(tmp_path / "seed.iso", {"meta-data": "instance-id: x\n", "user-data": "#cloud-config\n"})
    label = (tmp_path / "seed.iso").read_bytes()[0x8028:0x8048].strip()
    assert label.lower() == b"cidata"


def _layers(machine: str) -> list[str]:
    return sorted(f.name for f in store.directory(machine).glob("layer-*"))


def _backing(machine: str) -> str:
    disk = store.directory(machine) / "disk.qcow2"
    done = subprocess.run(["qemu-img", "info", "-U", disk], capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if "backing file:" in line)


def test_a_snapshot_can_be_reverted_to_again_and_again_and_replaced(driver: Any) -> None:
    vms.create([SIP, PBX], Story())
    vms.snapshot([SIP, PBX], "default", Story())
    assert running(driver) == {"sip-1", "pbx-1"}
    (first,) = _layers("sip-1")
    assert _layers("pbx-1") == [first], "one moment has one name"
    for _ in range(2):
        vms.revert([SIP, PBX], "default", Story())
        assert running(driver) == {"sip-1", "pbx-1"}
        assert first in _backing("sip-1")
    vms.snapshot([SIP, PBX], "default", Story())
    assert vms.snapshots("sip-1") == ["default"]
    assert first not in _backing("sip-1")
    driver.lookupByName("sip-1").destroy()
    vms.revert([SIP, PBX], "default", Story())
    assert running(driver) == {"sip-1", "pbx-1"}
    assert driver.lookupByName("sip-1").state()[0] == libvirt.VIR_DOMAIN_RUNNING


def test_a_snapshot_that_fails_leaves_the_machines_running_and_the_older_one(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vms.create([SIP, PBX], Story())
    vms.snapshot([SIP, PBX], "default", Story())
    kept = _layers("sip-1")
    disk = (store.directory("sip-1") / "disk.qcow2").stat().st_ino
    real = shutil.rmtree

    def fails_for_pbx(path: Path, **options: Any) -> None:
        if "pbx-1" in str(path):
            raise tools.full(store.root())
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fails_for_pbx)
        with pytest.raises(VmError, match="is full"):
            vms.snapshot([SIP, PBX], "default", Story())
    assert running(driver) == {"sip-1", "pbx-1"}
    assert all(d.state()[0] == libvirt.VIR_DOMAIN_RUNNING for d in lifecycle_domains(driver))
    assert _layers("sip-1") == kept
    assert (store.directory("sip-1") / "disk.qcow2").stat().st_ino == disk
    vms.revert([SIP, PBX], "default", Story())


def test_a_snapshot_that_is_not_there_or_of_two_moments_changes_nothing(driver: Any) -> None:
    vms.create([SIP, PBX], Story())
    vms.snapshot([SIP], "here", Story())
    before = [driver.lookupByName(n).ID() for n in ("sip-1", "pbx-1")]
    with pytest.raises(VmError, match="no snapshot 'here' of pbx-1") as caught:
        vms.revert([SIP, PBX], "here", Story())
    assert caught.value.hint == "there is: here"
    vms.snapshot([PBX], "here", Story())
    before[1] = driver.lookupByName("pbx-1").ID()
    with pytest.raises(VmError, match="not of one moment"):
        vms.revert([SIP, PBX], "here", Story())
    with pytest.raises(VmError, match="is no name"):
        vms.snapshot([SIP], "../escape", Story())
    assert [driver.lookupByName(n).ID() for n in ("sip-1", "pbx-1")] == before


def test_destroy_takes_snapshots_along(driver: Any) -> None:
    vms.create([SIP], Story())
    vms.snapshot([SIP], "default", Story())
    vms.destroy(["sip-1"], Story())
    assert not store.directory("sip-1").exists()
    assert not lifecycle_domains(driver)


def test_paused_machines_stand_still_and_run_again_whatever_happens_meanwhile(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks: list[str] = []
    monkeypatch.setattr(saved, "set_clocks", lambda machines: clocks.extend(m.name for m in machines))
    vms.create([SIP], Story())

    def state() -> int:
        return int(driver.lookupByName("sip-1").state()[0])

    def interrupted() -> None:
        with vms.paused([SIP, PBX]):  # the PBX does not exist
            assert state() == libvirt.VIR_DOMAIN_PAUSED
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state() == libvirt.VIR_DOMAIN_RUNNING
    assert clocks == ["sip-1"]
