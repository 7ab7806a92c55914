"""A daemon's certificate with its key, from the provider that the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase

from voip_stack import secrets
from voip_stack.errors import VoipError

DOCUMENTATION = """
name: voip_certificate
author: voip-stack
short_description: A daemon's certificate with its key
description:
  - PEM, the key first, then the certificate and its CA's.
  - Or, where C(voip_secrets_provider) is C(vault), the expression that C(vault agent) replaces by that.
options:
  _terms:
    description: The name of its role in Vault's pki_int, its common name, and further DNS names.
    required: true
  addresses:
    description: IP addresses that it is for.
    type: list
    elements: str
    default: []
"""


class LookupModule(LookupBase):  # type: ignore[misc]  # Ansible's plugins have no types
    """See DOCUMENTATION."""

    def run(self, terms: Sequence[str], variables: dict[str, Any] | None = None, **options: Any) -> list[str]:
        """The PEM. Raises AnsibleError, which says what to do."""
        self.set_options(var_options=variables, direct=options)
        role, name, *others = map(str, terms)
        addresses = [str(address) for address in self.get_option("addresses")]
        known = variables or {}
        plain = self._templar.template if self._templar else str
        keeper = secrets.provider(plain(known["voip_secrets_provider"]))
        try:
            return [keeper.certificate(role, name, others, addresses)]
        except VoipError as error:
            raise AnsibleError(f"{error.message}; {error.hint}") from None
