import json
import re
import shutil
import stat
import time
from pathlib import Path

import pytest

from voip_stack import host, settings
from voip_stack.errors import HostError
from voip_stack.host import doctor, platforms, probe
from voip_stack.host.doctor import Finding, State
from voip_stack.host.machine import ARM, X86
from voip_stack.host.platforms import Linux, MacOS, Platform
from voip_stack.host.tools import tools
from voip_stack.paths import REPOSITORY
from voip_stack.tell import nobody

ALIVE = "echo '[ 1.2] Run /init as init process'; sleep 60"
TRAP = "echo 'KVM internal error. Suberror: 1'; sleep 60"


class Pretended(Linux):
    """A computer that claims to have kvm, with the test's own QEMU."""

    def __init__(self, qemu: Path) -> None:
        super().__init__(X86)
        self.qemu = qemu
        self.boot = "first"

    @property
    def boot_id(self) -> str:
        return self.boot

    @property
    def emulator(self) -> str:
        return str(self.qemu)

    def offers(self, accelerator: str) -> bool:
        return accelerator == "kvm"

    def becomes(self, script: str) -> None:
        self.qemu.write_text(f"#!/bin/sh\necho x >>{self.qemu}.boots\n{script}\n")
        self.qemu.chmod(stat.S_IRWXU)

    @property
    def boots(self) -> int:
        record = Path(f"{self.qemu}.boots")
        return len(record.read_text().splitlines()) if record.exists() else 0


@pytest.fixture
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    machine = Pretended(tmp_path / "qemu")
    monkeypatch.setattr(probe, "current", lambda: machine)
    configure(monkeypatch, tmp_path)
    return machine


def configure(monkeypatch: pytest.MonkeyPatch, cache: Path, env: str = "") -> None:
    values = settings.parse(env, {"VOIP_CACHE_DIR": str(cache)})
    monkeypatch.setattr(settings, "load", lambda: values)


def test_kvm_counts_once_a_guest_has_booted_in_it_and_only_for_this_boot(computer: Pretended) -> None:
    computer.becomes(ALIVE)
    assert probe.verdict() is None
    assert probe.accelerator("k", "i") == "kvm"
    assert probe.accelerator("k", "i") == probe.verdict() == "kvm"
    assert computer.boots == 1
    computer.boot = "second"
    computer.becomes(TRAP)
    assert probe.verdict() is None
    assert probe.accelerator("k", "i") == "tcg"
    assert computer.boots == 2


def test_a_kvm_that_kills_its_guest_is_seen_at_once(computer: Pretended) -> None:
    computer.becomes(TRAP)
    start = time.monotonic()
    assert probe.accelerator("k", "i") == "tcg"
    assert time.monotonic() - start < 10
    assert probe.verdict() == "tcg"


def test_a_silent_guest_ends_with_the_deadline(computer: Pretended) -> None:
    computer.becomes("echo starting; sleep 60")
    start = time.monotonic()
    works, evidence = probe.probe(computer, "kvm", "k", "i", seconds=1)
    assert not works
    assert "starting" in evidence
    assert time.monotonic() - start < 10


def test_a_forced_accelerator_that_does_not_work_is_refused_with_evidence(
    computer: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, tmp_path, "VOIP_ACCELERATOR=kvm")
    computer.becomes(TRAP)
    with pytest.raises(HostError, match="VOIP_ACCELERATOR=kvm") as caught:
        probe.accelerator("k", "i")
    assert "KVM internal error" in caught.value.details
    configure(monkeypatch, tmp_path, "VOIP_ACCELERATOR=hvf")
    with pytest.raises(HostError, match="VOIP_ACCELERATOR=hvf"):
        probe.verdict()


def test_a_damaged_record_is_as_good_as_none(computer: Pretended, tmp_path: Path) -> None:
    (tmp_path / "accelerator.json").write_text("{")
    computer.becomes(ALIVE)
    assert probe.accelerator("k", "i") == "kvm"
    assert json.loads((tmp_path / "accelerator.json").read_text())["boot_id"] == "first"


@pytest.mark.parametrize(
    ("system", "machine", "kind", "board", "console"),
    [
        ("Linux", "x86_64", Linux, "q35", "ttyS0"),
        ("Linux", "aarch64", Linux, "virt", "ttyAMA0"),
        ("Darwin", "arm64", MacOS, "virt", "ttyAMA0"),
    ],
)
def test_each_computer_gets_its_board_and_console(
    system: str, machine: str, kind: type[Platform], board: str, console: str
) -> None:
    platform = platforms.choose(system, machine)
    assert type(platform) is kind
    assert (platform.architecture.machine, platform.architecture.console) == (board, console)


