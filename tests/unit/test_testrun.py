"""The parts of a test run, their times, and the count of their results."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from voip_stack import packages, settings, testrun
from voip_stack.errors import PackageError, UnavailableError, VmError
from voip_stack.host import speed
from voip_stack.roletest import proven, runner
from voip_stack.roletest.proven import Proof
from voip_stack.testrun import Part

OLD = Proof("0" * 16, "2026-11-29T10:00Z", 7, 60, "tcg", "redis-server 5:8.0.2-3")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "slowness", lambda: 1.0)
    monkeypatch.setattr(speed, "measure", lambda: 1.0)


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Molecule that does nothing, and passes at once unless the file of this path holds seconds."""
    program, file, waits = tmp_path / "molecule", tmp_path / "proven.yml", tmp_path / "seconds"
    program.write_text(f"""#!/bin/sh
[ $1 = destroy ] && exit
echo 'INFO     [redis > verify] Executing'
[ ! -e {waits} ] || sleep $(cat {waits})
echo '=== 3 passed, 1 skipped in 1.00s ==='
echo 'INFO     [redis > verify] Executed: Successful'
""")
    program.chmod(0o755)
    monkeypatch.setattr(runner, "molecule", lambda: str(program))
    monkeypatch.setattr(runner, "tested_package", lambda _role: "redis-server 5:8.0.2-3")
    monkeypatch.setattr(runner, "junit", lambda _runs, _file: None)
    monkeypatch.setattr(packages, "ensure", lambda *_, **__: None)
    conf = settings.parse("VOIP_ACCELERATOR=tcg", {"VOIP_CACHE_DIR": str(tmp_path)})
    monkeypatch.setattr(settings, "load", lambda: conf)
    monkeypatch.setattr(proven, "FILE", file)
    monkeypatch.setattr(proven.load, "__defaults__", (file,))
    monkeypatch.setattr(proven.record, "__defaults__", (file,))
    monkeypatch.setattr(proven, "unclean", list)
    return waits


def test_a_green_run_on_a_clean_tree_is_written_down(scenario: Path) -> None:
    assert not scenario.exists()
    runner.Matrix(["redis"]).run(1)
    proof = proven.load()["redis"]
    assert (proof.digest, proof.tests, proof.package) == (proven.digest_of("redis"), 4, "redis-server 5:8.0.2-3")
    assert proven.stale(["redis", "common"], proven.load()) == ["common"]


