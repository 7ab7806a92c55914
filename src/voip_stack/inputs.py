"""The variables that a text depends on: those that it names, and those that their values name."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from voip_stack import components
from voip_stack.components import Components


def known(ansible: Path, every: Components, hosts: Iterable[Collection[str]]) -> dict[str, str]:
    """As text: the inventory's variables of all machines, the components', and those of machines of these groups.

    The components' flags are left out: the other variables reflect their effect on a machine.
    """
    found: dict[str, Any] = {}
    for file in sorted((ansible / "inventory/group_vars").rglob("*.yml")):
        found |= yaml.safe_load(file.read_text()) or {}
    del found["voip_components"]
    found |= components.variables(every)
    for groups in hosts:
        for name, value in components.host_variables(every, groups).items():
            found[name] = [*found.get(name, []), value]
    return {name: json.dumps(value) for name, value in found.items()}


def named(text: str, variables: Mapping[str, str]) -> dict[str, str]:
    """Those of `variables` that `text` names, and those that their values name."""
    found: dict[str, str] = {}
    while more := (variables.keys() & re.findall(r"\w+", text)) - found.keys():
        found |= {name: variables[name] for name in more}
        text = "\n".join(variables[name] for name in more)
    return found
