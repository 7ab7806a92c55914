"""An operator's actions, and calls that still work after them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from voip_stack import calls, inventory, provision, secrets, settings, status, vms
from voip_stack.errors import CallError
from voip_stack.inventory import Machine
from voip_stack.secrets import vault

pytestmark = pytest.mark.alone


@pytest.mark.takes(90)
def test_a_dry_run_of_a_provisioned_stack_succeeds_and_would_change_nothing(stack: inventory.Inventory) -> None:
    report = provision.run(check=True)
    assert set(report.seconds["common"]) == set(stack.machines)
    assert report.changes == 0


def provisioned(stack: inventory.Inventory) -> list[Machine]:
    """All machines, provisioned with the current inputs."""
    machines = list(stack.machines.values())
    if provision.stale(machines):
        provision.run()
    assert provision.stale(machines) == []
    return machines


def up() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "invoke", "up"], capture_output=True, text=True, timeout=1700, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def changed(said: str) -> dict[str, list[str]]:
    """The changes by provisioning in the output of `up`, by machine."""
    found: dict[str, list[str]] = {}
    for line in said.partition("What changed\n")[2].partition("\n\n")[0].splitlines():
        if line[2] != " ":
            tasks = found.setdefault(line.split()[0], [])
        else:
            tasks.append(line.strip())
    return found


@pytest.fixture
def no_login(stack: inventory.Inventory, ssh: Callable[..., str]) -> Iterator[dict[tuple[str, str], tuple[str, ...]]]:
    """A PBX with an invalid secret_id; yields the faults that status has to report."""
    if settings.load().secrets == "file":
        yield {}
        return
    pbx = stack.group("pbx_servers")[0].name
    file, agent = "/etc/vault-agent/secret-id", "vault-agent.service"
    ssh(pbx, "cp", "--preserve=all", file, "/root/secret-id")
    ssh(pbx, "sed", "--in-place", "s/^......../00000000/", file)
    ssh(pbx, "systemctl", "restart", agent)
    try:
        refused = f"until journalctl --unit {agent} --lines 20 | grep 'error authenticating'; do sleep 1; done"
        ssh(pbx, "timeout", "60", "sh", "-c", refused)
        lost = f"new secrets and certificates do not come: ./voip provision --limit {pbx}"
        yield {(pbx, "others"): (f"{agent} could not log in at Vault when it last tried: {lost}",)}
    finally:
        ssh(pbx, "mv", "/root/secret-id", file)
        ssh(pbx, "systemctl", "restart", agent)


def test_status_says_what_is_degraded_and_only_that(
    stack: inventory.Inventory, ssh: Callable[..., str], no_login: dict[tuple[str, str], tuple[str, ...]]
) -> None:
    ssh("infra-1", "systemctl", "stop", "redis-server")
    try:
        faults = {(part.machine, part.name): part.faults for part in status.look() if part.faults}
    finally:
        ssh("infra-1", "systemctl", "start", "redis-server")
    lost = "a restart of RTPEngine takes the sound from its calls"
    assert faults == {
        ("infra-1", "redis"): (f"redis-server.service is inactive: {lost}",),
        **{
            (m.name, "others"): ("can not reach redis on infra-1 (192.168.64.40:6379)",)
            for m in stack.group("media_servers")
        },
        **no_login,
    }


@pytest.mark.takes(180)
def test_without_kernel_forwarding_the_proof_fails_and_up_mends_that_and_nothing_else(
    stack: inventory.Inventory, ssh: Callable[..., str]
) -> None:
    assert provisioned(stack)
    ssh("media_servers", "sed", "-i", "s/^table = .*/table = -1/", "/etc/rtpengine/rtpengine.conf")
    ssh("media_servers", "systemctl", "restart", "rtpengine-daemon")
    try:
        with pytest.raises(CallError) as caught:
            calls.verify()
        # In user space an emulated machine may also lose packets, and that is reported first.
        assert "not forwarded in the kernel" in f"{caught.value}\n{caught.value.details}"
        ssh("pbx_servers", "systemctl", "stop", "asterisk")
    finally:
        said = up()
    assert "The machines are provisioned again" in said
    mended = {
        "media_servers": ["rtpengine : Configure RTPEngine", "rtpengine : Restart RTPEngine"],
        "pbx_servers": ["asterisk : Start asterisk"],
    }
    assert changed(said) == {name: [] for name in stack.machines} | {
        machine.name: tasks for group, tasks in mended.items() for machine in stack.group(group)
    }
    assert set(ssh("pbx_servers", "systemctl", "is-active", "asterisk").split()) == {"active"}


@pytest.mark.takes(70)
def test_a_reverted_snapshot_brings_back_a_stack_that_works(
    stack: inventory.Inventory, ssh: Callable[..., str]
) -> None:
    machines = list(stack.machines.values())
    vms.snapshot(machines, "test")
    ssh("sip_proxies", "systemctl", "disable", "--now", "kamailio")
    ssh("media_servers", "rm", "-rf", "/etc/rtpengine")
    ssh("pbx_servers", "systemctl", "stop", "asterisk")
    ssh("infra-1", "systemctl", "stop", "postgresql")
    vms.revert(machines, "test")
    calls.verify()


@pytest.mark.takes(40)
def test_rtpengine_is_found_that_came_up_after_kamailio(ssh: Callable[..., str]) -> None:
    ssh("media_servers", "systemctl", "stop", "rtpengine-daemon")
    ssh("sip_proxies", "systemctl", "restart", "kamailio")
    ssh("media_servers", "systemctl", "start", "rtpengine-daemon")
    calls.verify()


@pytest.mark.takes(150)
def test_after_a_restart_of_every_machine_calls_complete_without_provisioning_and_with_vault_sealed(
    stack: inventory.Inventory,
) -> None:
    machines = list(stack.machines.values())
    vms.stop(machines)
    vms.start(machines)
    try:
        calls.verify()
    finally:
        vms.start(machines, then=vault.reopen)
    if settings.load().secrets == "vault":
        assert secrets.get("asterisk_ami_secret")
