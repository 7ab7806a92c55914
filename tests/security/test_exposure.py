"""The open ports as an attacker sees them; the inventory lists the allowed ones."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from xml.etree import ElementTree as ET

import pytest

from voip_stack import inventory, lab

pytestmark = pytest.mark.alone  # scans, and changes routes of the phones' network
NAMES = sorted(inventory.load().machines)
OUTSIDE = sorted(name for name, m in inventory.load().machines.items() if m.external)
# UDP ports of telephony stacks: SIP, IAX, RTPEngine's ng, RTP, DNS, NFS, SNMP, NTP, syslog, TFTP, HEP, mDNS.
UDP_PORTS = "53,69,111,123,161,514,2049,2223,2224,4569,5004,5060,5061,5080,5090,5353,9060,10000,10001,20000,30000"


def scan(argv: Callable[..., list[str]], address: str, *options: str) -> set[int]:
    """The ports of `address` that nmap finds open; `open|filtered` (no answer to UDP) is not open."""
    command = argv("nmap", "-Pn", "-n", "--max-retries", "2", "--min-rate", "10000", "-oX", "-", *options, address)
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    root = ET.fromstring(done.stdout)  # noqa: S314  # nmap's own output
    assert root.find("host") is not None, f"nmap did not scan {address}"
    return {
        int(port.attrib["portid"])
        for port in root.iter("port")
        if (state := port.find("state")) is not None and state.attrib["state"] == "open"
    }


@pytest.fixture(params=OUTSIDE)
def by_way_of(request: pytest.FixtureRequest, stack: inventory.Inventory) -> Iterator[str]:
    """An attacker's route from outside to the internal network, through a machine on both networks."""
    gateway = stack.machines[request.param].external
    route = [str(stack.networks["internal"].subnet), "via", str(gateway)]
    subprocess.run(lab.current().outside("ip", "route", "replace", *route), check=True)
    yield request.param
    subprocess.run(lab.current().outside("ip", "route", "del", *route), check=True)


@pytest.mark.takes(60)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in OUTSIDE])
def test_machines_inside_are_unreachable_from_outside(stack: inventory.Inventory, by_way_of: str, name: str) -> None:
    address = str(stack.machines[name].internal)
    outside = lab.current().outside
    assert scan(outside, address, "-sS", "-p-") == set(), f"{name} through {by_way_of}"
    assert scan(outside, address, "-sU", "-p", UDP_PORTS) == set(), f"{name} through {by_way_of}"


@pytest.mark.core
@pytest.mark.parametrize("name", OUTSIDE)
def test_only_documented_tcp_ports_are_open_outside(stack: inventory.Inventory, name: str) -> None:
    machine = stack.machines[name]
    documented = {p for s in stack.services_of(machine, "external") if s.protocol == "tcp" for p in s.ports}
    assert scan(lab.current().outside, str(machine.external), "-sS", "-p-") == documented


@pytest.mark.parametrize("name", NAMES)
def test_this_computer_reaches_only_what_is_documented_for_it(stack: inventory.Inventory, name: str) -> None:
    machine = stack.machines[name]
    services = [s for s in stack.services_of(machine, "internal") if "computer" in s.sources]
    documented = {p for s in services if s.protocol == "tcp" for p in s.ports}
    assert scan(lab.current().inside, str(machine.internal), "-sS", "-p-") == documented


# The kernel's range of ephemeral ports (net.ipv4.ip_local_port_range): UDP sockets there are clients waiting for an
# answer, such as Asterisk's DNS resolver, which can't be turned off. nftables blocks them.
EPHEMERAL = range(32768, 61000)


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_nothing_listens_that_is_not_documented(stack: inventory.Inventory, ssh: Callable[..., str], name: str) -> None:
    machine = stack.machines[name]
    documented = {
        (s.protocol, port)
        for network in stack.networks
        for s in stack.services_of(machine, network)
        for port in s.ports
    }
    undocumented = set()
    for line in ssh(name, "ss", "--listening", "--tcp", "--udp", "--numeric", "--no-header").splitlines():
        protocol, _, _, _, local = line.split()[:5]
        address, _, port = local.rpartition(":")
        host = address.partition("%")[0].strip("[]")
        client = protocol == "udp" and int(port) in EPHEMERAL
        if not (client or host.startswith("127.") or host == "::1" or (protocol, int(port)) in documented):
            undocumented.add(f"{protocol} {local}")
    assert not undocumented
