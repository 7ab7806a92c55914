"""Where the stack's addresses live: one shape, three homes (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import functools
import platform

import libvirt

from voip_stack import inventory, settings
from voip_stack.inventory import Inventory
from voip_stack.lab.base import Interface, Lab, Part
from voip_stack.lab.libvirt_networks import LibvirtLab
from voip_stack.lab.namespace import NamespaceLab
from voip_stack.lab.vmnet import VmnetLab
from voip_stack.settings import Settings

__all__ = ["Interface", "Lab", "Part", "choose", "current"]

HOMES: dict[str, type[Lab]] = {home.name: home for home in (NamespaceLab, LibvirtLab, VmnetLab)}


def choose(conf: Settings, stock: Inventory, system: str | None = None) -> Lab:
    """The home that VOIP_LAB names; for `auto` by what this computer is and whether a libvirtd answers."""
    if conf.lab != "auto":
        return HOMES[conf.lab](conf, stock)
    if (system or platform.system()) == "Darwin":
        return VmnetLab(conf, stock)
    return (LibvirtLab if answers(conf.libvirt_uri) else NamespaceLab)(conf, stock)


def answers(uri: str) -> bool:
    """Whether a libvirtd answers at `uri`."""
    try:
        libvirt.open(uri).close()
    except libvirt.libvirtError:
        return False
    return True


@functools.cache
def current() -> Lab:
    """The lab of this run. Raises SettingsError, InventoryError."""
    return choose(settings.load(), inventory.load())


# Errors come as exceptions; libvirt would print them as well.
libvirt.registerErrorHandler(lambda _context, _error: None, None)
