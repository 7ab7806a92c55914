"""Secrets by name, and their provider: a Provider for each value of VOIP_SECRETS."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from voip_stack import components, settings
from voip_stack.components import Secret
from voip_stack.errors import VoipError
from voip_stack.inventory import Machine

CERTIFICATE_HOURS = 2160  # lifetime of a daemon's certificate, from either provider
_LENGTH = 32
_ALPHABET = string.ascii_letters + string.digits
# A secret is written verbatim into files of many syntaxes and into URLs, some of them by `vault agent`.
_PLAIN = re.compile(r"[A-Za-z0-9._~-]+")


@dataclass(frozen=True)
class Dated:
    """A secret, a certificate or a login: its age or expiry; `state` for one that has neither."""

    name: str
    place: str
    made: datetime | None = None
    ends: datetime | None = None
    state: str = "not made yet"


class Provider(Protocol):
    """A store of the stack's secrets that also issues its certificates. All methods raise VoipError."""

    by_agent: bool  # whether `vault agent` on the machines writes them into files; otherwise roles do

    @property
    def place(self) -> str:
        """The place of all secrets, as shown to a person."""

    def where(self, secret: Secret) -> str:
        """The place of this secret."""

    def get(self, secret: Secret) -> str:
        """Its value."""

    def put(self, secret: Secret, value: str) -> None:
        """Store `value`."""

    def certificate(self, role: str, name: str, others: Sequence[str] = (), addresses: Sequence[str] = ()) -> str:
        """The text that a role writes: certificate for a name, `others` and `addresses`, key, and CA certificate."""

    def authority(self) -> str:
        """PEM of the CA that phones have to trust."""

    def dated(self) -> list[Dated]:
        """All entries of the store."""


def provider(name: str = "") -> Provider:
    """The provider called `name`, by default the one in the settings. Raises SettingsError."""
    if (name or settings.load().secrets) == "vault":
        from voip_stack.secrets.vault_provider import VaultProvider  # noqa: PLC0415  # imports the lab

        return VaultProvider()
    from voip_stack.secrets.file_provider import FileProvider  # noqa: PLC0415  # as above

    return FileProvider()


def catalogue() -> dict[str, Secret]:
    """The secrets of all enabled components by name."""
    return {secret.name: secret for component in components.enabled() for secret in component.secrets}


def classes() -> dict[str, dict[str, Any]]:
    """The paths that each class of machines may read: see components.classes()."""
    return components.classes(components.current())


def by_agent(machine: Machine) -> bool:
    """Whether `vault agent` writes the secrets of `machine`."""
    return provider().by_agent and any(c["group"] in machine.groups for c in classes().values())


def find(name: str) -> Secret:
    """The secret called `name`. Raises VoipError."""
    try:
        return components.secrets(components.current())[name]
    except KeyError:
        raise VoipError(f"there is no secret named {name!r}", "ansible/roles/*/component.yml name them") from None


def generate() -> str:
    """A new secret: 32 letters and digits, 190 bits."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))


def get(name: str) -> str:
    """The value of the secret called `name`. Raises VoipError, which names its place."""
    secret, keeper = find(name), provider()
    value = keeper.get(secret)
    if not _PLAIN.fullmatch(value):
        what = "holds more than letters, digits and ._~-" if value else "is empty"
        raise VoipError(f"{secret.field} in {keeper.where(secret)} {what}", "put another one there")
    return value


def put(name: str, value: str) -> None:
    """Store `value` as the secret called `name`. Raises VoipError."""
    provider().put(find(name), value)


def reference(name: str) -> str:
    """The consul-template expression for the secret's value. Raises VoipError."""
    secret = find(name)
    return "{{ with secret `secret/data/%s` }}{{ .Data.data.%s }}{{ end }}" % (secret.path, secret.field)  # noqa: UP031
