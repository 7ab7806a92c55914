"""What this stack keeps in PostgreSQL and RabbitMQ of a devstack-core: what is missing there, and what to remove.

The databases, logins and queues are those of the roles postgresql and rabbitmq, from the same templates. Sources:
RabbitMQ's HTTP API reference, PostgreSQL's manual (COMMENT, pg_roles).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import runpy
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jinja2
import yaml

from voip_stack import components, database, devstack, paths, secrets
from voip_stack.errors import VmError, VoipError
from voip_stack.lab import http_client

MARK = "voip-stack"  # how the comment of a database or a role begins that this stack has made
_OLDEST_POSTGRESQL = 14  # CREATE OR REPLACE TRIGGER
_ROLES = paths.ANSIBLE / "roles"
_HTTP_UNAUTHORIZED, _HTTP_NOT_FOUND, _HTTP_ERRORS = 401, 404, 400

Step = tuple[str, Callable[[], object]]  # what is missing (or there), and what makes (or removes) it


@dataclass(frozen=True)
class Layout:
    """What the roles postgresql and rabbitmq would make: SQL for psql, and RabbitMQ's definitions."""

    sql: str = field(repr=False)
    databases: dict[str, list[str]]  # logins by database
    definitions: dict[str, list[dict[str, Any]]] = field(repr=False)

    @property
    def mark(self) -> str:
        return f"{MARK} {hashlib.sha256(self.sql.encode()).hexdigest()}"

    @property
    def roles(self) -> list[str]:
        """The owners and the logins."""
        return [f"{name}_owner" for name in self.databases] + [n for names in self.databases.values() for n in names]

    @property
    def vhost(self) -> str:
        return str(self.definitions["vhosts"][0]["name"])


def render(secret: Callable[[str], str] = secrets.get) -> Layout:
    """The layout as the roles' own templates have it; `secret` gives passwords by the names of secrets.

    Raises VoipError when it does.
    """
    # As Ansible's template lookup has it: trim_blocks, and what is not defined is an error.
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ROLES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # noqa: S701  # SQL and JSON
    )
    own = runpy.run_path(str(_ROLES / "rabbitmq/filter_plugins/rabbitmq.py"))["FilterModule"]
    templates.filters |= {"to_json": json.dumps, **own().filters()}
    told = components.variables(components.current())
    databases = _filled(told["voip_databases"], secret)
    sql = templates.get_template("postgresql/templates/setup.sql.j2").render(postgresql_databases=databases)
    vhost = yaml.safe_load((_ROLES / "rabbitmq/defaults/main.yml").read_text())["rabbitmq_vhost"]
    lists = {
        f"rabbitmq_{kind}": _filled(told[f"voip_rabbitmq_{kind}"], secret) for kind in ("exchanges", "queues", "users")
    }
    definitions = templates.get_template("rabbitmq/templates/definitions.json.j2").render(rabbitmq_vhost=vhost, **lists)
    return Layout(sql, {d["name"]: [n["name"] for n in d["logins"]] for d in databases}, json.loads(definitions))


def _filled(value: Any, secret: Callable[[str], str]) -> Any:
    """`value` with passwords in place of the templates that name them."""
    if isinstance(value, components.Template):
        return secret(value.strip("{ }"))
    if isinstance(value, dict):
        return {key: _filled(item, secret) for key, item in value.items()}
    return [_filled(item, secret) for item in value] if isinstance(value, list) else value


def plan(wanted: Layout) -> Iterator[Step]:
    """What its PostgreSQL and RabbitMQ lack. Raises VoipError, for what is there and somebody else's too."""
    yield from plan_postgresql(wanted)
    yield from plan_rabbitmq(wanted)


# PostgreSQL


def postgresql_version() -> str:
    """Raises VoipError when it is too old, VmError when it can't be reached."""
    version = database.run("SHOW server_version;").split()[0]
    if int(version.partition(".")[0]) < _OLDEST_POSTGRESQL:
        raise VoipError(
            f"{devstack.postgresql()} is version {version}", f"this stack needs {_OLDEST_POSTGRESQL} or later"
        )
    return version


def _marks(wanted: Layout) -> tuple[dict[str, str], dict[str, str]]:
    """The comments of those of the layout's databases and roles that are there."""
    names = ", ".join(map(database.quoted, wanted.databases))
    roles = ", ".join(map(database.quoted, wanted.roles))
    rows = database.run(
        "SELECT 'database', datname, coalesce(shobj_description(oid, 'pg_database'), '')"  # noqa: S608  # quoted above
        f" FROM pg_database WHERE datname IN ({names})"
        " UNION ALL SELECT 'role', rolname, coalesce(shobj_description(oid, 'pg_authid'), '')"
        f" FROM pg_roles WHERE rolname IN ({roles});"
    )
    found: dict[str, dict[str, str]] = {"database": {}, "role": {}}
    for line in rows.splitlines():
        kind, name, comment = line.split("|", 2)
        found[kind][name] = comment
    return found["database"], found["role"]


