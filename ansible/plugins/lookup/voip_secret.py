"""A secret of the stack by its name, from the provider that the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase

from voip_stack import secrets
from voip_stack.errors import VoipError

DOCUMENTATION = """
name: voip_secret
author: voip-stack
short_description: A secret of the stack by its name
description:
  - Its value; or, where C(voip_secret_form) is C(reference), the expression that C(vault agent) replaces by it.
options:
  _terms:
    description: Names, as the components' descriptors have them.
    required: true
"""


class LookupModule(LookupBase):  # type: ignore[misc]  # Ansible's plugins have no types
    """See DOCUMENTATION."""

    def run(self, terms: Sequence[str], variables: dict[str, Any] | None = None, **_options: Any) -> list[str]:
        """The secrets called `terms`. Raises AnsibleError, which says what to do."""
        known = variables or {}
        plain = self._templar.template if self._templar else str
        if plain(known.get("voip_baking", False)):
            return ["nothing that is baked holds a secret" for _ in terms]
        find = secrets.reference if plain(known.get("voip_secret_form", "value")) == "reference" else secrets.get
        try:
            return [find(term) for term in terms]
        except VoipError as error:
            raise AnsibleError(f"{error.message}; {error.hint}") from None
