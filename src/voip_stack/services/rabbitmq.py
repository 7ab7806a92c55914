"""RabbitMQ of a devstack-core: this stack's objects there.

Virtual host, users and queues are those of the role rabbitmq, from the same template. Source:
https://www.rabbitmq.com/docs/http-api-reference
"""

from __future__ import annotations

import base64
import functools
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from voip_stack import secrets
from voip_stack.errors import VmError, VoipError
from voip_stack.lab import http_client
from voip_stack.services import Step, devstack, templates
from voip_stack.services.devstack import Login

MANAGEMENT_PORT = 15672  # of the HTTP API of its plugin rabbitmq_management
_HTTP_UNAUTHORIZED, _HTTP_NOT_FOUND, _HTTP_ERRORS = 401, 404, 400

Definitions = dict[str, list[dict[str, Any]]]  # by kind, as RabbitMQ exports and imports them


def definitions(secret: templates.Secret = secrets.get) -> Definitions:
    """The definitions that the role rabbitmq imports. Raises VoipError when `secret` does."""
    values = {
        f"rabbitmq_{kind}": templates.told(f"voip_rabbitmq_{kind}", secret) for kind in ("exchanges", "queues", "users")
    }
    defaults = yaml.safe_load((templates.ROLES / "rabbitmq/defaults/main.yml").read_text())
    text = templates.render("rabbitmq", "definitions.json.j2", rabbitmq_vhost=defaults["rabbitmq_vhost"], **values)
    return dict(json.loads(text))


@functools.cache
def administrator() -> Login:
    """The login of a devstack-core's administrator, at the management API. Raises VoipError."""
    return devstack.login("RabbitMQ", MANAGEMENT_PORT, "rabbitmq")


def _ask(method: str, path: str, body: object = None) -> Any:
    login = administrator()
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
            f"{login} refuses {login.user} as an administrator",
            "does secret/rabbitmq in Vault hold its password?",
        )
    if response.status >= _HTTP_ERRORS:
        said = response.body.decode(errors="replace")[:300]
        raise VoipError(f"{login}: {method} {path}: HTTP {response.status}: {said}", "./voip infra.check")
    return json.loads(response.body or b"{}")


def version() -> str:
    """Raises VoipError."""
    return str(_ask("GET", "overview")["rabbitmq_version"])


def _holds(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(found.get(key) == value for key, value in wanted.items())


def plan(wanted: Definitions) -> Iterator[Step]:
    """The steps for RabbitMQ's missing objects. Raises VoipError for one that exists but isn't ours."""
    there = _ask("GET", "definitions")
    vhost = wanted["vhosts"][0]["name"]
    mine = [v for v in there["vhosts"] if v["name"] == vhost]
    if mine and mine[0].get("description") != wanted["vhosts"][0]["description"]:
        raise VoipError(
            f"{administrator()} has a virtual host {vhost} that this stack has not made",
            "remove it there, or rename it",
        )
    names = {user["name"] for user in wanted["users"]}
    if not mine and (foreign := sorted(names & {user["name"] for user in there["users"]})):
        raise VoipError(
            f"{administrator()} has a user {foreign[0]} that this stack has not made",
            "remove it there, or rename it",
        )
    for section, items in wanted.items():
        for item in items:
            if not any(_holds(found, item) for found in there.get(section, ())):
                title = f"RabbitMQ: {_title(section, item)}"
                yield title, functools.partial(_ask, "POST", "definitions", {section: [item]})


def _title(section: str, item: Mapping[str, Any]) -> str:
    kinds = {"vhosts": "virtual host", "policies": "policy"}
    kind = kinds.get(section, section.removesuffix("s"))
    return f"the {kind} {item.get('name') or item.get('user') or item.get('destination')}"


def removal(wanted: Definitions) -> Iterator[Step]:
    """The existing objects of plan(). Raises VoipError."""
    there = _ask("GET", "definitions")
    ours = wanted["vhosts"][0]
    if not any(_holds(v, ours) for v in there["vhosts"]):
        return
    # Users first: they are known as ours only while our virtual host exists.
    for user in wanted["users"]:
        if any(u["name"] == user["name"] for u in there["users"]):
            path = f"users/{urllib.parse.quote(user['name'], safe='')}"
            yield f"RabbitMQ: the user {user['name']}", functools.partial(_ask, "DELETE", path)
    path = f"vhosts/{urllib.parse.quote(ours['name'], safe='')}"
    yield f"RabbitMQ: the virtual host {ours['name']}", functools.partial(_ask, "DELETE", path)
