"""Baking: the stack's roles run against a copy of the base tree at the computer's own speed; it becomes a disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from voip_stack import components, inputs, inventory, packages, paths, settings
from voip_stack.errors import HostError
from voip_stack.images import base, store
from voip_stack.images.store import Image
from voip_stack.tell import Progress, nobody

PLAIN = "plain"  # the image without any role, with a second kernel: what Molecule's guests start from
PEERS = "peers"  # the same with the packages of what roles talk to, not configured: the other guests of a scenario
PLAIN_GIB = 10
PLAYBOOK = paths.ANSIBLE / "playbooks" / "provision-vms.yml"
# The host `peers`, besides the inventory of the stack.
PEERS_INVENTORY = paths.REPOSITORY / "molecule" / "shared" / "peers.yml"

# A second kernel, newer or older, as after an upgrade that waits for its reboot: what is built for a kernel (DKMS) is
# built for each. Nobody boots it, so it needs no initrd. Where Debian has just one for clouds, it is a general one.
_ANOTHER_KERNEL = """
set -eu
name='^linux-image-[0-9.]+([+]deb[0-9]+)?-(cloud-)?(amd64|arm64)$'
images=$(apt-cache pkgnames linux-image- | grep -E "$name" | sort --version-sort)
for image in $(echo "$images" | grep -v cloud) $(echo "$images" | grep cloud); do
    [ -e "/boot/vmlinuz-${image#linux-image-}" ] || another=$image
done
INITRD=No DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@" "$another"
apt-get clean
# apt's cache of its lists, for which an emulated guest would take a quarter of a minute.
apt-get check
"""

# A chroot with the kernel's file systems in a mount namespace of its own: nothing stays mounted, whatever kills us.
_IN_CHROOT = """
set -eu
tree=$1; shift
mount -t proc proc "$tree/proc"
mount -t sysfs -o ro sysfs "$tree/sys"
mount --rbind /dev "$tree/dev"
mount -t tmpfs tmpfs "$tree/run"
mount -t tmpfs tmpfs "$tree/tmp"
exec "$@"
"""


def roles_of(machine: inventory.Machine, stack: inventory.Inventory) -> list[str]:
    """The roles that the playbook applies to `machine`."""
    return [c.name for c in stack.components_of(machine)]


def peers_roles() -> list[str]:
    """The roles that the scenarios apply to their guests of the image PEERS."""

    def found(node: Any) -> Iterator[str]:
        for value in node.values() if isinstance(node, dict) else ():
            is_peer = isinstance(value, dict) and (value.get("guest") or {}).get("image") == PEERS
            yield from value["scenario_roles"] if is_peer else found(value)

    files = sorted(PEERS_INVENTORY.parents[1].glob("*/hosts.yml"))
    return sorted({role for file in files for role in found(yaml.safe_load(file.read_text()))})


def packages_of(name: str) -> list[str]:
    """Packages of our own building that the roles of machine `name` install."""
    if name in (PLAIN, PEERS):
        return []
    stack = inventory.load()
    return packages.needed_by(roles_of(stack.machine(name), stack))


def key(name: str) -> str:
    """What the image of machine `name` depends on: base, roles, what they are told of it, playbook, our own packages.

    Of other machines it knows nothing for good: provisioning writes who they are.
    """
    if name == PLAIN:
        return store.digest("plain with lists", base.key(), PLAIN_GIB, _ANOTHER_KERNEL)
    if name == PEERS:
        parts = [paths.ANSIBLE / "roles" / r / p for r in peers_roles() for p in ("tasks/install.yml", "vars/main.yml")]
        parts.append(paths.ANSIBLE / "tasks")
        return store.digest("peers", base.key(), PLAIN_GIB, PEERS_INVENTORY, *parts, settings.load().package_proxy_port)
    machine = inventory.load().machine(name)
    conf = settings.load()
    return store.digest(
        *(name, base.key(), machine.disk_gib, sorted(machine.addresses.items())),
        *(PLAYBOOK, paths.ANSIBLE / "tasks", *_roles(machine), sorted(_told(machine).items())),
        [packages.key(p) for p in packages_of(name)],
        (conf.package_proxy_port, conf.advertised_address, conf.secrets),
    )


def _roles(machine: inventory.Machine) -> list[Path]:
    return [paths.ANSIBLE / "roles" / role for role in roles_of(machine, inventory.load())]


def _text(machine: inventory.Machine) -> str:
    files = (f for role in _roles(machine) for f in sorted(role.rglob("*")) if f.is_file() and f.suffix != ".pyc")
    return "\n".join(f.read_text(errors="replace") for f in files)


def _told(machine: inventory.Machine) -> dict[str, str]:
    """The variables that the roles of `machine` depend on."""
    known = inputs.known(paths.ANSIBLE, inventory.load().components, [machine.groups])
    return inputs.named(_text(machine), known)


def groups_named(name: str) -> set[str]:
    """The groups whose machines are in the configuration of machine `name`: groups['...'] of a role, or sources."""
    machine = inventory.load().machine(name)
    found = re.findall(r"groups\['(\w+)'\]|\"(\w+)\"", "\n".join([_text(machine), *_told(machine).values()]))
    return {group for pair in found for group in pair if group and group != "all"}


def current_keys() -> set[str]:
    """The keys that the recipes of today make: base tree, plain image, peers' image, one image per machine."""
    return {base.key(), *(key(name) for name in (PLAIN, PEERS, *inventory.load().machines))}


