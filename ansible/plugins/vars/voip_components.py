"""What the components' descriptors say, as variables: for all hosts, and for each by its groups."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.inventory.group import Group
from ansible.inventory.host import Host
from ansible.plugins.vars import BaseVarsPlugin
from ansible.template import trust_as_template

from voip_stack import components, settings
from voip_stack.errors import VoipError

DOCUMENTATION = """
name: voip_components
author: voip-stack
short_description: Variables from the components' descriptors
description: See src/voip_stack/components.py, variables() and host_variables().
options:
  stage:
    ini: [{key: stage, section: vars_voip_components}]
    env: [{name: ANSIBLE_VARS_PLUGIN_STAGE}]
extends_documentation_fragment: [vars_plugin_staging]
"""


@functools.cache
def _load() -> components.Components:
    try:
        return components.load(settings.load(), Path(__file__).resolve().parents[2])
    except VoipError as error:
        raise AnsibleError(f"{error.message}; {error.hint}") from None


@functools.cache
def _of_all() -> dict[str, Any]:
    return dict(_trusted(components.variables(_load())))


@functools.cache
def _of_host(groups: frozenset[str]) -> dict[str, Any]:
    return components.host_variables(_load(), groups)


def _trusted(value: Any) -> Any:
    if isinstance(value, components.Template):
        return trust_as_template(str(value))
    if isinstance(value, dict):
        return {key: _trusted(item) for key, item in value.items()}
    return [_trusted(item) for item in value] if isinstance(value, list) else value


class VarsModule(BaseVarsPlugin):  # type: ignore[misc]  # Ansible's plugins have no types
    """See DOCUMENTATION."""

    def get_vars(self, loader: Any, path: str, entities: Sequence[Any], **_options: bool) -> dict[str, Any]:
        """The variables of hosts and of the group `all`. Raises AnsibleError, which names the descriptor."""
        super().get_vars(loader, path, entities)
        found: dict[str, Any] = {}
        for entity in entities if isinstance(entities, list) else [entities]:
            if isinstance(entity, Group) and entity.name == "all":
                found |= _of_all()
            elif isinstance(entity, Host):
                found |= _of_host(frozenset(group.name for group in entity.get_groups()))
        return found
