"""A user's devstack-core instead of infra-1: how its servers are reached.

Its Vault holds the logins: secret/postgres, secret/rabbitmq, secret/redis-1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from voip_stack import inventory, lab
from voip_stack.errors import VmError, VoipError
from voip_stack.secrets import vault

_SECONDS = 15  # for one answer


@dataclass(frozen=True)
class Login:
    """Address and login of one of its servers; `place` is the user's database."""

    service: str
    address: str
    port: int
    user: str
    password: str = field(repr=False)
    place: str = ""

    def __str__(self) -> str:
        return f"{self.service} on {inventory.DEVSTACK} ({self.address}:{self.port})"


def login(service: str, port: int, path: str, user: str = "user", place: str = "") -> Login:
    """The login in its Vault under secret/`path`. Raises VaultError, VoipError."""
    kept = vault.current().kv(path)
    for key in ("password", *filter(None, (user, place))):
        if not kept.get(key):
            raise VoipError(
                f"secret/{path} in Vault on {inventory.DEVSTACK} has no {key}",
                "is it a devstack-core that has started?",
            )
    address = str(inventory.load().infra()[1])
    return Login(service, address, port, kept.get(user, ""), kept["password"], kept.get(place, ""))


# Redis: https://redis.io/docs/latest/develop/reference/protocol-spec/


def redis() -> tuple[str, str]:
    """Redis' version, and why RTPEngine can't keep its sessions there (empty: it could). Raises VoipError."""
    server = login("Redis", inventory.load().port("redis"), "redis-1", user="")
    try:
        with lab.current().connect(server.address, server.port, timeout=_SECONDS) as connection:
            stream = connection.makefile("rwb")
            for words in (("AUTH", server.password), ("INFO", "server")):
                stream.write(f"*{len(words)}\r\n".encode() + b"".join(_bulk(word) for word in words))
            stream.flush()
            let_in = stream.readline().decode(errors="replace").strip()
            if not let_in:
                raise ConnectionResetError("it closed the connection")
            if let_in != "+OK":
                raise VoipError(
                    f"{server} refuses our login: {let_in}", "does secret/redis-1 in Vault hold its password?"
                )
            head = stream.readline().decode(errors="replace").strip()
            text = stream.read(int(head[1:])).decode(errors="replace") if head.startswith("$") else ""
    except OSError as error:
        raise VmError(f"{server} can't be reached: {error}", "is devstack-core up?") from None
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    if "redis_version" not in facts:
        raise VoipError(f"{server} does not answer as Redis does: {head}", "is another server there?")
    cluster = "it is a cluster, whose nodes name addresses that machines can't reach"
    return facts["redis_version"], cluster if facts.get("redis_mode") == "cluster" else ""


def _bulk(word: str) -> bytes:
    raw = word.encode()
    return b"$%d\r\n%s\r\n" % (len(raw), raw)