def plan_postgresql(wanted: Layout) -> Iterator[Step]:
    """What PostgreSQL lacks. Raises VoipError."""
    postgresql_version()
    databases, roles = _marks(wanted)
    for kind, found in (("database", databases), ("role", roles)):
        foreign = [name for name, comment in found.items() if not comment.startswith(MARK)]
        if foreign:
            raise VoipError(
                f"{devstack.postgresql()} has a {kind} {foreign[0]} that this stack has not made",
                f"rename it, or say that it is ours: COMMENT ON {kind.upper()} {foreign[0]} IS '{MARK}'",
            )
    if any(databases.get(name) != wanted.mark for name in wanted.databases):
        # Marked as they are made: what a run that was cut short has left is known as ours.
        script = [
            f"BEGIN; CREATE ROLE {r}; COMMENT ON ROLE {r} IS '{MARK}'; COMMIT;" for r in wanted.roles if r not in roles
        ]
        script += [f"ALTER ROLE {login} LOGIN;" for logins in wanted.databases.values() for login in logins]
        for name in wanted.databases:
            if name not in databases:
                script += [
                    f"CREATE DATABASE {name} OWNER {name}_owner ENCODING 'UTF8' TEMPLATE template0;",
                    f"COMMENT ON DATABASE {name} IS '{MARK}';",
                ]
        marks = [f"COMMENT ON DATABASE {name} IS '{wanted.mark}';" for name in wanted.databases]
        text = "\n".join([*script, wanted.sql, *marks, ""])
        yield f"PostgreSQL: databases {', '.join(wanted.databases)} with their logins", lambda: database.run(text)


def _remove_postgresql(wanted: Layout) -> Iterator[Step]:
    databases, roles = _marks(wanted)
    for name, comment in databases.items():
        if comment.startswith(MARK):
            script = f"DROP DATABASE {name} WITH (FORCE);"
            yield f"PostgreSQL: the database {name}", functools.partial(database.run, script)
    for name, comment in roles.items():
        if comment.startswith(MARK):
            yield f"PostgreSQL: the role {name}", functools.partial(database.run, f"DROP ROLE {name};")


# RabbitMQ: https://www.rabbitmq.com/docs/http-api-reference


def _ask_rabbitmq(method: str, path: str, body: object = None) -> Any:
    login = devstack.rabbitmq()
    token = base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
    try:
        response = http_client.ask(
            login.address,
            login.port,
            f"/api/{path}",
            method=method,
            body=None if body is None else json.dumps(body),
            headers=headers,
        )
    except OSError as error:
        raise VmError(f"{login} can't be reached: {error}", "is its management plugin on? ./voip infra.check") from None
    if response.status == _HTTP_NOT_FOUND:
        return None
    if response.status == _HTTP_UNAUTHORIZED:
        raise VoipError(
            f"{login} does not let {login.user} in as an administrator",
            "does secret/rabbitmq in Vault hold its password?",
        )
    if response.status >= _HTTP_ERRORS:
        said = response.body.decode(errors="replace")[:300]
        raise VoipError(f"{login}: {method} {path}: HTTP {response.status}: {said}", "./voip infra.check")
    return json.loads(response.body or b"{}")


def rabbitmq_version() -> str:
    """Raises VoipError."""
    return str(_ask_rabbitmq("GET", "overview")["rabbitmq_version"])


def _holds(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(found.get(key) == value for key, value in wanted.items())


def plan_rabbitmq(wanted: Layout) -> Iterator[Step]:
    """What RabbitMQ lacks. Raises VoipError."""
    there = _ask_rabbitmq("GET", "definitions")
    mine = [v for v in there["vhosts"] if v["name"] == wanted.vhost]
    if mine and mine[0].get("description") != wanted.definitions["vhosts"][0]["description"]:
        raise VoipError(
            f"{devstack.rabbitmq()} has a virtual host {wanted.vhost} that this stack has not made",
            "remove it there, or rename it",
        )
    names = {user["name"] for user in wanted.definitions["users"]}
    if not mine and (foreign := sorted(names & {user["name"] for user in there["users"]})):
        raise VoipError(
            f"{devstack.rabbitmq()} has a user {foreign[0]} that this stack has not made",
            "remove it there, or rename it",
        )
    for section, items in wanted.definitions.items():
        for item in items:
            if not any(_holds(found, item) for found in there.get(section, ())):
                title = f"RabbitMQ: {_title(section, item)}"
                yield title, functools.partial(_ask_rabbitmq, "POST", "definitions", {section: [item]})


def _title(section: str, item: Mapping[str, Any]) -> str:
    kinds = {"vhosts": "virtual host", "policies": "policy"}
    kind = kinds.get(section, section.removesuffix("s"))
    return f"the {kind} {item.get('name') or item.get('user') or item.get('destination')}"


def _remove_rabbitmq(wanted: Layout) -> Iterator[Step]:
    there = _ask_rabbitmq("GET", "definitions")
    ours = wanted.definitions["vhosts"][0]
    if not any(_holds(v, ours) for v in there["vhosts"]):
        return
    # Users first: while our virtual host is there, they are known as ours.
    for user in wanted.definitions["users"]:
        if any(u["name"] == user["name"] for u in there["users"]):
            path = f"users/{urllib.parse.quote(user['name'], safe='')}"
            yield f"RabbitMQ: the user {user['name']}", functools.partial(_ask_rabbitmq, "DELETE", path)
    path = f"vhosts/{urllib.parse.quote(wanted.vhost, safe='')}"
    yield f"RabbitMQ: the virtual host {wanted.vhost}", functools.partial(_ask_rabbitmq, "DELETE", path)


def removal(wanted: Layout) -> Iterator[Step]:
    """What plan() made and is still there. Raises VoipError."""
    yield from _remove_postgresql(wanted)
    yield from _remove_rabbitmq(wanted)
