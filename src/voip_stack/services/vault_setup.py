"""This stack's objects in Vault, embedded or of a devstack-core: its secrets, and the policies to read them.

Sources: Vault's API of KV version 2, AppRole, PKI.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from voip_stack import inventory, secrets, settings
from voip_stack.deadline import Deadline
from voip_stack.secrets import vault
from voip_stack.secrets.vault import Vault, VaultError
from voip_stack.services import Step

_HOUR, _DAY = 3600, 24 * 3600
_ROOT_TTL, _INTERMEDIATE_TTL = "87600h", "43800h"
SECRET_ID_TTL = 30 * _DAY
_TOKEN_TTL, _TOKEN_MAX_TTL = 24 * _HOUR, 48 * _HOUR
_UPGRADE_SECONDS = 30  # for a mount of KV to become version 2
_WRAP_SECONDS = 300  # for a secret_id to reach its machine

# The machines of each class by name, each with its login address and the addresses of its certificate.
Machines = Mapping[str, Mapping[str, Sequence[str]]]


def policy(name: str, domain: str, sip_domain: str, machines: Mapping[str, Sequence[str]]) -> str:
    """The policy of the class `name`: paths to read, certificates to request, renewal of the login."""
    allowed = secrets.classes()[name]
    domains = f'    "alt_names" = ["{sip_domain}"]\n' if allowed["domain"] else ""
    names = json.dumps([f"{machine}.{domain}" for machine in machines])
    addresses = json.dumps([",".join(certified) for _, *certified in machines.values()])
    rules = [f'path "secret/data/{path}" {{\n  capabilities = ["read"]\n}}' for path in allowed["secrets"]]
    rules += [
        f'path "pki_int/issue/{certificate}" {{\n  capabilities = ["update"]\n'
        f'  allowed_parameters = {{\n    "common_name" = {names}\n{domains}'
        f'    "ip_sans" = {addresses}\n    "ttl" = []\n  }}\n}}'
        for certificate in allowed["certificates"]
        if machines  # an empty list would allow everything
    ]
    rules.append(
        f'path "{vault.role_path(name)}/secret-id" {{\n  capabilities = ["update"]\n}}\n\n'
        f'path "{vault.role_path(name)}/secret-id-accessor/destroy" {{\n  capabilities = ["update"]\n}}'
    )
    return "\n\n".join(rules) + "\n"


def base(server: Vault) -> Iterator[Step]:
    """The steps for a new Vault, done already in a devstack-core: the mounts, and the two CAs."""
    mounts = server.ask("GET", "sys/mounts")["data"]
    if "secret/" not in mounts:
        yield "the mount secret", lambda: _make_kv(server)
    for name, ttl in (("pki", _ROOT_TTL), ("pki_int", _INTERMEDIATE_TTL)):
        if f"{name}/" not in mounts:
            body = {"type": "pki", "config": {"max_lease_ttl": ttl}}
            yield f"the mount {name}", functools.partial(server.ask, "POST", f"sys/mounts/{name}", body)
    if not _has_issuer(server, "pki"):
        body = {**_key("voip-stack root CA"), "ttl": _ROOT_TTL}
        yield "the root CA", functools.partial(server.ask, "POST", "pki/root/generate/internal", body)
    if not _has_issuer(server, "pki_int"):
        yield "the intermediate CA", lambda: _make_intermediate(server)


def _make_kv(server: Vault) -> None:
    """The mount of KV version 2, which begins as version 1."""
    server.ask("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": "2"}})
    Deadline(_UPGRADE_SECONDS).wait(lambda: _serves(server), f"the mount secret of Vault on {server.name} serves")


def _serves(server: Vault) -> bool:
    try:
        server.kv("any")
    except VaultError:
        return False
    return True


def _has_issuer(server: Vault, mount: str) -> bool:
    return bool((server.find(f"{mount}/issuers?list=true") or {}).get("data", {}).get("keys"))


def _make_intermediate(server: Vault) -> None:
    request = server.ask("POST", "pki_int/intermediate/generate/internal", _key("voip-stack intermediate CA"))
    body = {"csr": request["data"]["csr"], "ttl": _INTERMEDIATE_TTL, "format": "pem_bundle"}
    signed = server.ask("POST", "pki/root/sign-intermediate", body)
    server.ask("POST", "pki_int/intermediate/set-signed", {"certificate": signed["data"]["certificate"]})


def _key(common_name: str) -> dict[str, Any]:
    return {"common_name": common_name, "key_type": "ec", "key_bits": 256}


def ours(server: Vault, machines: Machines, domain: str, sip_domain: str, bound: bool = True) -> Iterator[Step]:
    """The steps for missing or different secrets, policies, AppRoles and PKI roles. Raises VaultError.

    `bound`: a login is valid only from the address of one of the class's machines.
    """
    for path, fields in _fields().items():
        there = server.kv(path)
        missing = [field for field in fields if field not in there]
        if missing:
            body = {"data": there | {f: secrets.generate() for f in missing}}
            yield (
                f"secret/{path}: {', '.join(missing)}",
                functools.partial(server.ask, "POST", f"secret/data/{path}", body),
            )
    if not _has_logins(server):
        yield f"the login method {vault.LOGINS}", lambda: _make_logins(server)
    elif not server.ask("GET", f"sys/auth/{vault.LOGINS}/tune")["data"].get("user_lockout_disable"):
        yield f"the login method {vault.LOGINS}: nobody is locked out", lambda: _lock_nobody_out(server)
    for name, allowed in secrets.classes().items():
        text = policy(name, domain, sip_domain, machines.get(name, {}))
        path = f"sys/policies/acl/{name}-vm-policy"
        found = server.find(path)
        if found is None or found["data"]["policy"] != text:
            yield f"the policy {name}-vm-policy", functools.partial(server.ask, "PUT", path, {"policy": text})
        addresses = [address for address, *_ in machines.get(name, {}).values()] if bound else []
        settings: dict[str, Any] = {
            "token_policies": [f"{name}-vm-policy"],
            "token_ttl": _TOKEN_TTL,
            "token_max_ttl": _TOKEN_MAX_TTL,
            "secret_id_ttl": SECRET_ID_TTL,
            "secret_id_bound_cidrs": [f"{address}/32" for address in addresses],
            "token_bound_cidrs": addresses,
        }
        yield from _ensure(server, vault.role_path(name), settings, f"the AppRole {vault.role(name)}")
        for certificate in allowed["certificates"]:
            pki: dict[str, Any] = {
                "allowed_domains": list(dict.fromkeys([domain, *([sip_domain] if allowed["domain"] else [])])),
                "allow_subdomains": True,
                "allow_bare_domains": allowed["domain"],
                "allow_ip_sans": True,
                "allow_wildcard_certificates": False,
                "key_type": "ec",
                "key_bits": 256,
                "max_ttl": secrets.CERTIFICATE_HOURS * _HOUR,
            }
            yield from _ensure(server, f"pki_int/roles/{certificate}", pki, f"the PKI role {certificate}")


def _has_logins(server: Vault) -> bool:
    return f"{vault.LOGINS}/" in server.ask("GET", "sys/auth")["data"]


def _make_logins(server: Vault) -> None:
    server.ask("POST", f"sys/auth/{vault.LOGINS}", {"type": "approle"})
    _lock_nobody_out(server)


def _lock_nobody_out(server: Vault) -> None:
    """Turn off the lockout: a class's machines share a role_id, so five failures would lock out all of them.

    The lockout lasts 15 minutes and guards against guessed passwords; a secret_id is a random UUID.
    https://developer.hashicorp.com/vault/docs/concepts/user-lockout
    """
    server.ask("POST", f"sys/auth/{vault.LOGINS}/tune", {"user_lockout_config": {"lockout_disable": True}})


def _fields() -> dict[str, list[str]]:
    """The stack's secrets: fields by path."""
    wanted: dict[str, list[str]] = {}
    for secret in secrets.catalogue().values():
        wanted.setdefault(secret.path, []).append(secret.field)
    return wanted


