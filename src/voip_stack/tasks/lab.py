"""The network of the machines and the phones."""

import os
import subprocess

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from voip_stack import lab, packages, ui, vms


@task
def up(c: Context) -> None:
    """Make the lab, or repair it; existing parts are left."""
    if not c.config.run.dry:
        lab.current().up()
    _show()


@task
def down(c: Context) -> None:
    """Stop the machines and remove every process, interface and socket of the lab. Disks and images stay."""
    if c.config.run.dry:
        _show()
    else:
        lab.current().down(ui.say)
        packages.proxy.stop()


@task(help={"json": "print JSON"})
def status(_c: Context, json: bool = False) -> None:
    """The parts of the lab, and their state."""
    _show(json)


def _show(json: bool = False) -> None:
    home = lab.current()
    parts = home.status()
    if json:
        ui.as_json({"home": home.name, "parts": [{"name": p.name, "up": p.up, "detail": p.detail} for p in parts]})
    else:
        rows = [(p.name, "up" if p.up else "down", p.detail) for p in parts]
        ui.table([f"lab: {home.name}", "state", "detail"], rows)


@task(help={"outside": "as a phone outside, not as this computer", "command": "run this command, then leave"})
def shell(_c: Context, outside: bool = False, command: str = "") -> None:
    """A shell inside the lab, with this computer's addresses on its networks."""
    home = lab.current()
    home.up()
    program = ["env", f"PATH={vms.ssh.commands()}:{os.environ['PATH']}"]
    program += ["sh", "-c", command] if command else [os.environ.get("SHELL", "sh")]
    argv = home.outside(*program) if outside else home.inside(*program)
    code = subprocess.run(argv, check=False).returncode
    if command and code:
        raise Exit(code=code)
