"""Vault from this computer: its HTTP API (https://developer.hashicorp.com/vault/api-docs), through the lab."""

from __future__ import annotations

import functools
import json
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voip_stack import host, inventory, settings
from voip_stack.deadline import Deadline
from voip_stack.errors import VoipError
from voip_stack.inventory import Machine
from voip_stack.lab import http_client
from voip_stack.tell import Progress

# The mount where machines log in. A dedicated AppRole mount: lockout is tuned per mount, and other users of a
# devstack-core may log in at approle.
LOGINS = "voip-approle"
_HTTP_NOT_FOUND, _HTTP_FORBIDDEN, _HTTP_UNAVAILABLE, _HTTP_ERRORS = 404, 403, 503, 400
_OPEN_SECONDS = 15  # for Vault to answer once its machine is ready; host.patience() raises it
_HTTP_WRONG_KEY = 400, 500  # sys/unseal's status for a wrong key


class VaultError(VoipError):
    """Vault can't be reached, or refuses a request. `status` is HTTP's, 0 without an answer."""

    def __init__(self, message: str, hint: str = "", status: int = 0) -> None:
        super().__init__(message, hint)
        self.status = status


@dataclass(frozen=True)
class Keys:
    """The output of `vault operator init`, as kept on this computer (mode 0600)."""

    file: Path
    unseal: tuple[str, ...]
    root_token: str

    @classmethod
    def read(cls, file: Path) -> Keys:
        """The keys in `file`. Raises VaultError."""
        try:
            found = json.loads(file.read_text())
            return cls(file, tuple(found["unseal_keys_b64"]), found["root_token"])
        except FileNotFoundError:
            hint = "VOIP_DEVSTACK_TOKEN_FILE names it" if inventory.load().devstack else "./voip provision"
            raise VaultError(f"Vault's keys are missing ({file})", hint) from None
        except (ValueError, KeyError, TypeError) as error:
            raise VaultError(f"{file} does not hold Vault's keys: {error}", "restore it from a backup") from None


@dataclass(frozen=True)
class Vault:
    """A Vault server: `name` is its name for a person, `ca` the file of the CA that signed its certificate."""

    name: str
    address: str
    port: int
    ca: Path | None = None  # None: plain HTTP
    token: str = ""
    start: str = ""  # the command that starts and unseals it

    @property
    def url(self) -> str:
        return f"{'https' if self.ca else 'http'}://{self.address}:{self.port}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None, wrap: int = 0) -> dict[str, Any]:
        """Vault's answer to one request; `wrap`: the lifetime in seconds of its wrapping token. Raises VaultError."""
        where = f"Vault on {self.name} ({self.address}:{self.port})"
        if self.ca and not self.ca.exists():
            raise VaultError(f"the CA of {where} is missing ({self.ca})", "restore it from a backup")
        headers = {"X-Vault-Request": "true"}
        headers |= {"X-Vault-Token": self.token} if self.token else {}
        headers |= {"X-Vault-Wrap-TTL": f"{wrap}s"} if wrap else {}
        text = json.dumps(body) if body is not None else None
        try:
            response = http_client.ask(
                self.address, self.port, f"/v1/{path}", method=method, body=text, headers=headers, ca=self.ca
            )
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason or error
            raise VaultError(
                f"{where} is not the one that {self.ca} vouches for: {reason}", "./voip provision"
            ) from None
        except OSError as error:
            raise VaultError(f"{where} can't be reached: {error}", self.start or "./voip vms.status") from None
        try:
            answer = json.loads(response.body or b"{}")
        except ValueError:
            raise VaultError(f"{where} does not answer as Vault does", "is another server there?") from None
        if response.status >= _HTTP_ERRORS:
            raise self._refusal(where, response.status, path, answer.get("errors") or [])
        return dict(answer)

    def _refusal(self, where: str, status: int, path: str, errors: Sequence[str]) -> VaultError:
        said = "; ".join(" ".join(str(e).split()) for e in errors) or f"HTTP {status}"
        if status == _HTTP_UNAVAILABLE:
            return VaultError(f"{where} is sealed", self.start or f"./voip vms.start {self.name}", status)
        if status == _HTTP_FORBIDDEN:
            return VaultError(f"{where} refuses this token at {path}: {said}", "is the token the right one?", status)
        return VaultError(f"{where}: {path}: {said}", self.start or "./voip status", status)

    def find(self, path: str) -> dict[str, Any] | None:
        """The answer to GET `path`, None for a missing path. Raises VaultError."""
        try:
            return self.ask("GET", path)
        except VaultError as error:
            if error.status == _HTTP_NOT_FOUND:
                return None
            raise

    def kv(self, path: str) -> dict[str, str]:
        """The data of `secret/<path>` (KV version 2), empty for a missing path. Raises VaultError."""
        found = self.find(f"secret/data/{path}")
        return dict(found["data"]["data"] or {}) if found else {}

    def unseal(self, keys: Keys, patience: float) -> bool:
        """Unseal it; returns whether it was sealed. `patience`: seconds for either answer. Raises VaultError."""
        state = self._ask_patiently("sys/seal-status", patience)
        if not state["initialized"]:
            return False
        if state["sealed"]:
            try:
                opened = any(not self.ask("PUT", "sys/unseal", {"key": key})["sealed"] for key in keys.unseal)
                said = "too few"
            except VaultError as error:
                if error.status not in _HTTP_WRONG_KEY:
                    raise
                opened, said = False, str(error)
            if not opened:
                raise VaultError(
                    f"the keys in {keys.file} do not unseal Vault on {self.name}: {said}",
                    "restore that file from a backup",
                )
        self._ask_patiently("sys/health", patience)  # sys/health is an error until raft has elected a leader
        return bool(state["sealed"])

    def _ask_patiently(self, path: str, patience: float) -> dict[str, Any]:
        deadline = Deadline(patience)
        while True:
            try:
                return self.ask("GET", path)
            except VaultError:
                if deadline.is_due:
                    raise
                time.sleep(1)


