import copy
import dataclasses
from typing import Any

import pytest

from voip_stack import components, inventory, settings
from voip_stack.errors import InventoryError

COMMON: dict[str, Any] = {
    "voip_domain": "voip.local",
    "voip_user": "voip",
    "voip_networks": {
        "internal": {
            "bridge": "voip-int",
            "subnet": "192.168.64.0/24",
            "computer": "192.168.64.1",
            "mac_prefix": "52:54:00:12:34",
            "interface": "eth0",
        }
    },
    "voip_phones": {"first": "192.168.65.101", "last": "192.168.65.103"},
}
EVERY = components.load(settings.parse("", {}))
HOST = {"internal_address": "192.168.64.10", "memory_mib": 1024, "vcpus": 1, "disk_gib": 5}


def test_macs_and_addresses_follow_from_the_inventory() -> None:
    machine = inventory.parse({"sip-1": (["all", "sip_proxies"], HOST)}, COMMON, EVERY).machines["sip-1"]
    assert machine.macs == {"internal": "52:54:00:12:34:0a"}
    assert machine.groups == ("sip_proxies",)
    assert machine.external is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"internal_address": "192.168.64.300"}, "sip-1: internal_address: '192.168.64.300'"),
        ({"internal_address": "10.0.0.1"}, "outside 192.168.64.0/24"),
        ({"internal_address": "192.168.64.1"}, "of this computer"),
        ({"memory_mib": "lots"}, "sip-1: memory_mib"),
        ({"vcpus": 0}, "sip-1: vcpus"),
    ],
)
def test_a_bad_host_entry_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InventoryError, match=words):
        inventory.parse({"sip-1": (["sip_proxies"], HOST | change)}, COMMON, EVERY)


def test_two_machines_with_one_address_are_refused() -> None:
    with pytest.raises(InventoryError, match="sip-2 has the address 192.168.64.10 of sip-1"):
        inventory.parse({"sip-1": (["sip_proxies"], HOST), "sip-2": (["sip_proxies"], HOST)}, COMMON, EVERY)


def test_two_machines_with_one_last_byte_are_refused() -> None:
    """In a network wider than a /24 they would share a MAC, and RTPEngines a Redis database."""
    common = copy.deepcopy(COMMON)
    common["voip_networks"]["internal"]["subnet"] = "192.168.0.0/16"
    with pytest.raises(InventoryError, match=r"last byte of sip-2's internal_address 192.168.66.10 is sip-1's"):
        inventory.parse(
            {
                "sip-1": (["sip_proxies"], HOST),
                "sip-2": (["sip_proxies"], HOST | {"internal_address": "192.168.66.10"}),
            },
            common,
            EVERY,
        )


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ("192.168.65.10", r"a phone of the tests \(voip_phones\) has the address 192.168.65.10 of sip-1"),
        ("192.168.65.201", "of a guest of the roles' tests"),
        ("192.168.66.1", "voip_phones: 192.168.66.1 is outside 192.168.65.0/24"),
    ],
)
def test_a_phone_has_an_address_of_its_own_on_the_external_network(first: str, words: str) -> None:
    common = copy.deepcopy(COMMON)
    common["voip_networks"]["external"] = COMMON["voip_networks"]["internal"] | {
        "subnet": "192.168.65.0/24",
        "computer": "192.168.65.1",
    }
    common["voip_phones"] = {"first": first, "last": first}
    with pytest.raises(InventoryError, match=words):
        inventory.parse({"sip-1": (["sip_proxies"], HOST | {"external_address": "192.168.65.10"})}, common, EVERY)


def test_a_machine_at_a_test_guests_address_is_refused() -> None:
    with pytest.raises(InventoryError, match="sip-1 has the address 192.168.64.203 of a guest of the roles' tests"):
        inventory.parse({"sip-1": (["sip_proxies"], HOST | {"internal_address": "192.168.64.203"})}, COMMON, EVERY)


def test_a_missing_key_is_named() -> None:
    common = copy.deepcopy(COMMON)
    del common["voip_networks"]["internal"]["subnet"]
    with pytest.raises(InventoryError, match="subnet"):
        inventory.parse({"sip-1": (["sip_proxies"], HOST)}, common, EVERY)


def test_the_services_of_a_disabled_component_do_not_count() -> None:
    for enabled, names in ((True, ["ssh", "sip-udp", "sip-tcp"]), (False, ["ssh"])):
        every = EVERY | {"kamailio": dataclasses.replace(EVERY["kamailio"], enabled=enabled)}
        stack = inventory.parse({"sip-1": (["sip_proxies"], HOST)}, COMMON, every)
        assert [s.name for s in stack.services_of(stack.machines["sip-1"], "internal")] == names


def test_an_unknown_machine_is_answered_with_the_names_there_are() -> None:
    stack = inventory.load()
    with pytest.raises(InventoryError) as caught:
        stack.select(["sip-9"])
    assert "sip-9" in caught.value.message
    assert "sip-1" in caught.value.hint


def test_a_group_selects_its_machines() -> None:
    assert [m.name for m in inventory.load().select(["media_servers"])] == ["media-1"]


def test_pbx_and_infra_have_no_outside_interface() -> None:
    machines = inventory.load().machines
    assert machines["pbx-1"].external is None
    assert machines["infra-1"].external is None
    assert {name for name, m in machines.items() if m.external} == {"sip-1", "media-1"}