def prepare() -> None:
    """What all bakes share: the package proxy and the base tree. Raises ImageError, PackageError."""
    log = settings.load().cache_dir / "logs" / "base.log"
    base.ensure(log, packages.proxy.start())


def ensure(name: str, progress: Progress = nobody) -> Image:
    """The image of machine `name`, of PLAIN or of PEERS; baked when there is none of this key.

    Raises ImageError or ProvisionError with the end of the log, InventoryError for an unknown machine.
    """
    directory = store.root() / f"{name}-{key(name)}"
    found = store.find(directory)
    if found:
        return found
    if os.geteuid() != 0:
        _as_root(name)
        found = store.find(directory)
        if found:
            return found
        raise HostError(f"the image {directory.name} was not made", "run as root: ./voip images.build")
    log = settings.load().cache_dir / "logs" / f"bake-{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    for package in packages_of(name):
        packages.ensure(package, progress=progress)
    proxy = packages.proxy.start()
    tree = base.ensure(log, proxy)
    with store.building(directory) as partial:
        work = partial / "tree"
        base.run(["cp", "-a", "--reflink=auto", str(tree), str(work)], log, f"{name}: could not copy the base tree", "")
        gib = PLAIN_GIB
        if name == PEERS:
            inventories = (paths.INVENTORY / "development.yml", PEERS_INVENTORY)
            # Whatever the settings are: the roles of a scenario don't depend on them.
            roles = dict.fromkeys(components.STAGES, ()) | {"machine": ("common",), "services": peers_roles()}
            chosen = "--extra-vars=" + json.dumps({"voip_roles": roles})
            _bake(name, work, log, *(f"--inventory={i}" for i in inventories), "--tags=install", chosen)
        elif name == PLAIN:
            # apt unpacks its lists for a minute in an emulated guest; with these it has only to look for newer ones.
            by = ["--option", f"Acquire::http::Proxy={proxy}", "--option", "Acquire::Languages=none"]
            update = ["chroot", str(work), "apt-get", "update", *by]
            base.run(_in_chroot(work, update), log, "plain: apt could not get its lists", "see: ./voip doctor")
            another = ["chroot", str(work), "sh", "-c", _ANOTHER_KERNEL, "sh", *by]
            base.run(
                _in_chroot(work, another), log, "plain: apt could not install another kernel", "see: ./voip doctor"
            )
        else:
            _bake(name, work, log)
            gib = inventory.load().machine(name).disk_gib
        _finish(name, work, partial, gib, log)
    found = store.find(directory)
    assert found, directory  # noqa: S101  # building() has just renamed it into place
    return found


