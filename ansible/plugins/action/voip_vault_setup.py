"""What the stack keeps in Vault: what is missing there is made, from this computer."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase

from voip_stack.errors import VoipError
from voip_stack.secrets import vault
from voip_stack.services import make, vault_setup

DOCUMENTATION = """
name: voip_vault_setup
author: voip-stack
short_description: Makes what the stack keeps in Vault and is missing there
description:
  - Mounts, CAs, secrets, policies, AppRoles and PKI roles; what is there is left.
  - Runs on this computer, whatever the host is. A check only looks, and skips a Vault that is not there yet.
options:
  server:
    description: The Vault; the stack's own when left out.
    type: dict
    suboptions:
      name: {description: What messages call it., type: str, required: true}
      address: {description: Its IPv4 address., type: str, required: true}
      port: {description: Its TCP port., type: int, required: true}
      ca: {description: The file of the CA of its certificate; empty for plain HTTP., type: path, default: ""}
      keys: {description: The file of its keys or of its root token., type: path, required: true}
  machines:
    description:
      - By class of machines and by name, the address that a machine logs in from, then those of its certificate.
      - Those of the inventory when left out.
    type: dict
"""
RETURN = """
made:
  description: The titles of what was missing.
  returned: success
  type: list
"""
_TEXT = {"type": "str", "required": True}
_SERVER = {
    "name": _TEXT,
    "address": _TEXT,
    "port": {"type": "int", "required": True},
    "ca": {"type": "path", "default": ""},
    "keys": {"type": "path", "required": True},
}


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible's plugins have no types
    """See DOCUMENTATION."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The result: `changed` and `made`, or `msg` with what went wrong and what to do."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        spec = {"server": {"type": "dict", "options": _SERVER}, "machines": {"type": "dict"}}
        _, given = self.validate_argument_spec(argument_spec=spec)
        check = self._task.check_mode
        try:
            steps = vault_setup.plan(vault.at(**given["server"]) if given["server"] else None, given["machines"])
            made = [title for title, _ in steps] if check else list(make(steps))
        except VoipError as error:
            absent = (
                check and isinstance(error, vault.VaultError) and not error.status
            )  # by what the check pretends to do
            return result | {"skipped" if absent else "failed": True, "msg": f"{error.message}; {error.hint}"}
        return result | {"changed": bool(made), "made": made}
