#!/usr/bin/python3
"""The login of this machine at Vault (AppRole): whether it works, a new one that came wrapped, its renewal.

https://developer.hashicorp.com/vault/api-docs/auth/approle, https://developer.hashicorp.com/vault/docs/concepts/response-wrapping
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIRECTORY = Path("/etc/vault-agent")
REFUSED = 2  # exit status: Vault refuses the login, or there is none
SECONDS = 30  # for one answer
TRIES = 5  # a Vault that has just started, or is being unsealed


class RefusedError(Exception):
    """Vault said no: to try again is of no use."""


def ask(path: str, body: dict[str, Any], token: str = "") -> dict[str, Any]:
    """Vault's answer. Raises RefusedError, or OSError when it can't be reached."""
    request = urllib.request.Request(f"{given.url}/v1/{path}", json.dumps(body).encode(), method="POST")  # noqa: S310  # ours
    if token:
        request.add_header("X-Vault-Token", token)
    context = ssl.create_default_context(cafile=given.ca) if given.ca else None
    try:
        with urllib.request.urlopen(request, timeout=SECONDS, context=context) as answer:  # noqa: S310
            told: dict[str, Any] = json.loads(answer.read() or b"{}")
            return told
    except urllib.error.HTTPError as error:
        try:
            said = "; ".join(" ".join(e.split()) for e in json.loads(error.read())["errors"])
        except (ValueError, KeyError):
            said = str(error)
        if error.code in (400, 403):
            raise RefusedError(said) from None
        raise OSError("it is sealed" if error.code == 503 else said) from None


def patiently(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns; tried again while Vault can't be reached."""
    left = TRIES
    while True:
        try:
            return work()
        except OSError as error:
            left -= 1
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                sys.exit(f"Vault at {given.url} is not the one that {given.ca} vouches for: {reason.verify_message}")
            if not left:
                sys.exit(f"Vault at {given.url} can't be used: {reason}; on your computer: ./voip status")
            time.sleep(2)


def read(name: str) -> str:
    return (DIRECTORY / name).read_text().strip()


def keep(name: str, text: str) -> None:
    """Write a file of DIRECTORY, mode 0600, whole or not at all."""
    new = DIRECTORY / f".{name}.new"
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(DIRECTORY / name)


def log_in() -> str:
    """A token. Raises RefusedError."""
    try:
        body = {"role_id": read("role-id"), "secret_id": read("secret-id")}
    except FileNotFoundError:
        raise RefusedError("there is no login yet") from None
    return str(patiently(lambda: ask(f"auth/{given.mount}/login", body))["auth"]["client_token"])


def check() -> None:
    ask("auth/token/revoke-self", {}, log_in())


def unwrap() -> None:
    """Standard input: {"role_id": ..., "wrapping_token": ...}."""
    came = json.load(sys.stdin)
    try:
        secret = patiently(lambda: ask("sys/wrapping/unwrap", {}, came["wrapping_token"]))["data"]
    except RefusedError as error:
        raise RefusedError(
            f"the wrapped secret_id is expired, or somebody has unwrapped it before: {error}; "
            f"on your computer: ./voip provision --limit {given.machine}"
        ) from None
    keep("role-id", came["role_id"])
    keep("accessor", secret["secret_id_accessor"])
    keep("secret-id", secret["secret_id"])


def renew() -> None:
    token, role = log_in(), f"auth/{given.mount}/role/{given.role}"
    bound = [f"{given.address}/32"] if given.address else []
    body = {"metadata": json.dumps({"machine": given.machine}), "cidr_list": bound, "token_bound_cidrs": bound}
    new = patiently(lambda: ask(f"{role}/secret-id", body, token))["data"]
    old = read("accessor")
    keep("secret-id", new["secret_id"])
    keep("accessor", new["secret_id_accessor"])
    patiently(lambda: ask(f"{role}/secret-id-accessor/destroy", {"secret_id_accessor": old}, token))
    ask("auth/token/revoke-self", {}, token)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for option in ("url", "ca", "mount", "role", "machine", "address"):
    parser.add_argument(f"--{option}", required=True)
parser.add_argument("command", choices=["check", "unwrap", "renew"])
given = parser.parse_args()
try:
    {"check": check, "unwrap": unwrap, "renew": renew}[given.command]()
except RefusedError as refusal:
    sys.stderr.write(f"Vault at {given.url} refuses {given.role}: {refusal}\n")
    sys.exit(REFUSED)
