"""What a machine logs in at Vault with, made on this computer."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase

from voip_stack.errors import VoipError
from voip_stack.secrets import vault
from voip_stack.services import vault_setup

DOCUMENTATION = """
name: voip_vault_login
author: voip-stack
short_description: Makes what a machine logs in at Vault with
description:
  - A secret_id of its class's AppRole, which Vault wraps; this computer does not see it. To be used with C(no_log).
  - Runs on this computer, whatever the host is. A check makes none.
options:
  server:
    description: The Vault.
    type: dict
    required: true
    suboptions:
      name: {description: What messages call it., type: str, required: true}
      address: {description: Its IPv4 address., type: str, required: true}
      port: {description: Its TCP port., type: int, required: true}
      ca: {description: The file of the CA of its certificate; empty for plain HTTP., type: path, default: ""}
      keys: {description: The file of its keys or of its root token., type: path, required: true}
  class: {description: Whose AppRole it is., type: str, required: true}
  machine: {description: The machine's name., type: str, required: true}
  address: {description: The IPv4 address that the login is good from; empty for any., type: str, default: ""}
"""
RETURN = """
login:
  description: role_id, and wrapping_token, which unwraps to the secret_id once within 5 minutes.
  returned: when it was made
  type: dict
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
        """The result: `login`, or `msg` with what went wrong and what to do."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        spec = {"server": {"type": "dict", "options": _SERVER, "required": True}, "class": _TEXT, "machine": _TEXT}
        _, given = self.validate_argument_spec(argument_spec=spec | {"address": {"type": "str", "default": ""}})
        if self._task.check_mode:
            return result | {"changed": True}
        try:
            made = vault_setup.login(vault.at(**given["server"]), given["class"], given["machine"], given["address"])
        except VoipError as error:
            return result | {"failed": True, "msg": f"{error.message}; {error.hint}"}
        return result | {"changed": True, "login": made}
