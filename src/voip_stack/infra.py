"""What this stack needs in Vault: its secrets, and who may read them. Made where it lacks; nothing else is touched.

The layout is the same in the embedded Vault and in a devstack-core. Sources: Vault's API of KV version 2, AppRole, PKI.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from voip_stack import cli, inventory, secrets, ui, vault
from voip_stack.deadline import Deadline
from voip_stack.vault import Vault, VaultError

_HOUR, _DAY = 3600, 24 * 3600
_ROOT_TTL, _INTERMEDIATE_TTL = "87600h", "43800h"
CERTIFICATE_TTL = "2160h"
SECRET_ID_TTL = 30 * _DAY
_TOKEN_TTL, _TOKEN_MAX_TTL = 24 * _HOUR, 48 * _HOUR
_UPGRADE_SECONDS = 30  # for a mount of KV to become version 2
_WRAP_SECONDS = 300  # for a secret_id to reach its machine

Addresses = Mapping[str, Sequence[str]]  # of the machines of each class


def role(name: str) -> str:
    """The AppRole of the class `name`."""
    return f"{name}-vm-role"


def policy(name: str, domain: str) -> str:
    """The policy of the class `name`: what its machines may read, and the renewal of what they log in with."""
    allowed = secrets.classes()[name]
    rules = [f'path "secret/data/{path}" {{\n  capabilities = ["read"]\n}}' for path in allowed["secrets"]]
    rules += [
        f'path "pki_int/issue/{certificate}" {{\n  capabilities = ["update"]\n'
        f'  allowed_parameters = {{\n    "common_name" = ["*.{domain}"]\n    "ip_sans" = []\n    "ttl" = []\n  }}\n}}'
        for certificate in allowed["certificates"]
    ]
    rules.append(
        f'path "auth/approle/role/{role(name)}/secret-id" {{\n  capabilities = ["update"]\n}}\n\n'
        f'path "auth/approle/role/{role(name)}/secret-id-accessor/destroy" {{\n  capabilities = ["update"]\n}}'
    )
    return "\n\n".join(rules) + "\n"


def base(server: Vault) -> Iterator[str]:
    """What a devstack-core has and a new Vault lacks: the mounts, and the two CAs. Yields what was made."""
    mounts = server.ask("GET", "sys/mounts")["data"]
    if "secret/" not in mounts:
        server.ask("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": "2"}})
        Deadline(_UPGRADE_SECONDS).wait(lambda: _serves(server))
        yield "the mount secret"
    for name, ttl in (("pki", _ROOT_TTL), ("pki_int", _INTERMEDIATE_TTL)):
        if f"{name}/" not in mounts:
            server.ask("POST", f"sys/mounts/{name}", {"type": "pki", "config": {"max_lease_ttl": ttl}})
            yield f"the mount {name}"
    if not (server.find("pki/issuers?list=true") or {}).get("data", {}).get("keys"):
        server.ask("POST", "pki/root/generate/internal", {**_key("voip-stack root CA"), "ttl": _ROOT_TTL})
        yield "the root CA"
    if not (server.find("pki_int/issuers?list=true") or {}).get("data", {}).get("keys"):
        request = server.ask("POST", "pki_int/intermediate/generate/internal", _key("voip-stack intermediate CA"))
        signed = server.ask(
            "POST",
            "pki/root/sign-intermediate",
            {"csr": request["data"]["csr"], "ttl": _INTERMEDIATE_TTL, "format": "pem_bundle"},
        )
        server.ask("POST", "pki_int/intermediate/set-signed", {"certificate": signed["data"]["certificate"]})
        yield "the intermediate CA"


def _serves(server: Vault) -> bool:
    """Whether the new mount of KV version 2, which begins as version 1, has become one."""
    try:
        server.kv("kamailio")
    except VaultError:
        return False
    return True


def _key(common_name: str) -> dict[str, Any]:
    return {"common_name": common_name, "key_type": "ec", "key_bits": 256}


def setup(server: Vault, addresses: Addresses, domain: str) -> Iterator[str]:
    """Secrets, policies, AppRoles and PKI roles. Yields what was made or mended. Raises VaultError."""
    wanted: dict[str, list[str]] = {}
    for secret in secrets.catalogue().values():
        wanted.setdefault(secret.path, []).append(secret.field)
    for path, fields in wanted.items():
        there = server.kv(path)
        missing = [field for field in fields if field not in there]
        if missing:
            server.ask("POST", f"secret/data/{path}", {"data": there | {f: secrets.generate() for f in missing}})
            yield f"secret/{path}: {', '.join(missing)}"
    if "approle/" not in server.ask("GET", "sys/auth")["data"]:
        server.ask("POST", "sys/auth/approle", {"type": "approle"})
        yield "the login method approle"
    for name, allowed in secrets.classes().items():
        text = policy(name, domain)
        found = server.find(f"sys/policies/acl/{name}-vm-policy")
        if found is None or found["data"]["policy"] != text:
            server.ask("PUT", f"sys/policies/acl/{name}-vm-policy", {"policy": text})
            yield f"the policy {name}-vm-policy"
        cidrs = [f"{address}/32" for address in addresses.get(name, ())]
        settings: dict[str, Any] = {
            "token_policies": [f"{name}-vm-policy"],
            "token_ttl": _TOKEN_TTL,
            "token_max_ttl": _TOKEN_MAX_TTL,
            "secret_id_ttl": SECRET_ID_TTL,
            "secret_id_bound_cidrs": cidrs,
            "token_bound_cidrs": list(addresses.get(name, ())),
        }
        yield from _ensure(server, f"auth/approle/role/{role(name)}", settings, f"the AppRole {role(name)}")
        for certificate in allowed["certificates"]:
            pki: dict[str, Any] = {
                "allowed_domains": [domain],
                "allow_subdomains": True,
                "allow_ip_sans": True,
                "key_type": "ec",
                "key_bits": 256,
                "max_ttl": int(CERTIFICATE_TTL.removesuffix("h")) * _HOUR,
            }
            yield from _ensure(server, f"pki_int/roles/{certificate}", pki, f"the PKI role {certificate}")


def _ensure(server: Vault, path: str, settings: Mapping[str, Any], title: str) -> Iterator[str]:
    """Write `settings` to `path` unless they are there."""
    found = (server.find(path) or {}).get("data", {})
    if any(found.get(key) != value for key, value in settings.items()):
        server.ask("POST", path, dict(settings))
        yield title


def login(server: Vault, name: str, machine: str, address: str) -> dict[str, str]:
    """What `machine`, of the class `name`, logs in with: role_id, and a token that unwraps to its secret_id, once.

    The secret_id is good for 30 days and only from `address`; the wrapping token for 5 minutes. Raises VaultError.
    """
    path = f"auth/approle/role/{role(name)}"
    wrapped = server.ask(
        "POST",
        f"{path}/secret-id",
        {
            "metadata": json.dumps({"machine": machine}),
            "cidr_list": [f"{address}/32"],
            "token_bound_cidrs": [f"{address}/32"],
        },
        wrap=_WRAP_SECONDS,
    )
    found = server.ask("GET", f"{path}/role-id")["data"]["role_id"]
    return {"role_id": found, "wrapping_token": wrapped["wrap_info"]["token"]}


def all_of_it(server: Vault | None = None, addresses: Addresses | None = None) -> Iterator[str]:
    """base() and setup(), of the stack's own Vault and machines where not said otherwise. Raises VaultError."""
    stack = inventory.load()
    server = server or vault.current()
    yield from base(server)
    yield from setup(
        server, addresses or {c: [str(m.internal) for m in stack.group(c)] for c in secrets.classes()}, stack.domain
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m voip_stack.infra", description=__doc__.splitlines()[0])
    parser.add_argument("--vault", metavar="NAME,ADDRESS,PORT", help="the server; the stack's own when left out")
    parser.add_argument("--keys", type=Path, help="the file of its keys")
    parser.add_argument(
        "--ca", type=lambda text: Path(text) if text else None, help="the file of the CA of its certificate"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("setup", help="make what is missing; prints what that was")
    made.add_argument(
        "--addresses", type=json.loads, help='as JSON: {"sip": ["192.168.64.10"]}; of the inventory if left out'
    )
    machine = commands.add_parser("login", help="what a machine logs in with, as JSON")
    for option in ("class", "machine", "address"):
        machine.add_argument(f"--{option}", required=True)
    return parser.parse_args()


def _main() -> None:
    arguments = _arguments()
    server = vault.current() if not arguments.vault else None
    if server is None:
        name, address, port = arguments.vault.split(",")
        server = Vault(name, address, int(port), arguments.ca, vault.Keys.read(arguments.keys).root_token)
    if arguments.command == "login":
        ui.as_json(login(server, getattr(arguments, "class"), arguments.machine, arguments.address))
        return
    for made in all_of_it(server, arguments.addresses):
        ui.say(f"made {made}")


if __name__ == "__main__":
    cli.guard(_main)
