"""The roles' templates and the components' lists as Ansible renders them, for servers set up from this computer."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from typing import Any

import jinja2

from voip_stack import components, paths

ROLES = paths.ANSIBLE / "roles"
Secret = Callable[[str], str]  # a password by the name of its secret


def render(role: str, template: str, **values: object) -> str:
    """A template of a role, with the role's own filters. Raises jinja2.UndefinedError for an undefined value."""
    # Like Ansible's template lookup: trim_blocks, and an undefined variable is an error.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROLES / role / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # noqa: S701  # SQL and JSON
    )
    environment.filters["to_json"] = json.dumps
    for file in (ROLES / role / "filter_plugins").glob("*.py"):
        environment.filters |= runpy.run_path(str(file))["FilterModule"]().filters()
    return environment.get_template(template).render(values)


def told(variable: str, secret: Secret) -> list[dict[str, Any]]:
    """A list derived from the components, such as voip_databases, with passwords. Raises what `secret` does."""
    return list(_filled(components.variables(components.current())[variable], secret))


def _filled(value: Any, secret: Secret) -> Any:
    """`value` with its templates replaced by passwords."""
    if isinstance(value, components.Template):
        return secret(value.strip("{ }"))
    if isinstance(value, dict):
        return {key: _filled(item, secret) for key, item in value.items()}
    return [_filled(item, secret) for item in value] if isinstance(value, list) else value
