"""All scenarios of Molecule, one after the other or a few at a time: progress, a table, JUnit, one summary line."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO
from xml.etree import ElementTree as ET

from voip_stack import cli, paths, settings, ui
from voip_stack.errors import VoipError
from voip_stack.roletest.scenarios import SCENARIOS, evidence, roles, variables

SECONDS = 2400  # for one scenario, from destroy to destroy; the longest takes half of it on two idle cores
_STEP = re.compile(r"\[\w+ > (\w+)\] (Executing$|Executed: (\w+))")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_TESTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


# Ends with us, even when we are killed; where there is no such tool (macOS), at the next line that it prints.
LEASH = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


@dataclass
class Run:
    """What became of one scenario. `steps` are names and seconds in their order."""

    role: str
    log: Path
    steps: list[tuple[str, float]] = field(default_factory=list)
    tests: Counter[str] = field(default_factory=Counter)
    failed: str = ""  # the step that failed, or why the run did not end
    step: str = ""  # the step that it is at
    process: subprocess.Popen[str] | None = None
    late: bool = False
    cancelled: bool = False  # with the whole matrix: nobody asks why it failed

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.steps)

    def stop(self, late: bool = False) -> None:
        """End Molecule and what it has started; `late`: because its time is over."""
        self.late, self.cancelled = late, not late
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)


def _word(word: str) -> str:
    return "failed" if word.startswith("error") else word


def molecule() -> str:
    """Molecule of this environment."""
    return str(Path(sys.executable).with_name("molecule"))


def scenarios() -> list[str]:
    """All of them; first those that take longest, so that nobody waits for one at the end."""
    names = sorted(f.parent.name for f in SCENARIOS.glob("*/molecule.yml"))
    return sorted(names, key=lambda name: not variables(name).get("scenario_first"))


def changed(base: str = "main") -> list[str]:
    """The scenarios whose role, scenario or shared parts differ from branch `base`, uncommitted changes included.

    Raises VoipError when git does not know `base`.
    """
    command = ["git", "-C", str(paths.REPOSITORY), "diff", "--name-only", "--merge-base", base]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise VoipError(f"git can't compare with the branch {base}", "name the roles instead", done.stderr)
    new = ["git", "-C", str(paths.REPOSITORY), "ls-files", "--others", "--exclude-standard"]
    files = done.stdout.split("\n") + subprocess.run(new, capture_output=True, text=True, check=True).stdout.split("\n")
    shared = ("molecule/shared/", "molecule/conftest.py", ".config/molecule/", "libvirt/", "src/")
    every = (*shared, "ansible/ansible.cfg", "ansible/inventory/", "ansible/plugins/")
    if any(file.startswith(every) for file in files):
        return scenarios()
    return [
        name
        for name in scenarios()
        if any(file.startswith((f"molecule/{name}/", *(f"ansible/roles/{r}/" for r in roles(name)))) for file in files)
    ]


def test(run: Run, tell: threading.Lock) -> None:
    """`molecule destroy` and `molecule test`, their output in the run's log. A failed run is told; its guests stay."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    late = threading.Timer(SECONDS, run.stop, kwargs={"late": True})
    late.start()
    try:
        run.log.unlink(missing_ok=True)  # another run of this scenario may still write to it
        with run.log.open("w") as file:
            # `--destroy never` keeps the guests of an earlier run, too.
            for arguments in (["destroy"], ["test", "--destroy", "never"]):
                _run(run, arguments, file, tell)
                if run.failed:
                    break
    finally:
        late.cancel()
    if run.late:
        run.failed = f"{run.failed}: not done within {SECONDS} s"
    if not run.failed:
        try:
            remove(run.role)  # at once: idle guests take processor time from the others, and slots
        except subprocess.CalledProcessError as error:
            with run.log.open("a") as file:
                file.write(error.stdout + error.stderr)
            run.failed = "destroy"
    if run.failed and not run.cancelled:
        told = explain(run)
        with tell:
            ui.say(told)


def explain(run: Run) -> str:
    """Why `run` failed, for a person."""
    # Before the step "destroy" is done, the guests are not this run's.
    looks = [] if run.failed == "destroy" else [evidence(run.role)]
    said = reason(run.log.read_text())
    return "\n".join([f"\n{run.role} failed at {run.failed}:", *said, *looks, f"    the whole log: {run.log}", ""])


