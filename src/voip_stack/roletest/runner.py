"""Scenarios of Molecule, a few at a time, as the clock allows: progress, a table, JUnit, evidence, one summary line."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO
from xml.etree import ElementTree as ET

from voip_stack import cli, host, packages, paths, settings, ui
from voip_stack.deadline import Deadline
from voip_stack.errors import UnavailableError, VoipError
from voip_stack.host import speed
from voip_stack.roletest import proven
from voip_stack.roletest.proven import Proof
from voip_stack.roletest.scenarios import SCENARIOS, evidence, roles, tested_package
from voip_stack.tell import lines

SECONDS = 2400  # for one scenario on a fast computer, from destroy to destroy; the longest takes half of it
_UNKNOWN = 600  # seconds, on a fast computer, to expect of a scenario that was never proven
_STEP = re.compile(r"\[\w+ > (\w+)\] (Executing$|Executed: (\w+))")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_TESTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
_RED = re.compile(r"test_\w+\.py \S*[FE]")  # pytest's progress


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
    left: str = ""  # why it was not run, or not to its end
    cancelled: bool = False  # with the whole matrix: nobody asks why it failed
    late: bool = False
    red: bool = False  # a test or a step has failed
    step: str = ""  # the step that it is at
    process: subprocess.Popen[str] | None = None
    package: str = ""  # the tested daemon's package and version

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.steps)

    @property
    def result(self) -> str:
        if self.failed:
            return f"failed: {self.failed}"
        return f"left: {self.left}" if self.left else "passed" if self.steps else "not run"

    @property
    def ended(self) -> bool:
        """Whether somebody has ended it before it was done."""
        return bool(self.late or self.cancelled or self.left)

    def stop(self, late: bool = False, left: str = "") -> None:
        """End Molecule and what it has started: since its time is over (`late`), or the matrix's (`left`: how)."""
        self.late, self.left, self.cancelled = late, left, not (late or left)
        if self.process and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)


def _word(word: str) -> str:
    return "failed" if word.startswith("error") else word


def molecule() -> str:
    """Molecule of this environment."""
    return str(Path(sys.executable).with_name("molecule"))


def scenarios() -> list[str]:
    """All of them, by name."""
    return sorted(f.parent.name for f in SCENARIOS.glob("*/molecule.yml"))


def test(run: Run, tell: threading.Lock, deadline: Deadline | None) -> None:
    """`molecule destroy` and `molecule test`, their output in the run's log. A failed run is told; its guests stay.

    A run that is not done by `deadline` is ended and left.
    """
    _molecule(run, tell, deadline)
    if run.red:
        run.left = ""  # what is red is red, whatever the clock says
    elif run.left:
        run.failed = ""
    if not (run.failed or run.ended):
        run.package = tested_package(run.role)
    if not (run.failed or run.cancelled):
        try:
            remove(run.role)  # at once: idle guests take processor time from the others, and slots
        except subprocess.CalledProcessError as error:
            with run.log.open("a") as file:
                file.write(error.stdout + error.stderr)
            run.failed, run.left = "destroy", ""
    if run.failed and not run.cancelled:
        told = explain(run)
        with tell:
            ui.say(told)


