"""The passwords of the stack's daemons, and their delivery to the machines."""

from invoke.context import Context
from invoke.tasks import task

from voip_stack import secrets, ui
from voip_stack.secrets import rotation


@task(help={"component": "a component that has secrets (secrets.status lists them), or all"})
def rotate(_c: Context, component: str) -> None:
    """Give a component new secrets while the stack runs: calls go on, and the old secrets stop working."""
    rotation.rotate(component, ui.say)
    ui.say(f"{component}: rotated")


@task(help={"json": "print JSON"})
def status(_c: Context, json: bool = False) -> None:
    """Each secret's age; the expiry of certificates and machines' logins."""
    columns = ("what", "where", "age or end")
    rows = rotation.status()
    if json:
        ui.as_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        ui.table(columns, rows)


@task
def ca(_c: Context) -> None:
    """Print the CA (PEM) that phones must trust for TLS."""
    ui.say(secrets.provider().authority().rstrip())
