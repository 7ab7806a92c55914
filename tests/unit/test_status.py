import dataclasses
import subprocess

import pytest

from voip_stack import inventory, status, vms
from voip_stack.errors import VmError

SAID = """== postgresql active
figure 3 events of CDRs wait
figure 9 of 100 connections
== redis failed
== rabbitmq active
figure 12 events in the queue cdr
== others
fault logrotate.service has failed
"""


def components() -> list[inventory.Component]:
    return [c for c in inventory.load().components.values() if c.group == "infra"]


def parts(said: str) -> dict[str, status.Part]:
    return {p.name: p for p in status._parts(inventory.load().machine("infra-1"), components(), said)}


def test_a_daemon_that_works_shows_what_it_carries() -> None:
    found = parts(SAID)
    assert (found["postgresql"].state, found["postgresql"].faults) == ("active", ())
    assert found["postgresql"].figures == "3 events of CDRs wait, 9 of 100 connections"


def test_a_daemon_that_failed_says_what_calls_lack_and_where_to_look() -> None:
    (fault,) = parts(SAID)["redis"].faults
    assert fault == "redis-server.service is failed: a restart of RTPEngine takes the sound from its calls"
    assert "vms.ssh infra-1" in parts(SAID)["redis"].hint
    assert "redis-server.service" in parts(SAID)["redis"].hint


def test_other_units_that_failed_are_told_too() -> None:
    assert parts(SAID)["others"].faults == ("logrotate.service has failed",)
    assert "others" not in parts(SAID.replace("fault ", ""))


def test_a_machine_is_asked_for_what_it_uses_on_others_and_no_more() -> None:
    used = status._reach(inventory.load().machine("pbx-1"))
    assert "/dev/tcp/192.168.64.40/5432" in used
    assert "/dev/tcp/192.168.64.40/5672" in used
    assert "6379" not in used


def test_every_component_says_what_calls_lack_without_it() -> None:
    assert {c.role for c in inventory.load().components.values()} <= set(status._PROBES)


@pytest.mark.parametrize("name", ["sip-1", "media-1", "pbx-1", "infra-1"])
def test_what_a_machine_is_asked_is_a_shell_script(name: str) -> None:
    stack = inventory.load()
    machine = stack.machine(name)
    components = [c for c in stack.components.values() if c.group in machine.groups]
    script = status._script(components, machine)
    done = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"== {c.name} " in script for c in components)


def test_no_machine_at_all_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    off = vms.Status("sip-1", "off", "192.168.64.10", "", 1, 2048, 0, False, None, "current")
    monkeypatch.setattr(vms, "status", lambda machines: [dataclasses.replace(off, name=m.name) for m in machines])
    with pytest.raises(VmError, match="no machine") as caught:
        status.look()
    assert caught.value.hint == "./voip up"


def test_a_machine_that_is_off_is_named_with_the_way_to_start_it() -> None:
    off = vms.Status("media-1", "off", "192.168.64.20", "", 1, 2048, 0, False, None, "current")
    (part,) = status._look(inventory.load().machine("media-1"), off)
    assert part.faults == ("it is off: calls get a 503",)
    assert part.hint == "./voip vms.start media-1"