def _as_root(name: str) -> None:
    """Bake as root: file owners in the image are real. What is made belongs to the user again."""
    keep = "--preserve-env=" + ",".join(settings.load().environment())
    environment = {**os.environ, **settings.load().environment()}
    command = ["sudo", keep, sys.executable, "-m", "voip_stack.images", name, f"{os.getuid()}:{os.getgid()}"]
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise HostError(f"the image of {name} could not be baked as root", "the error stands above")


def _in_chroot(tree: Path, command: list[str]) -> list[str]:
    """The command line that runs `command` with the kernel's file systems mounted in `tree`."""
    return ["unshare", "--mount", "--fork", "--pid", "--kill-child", "sh", "-c", _IN_CHROOT, "sh", str(tree), *command]


def _bake(name: str, tree: Path, log: Path, *options: str) -> None:
    never = tree / "usr/sbin/policy-rc.d"
    never.write_text("#!/bin/sh\n# No daemon starts while an image is baked.\nexit 101\n")
    never.chmod(0o755)
    conf = settings.load()
    conf_proxy = tree / "etc/apt/apt.conf.d/00voip-bake"
    conf_proxy.write_text(
        f'Acquire::http::Proxy "http://127.0.0.1:{conf.package_proxy_port}";\n'
        'Acquire::http::Proxy::packages.voip.local "DIRECT";\n'
    )
    ansible = [
        str(Path(sys.executable).with_name("ansible-playbook")),
        str(PLAYBOOK),
        f"--limit={name}",
        "--skip-tags=service",
        *options,
        "--extra-vars=ansible_connection=community.general.chroot ansible_become=false voip_baking=true",
        f"--extra-vars=ansible_host={tree}",
    ]
    environment = {**os.environ, **conf.environment(), "ANSIBLE_CONFIG": str(paths.ANSIBLE / "ansible.cfg")}
    environment |= {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_STDOUT_CALLBACK": "default", "ANSIBLE_STRATEGY": "linear"}
    base.run(
        ["env", *(f"{k}={v}" for k, v in environment.items() if os.environ.get(k) != v), *_in_chroot(tree, ansible)],
        log,
        f"{name}: the roles failed in the image tree",
        "mend the role named above, then run the command again",
    )
    never.unlink()
    conf_proxy.unlink()
    hosts = tree / "etc/hosts"
    computer = inventory.load().networks["internal"].computer
    # While baking, packages.voip.local was this very computer.
    lines = [
        line.replace("127.0.0.1", str(computer)) if "packages.voip.local" in line else line
        for line in hosts.read_text().splitlines()
    ]
    hosts.write_text("\n".join(lines) + "\n")
    for apt_file in (tree / "etc/apt").rglob("*"):
        if apt_file.is_file() and "127.0.0.1" in (text := apt_file.read_text(errors="ignore")):
            apt_file.write_text(text.replace("127.0.0.1", str(computer)))
    for cached in (tree / "var/cache/apt/archives").glob("*.deb"):
        cached.unlink()
    (tree / "etc/machine-id").write_text("")


def _finish(name: str, tree: Path, partial: Path, gib: int, log: Path) -> None:
    """A disk from the tree, and beside it the tree's newest kernel of those that have an initrd."""
    initrds = sorted(tree.glob("boot/initrd.img-*"), key=lambda f: [int(n) for n in re.findall(r"\d+", f.name)])
    version = initrds[-1].name.removeprefix("initrd.img-")
    shutil.copy(tree / f"boot/vmlinuz-{version}", partial / "vmlinuz")
    shutil.copy(tree / f"boot/initrd.img-{version}", partial / "initrd.img")
    disk = partial / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(gib * 1024**3)
    # The file is all zeroes: nothing to initialise, now or later in the guest.
    make = ["mkfs.ext4", "-q", "-F", "-L", "voip-root", "-m", "1", "-N", "300000", "-J", "size=32"]
    options = ["-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", str(tree), str(disk)]
    base.run([*make, *options], log, f"{name}: mkfs.ext4 failed", "")
    shutil.rmtree(tree)
    for file_path in (disk, partial / "vmlinuz", partial / "initrd.img"):
        file_path.chmod(0o444)
    image = Image(name, key(name), disk, partial / "vmlinuz", partial / "initrd.img", base.KERNEL_ARGS)
    store.save(image)
