"""Operating systems that the stack runs on: one small class each."""

from __future__ import annotations

import abc
import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

from voip_stack.errors import HostError
from voip_stack.host.machine import ARM, X86, Architecture, Hardware

# The names that operating systems have for them.
ARCHITECTURES = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}


class Platform(abc.ABC):
    """This computer's operating system and architecture."""

    system: ClassVar[str]
    accelerators: ClassVar[tuple[str, ...]]  # what may run a guest faster than emulation, best first

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    @property
    @abc.abstractmethod
    def boot_id(self) -> str:
        """Another one after each start of this computer."""

    @property
    @abc.abstractmethod
    def memory_mib(self) -> int:
        """All memory of this computer, in MiB."""

    @property
    @abc.abstractmethod
    def available_mib(self) -> int:
        """Memory that programs may still take without swapping, in MiB."""

    @abc.abstractmethod
    def offers(self, accelerator: str) -> bool:
        """Whether `accelerator` is worth a probe: it says that it is there, which proves nothing."""

    @abc.abstractmethod
    def install(self, missing: list[str]) -> list[str]:
        """The command line that installs packages."""

    @property
    def cpus(self) -> int:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @property
    def emulator(self) -> str:
        """Raises HostError when QEMU is not there."""
        found = self.find(self.architecture.qemu)
        if not found:
            raise HostError(f"{self.architecture.qemu} is missing", "./voip doctor --fix")
        return found

    def find(self, program: str) -> str | None:
        """The path of `program`; Debian keeps daemons where a user's PATH does not lead."""
        return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))

    def cpu_mode(self, accelerator: str) -> str:
        # Under emulation a named model is slower than all features at once: the guest works around hardware bugs.
        return "maximum" if accelerator == "tcg" else "host-passthrough"

    def hardware(self, accelerator: str) -> Hardware:
        """The virtual computer with `accelerator`. Raises HostError when QEMU is not there."""
        return Hardware(accelerator, self.architecture, self.cpu_mode(accelerator), self.emulator)


class Linux(Platform):
    system = "Linux"
    accelerators = ("kvm",)

    @property
    def boot_id(self) -> str:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    @property
    def memory_mib(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024**2

    @property
    def available_mib(self) -> int:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) // 1024

    def offers(self, accelerator: str) -> bool:
        return accelerator == "kvm" and os.access("/dev/kvm", os.R_OK | os.W_OK)

    def install(self, missing: list[str]) -> list[str]:
        return ["apt-get", "install", "--yes", "--no-install-recommends", *missing]


class MacOS(Platform):
    """Written from what QEMU, libvirt and Homebrew document; not run by us."""

    system = "Darwin"
    accelerators = ("hvf",)

    @property
    def boot_id(self) -> str:
        return self._sysctl("kern.bootsessionuuid")

    @property
    def memory_mib(self) -> int:
        return int(self._sysctl("hw.memsize")) // 1024**2

    @property
    def available_mib(self) -> int:
        pages = [int(self._sysctl(key)) for key in ("vm.page_free_count", "vm.page_pageable_external_count")]
        return sum(pages) * int(self._sysctl("hw.pagesize")) // 1024**2

    def offers(self, accelerator: str) -> bool:
        return accelerator == "hvf" and self._sysctl("kern.hv_support") == "1"

    def install(self, missing: list[str]) -> list[str]:
        return ["brew", "install", *missing]

    def cpu_mode(self, accelerator: str) -> str:
        # QEMU's `host` does not start on an M4; `max` is the same CPU under hvf.
        m4 = accelerator == "hvf" and "M4" in self._sysctl("machdep.cpu.brand_string")
        return "maximum" if m4 else super().cpu_mode(accelerator)

    def hardware(self, accelerator: str) -> Hardware:
        plain = super().hardware(accelerator)
        if not self.architecture.acpi_needs_firmware:
            return plain
        share = Path(plain.emulator).resolve().parents[1] / "share/qemu"
        code, variables = share / "edk2-aarch64-code.fd", share / "edk2-arm-vars.fd"
        return Hardware(accelerator, self.architecture, plain.cpu_mode, plain.emulator, str(code), str(variables))

    def _sysctl(self, name: str) -> str:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()


def choose(system: str, machine: str) -> Platform:
    """The platform called `system` on an architecture called `machine`, as uname does. Raises HostError."""
    platforms: dict[str, type[Platform]] = {p.system: p for p in (Linux, MacOS)}
    if system not in platforms:
        raise HostError(f"this operating system is not supported: {system}", "Linux and macOS are")
    if machine not in ARCHITECTURES:
        raise HostError(f"this architecture is not supported: {machine}", "x86_64 and aarch64 are")
    return platforms[system](ARCHITECTURES[machine])


@functools.cache
def current() -> Platform:
    """This computer. Raises HostError when it is none that we support."""
    return choose(platform.system(), platform.machine())