def test_a_green_run_of_what_is_not_committed_proves_nothing(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not scenario.exists()
    monkeypatch.setattr(proven, "unclean", lambda: ["ansible/roles/redis/tasks/main.yml"])
    matrix = runner.Matrix(["redis"])
    matrix.run(1)
    matrix.report()
    assert proven.load() == {}
    assert "since these are not committed: ansible/roles/redis/tasks/main.yml" in capsys.readouterr().out


def test_what_was_changed_while_it_ran_is_not_proven(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not scenario.exists()
    digests = iter(["a" * 16, "b" * 16])
    monkeypatch.setattr(proven, "digest_of", lambda _name: next(digests))
    runner.Matrix(["redis"]).run(1)
    assert proven.load() == {}


def test_a_scenario_for_which_there_is_no_time_is_left_and_counted(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not scenario.exists()
    proven.record("redis", OLD)
    matrix = runner.Matrix(["redis", "common"], minutes=0.9)  # redis takes a minute
    matrix.run(1)
    matrix.report()
    said = capsys.readouterr().out
    assert "left: redis: not proven as it is now; last green 2026-11-29, 7 tests, redis-server 5:8.0.2-3" in said
    assert "left: common: never proven" in said
    assert said.endswith("0 passed, 0 failed, 2 skipped\n")


def test_a_scenario_that_is_not_done_in_time_is_ended_and_left(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario.write_text("60")
    proven.record("redis", Proof("0" * 16, "2026-11-29T10:00Z", 7, 1, "tcg"))
    matrix = runner.Matrix(["redis"], minutes=2 / 60)
    begin = time.monotonic()
    matrix.run(1)
    assert time.monotonic() - begin < 20
    matrix.report()
    said = capsys.readouterr().out
    assert "left: the time was over" in said
    assert said.endswith("0 passed, 0 failed, 1 skipped\n")
    assert proven.load()["redis"].date == "2026-11-29T10:00Z"


def test_a_scenario_whose_package_is_not_to_be_had_is_left_with_what_was_last_seen(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure(name: str, **_: object) -> None:
        raise UnavailableError(f"{name}: no version 1:22.* of {name} in unstable")

    assert not scenario.exists()
    proven.record("asterisk", Proof("0" * 16, "2026-11-29T10:00Z", 7, 1, "tcg", "asterisk 1:22.10.1"))
    monkeypatch.setattr(packages, "ensure", ensure)
    matrix = runner.Matrix(["asterisk"])
    matrix.run(1)
    matrix.report()
    said = capsys.readouterr().out
    assert "left: asterisk: no version 1:22.* of asterisk in unstable" in said
    assert "last green 2026-11-29, 7 tests, asterisk 1:22.10.1" in said
    assert said.endswith("0 passed, 0 failed, 1 skipped\n")


def test_a_scenario_whose_package_takes_all_the_time_is_not_begun(
    scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not scenario.exists()
    proven.record("asterisk", Proof("0" * 16, "2026-11-29T10:00Z", 7, 1, "tcg"))
    monkeypatch.setattr(packages, "ensure", lambda *_, **__: time.sleep(1.5))
    matrix = runner.Matrix(["asterisk"], minutes=1.2 / 60)
    matrix.run(1)
    assert matrix.runs[0].result == "left: the time was over"
    assert matrix.runs[0].steps == []


def test_a_test_that_has_failed_when_the_time_is_over_is_red(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = scenario.with_name("molecule")
    program.write_text(program.read_text().replace("[ ! -e", "echo 'test_redis.py ..F.'\n[ ! -e"))
    scenario.write_text("60")
    monkeypatch.setattr(runner, "evidence", lambda _role: "    its journal")
    proven.record("redis", Proof("0" * 16, "2026-11-29T10:00Z", 7, 1, "tcg"))
    matrix = runner.Matrix(["redis"], minutes=2 / 60)
    matrix.run(1)
    matrix.report()
    assert matrix.runs[0].result == "failed: verify"
    assert capsys.readouterr().out.endswith("0 passed, 1 failed, 0 skipped\n")


def test_what_goes_wrong_with_one_scenario_leaves_the_others_their_result(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def digest_of(name: str) -> str:
        if name == "common":
            raise FileNotFoundError("an editor replaces it")
        return "a" * 16

    assert not scenario.exists()
    monkeypatch.setattr(proven, "digest_of", digest_of)
    matrix = runner.Matrix(["common", "redis"])
    matrix.run(1)
    assert {run.role: run.result for run in matrix.runs} == {
        "common": "failed: FileNotFoundError: an editor replaces it",
        "redis": "passed",
    }
    assert "an editor replaces it" in capsys.readouterr().out


def test_a_run_without_any_test_proves_nothing(scenario: Path) -> None:
    program = scenario.with_name("molecule")
    program.write_text(program.read_text().replace("=== 3 passed, 1 skipped in 1.00s ===", "no tests ran"))
    runner.Matrix(["redis"]).run(1)
    assert proven.load() == {}


def test_a_package_that_does_not_build_is_red(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure(name: str, **_: object) -> None:
        raise PackageError(f"{name}: compilation failed", "the whole log: there")

    assert not scenario.exists()
    monkeypatch.setattr(packages, "ensure", ensure)
    matrix = runner.Matrix(["asterisk", "redis"])
    matrix.run(1)
    matrix.report()
    said = capsys.readouterr().out
    assert "asterisk failed: asterisk: compilation failed" in said
    assert said.endswith("3 passed, 1 failed, 1 skipped\n")


OUTPUT = """
print("collected 9 items")
print("FAILED tests/security/test_relay.py::test_nobody - assert 200 == 403")
print("SKIPPED [1] tests/conftest.py:40: left, too little time: test_a_busy_phone")
print("======= 1 failed, 7 passed, 1 skipped, 3 deselected, 2 errors in 61.02s (0:01:01) =======")
print("left: cdr: never proven")
print("14 passed, 0 failed, 1 skipped")
raise SystemExit(STATUS)
"""


def test_a_part_counts_what_pytest_and_the_scenarios_count(capsys: pytest.CaptureFixture[str]) -> None:
    part = Part("calls", [sys.executable, "-c", OUTPUT.replace("STATUS", "1")])
    part.run()
    assert part.status == 1
    assert part.counts == {"passed": 21, "failed": 3, "skipped": 2}
    assert [line.split(":")[0] for line in part.told] == [
        "FAILED tests/security/test_relay.py",
        "SKIPPED [1] tests/conftest.py",
        "left",
    ]
    assert "collected 9 items" in capsys.readouterr().out


def test_a_part_that_fails_without_a_test_counts_as_one_failure() -> None:
    part = Part("lint", [sys.executable, "-c", "raise SystemExit(2)"])
    part.run()
    assert part.counts == {"failed": 1}


def test_a_stack_that_can_not_be_set_aside_fails_that_part_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def aside() -> Iterator[None]:
        raise VmError("pbx-1 does not answer by ssh", "./voip vms.status")
        yield

    conf = settings.parse("", {"VOIP_CACHE_DIR": str(tmp_path)})
    monkeypatch.setattr(settings, "load", lambda: conf)
    monkeypatch.setattr(Part, "run", lambda _part: None)
    monkeypatch.setattr(testrun, "_made_ahead", lambda _log: contextlib.nullcontext())
    monkeypatch.setattr(testrun, "_stack_aside", aside)
    monkeypatch.setattr(runner, "scenarios", lambda: ["redis"])
    monkeypatch.setattr(proven, "load", dict)
    assert testrun.run() == 1
    said = capsys.readouterr().out
    assert "error: pbx-1 does not answer by ssh" in said
    assert said.endswith("0 passed, 1 failed, 0 skipped\n")


def test_everything_is_run_in_the_order_of_what_it_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(Part, "run", lambda part: commands.append(list(part.command[3:])))
    monkeypatch.setattr(testrun, "_made_ahead", lambda _log: contextlib.nullcontext())
    monkeypatch.setattr(testrun, "_stack_aside", contextlib.nullcontext)
    monkeypatch.setattr(runner, "scenarios", lambda: ["cdr", "common", "redis"])
    monkeypatch.setattr(proven, "load", lambda: dict.fromkeys(("common", "redis"), OLD))
    monkeypatch.setattr(proven, "digest_of", lambda name: OLD.digest if name == "redis" else "1" * 16)
    conf = settings.parse("", {"VOIP_CACHE_DIR": str(tmp_path)})
    monkeypatch.setattr(settings, "load", lambda: conf)
    assert testrun.run(minutes=75) == 0
    options = [[word.partition("=")[0] for word in command] for command in commands]
    assert options == [
        ["--session", "lint", "unit"],
        ["--session", "integration", "--", "--part"],
        ["--session", "molecule", "--", "--budget", "cdr", "common"],
        ["--session", "integration", "--", "--part", "--until"],
        ["--session", "molecule", "--", "--budget", "redis"],
    ]
    assert capsys.readouterr().out.endswith("0 passed, 0 failed, 0 skipped\n")
