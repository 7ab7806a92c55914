"""Scenarios' requests for guests, and the guests' owners."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from voip_stack import paths
from voip_stack.deadline import Deadline
from voip_stack.errors import HostError, InventoryError, VmError
from voip_stack.roletest import mutants, runner, scenarios, slots
from voip_stack.roletest.slots import Owner, Wanted

HOSTS = """
all:
  children:
    sip:
      hosts:
        proxy:
          guest: {memory_mib: 512}
    infra:
      hosts:
        database:
          guest:
    stub:
      hosts:
        nobody: {internal_address: 192.168.64.219}
  vars: {some: thing}
"""


def test_guests_are_the_hosts_that_ask(tmp_path: Path) -> None:
    file = tmp_path / "hosts.yml"
    file.write_text(HOSTS)
    assert scenarios.wanted(file) == [Wanted("proxy", memory_mib=512), Wanted("database")]


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "hosts.yml"
    file.write_text(HOSTS.replace("memory_mib", "memory"))
    with pytest.raises(InventoryError, match="proxy: guest: an unknown key") as error:
        scenarios.wanted(file)
    assert "memory_mib" in error.value.hint


def test_a_scenario_without_guests_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "hosts.yml"
    file.write_text("all: {hosts: {nobody: }}")
    with pytest.raises(InventoryError, match="asks for no guest"):
        scenarios.wanted(file)


def test_slots_have_addresses_and_macs_of_their_own() -> None:
    machines = [slots.slot(name, Wanted("any")) for name in slots.slot_names()]
    for network in ("internal", "external"):
        assert len({m.addresses[network] for m in machines}) == len({m.macs[network] for m in machines}) == slots.SLOTS
    assert str(machines[0].internal) == "192.168.64.201"
    assert machines[0].macs["internal"].endswith(":c9")
    assert machines[0].image_name == "plain"


def test_an_unknown_network_is_named() -> None:
    with pytest.raises(InventoryError, match="no network 'dmz'"):
        slots.slot("molecule-1", Wanted("any", networks=("dmz",)))


def test_a_dead_process_owns_nothing() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        started = slots._ps(process.pid, "lstart=")
        owner = Owner("common", "", "common-1", process.pid, started)
        assert owner.alive
        assert not Owner("common", "", "common-1", process.pid, "Thu Jan  1 00:00:00 1970").alive
        process.kill()
    assert not owner.alive


def test_a_scenario_that_another_process_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        here = str(paths.REPOSITORY)
        owner = Owner("common", here, "common-1", process.pid, slots._ps(process.pid, "lstart="))
        monkeypatch.setattr(slots, "owners", lambda _connection: {"molecule-1": owner})
        with pytest.raises(VmError, match=f"held by process {process.pid}"):
            slots._mine(None, "common")
        assert slots._mine(None, "kamailio") == {}
        process.kill()
    assert slots._mine(None, "common") == {"molecule-1": owner}


def test_junit_names_the_step_that_failed(tmp_path: Path) -> None:
    run = runner.Run("common", tmp_path / "log", [("converge", 3.0), ("verify", 2.0)], Counter(), failed="verify")
    runner.junit([run], tmp_path / "out" / "molecule.xml")
    suite = ET.fromstring((tmp_path / "out" / "molecule.xml").read_text())[0]  # noqa: S314  # our own file
    assert suite.get("failures") == "1"
    assert [case.get("name") for case in suite if len(case)] == ["verify"]


def test_junit_has_a_failure_for_what_no_step_was(tmp_path: Path) -> None:
    run = runner.Run("common", tmp_path / "log", [("converge", 3.0)], Counter(), failed="verify: not done within 9 s")
    runner.junit([run], tmp_path / "molecule.xml")
    suite = ET.fromstring((tmp_path / "molecule.xml").read_text())[0]  # noqa: S314  # our own file
    assert [case.get("name") for case in suite if len(case)] == ["verify: not done within 9 s"]
    assert suite.get("tests") == str(len(suite)) == "2"


def test_a_scenario_depends_on_the_roles_of_its_peers() -> None:
    assert scenarios.roles("kamailio") == {"kamailio", "postgresql", "rtpengine"}
    assert scenarios.roles("network_config") == {"network_config"}


@pytest.mark.parametrize("mutant", mutants.load(), ids=lambda m: f"{m.role}: {m.name}")
def test_each_mutant_finds_what_it_breaks(mutant: mutants.Mutant, tmp_path: Path) -> None:
    role = mutants._ROLES / mutant.role
    shutil.copytree(role, tmp_path / mutant.role)
    mutant.apply(tmp_path)
    assert (tmp_path / mutant.role / mutant.file).read_text() != (role / mutant.file).read_text()


def test_every_role_has_a_scenario_and_mutants() -> None:
    roles = sorted(d.name for d in mutants._ROLES.iterdir())
    assert sorted(runner.scenarios()) == roles
    assert sorted({m.role for m in mutants.load()}) == roles


@pytest.mark.parametrize("role", runner.scenarios())
def test_every_scenario_refuses_two_bad_values_and_says_what_to_look_at(role: str) -> None:
    variables = scenarios.variables(role)
    assert len(variables["refused"]) >= 2
    assert variables["scenario_unit"]
    assert variables["scenario_check"]


LOG = """
INFO     [kamailio > destroy] Executing
INFO     [kamailio > destroy] Executed: Successful
INFO     [kamailio > converge] Executing
INFO     [kamailio > converge] Executed: Successful
INFO     [kamailio > verify] Executing
INFO     [kamailio > verify] Executing Testinfra tests found in molecule/kamailio/...
E       assert 401 == 200
FAILED test_kamailio.py::test_a_phone_registers - assert 401 == 200
============== 1 failed, 19 passed, 1 error in 91.11s (0:01:31) ===============
ERROR    [kamailio > verify] \x1b[31mExecuted: Failed\x1b[0m
"""


PLAIN = LOG.replace("\x1b[31m", "").replace("\x1b[0m", "")


def test_a_run_is_followed_by_what_molecule_says(tmp_path: Path) -> None:
    run = runner.Run("kamailio", tmp_path / "log")
    with (
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run.process,
        run.log.open("w") as log,
    ):
        assert run.process.stdin
        run.process.stdin.write(LOG)
        run.process.stdin.close()
        runner._follow(run, log, threading.Lock())
    assert run.log.read_text() == PLAIN
    assert [step for step, _ in run.steps] == ["destroy", "converge", "verify"]
    assert run.failed == "verify"
    assert run.tests == {"passed": 19, "failed": 2}


def test_a_run_that_ends_early_is_at_a_step(tmp_path: Path) -> None:
    run = runner.Run("kamailio", tmp_path / "log")
    lines = "INFO     [kamailio > converge] Executing\n"
    with (
        subprocess.Popen(["echo", "-n", lines], stdout=subprocess.PIPE, text=True) as run.process,
        run.log.open("w") as log,
    ):
        runner._follow(run, log, threading.Lock())
    assert run.step == "converge"


@pytest.fixture
def molecule_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Molecule whose destroy succeeds, and whose test fails once the file of this path is there."""
    program, may_fail = tmp_path / "molecule", tmp_path / "may-fail"
    program.write_text(
        "#!/bin/sh\n[ $1 = destroy ] && exit\necho 'INFO     [redis > converge] Executing'\n"
        f"until [ -e {may_fail} ]; do sleep 0.05; done\necho '[ERROR]: no such port'; exit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(runner, "molecule", lambda: str(program))
    monkeypatch.setattr(runner, "evidence", lambda role: f"    the journal of {role}")
    return may_fail


def test_a_failure_is_told_when_it_happens(
    molecule_fails: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    molecule_fails.touch()
    run = runner.Run("redis", tmp_path / "log")
    runner.test(run, threading.Lock(), None)
    assert run.failed == "converge"
    said = capsys.readouterr().out
    assert "redis failed at converge:\n    [ERROR]: no such port\n    the journal of redis\n" in said


def test_of_a_run_that_was_ended_nobody_is_told_why_it_failed(
    molecule_fails: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not molecule_fails.exists()
    run = runner.Run("redis", tmp_path / "log")
    thread = threading.Thread(target=runner.test, args=(run, threading.Lock(), None))
    thread.start()
    assert Deadline(10).until(lambda: run.step == "converge", every=0.05)
    run.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert run.failed == "converge"
    assert capsys.readouterr().out == ""


def test_what_was_wrong_is_said_without_the_rest() -> None:
    assert [line.strip() for line in runner.reason(PLAIN)] == [
        "E       assert 401 == 200",
        "FAILED test_kamailio.py::test_a_phone_registers - assert 401 == 200",
    ]


def test_what_ansible_says_is_kept_whole() -> None:
    log = """
TASK [Call the VM library] ****
[ERROR]: Task failed: Action failed: error: the scenario common is held by process 7

  wait for it to end, or end it: kill 7
Origin: molecule/shared/tasks/library.yml:11:3

fatal: [localhost]: FAILED! => {"msg": "error: the scenario common is held by process 7"}
"""
    assert [line.strip() for line in runner.reason(log)] == [
        "[ERROR]: Task failed: Action failed: error: the scenario common is held by process 7",
        "wait for it to end, or end it: kill 7",
    ]


@pytest.mark.parametrize(
    ("command", "output", "named"),
    [
        ("converge", "TASK [a : one] **\nok: [x]\n\nTASK [a : two] **\nfatal: [x]: FAILED!\n\nPLAY RECAP\n", "a : two"),
        ("converge", "TASK [one]\nfatal: [x]: UNREACHABLE!\nTASK [rescued]\nok: [x]\n", "one"),
        ("converge", "RUNNING HANDLER [a : Restart] **\nfailed: [x] (item=y)\n", "a : Restart"),
        ("converge", "TASK [a : one] **\nok: [x]\nTraceback\n", ""),
        ("verify", "ERROR test_a.py::test_one - no\nFAILED test_a.py::test_two[x] - no\n", "test_two[x]"),
        ("verify", "TASK [a : one] **\n", ""),
    ],
)
def test_a_break_is_caught_by_a_test_or_a_task_and_by_nothing_else(command: str, output: str, named: str) -> None:
    assert mutants.culprit(command, output) == named


def test_too_little_memory_is_said_before_anything_starts() -> None:
    with pytest.raises(HostError, match="2 guests need 2000512 MiB of memory"):
        slots._require_memory([Wanted("a", memory_mib=1_000_000), Wanted("b", memory_mib=1_000_000)])
    slots._require_memory([])


def test_the_orphans_of_a_killed_run_are_ended_and_nobody_else() -> None:
    """A process group with a dead leader is ended; one with a living leader has an owner."""
    script = "sleep 60 & echo $!; [ $1 = dies ] || wait"

    def ended(pid: int) -> bool:
        return slots._ps(pid, "stat=")[:1] in ("", "Z")

    for fate in ("dies", "lives"):
        with subprocess.Popen(
            ["sh", "-c", script, "sh", fate], start_new_session=True, stdout=subprocess.PIPE, text=True
        ) as leader:
            assert leader.stdout
            child = int(leader.stdout.readline())
            if fate == "dies":
                leader.wait()
            slots._end_orphans(Owner("common", "", "common-1", leader.pid, "some time"))
            gone = Deadline(5).until(partial(ended, child), every=0.05)
            assert gone == (fate == "dies")
            if not gone:
                os.killpg(leader.pid, signal.SIGKILL)
