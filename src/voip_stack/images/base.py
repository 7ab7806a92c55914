"""The base tree: Debian 13 with a kernel, cloud-init, ssh and Python, as mmdebstrap makes it."""

from __future__ import annotations

import platform
import shlex
import subprocess
from pathlib import Path

from voip_stack import settings
from voip_stack.errors import HostError, ImageError
from voip_stack.images import store

SUITE = "trixie"

# Debian's names of architectures.
ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}

PACKAGES = (
    "linux-image-cloud-{architecture}",
    "initramfs-tools",
    "zstd",
    "cloud-init",
    "openssh-server",
    "systemd-sysv",
    "systemd-resolved",
    "systemd-timesyncd",
    "dbus",
    "udev",
    "python3",
    "python3-apt",
    "sudo",
    "iproute2",
    "iputils-ping",
    "nftables",
    "netbase",
    "e2fsprogs",
    "kmod",
    "procps",
    "ca-certificates",
    "less",
    "nano",
)

# What the guest needs to find its root: a small initrd boots seconds faster under emulation.
INITRD_MODULES = ("virtio_pci", "virtio_blk", "ext4")

# With its modules named and its root a device of the kernel's, an initrd has no work for udev, which would go through
# all devices, as it does again behind it: a sixth of an emulated boot. The scripts of initramfs-tools do without it
# where it is not there. An update that moves it must not fail in a guest for this.
_NO_UDEV = """#!/bin/sh
[ "$1" = prereqs ] && exit
cd "$DESTDIR" && rm -rf scripts/init-*/udev usr/bin/udevadm usr/lib/systemd usr/lib/udev
"""

KERNEL_ARGS = "root=/dev/vda rw net.ifnames=0 quiet loglevel=4"

# Of the programs that systemd starts at boot and at each reload of its units, those that a server in a virtual machine
# has no use for (systemd.generator(7)): under emulation they take a third of a reload, and each package brings some.
_NO_GENERATORS = "debug gpt-auto hibernate-resume run ssh system-update tpm2"

_HOOKS = (
    # Nothing of this build's proxy, no host keys of its own (the seed brings them), no machine-id shared by guests.
    'rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/ssh/ssh_host_* "$1"/etc/resolv.conf "$1"/etc/hostname',
    ': > "$1"/etc/machine-id',
    'echo "/dev/vda / ext4 errors=remount-ro,noatime 0 1" > "$1"/etc/fstab',
    # No name servers are to be had in the lab: names come from /etc/hosts.
    'printf "127.0.0.1 localhost\\n" > "$1"/etc/hosts',
    'printf "MODULES=list\\nCOMPRESS=zstd\\n" > "$1"/etc/initramfs-tools/conf.d/voip-stack',
    f'cd "$1"/etc/initramfs-tools/hooks && printf %s {shlex.quote(_NO_UDEV)} > no-udev && chmod +x no-udev',
    'mkdir "$1"/etc/systemd/system-generators && cd "$1"/etc/systemd/system-generators && '
    f"for name in {_NO_GENERATORS}; do ln -s /dev/null systemd-$name-generator; done",
    # debconf's questions before an installation: seconds of Perl, and nobody is there to answer.
    'rm -f "$1"/etc/apt/apt.conf.d/70debconf',
    'chroot "$1" systemctl enable systemd-networkd.service',
    'chroot "$1" update-initramfs -u -k all',
    # Locale and translations of no use on a server without a person at its console.
    'rm -rf "$1"/usr/share/locale/* "$1"/usr/share/doc/*/changelog* "$1"/var/lib/apt/lists/*',
)


def architecture() -> str:
    """This computer's architecture by Debian's name. Raises HostError for one that the stack has no image for."""
    machine = platform.machine()
    try:
        return ARCHITECTURES[machine.lower()]
    except KeyError:
        raise HostError(f"no image for the architecture {machine}", "amd64 and arm64 are supported") from None


def recipe() -> tuple[object, ...]:
    """Everything that decides what a base tree holds."""
    return (SUITE, architecture(), PACKAGES, INITRD_MODULES, KERNEL_ARGS, _HOOKS, settings.load().debian_mirror)


def key() -> str:
    return store.digest(*recipe())


def ensure(log: Path, apt_proxy: str) -> Path:
    """The base tree's directory; made on first use (about a minute). `apt_proxy` is a URL.

    Raises ImageError with the end of mmdebstrap's output.
    """
    directory = store.root() / f"base-{key()}"
    if directory.exists():
        return directory
    conf = settings.load()
    with store.building(directory) as partial:
        modules = "\\n".join(INITRD_MODULES)
        command = [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--architectures={architecture()}",
            "--include=" + ",".join(PACKAGES).format(architecture=architecture()),
            f'--aptopt=Acquire::http::Proxy "{apt_proxy}"',
            '--aptopt=Acquire::Retries "3"',
            '--essential-hook=mkdir -p "$1"/etc/initramfs-tools && '
            f"printf '{modules}\\n' > \"$1\"/etc/initramfs-tools/modules",
            *(f"--customize-hook={hook}" for hook in _HOOKS),
            SUITE,
            str(partial),
            *([conf.debian_mirror] if conf.debian_mirror else []),
        ]
        run(command, log, "mmdebstrap could not make the base tree", "is the network there? see: ./voip doctor")
    return directory


def run(command: list[str], log: Path, failure: str, hint: str) -> None:
    """Run a long command with its output in `log`. Raises ImageError with the log's end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False)
        except FileNotFoundError:
            raise HostError(f"{command[0]} is missing", "./voip doctor --fix") from None
    if done.returncode != 0:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        if "No space left on device" in end:
            hint = "the disk is full; free some space, e.g. with: ./voip images.prune"
        raise ImageError(failure, f"{hint}\nthe whole log: {log}", end)
