"""The roles: a new one, with its scenario."""

from invoke.context import Context
from invoke.tasks import task

from voip_stack import paths, ui
from voip_stack.roletest import skeleton


@task(positional=["name"], help={"name": "small letters, digits and _"})
def new(_c: Context, name: str) -> None:
    """Make a role and its scenario, which pass as they are: a starting point."""
    for file in skeleton.new(name):
        ui.say(str(file.relative_to(paths.REPOSITORY)))
    ui.say(f"Next: molecule test -s {name}. Then replace the echo by your daemon (docs/roles.md).")
