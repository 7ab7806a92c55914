"""The stack's secrets by name, whoever keeps them: files of this computer, or Vault (VOIP_SECRETS)."""

from __future__ import annotations

import re
import secrets
import string
from pathlib import Path
from typing import Any

from voip_stack import components, files, settings
from voip_stack.components import Secret
from voip_stack.errors import VoipError
from voip_stack.inventory import Machine

CERTIFICATE_HOURS = 2160  # a daemon's certificate lives so long, whoever signs it
_LENGTH = 32
_ALPHABET = string.ascii_letters + string.digits
# A secret is written as it is into files of many syntaxes and into URLs, some of them by `vault agent`.
_PLAIN = re.compile(r"[A-Za-z0-9._~-]+")


def catalogue() -> dict[str, Secret]:
    """The secrets of all enabled components by name."""
    return {secret.name: secret for component in components.enabled() for secret in component.secrets}


def classes() -> dict[str, dict[str, Any]]:
    """What each class of machines may read: see components.classes()."""
    return components.classes(components.current())


def by_agent(machine: Machine) -> bool:
    """Whether `vault agent` writes the secrets of `machine`."""
    return settings.load().secrets == "vault" and any(c["group"] in machine.groups for c in classes().values())


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
    """The value of the secret called `name`. Raises VoipError, which names where it should be."""
    secret = find(name)
    if settings.load().secrets == "vault":
        from voip_stack import vault  # noqa: PLC0415  # it needs the lab, which a file does not

        where = f"secret/{secret.path} in Vault"
        value = vault.current().kv(secret.path).get(secret.field)
        if value is None:
            raise VoipError(f"there is no {secret.field} in {where}", "./voip infra.setup")
    else:
        file = settings.load().secrets_dir / name
        where = str(file)
        value = _kept(file)
    if not _PLAIN.fullmatch(value):
        what = "holds more than letters, digits and ._~-" if value else "is empty"
        raise VoipError(f"{secret.field} in {where} {what}", "put another one there")
    return value


def put(name: str, value: str) -> None:
    """Keep `value` as the secret called `name` from now on. Raises VoipError."""
    secret = find(name)
    if settings.load().secrets == "vault":
        from voip_stack import vault  # noqa: PLC0415  # as in get()

        server = vault.current()
        server.ask("POST", f"secret/data/{secret.path}", {"data": server.kv(secret.path) | {secret.field: value}})
        return
    files.write(settings.load().secrets_dir / name, value + "\n")


def reference(name: str) -> str:
    """What `vault agent` replaces by the secret's value (consul-template's language). Raises VoipError."""
    secret = find(name)
    return "{{ with secret `secret/data/%s` }}{{ .Data.data.%s }}{{ end }}" % (secret.path, secret.field)  # noqa: UP031


def _kept(file: Path) -> str:
    """The secret in `file`, mode 0600; made when it is not there, by one of those who ask at the same time."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.write_new(file, generate() + "\n")
    return (file.read_text().split() or [""])[0]