def _ensure(server: Vault, path: str, settings: Mapping[str, Any], title: str) -> Iterator[Step]:
    """Write `settings` to `path` unless they are there."""
    found = (server.find(path) or {}).get("data", {})
    if any(found.get(key) != value for key, value in settings.items()):
        yield title, functools.partial(server.ask, "POST", path, dict(settings))


def removal(server: Vault) -> Iterator[Step]:
    """The existing objects of ours(). Fields added by others stay. Raises VaultError."""
    for name, allowed in secrets.classes().items():
        paths = [f"sys/policies/acl/{name}-vm-policy"]
        paths += [f"pki_int/roles/{certificate}" for certificate in allowed["certificates"]]
        for path in paths:
            if server.find(path):
                yield path, functools.partial(server.ask, "DELETE", path)
    for path, fields in _fields().items():
        there = server.kv(path)
        if set(there) & set(fields):
            rest = {key: value for key, value in there.items() if key not in fields}
            yield f"secret/{path}: {', '.join(fields)}", functools.partial(_remove_secret, server, path, rest)
    if _has_logins(server):
        yield f"the login method {vault.LOGINS}", functools.partial(server.ask, "DELETE", f"sys/auth/{vault.LOGINS}")


def _remove_secret(server: Vault, path: str, rest: Mapping[str, str]) -> None:
    """Keep `rest` there, and no earlier versions."""
    if rest:
        newest = server.ask("POST", f"secret/data/{path}", {"data": dict(rest)})["data"]["version"]
        server.ask("PUT", f"secret/destroy/{path}", {"versions": list(range(1, newest))})
    else:
        server.ask("DELETE", f"secret/metadata/{path}")


def login(server: Vault, name: str, machine: str, address: str) -> dict[str, str]:
    """The login of `machine`, of the class `name`: role_id, and a token that unwraps to its secret_id, once.

    The secret_id is valid for 30 days, and only from `address` unless that is empty; the wrapping token for 5 minutes.

    Raises VaultError.
    """
    path = vault.role_path(name)
    bound = [f"{address}/32"] if address else []
    body = {"metadata": json.dumps({"machine": machine}), "cidr_list": bound, "token_bound_cidrs": bound}
    wrapped = server.ask("POST", f"{path}/secret-id", body, wrap=_WRAP_SECONDS)
    found = server.ask("GET", f"{path}/role-id")["data"]["role_id"]
    return {"role_id": found, "wrapping_token": wrapped["wrap_info"]["token"]}


def _machines() -> Machines:
    """The classes and machines of the inventory."""
    stack, advertised = inventory.load(), settings.load().advertised_address

    def addresses(machine: inventory.Machine) -> list[str]:
        certified = [str(machine.external), *([advertised] if advertised else [])] if machine.external else []
        return [str(machine.internal), *dict.fromkeys(certified)]

    return {name: {m.name: addresses(m) for m in stack.group(c["group"])} for name, c in secrets.classes().items()}


def plan(server: Vault | None = None, machines: Machines | None = None) -> Iterator[Step]:
    """base() and ours(), by default of the stack's own Vault and machines. Raises VaultError."""
    server = server or vault.current()
    yield from base(server)
    # Behind a devstack-core's Docker network, Vault may see the same address for all machines.
    bound = not inventory.load().devstack or settings.load().devstack_bind
    domains = inventory.load().domain, settings.load().sip_domain
    yield from ours(server, _machines() if machines is None else machines, *domains, bound)
