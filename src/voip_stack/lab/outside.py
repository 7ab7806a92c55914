"""The phones outside: a namespace of their own with one leg in the external network and no way anywhere else."""

from __future__ import annotations

from voip_stack.inventory import Inventory
from voip_stack.lab.base import Part, privileged, run
from voip_stack.lab.netns import Namespace

_LEG, _PEER = "voip-phones", "voip-phones-br"  # the veth's end among the phones, and the one in the bridge


class Outside(Namespace):
    """The namespace `voip-outside`."""

    def __init__(self, inventory: Inventory) -> None:
        super().__init__("voip-outside")
        self.inventory = inventory

    def attach(self, bridge: str, home: Namespace | None = None) -> None:
        """Make it and plug it into `bridge`, which is in the namespace `home` (None: the computer's own)."""
        self.make()
        into = privileged("ip", *(["-n", home.name] if home else []))
        if _LEG not in self.links():
            # Its peer may have outlived it by a moment, or a crash may have come between the two halves.
            run(*into, "link", "delete", _PEER, check=False)
            run(*into, "link", "add", _PEER, "type", "veth", "peer", "name", _LEG, "netns", self.name)
        run(*into, "link", "set", _PEER, "master", bridge, "up")
        network = self.inventory.networks["external"]
        for address in self.inventory.phones:
            self.ip("address", "replace", f"{address}/{network.subnet.prefixlen}", "dev", _LEG)
        self.ip("link", "set", _LEG, "up")

    def part(self) -> Part:
        leg = self.links().get(_LEG, {})
        addresses = [a["local"] for a in leg.get("addr_info", []) if a["family"] == "inet"]
        missing = {str(a) for a in self.inventory.phones} - set(addresses)
        detail = f"{addresses[0]} to {addresses[-1]}" if addresses else "not made"
        return Part(f"namespace {self.name}", not missing and leg.get("operstate") == "UP", detail)
