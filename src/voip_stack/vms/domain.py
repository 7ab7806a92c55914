"""A machine as libvirt sees it: the domain XML, the same template for KVM, HVF and emulation, x86_64 and aarch64."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from voip_stack import paths
from voip_stack.host import Hardware
from voip_stack.images import Image
from voip_stack.inventory import Machine
from voip_stack.lab import Interface
from voip_stack.vms.connection import NAMESPACE_URI

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(paths.LIBVIRT),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=True,
)


@dataclass(frozen=True)
class Link:
    """One interface of a machine: its MAC and how it reaches its network."""

    mac: str
    interface: Interface


def _pci(slot: int) -> str:
    """The address of a device that must not move: names of interfaces and disks follow the order of the slots."""
    return Markup(  # noqa: S704  # a number of ours
        f'<address type="pci" domain="0" bus="0" slot="{slot}" function="0"/>'
    )


def identifier(name: str) -> str:
    """A machine's UUID: the same whenever it is made, so a saved memory finds its domain."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{NAMESPACE_URI}:{name}"))


def render(machine: Machine, image: Image, hardware: Hardware, links: Sequence[Link], directory: Path) -> str:
    """The domain XML of `machine` (https://libvirt.org/formatdomain.html), its files in `directory`."""
    return _TEMPLATES.get_template("domain.xml.j2").render(
        machine=machine,
        image=image,
        hardware=hardware,
        links=links,
        directory=directory,
        uuid=identifier(machine.name),
        namespace_uri=NAMESPACE_URI,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        uid=os.getuid(),
        gid=os.getgid(),
        pci=_pci,
    )
