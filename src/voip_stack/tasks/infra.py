"""This stack's objects in the services around it."""

import dataclasses
from collections.abc import Iterable

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from voip_stack import ui
from voip_stack.services import Step, make
from voip_stack.services import check as services


@task
def setup(_c: Context) -> None:
    """Make this stack's missing objects in Vault, PostgreSQL and RabbitMQ; existing ones are left."""
    _carry_out(services.missing(), "made", "nothing was missing")


@task(help={"json": "print JSON"})
def check(_c: Context, json: bool = False) -> None:
    """Each service of a devstack-core: reachable, version, missing objects. Exit code 1 when one is missing."""
    rows = services.check()
    if json:
        ui.as_json([dataclasses.asdict(row) for row in rows])
    else:
        ui.table(["service", "address", "state", "version"], [(r.service, r.address, r.state, r.version) for r in rows])
        for row in rows:
            for lack in row.lacks:
                ui.say(f"missing: {row.service}: {lack}")
            if row.note:
                ui.say(f"{row.service} is {row.note}")
        for hint in dict.fromkeys(row.hint for row in rows if row.lacks):
            ui.say(f"  {hint}")
    if any(row.lacks for row in rows):
        raise Exit(code=1)


@task
def teardown(_c: Context) -> None:
    """Remove from a devstack-core all that infra.setup made, with CDRs and subscribers, and nothing else."""
    _carry_out(services.teardown(), "removed", "nothing was there")


def _carry_out(steps: Iterable[Step], done: str, nothing: str) -> None:
    """Run the steps, and print each."""
    for title in make(steps):
        ui.say(f"{done} {title}")
        nothing = ""
    if nothing:
        ui.say(nothing)
