"""The inventory as frozen values: the one source for domain XML, seeds, networks, firewall, tests and tables."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from voip_stack import components, paths, settings
from voip_stack.components import Component
from voip_stack.errors import InventoryError

Address = ipaddress.IPv4Address
DEVSTACK = "devstack-core"
SLOTS = range(201, 213)  # the last byte, on each network, of the guests of the roles' tests


@dataclass(frozen=True)
class Network:
    """A network of the lab. `computer` is this computer's own address on it."""

    name: str
    bridge: str
    subnet: ipaddress.IPv4Network
    computer: Address
    mac_prefix: str
    interface: str


@dataclass(frozen=True)
class Machine:
    """A virtual machine of the inventory; addresses and MACs by network name, in the order of eth0, eth1."""

    name: str
    groups: tuple[str, ...]
    memory_mib: int
    vcpus: int
    disk_gib: int
    addresses: dict[str, Address]
    macs: dict[str, str]
    image: str = ""  # whose image it stands on; empty: its own

    @property
    def image_name(self) -> str:
        return self.image or self.name

    @property
    def internal(self) -> Address:
        return self.addresses["internal"]

    @property
    def external(self) -> Address | None:
        return self.addresses.get("external")


@dataclass(frozen=True)
class Service:
    """Ports that a component listens on, on one network. `sources` are groups or "computer"; external: anybody."""

    name: str
    component: str
    groups: tuple[str, ...]
    protocol: str
    ports: range
    network: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Inventory:
    domain: str
    user: str
    networks: dict[str, Network]
    machines: dict[str, Machine]
    components: dict[str, Component]
    services: tuple[Service, ...]
    phones: tuple[Address, ...]
    devstack: Address | None = None  # where the supporting services are, when no machine of ours has them

    def machine(self, name: str) -> Machine:
        """The machine called `name`. Raises InventoryError with the names there are."""
        try:
            return self.machines[name]
        except KeyError:
            raise InventoryError(
                f"there is no machine {name!r} in the inventory", f"name one of: {', '.join(self.machines)}"
            ) from None

    def select(self, names: Sequence[str]) -> list[Machine]:
        """The machines of these names or groups, in the inventory's order; all of them when `names` is empty."""
        if not names:
            return list(self.machines.values())
        wanted: set[str] = set()
        for name in names:
            members = [m.name for m in self.machines.values() if name in m.groups]
            wanted.update(members or [self.machine(name).name])
        return [m for m in self.machines.values() if m.name in wanted]

    def group(self, name: str) -> list[Machine]:
        """The machines in group `name`."""
        return [m for m in self.machines.values() if name in m.groups]

    def servers(self, group: str) -> list[tuple[str, Address]]:
        """Who serves what the machines of `group` do, with its internal address: those, or a devstack-core."""
        if group == "infra" and self.devstack:
            return [(DEVSTACK, self.devstack)]
        return [(m.name, m.internal) for m in self.group(group)]

    def infra(self) -> tuple[str, Address]:
        """The first that gives supporting services. Raises InventoryError when there is none."""
        try:
            return self.servers("infra")[0]
        except IndexError:
            raise InventoryError(
                "the inventory has no machine in the group infra", "see ansible/inventory/development.yml"
            ) from None

    def services_of(self, machine: Machine, network: str) -> list[Service]:
        """What listens on `machine` towards `network`."""
        here = {component.name for component in self.components_of(machine)}
        return [s for s in self.services if s.network == network and s.component in here]

    def components_of(self, machine: Machine) -> list[Component]:
        """The enabled components of `machine`, in the order in which their roles are applied."""
        return components.enabled(machine.groups, self.components)

    def port(self, name: str) -> int:
        """The port called `name` in a descriptor: an enabled component's, or one's that a devstack-core replaces.

        Raises InventoryError when none has it.
        """
        for component in sorted(self.components.values(), key=lambda c: not c.enabled):
            for port in component.ports if component.enabled or self.devstack else ():
                if port.name == name:
                    return port.ports[0]
        raise InventoryError(f"no enabled component has a port {name}", f"see {paths.ANSIBLE / components.FLAGS}")

    @property
    def devstack_ports(self) -> list[int]:
        """What the stack uses, or looks at, in a devstack-core (TCP)."""
        return [self.port(name) for name in ("vault", "postgresql", "redis", "amqp")] if self.devstack else []


def _machine(name: str, groups: Iterable[str], values: dict[str, Any], networks: dict[str, Network]) -> Machine:
    addresses: dict[str, Address] = {}
    for network in networks.values():
        text = values.get(f"{network.name}_address")
        if text is None:
            continue
        try:
            address = Address(text)
        except ValueError:
            raise InventoryError(f"{name}: {network.name}_address: {text!r} is not an IPv4 address") from None
        if address not in network.subnet:
            raise InventoryError(f"{name}: {network.name}_address {address} is outside {network.subnet}")
        addresses[network.name] = address
    if "internal" not in addresses:
        raise InventoryError(f"{name} has no internal_address", f"add one in {paths.INVENTORY / 'development.yml'}")
    for key in ("memory_mib", "vcpus", "disk_gib"):
        if not isinstance(values.get(key), int) or values[key] < 1:
            raise InventoryError(f"{name}: {key} must be a whole number above 0, not {values.get(key)!r}")
    last = int(addresses["internal"]) & 0xFF
    return Machine(
        name=name,
        groups=tuple(sorted(g for g in groups if g not in ("all", "ungrouped"))),
        memory_mib=values["memory_mib"],
        vcpus=values["vcpus"],
        disk_gib=values["disk_gib"],
        addresses=addresses,
        macs={n: f"{networks[n].mac_prefix}:{last:02x}" for n in addresses},
    )


