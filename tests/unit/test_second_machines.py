"""The stack with a second machine of each kind but infra: its rendered files, and the search for calls."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from voip_stack import images, inventory, paths, provision, settings, status
from voip_stack.calls import ladder, phone, probes, proof
from voip_stack.calls.capture import Recording, Sip
from voip_stack.calls.probes import Forwarding, Metrics
from voip_stack.errors import CallError, InventoryError
from voip_stack.host.machine import X86, Hardware
from voip_stack.images import Image
from voip_stack.images.bake import roles_of
from voip_stack.lab import Interface, http_client
from voip_stack.vms import domain, seed, ssh

INFRA = "infra-1"
NAMES = ["sip-1", "sip-2", "media-1", "media-2", "pbx-1", "pbx-2", INFRA]
TEMPLATES = {  # by role
    "common": ["hosts"],
    "network_config": ["nftables.conf"],
    "kamailio": ["dispatcher.list", "kamailio.cfg"],
    "rtpengine": ["rtpengine.conf"],
    "asterisk": ["pjsip.conf"],
    "postgresql": ["pg_hba.conf"],
    "redis": ["redis.conf"],
}
Stack = inventory.Inventory
Rendered = dict[str, dict[str, str]]  # by machine and template


def double(hosts: dict[str, Any]) -> None:
    """Put a second machine after the first of each group, at the next addresses; infra keeps one."""
    for group in hosts["all"]["children"]["voip_vms"]["children"].values():
        for name, values in list(group["hosts"].items()):
            if name != INFRA:
                next_to = {k: str(IPv4Address(v) + 1) for k, v in values.items() if k.endswith("_address")}
                group["hosts"][name.replace("-1", "-2")] = values | next_to


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's inventory, doubled: its development.yml."""
    copy = tmp_path_factory.mktemp("doubled") / "inventory"
    shutil.copytree(paths.INVENTORY, copy)
    file = copy / "development.yml"
    values = yaml.safe_load(file.read_text())
    double(values)
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


