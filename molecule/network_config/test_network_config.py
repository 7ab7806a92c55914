"""Each documented port is open where the inventory says and closed elsewhere: seen from every kind of machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from guests import Guest, Host, inventory_of

from voip_stack import inventory, lab
from voip_stack.deadline import Deadline

PROBE = Path(__file__).with_name("probe.py").read_text()
KINDS = {"edge": ("sip_proxies", "infra"), "core": ("media_servers", "pbx_servers")}
STUBS = {"media-8": ("media_servers", "192.168.64.228"), "pbx-8": ("pbx_servers", "192.168.64.229")}  # as in hosts.yml
STACK = inventory.load()
# Every port that any service documents (of a range its ends), and some that none does.
PORTS = sorted(
    {f"{s.protocol}/{port}" for s in STACK.services for port in (s.ports[0], s.ports[-1])}
    | {"tcp/23", "tcp/3306", "udp/161", "udp/30000"}
)
INSIDE = [
    *(("computer", target) for target in KINDS),
    ("edge", "core"),
    ("core", "edge"),
    *((stub, target) for stub in STUBS for target in KINDS),
]
Answers = Callable[[str, str], set[str]]


def documented(target: str, network: str, sources: Sequence[str] = ()) -> set[str]:
    """The ports that `target` offers to `sources` (groups, or the computer) by the inventory; outside to anybody."""
    return {
        f"{s.protocol}/{port}"
        for s in STACK.services
        if s.network == network
        and not {*KINDS[target], "all"}.isdisjoint(s.groups)
        and (network == "external" or set(sources) & set(s.sources))
        for port in (s.ports[0], s.ports[-1])
    }


@pytest.fixture(scope="module")
def listening(guest: Guest) -> None:
    """All these ports are served on each machine: what is closed, the firewall closes."""

    def ready(machine: Host) -> bool:
        return machine.run("test -e /run/listeners").rc == 0

    for name in KINDS:
        unit = guest(name).run("systemctl is-active listeners")
        if unit.rc != 0:
            guest(name).check_output("systemd-run --unit=listeners python3 -c %s listen " + " ".join(PORTS), PROBE)
        assert Deadline(60).until(partial(ready, guest(name)), every=1), name


@pytest.fixture(scope="module")
def answers(guest: Guest, listening: None) -> Answers:  # noqa: ARG001  # asked when they listen
    """answers(who, address): the ports of PORTS that answer to `who`; a stub asks by way of the other machine."""

    def ask(who: str, address: str) -> set[str]:
        if who in ("computer", "phone"):
            home = {"computer": lab.current().inside, "phone": lab.current().outside}[who]
            argv = home("python3", "-c", PROBE, "ask", address, *PORTS)
            return set(json.loads(subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout))
        asker = who if who in KINDS else next(n for n in KINDS if inventory_of(n)["internal_address"] != address)
        own = STUBS[who][1] if who in STUBS else ""
        if own:
            guest(asker).check_output("ip address replace %s dev eth0", f"{own}/24")
        try:
            command = "PROBE_FROM=%s python3 -c %s ask %s " + " ".join(PORTS)
            return set(json.loads(guest(asker).check_output(command, own, PROBE, address)))
        finally:
            if own:
                guest(asker).check_output("ip address del %s dev eth0", f"{own}/24")

    return ask


@pytest.mark.parametrize(("who", "target"), INSIDE, ids=[f"{target} from {who}" for who, target in INSIDE])
def test_inside_each_sees_what_is_documented_for_it(answers: Answers, who: str, target: str) -> None:
    sources = KINDS.get(who) or (STUBS[who][:1] if who in STUBS else (who,))
    expected = documented(target, "internal", sources)
    assert answers(who, inventory_of(target)["internal_address"]) == expected


def test_every_documented_source_was_asked_from() -> None:
    """So that a new group in the inventory does not go untested."""
    asked = {s for who, _ in INSIDE for s in KINDS.get(who) or (STUBS[who][:1] if who in STUBS else (who,))}
    assert {source for service in STACK.services for source in service.sources} <= asked


@pytest.mark.parametrize("target", KINDS)
def test_outside_sees_what_is_documented_and_nothing_else(answers: Answers, target: str) -> None:
    assert answers("phone", inventory_of(target)["external_address"]) == documented(target, "external")


def test_nobody_outside_reaches_an_internal_address(answers: Answers) -> None:
    """Not even of the machine that has both: an address counts on its own network only."""
    route = [f"{inventory_of('edge')['internal_address']}/32", "via", inventory_of("edge")["external_address"]]
    subprocess.run(lab.current().outside("ip", "route", "replace", *route), check=True)
    try:
        assert answers("phone", inventory_of("edge")["internal_address"]) == set()
    finally:
        subprocess.run(lab.current().outside("ip", "route", "del", *route), check=True)


def test_nothing_is_routed_between_the_networks(guest: Guest) -> None:
    for name in KINDS:
        assert guest(name).sysctl("net.ipv4.ip_forward") == 0
        assert "type filter hook forward priority filter; policy drop" in guest(name).check_output("nft list ruleset")


@pytest.mark.parametrize("name", KINDS)
def test_addresses_are_those_of_the_inventory(guest: Guest, name: str) -> None:
    known = inventory_of(name)
    links = json.loads(guest(name).check_output("ip -json -4 address show scope global"))
    found = {link["ifname"]: [a["local"] for a in link["addr_info"]] for link in links}
    wanted = {
        n.interface: [known[f"{n.name}_address"]] for n in STACK.networks.values() if f"{n.name}_address" in known
    }
    assert found == wanted


def test_another_table_survives_a_stop_and_a_start(guest: Guest) -> None:
    """RTPEngine has a table of its own: whatever happens to the firewall must not take it along."""
    machine = guest("core")
    machine.check_output("nft add table ip filter")
    machine.check_output("systemctl restart nftables.service")
    assert "table ip filter" in machine.check_output("nft list tables")
    machine.check_output("nft delete table ip filter")
