"""`./voip test`: all tests, or those that fit into a time; what was left is named, and one line counts everything."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from voip_stack import inventory, packages, paths, settings, ui, vms
from voip_stack.host import current
from voip_stack.roletest import proven, runner

_PYTEST = re.compile(r"=+ (.*\d+ (?:passed|failed|error|skipped).*) in [\d.]+s")
_PLAIN = re.compile(r"\d+ passed, \d+ failed, \d+ skipped")
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
# What failed or was left, said again at the end, where it can't be missed.
_TELL = re.compile(r" *(FAILED |ERROR |\[ERROR\]|error: |SKIPPED |left: |\S+ failed at )")
_BESIDE_MIB = 6 * 1024  # of free memory, for the guests of scenarios beside a stack that stands still


@dataclass
class Part:
    """One command of a run, and what became of it."""

    name: str
    command: Sequence[str]
    status: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Run it, printing what it prints, and learn from that. Whatever ends this ends it."""
        ui.say(f"==> {self.name}")
        begin = time.monotonic()
        with subprocess.Popen(
            self.command,
            cwd=paths.REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            assert process.stdout  # noqa: S101  # the pipe asked for above
            try:
                for line in process.stdout:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                    self.read(line.rstrip())
                self.status = process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGTERM)
                raise
        self.seconds = time.monotonic() - begin
        if self.status and not self.counts["failed"]:
            self.counts["failed"] += 1  # no test, but the part itself

    def read(self, line: str) -> None:
        """Count what a line of output counts, and keep what it tells."""
        found = _PYTEST.match(line)
        if found or _PLAIN.fullmatch(line):
            for number, word in _COUNT.findall(found.group(1) if found else line):
                self.counts["failed" if word.startswith("error") else word] += int(number)
        elif _TELL.match(line):
            self.told.append(line[:400])


def run(minutes: float = 0.0) -> int:
    """Run everything; with `minutes`, what fits into them. 0 when nothing failed.

    Always: lint, unit, the stack from nothing to a proven call and the tests marked `core`, however long they take.
    Then as the clock allows: scenarios that are stale, the stack's other tests, and scenarios proven before, the newest
    first. A scenario that is not done in time is ended and left; a test that would not be is not begun.
    """
    until = time.time() + minutes * 60 if minutes else 0.0
    proofs, names = proven.load(), runner.scenarios()
    stale = proven.stale(names, proofs)
    others = [name for name in runner.by_evidence(names, proofs) if name not in stale]
    done: list[Part] = []

    def part(name: str, *arguments: str) -> None:
        done.append(Part(name, [sys.executable, "-m", "nox", "--session", *arguments]))
        done[-1].run()

    def scenarios(name: str, roles: Sequence[str]) -> None:
        if roles:
            budget = [f"--budget={max(until - time.time(), 1) / 60:.2f}"] if until else []
            with _stack_aside():
                part(name, "molecule", "--", *budget, *roles)

    with _made_ahead() as log:
        part("lint and unit tests", "lint", "unit")
        part("the stack, from nothing to a proven call", "integration", "--", "--part=core")
    scenarios("scenarios that are not proven", stale)
    limit = [f"--until={until:.0f}"] if until else []
    part("the stack's other tests", "integration", "--", "--part=rest", *limit)
    scenarios("scenarios proven before", others)
    _report(done, log)
    return int(any(p.status for p in done))


@contextlib.contextmanager
def _made_ahead() -> Iterator[Path]:
    """Build packages and images while the first tests run, which leave a core idle at times.

    What fails here is made again, and told, where it is needed. Only as root: sudo would ask in the middle of a test.
    """
    log = settings.load().cache_dir / "logs" / "ahead.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    if os.geteuid() != 0:
        yield log
        return
    roles = (c.role for c in inventory.load().components.values() if c.enabled)
    names = ",".join(packages.needed_by(roles))
    builds = ["packages.build", f"--names={names}"] if names else []
    command = [sys.executable, "-m", "invoke", *builds, "images.build"]
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=paths.REPOSITORY, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            yield log
        finally:
            process.terminate()


@contextlib.contextmanager
def _stack_aside() -> Iterator[None]:
    """The stack's machines take no processor time meanwhile; nor memory, where there is little."""
    machines = list(inventory.load().machines.values())
    if current().available_mib >= _BESIDE_MIB:
        with vms.paused(machines):
            yield
    else:
        vms.stop(machines)
        yield
        vms.start(machines)


def _report(done: Sequence[Part], log: Path) -> None:
    ahead = re.search(r"^error: (.*\n){1,20}", log.read_text(), re.MULTILINE)
    for line in [*([ahead.group()] if ahead else []), *(line for part in done for line in part.told)]:
        ui.say(line)
    words = ("passed", "failed", "skipped")
    rows = [
        (p.name, "failed" if p.status else "passed", *(p.counts[w] for w in words), f"{p.seconds / 60:7.1f}")
        for p in done
    ]
    ui.table(["part", "result", *words, "minutes"], rows)
    total = sum((part.counts for part in done), Counter[str]())
    ui.say(", ".join(f"{total[word]} {word}" for word in words))