@pytest.mark.parametrize(("system", "machine"), [("Windows", "x86_64"), ("Linux", "riscv64")])
def test_another_kind_of_computer_is_refused_by_name(system: str, machine: str) -> None:
    with pytest.raises(HostError, match="Windows|riscv64"):
        platforms.choose(system, machine)


def test_a_mac_brings_firmware_and_takes_max_on_an_m4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Platform, "emulator", "/brew/bin/qemu-system-aarch64")
    monkeypatch.setattr(MacOS, "_sysctl", lambda _self, _name: "Apple M4 Pro")
    hardware = MacOS(ARM).hardware("hvf")
    assert hardware.firmware == "/brew/share/qemu/edk2-aarch64-code.fd"
    assert hardware.nvram_template
    assert (hardware.cpu_mode, hardware.domain_type, hardware.acpi) == ("maximum", "hvf", True)
    monkeypatch.setattr(MacOS, "_sysctl", lambda _self, _name: "Apple M1")
    assert MacOS(ARM).hardware("hvf").cpu_mode == "host-passthrough"


def test_emulation_names_no_cpu_model_and_needs_no_firmware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Platform, "emulator", "/usr/bin/qemu")
    plain = Linux(X86).hardware("tcg")
    assert (plain.domain_type, plain.cpu_mode, plain.acpi, plain.firmware) == ("qemu", "maximum", True, "")
    assert not Linux(ARM).hardware("kvm").acpi


def debian_packages(qemu_arch: str) -> set[str]:
    text = (REPOSITORY / "requirements" / "debian.txt").read_text().replace("{qemu_arch}", qemu_arch)
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    assert all(" " not in line for line in lines)
    return set(filter(None, lines))


def test_the_launcher_installs_every_tool_that_the_doctor_looks_for() -> None:
    assert {t.debian for t in tools(Linux(X86))} <= debian_packages("x86")
    assert {t.debian for t in tools(Linux(ARM))} <= debian_packages("arm")
    brewed = set(re.findall(r'^brew "([^"]+)"', (REPOSITORY / "Brewfile").read_text(), re.MULTILINE))
    assert {t.brew for t in tools(MacOS(ARM))} <= brewed


def test_a_missing_tool_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "current", lambda: Linux(X86))
    monkeypatch.setattr(Linux, "find", lambda _self, program: None if program == "sipp" else f"/bin/{program}")
    monkeypatch.setattr(shutil, "which", lambda _program: "/usr/bin/apt-get")
    (finding,) = doctor._tools()
    assert finding.name == "tool sipp"
    assert finding.state is State.FAILED
    assert finding.mend.endswith("apt-get install --yes --no-install-recommends sip-tester")
    assert finding.fix


def test_too_little_memory_names_what_the_machines_want(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "current", lambda: Linux(X86))
    for memory, state in ((16000, State.OK), (11000, State.WARNING), (4000, State.FAILED)):
        monkeypatch.setattr(Linux, "memory_mib", memory)
        (finding,) = doctor._memory()
        assert finding.state is state, memory
        assert "12288" in finding.found


def test_an_archive_that_can_not_be_reached_matters_less_once_images_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, tmp_path, "VOIP_DEBIAN_MIRROR=http://127.0.0.1:9/debian")
    (finding,) = doctor._packages()
    assert finding.state is State.FAILED
    assert "127.0.0.1:9" in finding.found
    (tmp_path / "images").mkdir()
    (finding,) = doctor._packages()
    assert finding.state is State.WARNING


def test_a_failure_stops_up_unless_it_could_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = True

    def repair() -> None:
        nonlocal broken
        broken = False

    def examine() -> list[Finding]:
        fix = repair if mendable else None
        return [Finding("lab", State.FAILED if broken else State.OK, "down", "./voip lab.up", fix)]

    monkeypatch.setattr(doctor, "examine", examine)
    mendable = False
    with pytest.raises(HostError, match="lab: down") as caught:
        doctor.require(nobody, fix=True)
    assert caught.value.hint == "./voip lab.up"
    mendable = True
    with pytest.raises(HostError, match="lab: down"):
        doctor.require(nobody)
    doctor.require(nobody, fix=True)
    assert not broken