def _check_addresses(networks: dict[str, Network], machines: dict[str, Machine], phones: list[Address]) -> None:
    """Raises InventoryError, naming both, when two want one address: computer, guests of tests, machines, phones."""
    taken = {n.computer: "this computer" for n in networks.values()}
    guests = (int(network.subnet.network_address) + last for network in networks.values() for last in SLOTS)
    taken |= {Address(guest): "a guest of the roles' tests" for guest in guests}
    machines_ = [(address, m.name) for m in machines.values() for address in m.addresses.values()]
    for address, name in [*machines_, *((phone, "a phone of the tests (voip_phones)") for phone in phones)]:
        if address in taken:
            raise InventoryError(f"{name} has the address {address} of {taken[address]}", f"see {paths.INVENTORY}")
        taken[address] = name
    # MACs, and RTPEngines' databases in Redis, are numbered by it; in a /24 it is an address's own.
    owners: dict[int, str] = {}
    for m in machines.values():
        if (other := owners.setdefault(int(m.internal) & 0xFF, m.name)) != m.name:
            raise InventoryError(
                f"the last byte of {m.name}'s internal_address {m.internal} is {other}'s", f"see {paths.INVENTORY}"
            )


def _services(every: components.Components) -> Iterator[Service]:
    """What the enabled components listen on."""
    for component in components.enabled(among=every):
        for port in component.ports:
            for way in port.reached:
                here = (port.name, component.name, component.groups, port.protocol, port.ports)
                yield Service(*here, way["network"], tuple(way.get("sources", ())))


def parse(
    hosts: dict[str, tuple[list[str], dict[str, Any]]], common: dict[str, Any], every: components.Components
) -> Inventory:
    """An Inventory from hosts (name to groups and variables), the variables of group `all`, and the components.

    Raises InventoryError, naming the host and the key.
    """
    try:
        networks = {
            name: Network(
                name,
                n["bridge"],
                ipaddress.IPv4Network(n["subnet"]),
                Address(n["computer"]),
                n["mac_prefix"],
                n["interface"],
            )
            for name, n in common["voip_networks"].items()
        }
        machines = {name: _machine(name, groups, values, networks) for name, (groups, values) in hosts.items()}
        first, last = (int(Address(common["voip_phones"][end])) for end in ("first", "last"))
    except KeyError as error:
        raise InventoryError(f"the inventory lacks {error}", f"see {paths.INVENTORY}/group_vars/all") from None
    except (TypeError, ValueError) as error:
        raise InventoryError(f"the inventory has a bad value: {error}", f"see {paths.INVENTORY}") from None
    phones = [Address(n) for n in range(first, last + 1)]
    if wrong := [a for a in phones if "external" in networks and a not in networks["external"].subnet]:
        raise InventoryError(f"voip_phones: {wrong[0]} is outside {networks['external'].subnet}")
    _check_addresses(networks, machines, phones)
    return Inventory(
        domain=common["voip_domain"],
        user=common["voip_user"],
        networks=networks,
        machines=machines,
        components=dict(every),
        services=tuple(_services(every)),
        phones=tuple(phones),
    )


@functools.cache
def load() -> Inventory:
    """The repository's inventory, read by Ansible's own reader. Raises InventoryError."""
    # Ansible takes half a second to import: only who needs the inventory pays.
    from ansible.errors import AnsibleError  # noqa: PLC0415
    from ansible.inventory.manager import InventoryManager  # noqa: PLC0415
    from ansible.parsing.dataloader import DataLoader  # noqa: PLC0415
    from ansible.vars.manager import VariableManager  # noqa: PLC0415

    try:
        loader = DataLoader()
        manager = InventoryManager(loader=loader, sources=[str(paths.INVENTORY / "development.yml")])
        variables = VariableManager(loader=loader, inventory=manager)
        hosts = {
            host.name: ([g.name for g in host.get_groups()], variables.get_vars(host=host))
            for host in manager.get_hosts()
        }
    except AnsibleError as error:
        raise InventoryError(f"the inventory can't be read: {error}") from None
    if not hosts:
        raise InventoryError(f"no machine in {paths.INVENTORY / 'development.yml'}")
    conf = settings.load()
    every = components.current()
    components.check_groups(every, set(manager.groups) - {"all", "ungrouped"})
    stack = parse(hosts, next(iter(hosts.values()))[1], every)
    if conf.infra == "embedded":
        return stack
    return replace(
        stack,
        machines={name: m for name, m in stack.machines.items() if "infra" not in m.groups},
        devstack=Address(conf.devstack_address or stack.networks["internal"].computer),
    )