@pytest.fixture(scope="module", autouse=True)
def doubled(hosts: Path) -> Iterator[Stack]:
    """The library's inventory during these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "INVENTORY", hosts.parent)
        inventory.load.cache_clear()
        yield inventory.load()
    inventory.load.cache_clear()


def test_another_rtpengine_changes_no_image_and_is_told_to_those_who_use_one(
    doubled: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_both = {name: (images.key(name), provision._digest(machine)) for name, machine in doubled.machines.items()}
    without = dataclasses.replace(doubled, machines={n: m for n, m in doubled.machines.items() if n != "media-2"})
    monkeypatch.setattr(inventory, "load", lambda: without)
    again = {name: (images.key(name), provision._digest(machine)) for name, machine in without.machines.items()}
    changed = {name for name in again if again[name] != with_both[name]}
    assert {name for name in again if again[name][0] != with_both[name][0]} == set()
    assert changed == {"sip-1", "sip-2", "pbx-1", "pbx-2", INFRA}  # media-1's stamp is current


@pytest.fixture(scope="module")
def rendered(hosts: Path, doubled: Stack) -> Rendered:
    """The roles' templates as Ansible renders them for each machine."""
    roles = paths.ANSIBLE / "roles"
    wanted = {
        name: {
            f"{role}/{file}": str(roles / role / f"templates/{file}.j2")
            for role in roles_of(machine, doubled)
            for file in TEMPLATES.get(role, [])
        }
        for name, machine in doubled.machines.items()
    }
    argv = [str(Path(sys.executable).with_name("ansible")), "all", "-i", str(hosts), "-m", "debug", "-c", "local", "-o"]
    for role in TEMPLATES:
        argv += [f"-e@{file}" for part in ("defaults", "vars") if (file := roles / role / part / "main.yml").exists()]
    argv += ["-e", json.dumps({"wanted": wanted})]
    argv += ["-a", "msg={{ query('ansible.builtin.template', *wanted[inventory_hostname].values()) }}"]
    environment = os.environ | settings.load().environment()
    environment |= {"ANSIBLE_CONFIG": str(paths.ANSIBLE / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: Rendered = {}
    for line in done.stdout.splitlines():
        name, _, answer = line.partition(" | SUCCESS => ")
        found[name] = dict(zip(wanted[name], json.loads(answer)["msg"], strict=True))
    return found


def lines(rendered: Rendered, name: str, template: str, pattern: str) -> list[Any]:
    """The groups of `pattern` in the lines of a rendered template."""
    return re.findall(pattern, rendered[name][template], re.MULTILINE)


def test_a_second_machine_is_one_more_entry(doubled: Stack) -> None:
    assert list(doubled.machines) == NAMES
    assert len({images.key(name) for name in NAMES}) == len(NAMES)
    for first in NAMES[::2]:
        second = doubled.machines.get(first.replace("-1", "-2"))
        if second:
            machine = doubled.machines[first]
            assert set(second.addresses) == set(machine.addresses)
            assert second.groups == machine.groups
            for network in doubled.networks:
                assert doubled.services_of(second, network) == doubled.services_of(machine, network)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    return Image("x", "0123abcd", tmp_path / "disk.raw", tmp_path / "vmlinuz", tmp_path / "initrd.img", "root=/dev/vda")


def test_no_mac_and_no_identity_of_a_domain_is_there_twice(doubled: Stack, image: Image, tmp_path: Path) -> None:
    hardware = Hardware("tcg", X86, "maximum", "/usr/bin/qemu-system-x86_64")
    found = []
    for machine in doubled.machines.values():
        links = [domain.Link(mac, Interface("bridge", network)) for network, mac in machine.macs.items()]
        root = ET.fromstring(domain.render(machine, image, hardware, links, tmp_path / machine.name))  # noqa: S314
        assert root.findtext("name") == machine.name
        macs = [e.attrib["address"] for e in root.iter("mac")]
        assert macs == list(machine.macs.values())
        found += [str(root.findtext("uuid")), *macs]
    assert len(set(found)) == len(found) == len(NAMES) + sum(len(m.addresses) for m in doubled.machines.values())


def test_no_address_is_given_out_twice(
    doubled: Stack, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "identity", lambda: tmp_path / "id")
    for name in ("id.pub", "host", "host.pub"):
        (tmp_path / name).write_text("ssh-ed25519 AAAA x\n")
    found = []
    for machine in doubled.machines.values():
        files = seed.render(machine, doubled, image, tmp_path / "host", None)
        links = yaml.safe_load(files["network-config"])["ethernets"].values()
        given = [address.partition("/")[0] for link in links for address in link["addresses"]]
        assert given == list(map(str, machine.addresses.values()))
        assert machine.name in files["meta-data"]
        found += given
    assert len(set(found)) == len(found)


def test_every_machine_knows_the_name_of_every_other(doubled: Stack, rendered: Rendered) -> None:
    for name in doubled.machines:
        known = rendered[name]["common/hosts"].splitlines()
        for machine in doubled.machines.values():
            assert known.count(f"{machine.internal} {machine.name}.{doubled.domain} {machine.name}") == 1


def test_calls_are_of_the_sip_domain_and_machines_of_another(doubled: Stack, rendered: Rendered) -> None:
    chosen = settings.load().sip_domain
    assert chosen != doubled.domain
    assert lines(rendered, "sip-1", "kamailio/kamailio.cfg", r'^#!define DOMAIN "(.*)"$') == [chosen]
    assert set(lines(rendered, "pbx-1", "asterisk/pjsip.conf", r"^from_domain = (.*)$")) == {chosen}


def test_the_firewall_lets_in_all_machines_of_a_kind(doubled: Stack, rendered: Rendered) -> None:
    addresses = {
        group: {str(m.internal) for m in doubled.group(group)} for m in doubled.machines.values() for group in m.groups
    }
    addresses["computer"] = {str(doubled.networks["internal"].computer)}
    for name, machine in doubled.machines.items():
        admitted = lines(rendered, name, "network_config/nftables.conf", r"ip saddr \{ (.*) \} .* comment \"(.*)\"$")
        assert {service: set(sources.split(", ")) for sources, service in admitted} == {
            service.name: set().union(*(addresses[source] for source in service.sources))
            for service in doubled.services_of(machine, "internal")
        }


@pytest.mark.parametrize("proxy", ["sip-1", "sip-2"])
def test_a_proxy_knows_both_pbxs_and_both_rtpengines(doubled: Stack, rendered: Rendered, proxy: str) -> None:
    own = doubled.machines[proxy]
    pattern = r"^1 sip:(\S+):5060 0 (\d) socket=udp:(\S+):5060$"
    assert lines(rendered, proxy, "kamailio/dispatcher.list", pattern) == [
        ("192.168.64.30", "2", str(own.internal)),
        ("192.168.64.31", "1", str(own.internal)),
    ]
    config = "kamailio/kamailio.cfg"
    sockets = lines(rendered, proxy, config, r'"rtpengine_sock", "udp:(\S+):2223"')
    assert sockets == ["192.168.64.20", "192.168.64.21"]
    assert set(lines(rendered, proxy, config, r"^listen=\w+:([\d.]+)")) == {str(own.internal), str(own.external)}


@pytest.mark.parametrize("pbx", ["pbx-1", "pbx-2"])
def test_a_pbx_is_called_by_both_proxies_and_answers_the_one_that_called(rendered: Rendered, pbx: str) -> None:
    pattern = r"^\[(\S+)\]\(proxy\)\naors = users,(\S+)\noutbound_proxy = sip:([\d.]+)"
    assert lines(rendered, pbx, "asterisk/pjsip.conf", pattern) == [
        ("sip-1", "sip-1", "192.168.64.10"),
        ("sip-2", "sip-2", "192.168.64.11"),
    ]
    assert lines(rendered, pbx, "asterisk/pjsip.conf", r"^endpoint = (\S+)\nmatch = (\S+)") == [
        ("sip-1", "192.168.64.10"),
        ("sip-2", "192.168.64.11"),
    ]


def test_each_rtpengine_has_a_database_in_redis_that_no_other_machine_changes(
    doubled: Stack, rendered: Rendered
) -> None:
    (databases,) = lines(rendered, INFRA, "redis/redis.conf", r"^databases (\d+)$")
    for name in ("media-1", "media-2"):
        own = doubled.machines[name]
        (number,) = lines(rendered, name, "rtpengine/rtpengine.conf", r"^redis = \S+/(\d+)$")
        assert int(number) == int(own.internal) & 0xFF < int(databases)
        (interface,) = lines(rendered, name, "rtpengine/rtpengine.conf", "^interface = (.*)$")
        assert interface == f"internal/{own.internal};external/{own.external}"


def test_postgresql_lets_in_both_proxies_and_both_pbxs(rendered: Rendered) -> None:
    admitted = lines(rendered, INFRA, "postgresql/pg_hba.conf", r"^host (\w+) \S+ (\S+)/32 ")
    wanted = {"kamailio": (10, 11), "asterisk": (30, 31), "cdr": (30, 31)}
    assert {(d, f"192.168.64.{last}") for d, both in wanted.items() for last in both} <= set(admitted)


@pytest.mark.parametrize("name", NAMES)
def test_status_asks_every_machine(doubled: Stack, name: str) -> None:
    machine = doubled.machines[name]
    components = [c for c in doubled.components_of(machine) if c.away]
    script = status._script(components, machine)
    assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0
    assert all(f"== {c.name} " in script for c in components)


class Machines:
    """The machines' answers: sessions and packets by RTPEngine, dialogs and channels by proxy and PBX."""

    def __init__(self, sessions: Mapping[str, Callable[[int], int]], user_space: str = "", no_rule: str = "") -> None:
        self.sessions, self.user_space, self.no_rule = sessions, user_space, no_rule
        self.seconds: dict[str, int] = {}  # by machine, asked once a second
        self.held = dict.fromkeys(("sip-1", "sip-2", "pbx-1", "pbx-2"), 0)

    def metrics(self, name: str) -> Metrics:
        """Each session has two streams of 50 packets/s."""
        second = self.seconds[name] = self.seconds.get(name, -1) + 1
        sessions = self.sessions[name](second)
        packets = sum(100 * self.sessions[name](s) for s in range(second))
        kernel = name != self.user_space
        return Metrics(second, sessions, 2 * sessions * kernel, packets * kernel, packets * (not kernel))

    def ssh(self, machine: str, script: str) -> str:
        if "kamcmd" in script:
            return f"all: {self.held[machine]}\n"
        if "channels" in script:
            return f"{self.held[machine]} active channels\n"
        stats = "    stats:    1000 bytes,    10 packets,    0 errors\n" * 2 * self.sessions[machine](10)
        return stats + "nftables rule: yes\n" * (machine != self.no_rule)


@dataclasses.dataclass
class Leg:
    """A call that goes on until its end has been polled `left` times."""

    left: int = 12

    @property
    def returncode(self) -> int | None:
        self.left -= 1
        return 0 if self.left < 0 else None


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Forwarding]:
    """watched(machines): the forwarding of a call on them; media-1 and media-2 are read once before the call."""

    def watch(machines: Machines) -> Forwarding:
        monkeypatch.setattr(probes, "metrics", machines.metrics)
        monkeypatch.setattr(probes, "_ssh", machines.ssh)
        monkeypatch.setattr(probes, "_EVERY", 0.0)
        leg: Any = Leg()
        return probes.watch(leg, probes.held(), module_after=0)

    return watch


def test_forwarding_is_that_of_the_rtpengine_whose_sessions_grew(watched: Callable[..., Forwarding]) -> None:
    """media-1 carries other calls all the time, in user space."""
    machines = Machines({"media-1": lambda _: 6, "media-2": lambda second: 2 * (second > 0)}, user_space="media-1")
    assert watched(machines) == Forwarding(("media-2",), 4, 200.0, 0.0, 4, True)


def test_forwarding_of_a_call_on_both_rtpengines_is_their_sum(watched: Callable[..., Forwarding]) -> None:
    both = {name: lambda second: int(second > 0) for name in ("media-1", "media-2")}
    assert watched(Machines(both)) == Forwarding(("media-1", "media-2"), 4, 200.0, 0.0, 4, True)
    assert watched(Machines(both, no_rule="media-2")).rule is False
    assert watched(Machines(both, user_space="media-1")) == Forwarding(("media-1", "media-2"), 2, 100.0, 100.0, 4, True)


def test_what_calls_hold_is_asked_of_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines({"media-1": lambda _: 0, "media-2": lambda _: 2})
    machines.held |= {"sip-2": 2, "pbx-2": 1}
    monkeypatch.setattr(probes, "metrics", machines.metrics)
    monkeypatch.setattr(probes, "_ssh", machines.ssh)
    held = probes.held()
    assert held == {
        ("sip-1", "dialogs"): 0,
        ("sip-2", "dialogs"): 2,
        ("media-1", "RTPEngine sessions"): 0,
        ("media-2", "RTPEngine sessions"): 2,
        ("pbx-1", "channels"): 0,
        ("pbx-2", "channels"): 1,
    }
    assert probes.released(0, held) == {}
    machines.held["pbx-2"] = 3
    assert probes.released(0, held) == {"pbx-2": "2 channels"}


def test_metrics_are_asked_at_the_machines_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(address: str, *_: object, **__: object) -> None:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(http_client, "ask", ask)
    for name in ("media-1", "media-2"):
        with pytest.raises(CallError, match=name):
            probes.metrics(name)
    assert asked == ["192.168.64.20", "192.168.64.21"]


A, SIP_OUT, SIP_IN, PBX, B = (f"192.168.{last}" for last in ("65.101", "65.11", "64.11", "64.31", "65.102"))


def recording(*messages: tuple[str, str, str, int | None]) -> Recording:
    """Messages of one call: source, destination, method, status; one each second."""
    return Recording(
        tuple(
            Sip(float(n), source, destination, method, 1, status, str(status or ""), "x", "2999")
            for n, (source, destination, method, status) in enumerate(messages)
        ),
        (),
    )


def test_the_proof_names_and_draws_the_machines_that_took_part() -> None:
    caller, callee = (phone.Phone("2998", "x", IPv4Address(a), proxy=IPv4Address(SIP_OUT)) for a in (A, B))
    ping = ("192.168.64.30", "192.168.64.10", "OPTIONS", None)
    first = [ping, (A, SIP_OUT, "INVITE", None), (SIP_IN, PBX, "INVITE", None)]
    call = recording(*first, (PBX, SIP_IN, "INVITE", None), (SIP_OUT, B, "INVITE", None), (PBX, SIP_IN, "INVITE", 200))
    assert [*dict.fromkeys(proof.columns(call, caller, callee).values())] == ["phone A", "sip-2", "pbx-2", "phone B"]
    assert "sip-1" not in proof.draw(call, caller, callee)
    assert max(map(len, proof.draw(call, caller, callee).splitlines())) <= 110
    refused = recording(*first, (PBX, SIP_IN, "INVITE", 503), (SIP_OUT, A, "INVITE", 503))
    assert ladder.blame(refused, proof.columns(refused, caller, callee)) == "sip-2 -> pbx-2: 503 to INVITE"
    nothing = proof.columns(recording(ping), caller, callee)
    assert [*dict.fromkeys(nothing.values())] == ["phone A", "sip-1", "pbx-1", "phone B"]

    forwarding = Forwarding(("media-2",), 4, 200.0, 0.0, 4, True)
    for seen, pbx in ((call, "pbx-2"), (refused, "pbx-1, pbx-2")):
        result = proof.measure(seen, caller, callee, forwarding, {}, [], Path("call.pcapng"))
        assert f"{pbx}: 0 CDRs of this call in the database, not 1" in proof.faults(result)


def test_which_proxy_is_called_is_the_callers_choice() -> None:
    assert phone.proxy_address() == IPv4Address("192.168.65.10")
    assert phone.proxy_address("sip-2") == IPv4Address("192.168.65.11")
    with pytest.raises(InventoryError, match="pbx-1 is no SIP proxy") as caught:
        phone.proxy_address("pbx-1")
    assert caught.value.hint == "name one of: sip-1, sip-2"
