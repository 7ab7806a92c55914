"""The lab on the networks of a libvirtd that runs already: a desktop, where a softphone reaches sip-1 itself."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import uuid
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as ET

import jinja2
import libvirt

from voip_stack import paths
from voip_stack.errors import LabError
from voip_stack.inventory import Network
from voip_stack.lab.base import Interface, Lab, Part, end, run
from voip_stack.lab.outside import Outside
from voip_stack.tell import Tell, nobody

_IDENTITY = uuid.uuid5(uuid.NAMESPACE_URL, "urn:voip-stack:network")


def render(network: Network) -> str:
    """The network XML of `network` (https://libvirt.org/formatnetwork.html)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(paths.LIBVIRT / "networks"), undefined=jinja2.StrictUndefined, autoescape=True
    )
    identity = uuid.uuid5(_IDENTITY, network.name)
    return environment.get_template("network.xml.j2").render(network=network, uuid=identity)


class LibvirtLab(Lab):
    """Linux with libvirtd."""

    name = "libvirt"

    @property
    def phones(self) -> Outside:
        return Outside(self.inventory)

    @property
    def networks(self) -> list[Network]:
        """The networks that libvirt makes for us: not the external one when a bridge of the LAN takes its place."""
        return [
            n for n in self.inventory.networks.values() if n.name != "external" or not self.settings.external_bridge
        ]

    @property
    def uri(self) -> str:
        return self.settings.libvirt_uri

    def interface(self, network: str) -> Interface:
        if network == "external" and self.settings.external_bridge:
            return Interface("bridge", self.settings.external_bridge)
        return Interface("network", self.inventory.networks[network].bridge)

    def outside(self, *argv: str) -> list[str]:
        return self.phones.command(*argv)

    def up(self) -> None:
        with self._connection() as connection:
            missing = [n for n in self.networks if not self._is_active(connection, n)]
            if missing:
                occupied(missing, run("ip", "-json", "-4", "route", "show", "table", "all"))
            for network in missing:
                connection.networkDefineXML(render(network)).create()
        self.phones.attach(self.settings.external_bridge or self.inventory.networks["external"].bridge)

    def down(self, tell: Tell = nobody) -> None:
        with self._connection() as connection:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                if domain.name() in self.inventory.machines:
                    tell(f"stopping {domain.name()}")
                    # It may have ended by itself since.
                    with contextlib.suppress(libvirt.libvirtError):
                        domain.destroy()
            if rest := self.phones.processes():
                end(list(rest))
            self.phones.remove()
            for network in connection.listAllNetworks():
                if network.name() in {n.bridge for n in self.networks}:
                    if network.isActive():
                        network.destroy()
                    network.undefine()

    def status(self) -> list[Part]:
        try:
            with self._connection() as connection:
                active = {n.name() for n in connection.listAllNetworks(libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE)}
        except LabError:
            return [Part("libvirtd", False, self.uri)]
        parts = [
            Part(f"network {n.bridge}", n.bridge in active, f"{n.computer}/{n.subnet.prefixlen}") for n in self.networks
        ]
        return [Part("libvirtd", True, self.uri), *parts, self.phones.part()]

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        try:
            connection = libvirt.open(self.uri)
        except libvirt.libvirtError as error:
            raise LabError(f"libvirtd does not answer at {self.uri}", "./voip doctor", str(error)) from None
        try:
            yield connection
        except libvirt.libvirtError as error:
            raise LabError("libvirt refuses a network of the lab", "./voip lab.status", str(error)) from None
        finally:
            connection.close()

    def _is_active(self, connection: Any, network: Network) -> bool:
        """Whether libvirt runs `network`. Raises LabError when it has one of that name with another address."""
        for known in connection.listAllNetworks():
            if known.name() != network.bridge:
                continue
            address = ET.fromstring(known.XMLDesc()).find("ip")  # noqa: S314  # libvirtd's own
            if known.isActive() and (address is None or address.get("address") != str(network.computer)):
                raise LabError(
                    f"libvirt's network {network.bridge} does not have the address {network.computer}",
                    "./voip lab.down, then ./voip lab.up",
                )
            return bool(known.isActive())
        return False


def occupied(networks: list[Network], routes: str) -> None:
    """Raise LabError when `routes` (ip -json route) lead into one of `networks` other than by its bridge."""
    for route in json.loads(routes):
        if route["dst"] == "default":
            continue
        subnet = ipaddress.IPv4Network(route["dst"], strict=False)
        for network in networks:
            if subnet.overlaps(network.subnet) and subnet.prefixlen and route.get("dev") != network.bridge:
                raise LabError(
                    f"{network.subnet} is occupied: this computer routes {route['dst']} to {route.get('dev')}",
                    f"choose another subnet in {paths.INVENTORY}/group_vars/all/networks.yml and development.yml",
                )
