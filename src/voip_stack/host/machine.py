"""Virtual computers: what differs between architectures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """An architecture as QEMU and libvirt name it: its board, and the kernel's name of the first serial port."""

    name: str
    machine: str
    console: str
    acpi_needs_firmware: bool = False

    @property
    def qemu(self) -> str:
        return f"qemu-system-{self.name}"


X86 = Architecture("x86_64", "q35", "ttyS0")
# libvirt refuses ACPI without UEFI there.
ARM = Architecture("aarch64", "virt", "ttyAMA0", acpi_needs_firmware=True)


@dataclass(frozen=True)
class Hardware:
    """The virtual computer that this computer can run, as the domain XML needs it."""

    accelerator: str  # kvm, hvf, tcg
    architecture: Architecture
    cpu_mode: str
    emulator: str
    firmware: str = ""  # UEFI code; empty: the board's own way to start a kernel
    nvram_template: str = ""

    @property
    def arch(self) -> str:
        return self.architecture.name

    @property
    def machine(self) -> str:
        return self.architecture.machine

    @property
    def console(self) -> str:
        return self.architecture.console

    @property
    def domain_type(self) -> str:
        return "qemu" if self.accelerator == "tcg" else self.accelerator

    @property
    def acpi(self) -> bool:
        return bool(self.firmware) or not self.architecture.acpi_needs_firmware
