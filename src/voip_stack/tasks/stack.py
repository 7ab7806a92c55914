"""The whole stack at once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json as json_format
import re
import time
from collections.abc import Sequence
from pathlib import Path

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from voip_stack import calls, images, inventory, lab, packages, provision, services, settings, testrun, ui, vms
from voip_stack import status as stack_status
from voip_stack.errors import CallError, VoipError
from voip_stack.host import doctor
from voip_stack.inventory import Machine
from voip_stack.secrets import vault
from voip_stack.services import check
from voip_stack.tasks.calls import show
from voip_stack.tell import lines
from voip_stack.vms import store


@task
def up(_c: Context) -> None:
    """From nothing to a proven call: checks, images, machines, provisioning, one real call."""
    start = time.monotonic()
    steps = ui.Steps()
    machines = list(inventory.load().machines.values())
    begin = _begin(machines)
    if before := _last_from(begin):
        ui.say(f"The last time from {begin} it took {_duration(sum(before.values()))}.")
    with steps.step("doctor"):
        doctor.require(ui.say, fix=True)
    with steps.step("lab"):
        lab.current().up()
        packages.proxy.start(lab.current().package_addresses)
    with steps.step("images"):
        # An existing machine keeps its disk, even if the roles have changed since: provisioning updates it.
        missing = [m.name for m in machines if m.name not in vms.existing()]
        bake_all(missing, steps)
    with steps.step("machines"):
        vms.create(machines, ui.teller(), then=vault.reopen)
    if inventory.load().devstack:
        with steps.step("services"):
            for made in services.make(check.missing()):
                ui.say(f"made {made}")
    with steps.step("provision"):
        stale = provision.stale(machines)
        if stale:
            provision.run(progress=lines(ui.say))
        else:
            ui.say("Nothing has changed since they were provisioned. To check every setting: ./voip provision")
    with steps.step("call"):
        try:
            result = calls.verify()
        except CallError as error:
            if stale:
                raise
            # Somebody changed a machine by hand, or a daemon on it died.
            ui.say(f"The call failed: {error.message}\nThe machines are provisioned again.")
            provision.run(progress=lines(ui.say))
            result = calls.verify()
        show(result)
    total = time.monotonic() - start
    ui.table(["step", "seconds"], [(n, f"{s:8.1f}") for n, s in [*steps.done, ("all", total)]])
    at = time.strftime("%FT%TZ", time.gmtime())
    with _record().open("a") as file:
        file.write(json_format.dumps({"at": at, "from": begin, "steps": dict(steps.done)}) + "\n")
    ui.say(f"The stack is up. Times are kept in {_record()}.")


def _record() -> Path:
    """The file with the seconds of each `up`, one line of JSON per run."""
    return settings.load().cache_dir / "logs" / "up.jsonl"


def _begin(machines: Sequence[Machine]) -> str:
    """The starting point of an `up`, which determines how long it takes."""
    if all(store.directory(m.name).exists() for m in machines):
        return "machines that are there"
    baked = {image.key for image in images.list_images()}
    return "images that are there" if all(images.key(m.name) in baked for m in machines) else "nothing"


def _last_from(begin: str) -> dict[str, float]:
    """The seconds of each step of the last `up` with this starting point; empty when there was none."""
    lines = _record().read_text().splitlines() if _record().exists() else []
    runs = [run for line in lines if (run := json_format.loads(line)).get("from") == begin]
    # A step that contains others ("images") is not counted twice.
    return {n: s for n, s in runs[-1]["steps"].items() if not n.startswith("image ")} if runs else {}


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def bake_all(names: list[str], steps: ui.Steps) -> None:
    """Bake images two at a time. The stack's packages start at once, since they take longest."""
    if not names:
        return
    images.prepare()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        order = sorted(names, key=lambda n: not images.packages_of(n))
        futures = {name: pool.submit(images.ensure, name, lines(ui.say)) for name in order}
        for name, future in futures.items():
            with steps.step(f"image {name}"):
                future.result()


@task(help={"json": "print JSON"})
def status(_c: Context, json: bool = False) -> None:
    """Working and degraded parts: machines, daemons, registrations, calls. Exit code 1 when one is degraded."""
    parts = stack_status.look()
    if json:
        ui.as_json([dataclasses.asdict(part) for part in parts])
    else:
        shown = [(p.machine, p.name, p.state, p.figures) for p in parts if p.state]
        ui.table(["machine", "part", "state", "carries"], shown)
        for part in parts:
            for fault in part.faults:
                where = part.machine if part.name in ("machine", "others") else f"{part.name} on {part.machine}"
                ui.say(f"\ndegraded: {where}: {fault}")
            if part.faults and part.hint:
                ui.say(f"  {part.hint}")
    if any(part.faults for part in parts):
        raise Exit(code=1)
    if not json:
        ui.say("\nAll is well.")


@task(help={"minutes": "skip tests that don't fit into this time; lint, unit and the stack's core tests always run"})
def test(_c: Context, minutes: str = "") -> None:
    """Run the tests: lint, unit, the full stack with real calls, and every role alone."""
    if minutes and not re.fullmatch(r"[1-9]\d{0,3}", minutes):
        raise VoipError(f"--minutes {minutes!r} is no number of minutes", "e.g.: ./voip test --minutes 75")
    raise Exit(code=testrun.run(float(minutes or 0)))
