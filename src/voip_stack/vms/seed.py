"""The NoCloud seed: what a machine needs to be told at its first boot, as an ISO image with the label `cidata`.

https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import jinja2

from voip_stack import paths
from voip_stack.images import Image
from voip_stack.inventory import Address, Inventory, Machine
from voip_stack.vms import ssh, tools

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(paths.LIBVIRT / "cloud-init"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    autoescape=False,  # noqa: S701  # YAML, of values that the inventory has checked
)
FILES = ("meta-data", "user-data", "network-config")


def render(machine: Machine, stack: Inventory, image: Image, host_key: Path, gateway: Address | None) -> dict[str, str]:
    """The seed's files by name. `gateway` is the lab's way out, where it has one."""
    values = {
        "machine": machine,
        "domain": stack.domain,
        "user": stack.user,
        "networks": [n for n in stack.networks.values() if n.name in machine.addresses],
        "gateway": gateway,
        "grow": machine.disk_gib * 1024**3 > image.disk.stat().st_size,
        "instance": time.time_ns(),
        "authorized_key": ssh.public(ssh.identity()),
        "host_key_private": host_key.read_text(),
        "host_key_public": ssh.public(host_key),
    }
    return {name: _TEMPLATES.get_template(f"{name}.j2").render(values) for name in FILES}


def write(iso: Path, files: dict[str, str]) -> None:
    """Write `files` to a new `iso`. Raises VmError or HostError."""
    # Beside the image, not in /tmp: it holds the machine's private key, and must go with it if we are killed here.
    with tempfile.TemporaryDirectory(dir=iso.parent, prefix=".seed-") as directory:
        for name, text in files.items():
            (Path(directory) / name).write_text(text)
        options = ["-volid", "cidata", "-joliet", "-rock", "-quiet"]
        tools.run("xorriso", "-as", "mkisofs", *options, "-output", str(iso), directory, writes=iso)
