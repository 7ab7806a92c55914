"""Secrets in Vault, and certificates of its PKI: `vault agent` on the machines fetches both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from voip_stack import inventory
from voip_stack.components import Secret
from voip_stack.errors import VoipError
from voip_stack.secrets import vault
from voip_stack.secrets.store import CERTIFICATE_HOURS, Dated, catalogue, classes


class VaultProvider:
    """See Provider. The mount `secret` (KV version 2), the mounts `pki` and `pki_int`."""

    by_agent = True
    place = "Vault"

    def where(self, secret: Secret) -> str:
        return f"secret/{secret.path} in Vault"

    def get(self, secret: Secret) -> str:
        value = vault.current().kv(secret.path).get(secret.field)
        if value is None:
            raise VoipError(f"there is no {secret.field} in {self.where(secret)}", "./voip infra.setup")
        return value

    def put(self, secret: Secret, value: str) -> None:
        server = vault.current()
        server.ask("POST", f"secret/data/{secret.path}", {"data": server.kv(secret.path) | {secret.field: value}})

    def certificate(self, role: str, name: str, others: Sequence[str] = (), addresses: Sequence[str] = ()) -> str:
        """The consul-template expression for it: pkiCert, with the role `role` of pki_int."""
        parts = {"common_name": name, "alt_names": ",".join(others), "ip_sans": ",".join(addresses)}
        asked = " ".join(f"`{key}={value}`" for key, value in parts.items() if value)
        return (
            f"{{{{ with pkiCert `pki_int/issue/{role}` {asked} `ttl={CERTIFICATE_HOURS}h` }}}}"
            "{{ .Key }}\n{{ .Cert }}\n{{ .CA }}{{ end }}"
        )

    def authority(self) -> str:
        return str(vault.current().ask("GET", "pki/cert/ca")["data"]["certificate"]).strip() + "\n"

    def dated(self) -> list[Dated]:
        """Vault's state, secrets, the newest certificates of our machines and of the CAs, machines' logins."""
        server = vault.current()
        health = server.ask("GET", "sys/seal-status")
        state = f"version {health['version']}, {'sealed' if health['sealed'] else 'unsealed'}"
        found = [Dated("Vault", server.url, state=state)]
        versions = {s.path: server.find(f"secret/metadata/{s.path}") for s in catalogue().values()}
        for secret in catalogue().values():
            version = versions[secret.path]
            made = _time(version["data"]["updated_time"]) if version else None
            found.append(Dated(secret.name, f"secret/{secret.path}: {secret.field}", made))
        found += [Dated(f"certificate {name}", "pki, pki_int", ends=end) for name, end in self.ends().items()]
        return found + [login for name in classes() for login in _logins(server, name)]

    def ends(self) -> dict[str, datetime]:
        """The expiry of our machines' newest certificates and of the CAs, by common name. Raises VaultError."""
        from voip_stack.secrets import certificates  # noqa: PLC0415  # takes half a second, needed only here

        stack, server = inventory.load(), vault.current()
        ours = [f"{machine}.{stack.domain}" for machine in stack.machines]
        found: dict[str, datetime] = {}
        listed = server.find("pki_int/certs?list=true") or {"data": {"keys": []}}
        serials = (f"pki_int/cert/{serial}" for serial in listed["data"]["keys"])
        for path in ("pki/cert/ca", "pki_int/cert/ca", *serials):
            answer = server.find(path)
            if answer is None:
                continue
            name, end = certificates.described(answer["data"]["certificate"])
            if path.endswith("/ca") or name in ours:  # a devstack-core also has other certificates there
                found[name] = max(end, found.get(name, end))
        return found


def _logins(server: vault.Vault, name: str) -> Iterator[Dated]:
    """The secret_ids of a class, by machine."""
    path = vault.role_path(name)
    listed = server.find(f"{path}/secret-id?list=true") or {"data": {"keys": []}}
    found = {}
    for accessor in listed["data"]["keys"]:
        login: dict[str, Any] = server.ask(
            "POST", f"{path}/secret-id-accessor/lookup", {"secret_id_accessor": accessor}
        )["data"]
        found[accessor] = (str(login["metadata"].get("machine", "?")), _time(login["expiration_time"]))
    for machine, end in sorted(found.values()):
        yield Dated(f"login of {machine}", f"AppRole {vault.role(name)}", ends=end)


def _time(text: str) -> datetime:
    """Vault's time: RFC 3339 with nanoseconds."""
    seconds, _, _ = text.partition(".")
    return datetime.fromisoformat(seconds.removesuffix("Z") + "+00:00")
