"""The stack's secrets and certificates, for either provider: files of this computer, or Vault (VOIP_SECRETS)."""

from voip_stack.secrets.store import (
    CERTIFICATE_HOURS,
    Dated,
    Provider,
    by_agent,
    catalogue,
    classes,
    find,
    generate,
    get,
    provider,
    put,
    reference,
)

__all__ = [
    "CERTIFICATE_HOURS",
    "Dated",
    "Provider",
    "by_agent",
    "catalogue",
    "classes",
    "find",
    "generate",
    "get",
    "provider",
    "put",
    "reference",
]
