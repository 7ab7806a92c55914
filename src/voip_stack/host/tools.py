"""Programs that the stack calls, and their packages, which ./voip installs (requirements/debian.txt, Brewfile)."""

from __future__ import annotations

from dataclasses import dataclass

from voip_stack.host.platforms import Platform


@dataclass(frozen=True)
class Tool:
    """A program, what it is for, and where it comes from; an empty package: the system has no need of it."""

    program: str
    purpose: str
    debian: str
    brew: str = ""

    def package(self, platform: Platform) -> str:
        return self.brew if platform.system == "Darwin" else self.debian


def tools(platform: Platform) -> list[Tool]:
    """The programs needed on `platform`."""
    arm = platform.architecture.name == "aarch64"
    every = [
        Tool(platform.architecture.qemu, "runs the machines", f"qemu-system-{'arm' if arm else 'x86'}", "qemu"),
        Tool("qemu-img", "makes their disks", "qemu-utils", "qemu"),
        Tool("libvirtd", "keeps the machines", "libvirt-daemon", "libvirt"),
        Tool("virt-xml-validate", "checks what we tell libvirt", "libvirt-clients", "libvirt"),
        Tool("xorriso", "makes the seeds of first boots", "xorriso", "xorriso"),
        Tool("mmdebstrap", "makes the base image", "mmdebstrap"),
        Tool("mkfs.ext4", "makes disk images", "e2fsprogs"),
        Tool("apt-cacher-ng", "keeps packages", "apt-cacher-ng"),
        Tool("ip", "makes the lab's network", "iproute2"),
        Tool("nsenter", "enters the lab", "util-linux"),
        Tool("sysctl", "sets up the lab's network", "procps"),
        Tool("nft", "checks firewalls", "nftables"),
        Tool("psql", "talks to a devstack-core", "postgresql-client"),
        Tool("socat", "connects the lab with this computer", "socat", "socat"),
        Tool("ssh", "reaches the machines", "openssh-client"),
        Tool("sipp", "makes calls", "sip-tester", "sipp"),
        Tool("tshark", "looks into calls", "tshark", "wireshark"),
        Tool("xmllint", "checks XML", "libxml2-utils"),
        Tool("shellcheck", "checks scripts", "shellcheck", "shellcheck"),
    ]
    return [tool for tool in every if tool.package(platform)]
