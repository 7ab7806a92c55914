"""`./voip test`: all tests, or those that fit into a time; names skipped ones, and counts everything in one line."""

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

from voip_stack import components, files, inventory, packages, paths, settings, ui, vms
from voip_stack.errors import VoipError
from voip_stack.host import current
from voip_stack.roletest import proven, runner
from voip_stack.secrets import vault

_PYTEST = re.compile(r"=+ (.*\d+ (?:passed|failed|error|skipped).*) in [\d.]+s")
_PLAIN = re.compile(r"\d+ passed, \d+ failed, \d+ skipped")
_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
# Failed and skipped tests, repeated at the end, where nobody can miss them.
_TELL = re.compile(r" *(FAILED |ERROR |\[ERROR\]|error: |SKIPPED |left: |\S+ failed at )")
_GRACE = 30  # seconds for a part to end its processes
_BESIDE_MIB = 6 * 1024  # of free memory, for the guests of scenarios beside a suspended stack


@dataclass
class Part:
    """One command of a run, and its result."""

    name: str
    command: Sequence[str]
    status: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Run it, print its output, and parse that. The process ends with this call, however that ends."""
        ui.say(f"==> {self.name}")
        begin = time.monotonic()
        # In our session: sudo asks for its password at the terminal.
        with subprocess.Popen(
            self.command,
            cwd=paths.REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout  # noqa: S101  # the pipe requested above
            try:
                for line in process.stdout:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                    self.read(line.rstrip())
                self.status = process.wait()
            except BaseException as stop:
                if not isinstance(stop, KeyboardInterrupt):  # Ctrl-C reaches all processes of this terminal
                    process.send_signal(signal.SIGINT)  # nox ends its processes
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
                process.kill()
                raise
        self.seconds = time.monotonic() - begin
        if self.status and not self.counts["failed"]:
            self.counts["failed"] += 1  # not a test, but the part itself

    def fail(self, why: str) -> None:
        """Count a failure of the part itself."""
        self.status = self.status or 1
        self.counts["failed"] += 1
        self.told.append(f"error: {why}")
        ui.say(f"error: {why}")

    def read(self, line: str) -> None:
        """Count the results in a line of output, and keep its messages."""
        found = _PYTEST.match(line)
        if found or _PLAIN.fullmatch(line):
            for number, word in _COUNT.findall(found.group(1) if found else line):
                self.counts["failed" if word.startswith("error") else word] += int(number)
        elif _TELL.match(line):
            self.told.append(line[:400])


def run(minutes: float = 0.0) -> int:
    """Run everything; with `minutes`, the parts that fit into them. 0 when nothing failed.

    Always: lint, unit, the stack from nothing to a proven call and the tests marked `core`, however long they take.
    Then, while time is left: stale scenarios, the stack's other tests, and proven scenarios, the newest proof first. A
    scenario that is not done in time is ended and counted as skipped. So is a test that would take too long.
    """
    until = time.time() + minutes * 60 if minutes else 0.0
    proofs, names = proven.load(), runner.scenarios()
    stale = proven.stale(names, proofs)
    others = runner.by_evidence(names, proofs)[len(stale) :]
    done: list[Part] = []

    def part(name: str, *arguments: str, aside: bool = False) -> None:
        done.append(Part(name, [sys.executable, "-m", "nox", "--session", *arguments]))
        try:
            with _stack_aside() if aside else contextlib.nullcontext():
                done[-1].run()
        except VoipError as error:  # the stack could not be set aside, or brought back
            done[-1].fail(error.message)

    def scenarios(name: str, roles: Sequence[str]) -> None:
        left = max(until - time.time(), 1)
        budget = [f"--budget={left / 60:.2f}"] if until else []
        if roles:
            part(name, "molecule", "--", *budget, *roles, aside=not until or left > 1)

    signals = {s: signal.signal(s, lambda *_: sys.exit(143)) for s in (signal.SIGTERM, signal.SIGHUP)}
    log = settings.load().cache_dir / "logs" / "ahead.log"
    files.write(log, "")
    try:
        with _made_ahead(log):
            part("lint and unit tests", "lint", "unit")
            part("the stack, from nothing to a proven call", "integration", "--", "--part=core")
        scenarios("scenarios that are not proven", stale)
        limit = [f"--until={until:.0f}"] if until else []
        part("the stack's other tests", "integration", "--", "--part=rest", *limit)
        scenarios("scenarios proven before", others)
    finally:
        _report(done, log)
        for number, handler in signals.items():
            signal.signal(number, handler)
    return int(any(p.status for p in done))


@contextlib.contextmanager
def _made_ahead(log: Path) -> Iterator[None]:
    """Build packages and images during the first tests, which leave a core idle at times.

    A failure here is ignored: the build is repeated, and its error shown, where it is needed. Only as root: sudo would
    ask in the middle of a test.
    """
    if os.geteuid() != 0:
        yield
        return
    roles = (c.name for c in components.enabled())
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
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def _stack_aside() -> Iterator[None]:
    """Suspend the stack's running machines meanwhile; stop them if memory is short."""
    there = inventory.load().machines.values()
    running = [m for m, s in zip(there, vms.status(list(there)), strict=True) if s.state == "running"]
    if current().available_mib >= _BESIDE_MIB:
        with vms.paused(running):
            yield
        return
    vms.stop(running, ui.teller())
    try:
        yield
    finally:
        vms.start(running, ui.teller(), then=vault.reopen)


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