def _run(run: Run, arguments: list[str], file: TextIO, tell: threading.Lock) -> None:
    with subprocess.Popen(
        [*LEASH, molecule(), *arguments, "--scenario-name", run.role],
        cwd=paths.REPOSITORY,
        env={**os.environ, "NO_COLOR": "1", "MOLECULE_COMMAND_BORDERS": "false", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as run.process:
        _follow(run, file, tell)
    if run.process.returncode != 0:
        run.failed = run.failed or run.step or "its end"


def _follow(run: Run, file: TextIO, tell: threading.Lock) -> None:
    """Copy what Molecule says to `file`, and learn from it which step it is at and what became of it."""
    assert run.process  # noqa: S101  # started by the caller
    assert run.process.stdout  # noqa: S101  # and with a pipe
    begin = time.monotonic()
    for line in run.process.stdout:
        line = _COLOUR.sub("", line)  # Molecule's failures have some even where nobody wants it  # noqa: PLW2901
        file.write(line)
        file.flush()
        if found := _STEP.search(line.rstrip()):
            step, what, result = found.groups()
            now = time.monotonic()
            if what == "Executing":
                run.step, begin = step, now
            elif step == run.step:
                run.failed = run.failed or (step if result == "Failed" else "")
                run.step = ""
                if step == "destroy" and run.steps:
                    continue  # `--destroy never`: nothing was done
                run.steps.append((step, now - begin))
                with tell:
                    word = "" if result == "Successful" else result
                    ui.say(f"  {run.role:<16} {step:<12} {now - begin:5.0f} s  {word}".rstrip())
        elif line.startswith("=") and " in " in line:
            for number, word in _TESTS.findall(line):
                run.tests[_word(word)] += int(number)


def reason(log: str) -> list[str]:
    """The lines of Ansible and pytest that say what was wrong, without the rest."""
    found: list[str] = []
    message = False  # Ansible's goes on until it says where the task stands
    for line in map(str.rstrip, log.splitlines()):
        message = line.startswith("[ERROR]") or (
            message and not line.startswith(("Origin:", "fatal:", "TASK ", "PLAY "))
        )
        if line and (message or line.startswith(("FAILED ", "ERROR test_", "E  ", "error:"))):
            found.append(f"    {line[:300]}")
    return found[:20]


def junit(runs: list[Run], file: Path) -> None:
    """The runs as JUnit XML: a suite per scenario, a case per step."""
    top = ET.Element("testsuites")
    for run in runs:
        # A deadline or a failed removal is no step of its own.
        steps = run.steps + [(run.failed, 0.0)] * bool(run.failed and run.failed not in dict(run.steps))
        suite = ET.SubElement(top, "testsuite", name=run.role, tests=str(len(steps)), time=f"{run.seconds:.1f}")
        suite.set("failures", "1" if run.failed else "0")
        for step, seconds in steps:
            case = ET.SubElement(suite, "testcase", classname=f"molecule.{run.role}", name=step, time=f"{seconds:.1f}")
            if step == run.failed:
                ET.SubElement(case, "failure", message=f"see {run.log}")
    file.parent.mkdir(exist_ok=True)
    ET.ElementTree(top).write(file, encoding="unicode", xml_declaration=True)


def remove(role: str) -> None:
    """`molecule destroy`, quietly: the run's own log has what matters."""
    command = [molecule(), "destroy", "--scenario-name", role]
    subprocess.run(command, cwd=paths.REPOSITORY, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s molecule --", description="Test roles on guests of their own.")
    parser.add_argument("roles", nargs="*", help="scenarios; all when none is named")
    parser.add_argument("--changed", action="store_true", help="those that differ from the branch main")
    jobs = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help=f"how many at a time ({jobs})")
    options = parser.parse_args()
    known = scenarios()
    for role in options.roles:
        if role not in known:
            raise VoipError(f"there is no scenario {role!r}", f"the scenarios are: {', '.join(known)}")
    roles = options.roles or (changed() if options.changed else known)
    if not roles:
        ui.say("No role differs from the branch main.")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what runs below us ends too
    begin, tell = time.monotonic(), threading.Lock()
    logs = settings.load().cache_dir / "logs" / "molecule"
    runs = [Run(role, logs / f"{role}.log") for role in roles]
    pool = concurrent.futures.ThreadPoolExecutor(max(1, options.jobs))
    try:
        for future in [pool.submit(test, run, tell) for run in runs]:
            future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for run in runs:
            run.stop()
        raise
    junit(runs, paths.REPOSITORY / "junit" / "molecule.xml")
    rows = [
        (r.role, f"failed: {r.failed}" if r.failed else "passed", sum(r.tests.values()), f"{r.seconds:7.0f}")
        for r in runs
    ]
    ui.table(["role", "result", "tests", "seconds"], rows)
    total = sum((run.tests for run in runs), Counter[str]())
    broken = sum(1 for run in runs if run.failed and run.failed != "verify")
    counts = f"{total['passed']} passed, {total['failed'] + broken} failed, {total['skipped']} skipped"
    ui.say(f"{counts} in {time.monotonic() - begin:.1f}s")
    sys.exit(any(run.failed for run in runs))


if __name__ == "__main__":
    cli.guard(main)