def _molecule(run: Run, tell: threading.Lock, deadline: Deadline | None) -> None:
    """Run it until it is done, fails, takes too long for a scenario, or longer than to `deadline`."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    seconds = speed.patient(SECONDS)
    timers = [threading.Timer(seconds, run.stop, kwargs={"late": True})]
    if deadline:
        timers.append(threading.Timer(deadline.left, run.stop, kwargs={"left": "the time was over"}))
    for timer in timers:
        timer.start()
    try:
        run.log.unlink(missing_ok=True)  # another run of this scenario may still write to it
        with run.log.open("w") as file:
            # `--destroy never` keeps the guests of an earlier run, too.
            for arguments in (["destroy"], ["test", "--destroy", "never"]):
                if not (run.failed or run.ended):
                    _run(run, arguments, file, tell)
    finally:
        for timer in timers:
            timer.cancel()
    if run.late:
        run.failed = f"{run.failed}: not done within {seconds:.0f} s"


def explain(run: Run) -> str:
    """Why `run` failed, for a person."""
    # Before the step "destroy" is done, the guests are not this run's.
    looks = [] if run.failed == "destroy" else [evidence(run.role)]
    said = reason(run.log.read_text())
    return "\n".join([f"\n{run.role} failed at {run.failed}:", *said, *looks, f"    the whole log: {run.log}", ""])


def environment() -> dict[str, str]:
    """What Molecule runs in: plain output, and the patience that this computer needs."""
    ours = {"ANSIBLE_TIMEOUT": str(round(speed.patient(60))), "NO_COLOR": "1", "MOLECULE_COMMAND_BORDERS": "false"}
    return os.environ | ours | {"PYTEST_ADDOPTS": ""}  # the user's would leave tests out


def _run(run: Run, arguments: list[str], file: TextIO, tell: threading.Lock) -> None:
    with subprocess.Popen(
        [*LEASH, molecule(), *arguments, "--scenario-name", run.role],
        cwd=paths.REPOSITORY,
        env={**environment(), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as run.process:
        if run.ended:  # while it was started
            run.process.terminate()
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
                run.red |= result == "Failed" and not run.ended
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
        elif _RED.match(line):
            run.red = True


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
    """The runs as JUnit XML: a suite per scenario, a case per step; what was left is a skipped case."""
    top = ET.Element("testsuites")
    for run in runs:
        if run.left:
            suite = ET.SubElement(top, "testsuite", name=run.role, tests="1", skipped="1", time="0")
            case = ET.SubElement(suite, "testcase", classname=f"molecule.{run.role}", name=run.role)
            ET.SubElement(case, "skipped", message=run.left)
            continue
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


def by_evidence(names: list[str], proofs: dict[str, Proof]) -> list[str]:
    """The scenarios in the order of what a run tells: those that are stale, then the newest proven."""
    stale = proven.stale(names, proofs)
    rest = sorted((name for name in names if name not in stale), key=lambda name: proofs[name].date, reverse=True)
    return [*stale, *rest]


def _minutes(text: str) -> float:
    minutes = float(text) if text.replace(".", "", 1).isdigit() else 0.0
    if not minutes:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes, such as 25")
    return minutes


class Matrix:
    """A run of several scenarios: what it starts, in which time, and what it writes down of it."""

    def __init__(self, names: list[str], minutes: float = 0.0) -> None:
        """`minutes`: what is not done by then is left. 0: as long as it takes."""
        logs = settings.load().cache_dir / "logs" / "molecule"
        self.runs = [Run(name, logs / f"{name}.log") for name in names]
        self.deadline = Deadline(minutes * 60) if minutes else None
        self.proofs = proven.load()
        self.unclean = proven.unclean()
        self.slowness = speed.measure()
        self._tell = threading.Lock()

    def run(self, jobs: int) -> None:
        """Run them, `jobs` at a time; whatever ends this ends them.

        In their order; where all will be done in time, the longest first, so that none runs alone at the end.
        """
        seconds = {run.role: self.expected(run.role) for run in self.runs}
        if not self.deadline or sum(seconds.values()) / max(1, jobs) < self.deadline.left:
            self.runs.sort(key=lambda run: -seconds[run.role])
        pool = concurrent.futures.ThreadPoolExecutor(max(1, jobs))
        try:
            for future in [pool.submit(self._one, run) for run in self.runs]:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for run in self.runs:
                run.stop()
            raise

    def expected(self, name: str) -> float:
        """Seconds that scenario `name` will take here."""
        return (self.proofs[name].seconds if name in self.proofs else _UNKNOWN) * self.slowness

    def _one(self, run: Run) -> None:
        """Run one. Whatever goes wrong is that scenario's failure: the others go on."""
        try:
            if self.deadline and self.deadline.left < self.expected(run.role):
                run.left = "too little time was left"
                return
            digest = proven.digest_of(run.role)
            self._packages(run)
            if not (run.failed or run.ended):
                test(run, self._tell, self.deadline)
            if not (run.failed or run.ended):
                self._record(run, digest)
        except Exception as error:
            run.failed, run.left = f"{type(error).__name__}: {error}", ""
            with self._tell:
                ui.say(f"\n{run.role}:\n{traceback.format_exc()}")

    def _record(self, run: Run, digest: str) -> None:
        """Write down that `run` was green with what `digest` is of, if that is committed."""
        tests = run.tests["passed"] + run.tests["skipped"]
        self.unclean = self.unclean or proven.unclean()
        if self.unclean or not tests:
            return
        if proven.digest_of(run.role) != digest:
            ui.say(f"{run.role} was changed while it ran: not proven")
            return
        seconds = max(1, round(run.seconds / self.slowness))
        proven.record(run.role, Proof(digest, proven.now(), tests, seconds, host.verdict() or "tcg", run.package))

    def _packages(self, run: Run) -> None:
        """Have what the scenario's roles install. One that can't be had here leaves it out; a failed build is red."""
        try:
            for package in packages.needed_by(roles(run.role)):
                packages.ensure(package, progress=lines(ui.say))
        except UnavailableError as error:
            run.left = error.message
        except VoipError as error:
            run.failed = "packages"
            with self._tell:
                ui.say(f"\n{run.role} failed: {error.message}\n{error.details}\n{error.hint}\n")

    def report(self) -> None:
        """The table, what was left and since when it is proven, and the summary line; JUnit beside them."""
        junit(self.runs, paths.REPOSITORY / "junit" / f"molecule-{time.strftime('%H%M%S')}.xml")
        rows = [(r.role, r.result, sum(r.tests.values()), f"{r.seconds:7.0f}") for r in self.runs]
        ui.table(["role", "result", "tests", "seconds"], rows)
        left = [run.role for run in self.runs if run.left]
        failed = [run for run in self.runs if run.failed]
        stale = proven.stale(left, self.proofs)
        for name in left:
            proof = self.proofs.get(name)
            now = "" if name not in stale else "not proven as it is now; "
            ui.say(f"left: {name}: {now}last green {proof}" if proof else f"left: {name}: never proven")
        if self.unclean and not all(run.left for run in self.runs):
            ui.say(f"Not written to proven.yml, since these are not committed: {', '.join(self.unclean[:5])}")
        total = sum((run.tests for run in self.runs if not run.left), Counter[str]())
        # A scenario may fail at something that is no test.
        broken = total["failed"] + sum(1 for run in failed if not run.tests["failed"])
        ui.say(f"{total['passed']} passed, {broken} failed, {total['skipped'] + len(left)} skipped")


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s molecule --", description="Test roles on guests of their own.")
    parser.add_argument("roles", nargs="*", help="scenarios, in this order; all when none is named")
    parser.add_argument("--stale", action="store_true", help="those that are not proven as they are now")
    parser.add_argument(
        "--budget", type=_minutes, default=0.0, metavar="MINUTES", help="the stale ones, then the newest proven"
    )
    jobs = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help=f"how many at a time ({jobs})")
    options = parser.parse_args()
    known = scenarios()
    for role in options.roles:
        if role not in known:
            raise VoipError(f"there is no scenario {role!r}", f"the scenarios are: {', '.join(known)}")
    proofs = proven.load()
    names = options.roles or known
    if options.stale:
        names = proven.stale(names, proofs)
        if not names:
            ui.say("All are proven as they are now.\n0 passed, 0 failed, 0 skipped")
            return
    elif options.budget and not options.roles:
        names = by_evidence(names, proofs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what runs below us ends too
    matrix = Matrix(names, options.budget)
    matrix.run(options.jobs)
    matrix.report()
    sys.exit(any(run.failed for run in matrix.runs))


if __name__ == "__main__":
    cli.guard(main)
