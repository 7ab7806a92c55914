"""Missing objects of this stack in the services around it, and the state of a devstack-core's services."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from voip_stack import inventory, lab, secrets, settings
from voip_stack.errors import VoipError
from voip_stack.secrets import vault
from voip_stack.services import Step, database, devstack, rabbitmq, templates, vault_setup

_CONNECT_SECONDS = 5


def _open_the_way() -> None:
    """Forward a devstack-core's ports on this computer, if the lab is a namespace."""
    if inventory.load().devstack:
        lab.current().up()
        lab.current().let_in(rabbitmq.MANAGEMENT_PORT)


def missing() -> Iterator[Step]:
    """The steps for all missing objects; each is looked for once those before are made.

    Raises VoipError.
    """
    _open_the_way()
    if settings.load().secrets == "vault":
        yield from vault_setup.plan()
    if inventory.load().devstack:
        yield from in_servers()


def in_servers(secret: templates.Secret = secrets.get) -> Iterator[Step]:
    """Missing objects in PostgreSQL and RabbitMQ of a devstack-core; `secret` gives passwords. Raises VoipError."""
    yield from database.plan(database.layout(secret))
    yield from rabbitmq.plan(rabbitmq.definitions(secret))


def teardown() -> Iterator[Step]:
    """Only the objects that this stack has made in the user's devstack-core. Raises VoipError."""
    if not inventory.load().devstack:
        raise VoipError("this stack's objects are on infra-1, and are removed with it", "./voip vms.destroy infra-1")
    _open_the_way()
    yield from database.removal(database.layout(_kept))
    yield from rabbitmq.removal(rabbitmq.definitions(_kept))
    if settings.load().secrets == "vault":
        yield from vault_setup.removal(vault.current())


@dataclass(frozen=True)
class Row:
    """A service of a devstack-core. `lacks` names this stack's missing objects; empty when all is well."""

    service: str
    address: str
    state: str
    version: str = ""
    lacks: tuple[str, ...] = ()
    hint: str = ""
    note: str = ""


def check() -> list[Row]:
    """Each service of the user's devstack-core: reachable, version, missing objects. Raises VoipError."""
    stack = inventory.load()
    if not stack.devstack:
        raise VoipError("the services around the stack are on infra-1, not in a devstack-core", "./voip status")
    _open_the_way()
    looks: dict[str, tuple[int, Callable[[], Row]]] = {
        "Vault": (stack.port("vault"), _look_at_vault),
        "PostgreSQL": (
            stack.port("postgresql"),
            lambda: _answers(database.version(), _titles(database.plan(database.layout(_kept)))),
        ),
        "RabbitMQ": (
            stack.port("amqp"),
            lambda: _answers(rabbitmq.version(), _titles(rabbitmq.plan(rabbitmq.definitions(_kept)))),
        ),
        "Redis": (stack.port("redis"), _look_at_redis),
    }
    rows = []
    for service, (port, look) in looks.items():
        where = f"{stack.devstack}:{port}"
        try:
            lab.current().connect(str(stack.devstack), port, _CONNECT_SECONDS).close()
            row = replace(look(), service=service, address=where)
        except VoipError as error:
            row = Row(service, where, "fails", "", (error.message,), error.hint)
        except OSError as error:
            row = Row(service, where, "away", "", (f"it can't be reached: {error}",), "start devstack-core")
        rows.append(row)
    return rows


def _answers(version: str, lacks: Iterable[str]) -> Row:
    return Row("", "", "answers", version, tuple(lacks), "./voip infra.setup")


def _titles(steps: Iterable[Step]) -> Iterator[str]:
    """The titles without the service, which the row already names."""
    return (title.partition(": ")[2] for title, _ in steps)


def _look_at_vault() -> Row:
    server = vault.current()
    version = str(server.ask("GET", "sys/health")["version"])
    steps = vault_setup.plan() if settings.load().secrets == "vault" else ()
    return _answers(version, (title for title, _ in steps))


def _look_at_redis() -> Row:
    version, why = devstack.redis()
    note = ": ".join(filter(None, ("not used", why)))
    return Row("", "", "answers", version, note=f"{note}; a restart of RTPEngine takes the sound from its calls")


def _kept(name: str) -> str:
    """A secret, if it exists: checks and removals don't need one."""
    try:
        return secrets.get(name)
    except VoipError:
        return "absent"


def require() -> None:
    """Raises VoipError when a devstack-core replaces infra-1, and a service or one of our objects in it is missing."""
    if inventory.load().devstack:
        for row in check():
            if row.lacks:
                raise VoipError(
                    f"{row.service} of devstack-core ({row.address}) lacks: {'; '.join(row.lacks)}", row.hint
                )