def role(name: str) -> str:
    """The AppRole of the class `name`."""
    return f"{name}-vm-role"


def role_path(name: str) -> str:
    """Its path in Vault."""
    return f"auth/{LOGINS}/role/{role(name)}"


def keys_dir() -> Path:
    """The directory on this computer with the CA and the keys of the embedded Vault."""
    return settings.load().secrets_dir / "vault"


def of(machine: Machine, token: str = "") -> Vault:
    """The Vault that the role vault_server sets up on `machine`."""
    return Vault(machine.name, str(machine.internal), inventory.load().port("vault"), keys_dir() / "ca.pem", token)


def at(name: str, address: str, port: int, keys: str, ca: str = "") -> Vault:
    """The Vault with this name, with all rights: `keys` and `ca` are files, as in token_in() and Vault.

    Raises VaultError.
    """
    return Vault(name, address, port, Path(ca) if ca else None, token_in(Path(keys)))


def token_in(file: Path) -> str:
    """The root token in `file`: either the keys of an embedded Vault, or the token alone, as in devstack-core.

    Raises VaultError.
    """
    if file.exists() and not file.read_text().lstrip().startswith("{"):
        token = file.read_text().strip()
        if not token:
            raise VaultError(f"{file} is empty", "it holds the root token of Vault")
        return token
    return Keys.read(file).root_token


@functools.cache
def current() -> Vault:
    """The stack's Vault, with all rights. Raises VaultError, InventoryError."""
    stack = inventory.load()
    name, address = stack.infra()
    if stack.devstack:
        start = "start devstack-core and unseal its Vault; then: ./voip infra.check"
        return Vault(
            name, str(address), stack.port("vault"), None, token_in(settings.load().devstack_token_file), start
        )
    return of(stack.machine(name), token_in(keys_dir() / f"{name}.json"))


def reopen(machine: Machine, progress: Progress) -> None:
    """Unseal the Vault of a `machine` that has started, if it has one; tell what prevents that."""
    try:
        if unseal_machine(machine, host.patience(_OPEN_SECONDS)):
            progress(machine.name, "its Vault is unsealed")
    except VaultError as error:
        # Calls don't need Vault: the machines' files already hold their secrets.
        progress(machine.name, f"{error.message}: {error.hint}" if error.hint else error.message)


def unseal_machine(machine: Machine, patience: float = 60) -> bool:
    """Unseal the Vault of `machine` if we have its keys; returns whether it was sealed. Raises VaultError."""
    file = keys_dir() / f"{machine.name}.json"
    if "vault_server" not in {c.name for c in inventory.load().components_of(machine)} or not file.exists():
        return False
    return of(machine).unseal(Keys.read(file), patience)
