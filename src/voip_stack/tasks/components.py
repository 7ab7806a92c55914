"""The components of the stack."""

from dataclasses import asdict

from invoke.context import Context
from invoke.tasks import task

from voip_stack import inventory, ui


@task(name="list", help={"json": "print JSON"})
def list_(_c: Context, json: bool = False) -> None:
    """Each component with its machines and ports; the whole descriptor as JSON (docs/components.md)."""
    stack = inventory.load()
    rows: list[tuple[str, list[str], list[str]]] = [
        (
            component.name,
            [m.name for m in stack.machines.values() if component in stack.components_of(m)],
            [f"{port.name} {port.protocol} {port.text}" for port in component.ports],
        )
        for component in stack.components.values()
    ]
    if json:
        ui.as_json([asdict(component) for component in stack.components.values()])
    else:
        ui.table(("component", "on", "ports"), [(name, ", ".join(on) or "-", ", ".join(p)) for name, on, p in rows])
