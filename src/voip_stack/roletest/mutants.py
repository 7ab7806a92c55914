"""Whether scenarios notice what they are for: each break of a `molecule/ROLE/mutants.yml` must turn its scenario red.

A scenario is converged and verified as it is, and its guests are kept as they then are. For each break they are brought
back to that moment, and converged and verified again with a copy of the role that has it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from voip_stack import cli, paths, settings, ui, vms
from voip_stack.errors import VoipError
from voip_stack.roletest import runner, scenarios, slots

_ROLES = paths.ANSIBLE / "roles"
_SNAPSHOT = "healthy"
_TEST = re.compile(r"^(?:FAILED|ERROR) \S*::(\S+)", re.MULTILINE)
_TASK = re.compile(r"^(?:TASK|RUNNING HANDLER) \[(.*?)\]", re.MULTILINE)
_FATAL = re.compile(r"^(?:fatal|failed): \[", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """One break of a role: `old` in `file` becomes `new`."""

    role: str
    name: str
    file: str
    old: str
    new: str

    def apply(self, roles: Path) -> None:
        """Break the copy of the role in `roles`. Raises VoipError when there is nothing to break."""
        file = roles / self.role / self.file
        text = file.read_text()
        if self.old not in text:
            hint = f"mend molecule/{self.role}/mutants.yml"
            raise VoipError(f"{self.role}: {self.name}: {self.file} has no {self.old!r}", hint)
        file.write_text(text.replace(self.old, self.new))


def load() -> list[Mutant]:
    """The breaks, by role."""
    return [
        Mutant(file.parent.name, entry["name"], entry["file"], entry["replace"], entry["with"])
        for file in sorted(scenarios.SCENARIOS.glob("*/mutants.yml"))
        for entry in yaml.safe_load(file.read_text())
    ]


def _molecule(command: str, role: str, roles: Path) -> tuple[int | None, str]:
    """A command of Molecule with `roles` before the repository's own: its exit status and output.

    The status is None when its time ran out. The output is added to the role's log.
    """
    environment = runner.environment() | {"PYTEST_ADDOPTS": "--exitfirst"}
    environment["ANSIBLE_ROLES_PATH"] = f"{roles}:{_ROLES}"
    with subprocess.Popen(
        [*runner.LEASH, runner.molecule(), command, "--scenario-name", role],
        cwd=paths.REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        late = False
        try:
            output, _ = process.communicate(timeout=runner.SECONDS)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGTERM)  # Ansible and the tests, too
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    with _log(role).open("a") as file:
        file.write(output)
    return None if late else process.returncode, output


def _log(role: str) -> Path:
    log = settings.load().cache_dir / "logs" / "mutants" / f"{role}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


def culprit(command: str, output: str) -> str:
    """The test, or the task of Ansible, that `output` of a failed Molecule command names; empty when it names none."""
    if command == "verify":
        tests = _TEST.findall(output)
        return tests[-1] if tests else ""
    fatal = list(_FATAL.finditer(output))
    tasks = _TASK.findall(output, 0, fatal[-1].start()) if fatal else []
    return tasks[-1] if tasks else ""


def _caught(role: str, roles: Path) -> str:
    """What notices that the role in `roles` is broken; empty when nothing does.

    Raises VoipError when Molecule fails for a reason of its own.
    """
    for command in ("converge", "verify"):
        status, output = _molecule(command, role, roles)
        if status is None:
            return f"{command}: not done within {runner.SECONDS} s"
        if status != 0:
            found = culprit(command, output)
            if not found:
                raise VoipError(f"{role}: {command} failed, and no test or task did", f"see {_log(role)}")
            return f"{command}: {found}"
    return ""


def run(role: str, mutants: list[Mutant]) -> list[tuple[Mutant, str, float]]:
    """Each mutant of `role` with what caught it and the seconds that it took.

    Raises VoipError when the scenario is red without any.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="voip-mutants-") as work:
        roles = Path(work)
        ui.say(f"{role}: as it is")
        for command in ("destroy", "converge", "verify"):
            if _molecule(command, role, roles)[0] != 0:
                raise VoipError(f"{role} is red as it is, at {command}", f"mend it first: nox -s molecule -- {role}")
        there, asked = slots.guests_of(role), scenarios.wanted(scenarios.SCENARIOS / role / "hosts.yml")
        machines = [slots.slot(there[want.host], want) for want in asked]
        vms.snapshot(machines, _SNAPSHOT)
        for mutant in mutants:
            begin = time.monotonic()
            vms.revert(machines, _SNAPSHOT)
            shutil.copytree(_ROLES / role, roles / role)
            mutant.apply(roles)
            caught = _caught(role, roles)
            shutil.rmtree(roles / role)
            results.append((mutant, caught, time.monotonic() - begin))
            ui.say(f"  {results[-1][2]:4.0f} s  {mutant.name}: {caught or 'NOT CAUGHT'}")
        runner.remove(role)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s mutants --", description="Break roles; their scenarios must notice.")
    parser.add_argument("roles", nargs="*", help="those with breaks; all when none is named")
    options = parser.parse_args()
    mutants = load()
    known = list(dict.fromkeys(m.role for m in mutants))
    for role in options.roles:
        if role not in known:
            raise VoipError(f"there are no breaks for {role!r}", f"there are some for: {', '.join(known)}")
    results = [r for role in options.roles or known for r in run(role, [m for m in mutants if m.role == role])]
    ui.table(
        ["role", "break", "caught by", "seconds"],
        [(m.role, m.name, caught or "NOT CAUGHT", f"{seconds:7.0f}") for m, caught, seconds in results],
    )
    missed = sum(not caught for _, caught, _ in results)
    ui.say(f"{len(results) - missed} passed, {missed} failed, 0 skipped")
    sys.exit(missed > 0)


if __name__ == "__main__":
    cli.guard(main)
