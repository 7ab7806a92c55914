"""Components: `ansible/roles/<component>/component.yml`; the stack derives everything about one from that file.

The library reads the descriptors here; the vars plugin voip_components hands the same data to Ansible.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from voip_stack import paths, settings
from voip_stack.errors import InventoryError
from voip_stack.settings import Settings

STAGES = ("machine", "vault", "services", "agent", "telephony")  # the plays of provision-vms.yml, in order
COMPUTER = "computer"  # this computer, as a source
SCHEMA = paths.ANSIBLE / "component.schema.json"
FLAGS = PurePosixPath("inventory/group_vars/all/components.yml")  # below ansible/


class Template(str):
    """Jinja that only Ansible evaluates; any other text is taken literally."""

    __slots__ = ()


@dataclass(frozen=True)
class Port:
    """A port that a component listens on beyond loopback. `internal`: groups or COMPUTER; `external`: anybody."""

    name: str
    protocol: str
    ports: range
    external: bool
    internal: tuple[str, ...]

    @property
    def variable(self) -> str:
        return f"voip_port_{self.name.replace('-', '_')}"

    @property
    def reached(self) -> list[dict[str, Any]]:
        """The networks that reach it, with their sources: anybody if there are no `sources`."""
        external = [{"network": "external"}] if self.external else []
        internal = [{"network": "internal", "sources": list(self.internal)}] if self.internal else []
        return [*external, *internal]

    @property
    def text(self) -> str:
        """The syntax of nftables and daemons: 5060, or 10000-20000."""
        first, last = self.ports[0], self.ports[-1]
        return str(first) if first == last else f"{first}-{last}"


@dataclass(frozen=True)
class Secret:
    """A secret and its place in Vault: the key `field` of `secret/<path>` (KV version 2)."""

    name: str
    path: str
    field: str
    reader: str = "machine"  # the component's machines, or COMPUTER
    issuer: str = ""  # the server that knows it: postgresql, redis or rabbitmq; empty: none


@dataclass(frozen=True)
class Component:
    """A role and what it sets up on the machines of its groups."""

    name: str
    enabled: bool  # its flag is set, and it exists for the providers that the settings name
    groups: tuple[str, ...]
    stage: str
    after: tuple[str, ...] = ()
    provides: str = ""
    units: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()
    secrets: tuple[Secret, ...] = ()
    certificates: Mapping[str, bool] = field(default_factory=dict)  # by PKI role: may they be for the SIP domain, too
    secret_files: tuple[PurePosixPath, ...] = ()
    databases: Mapping[str, Any] = field(default_factory=dict)  # `schema` is the SQL itself here, not a file name
    redis_users: Mapping[str, Any] = field(default_factory=dict)
    rabbitmq: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)
    away: str = ""
    status: str = ""
    status_secrets: tuple[str, ...] = ()

    def on(self, groups: Collection[str]) -> bool:
        """Whether machines of these groups have it."""
        return "all" in self.groups or not set(self.groups).isdisjoint(groups)


Components = Mapping[str, Component]


def load(conf: Settings, ansible: Path = paths.ANSIBLE) -> dict[str, Component]:
    """All components by name, in the order in which their roles are applied.

    Raises InventoryError, naming the file and the key, for a descriptor that is wrong or conflicts with another.
    """
    flags = _flags(ansible)
    found = {
        file.parent.name: _component(file, flags.get(file.parent.name, False), conf)
        for file in sorted((ansible / "roles").glob("*/component.yml"))
    }
    for name in flags.keys() - found.keys():
        close = difflib.get_close_matches(name, found, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(found)}"
        raise InventoryError(f"{ansible / FLAGS}: there is no roles/{name}/component.yml", hint)
    for component in found.values():
        _check(component, found, ansible / "roles" / component.name / "component.yml")
    _check_names(found, ansible)
    _check_ports([c for c in found.values() if c.enabled], ansible)
    return {c.name: c for stage in STAGES for c in _in_order([c for c in found.values() if c.stage == stage], ansible)}


def current() -> dict[str, Component]:
    """The repository's components with the settings of this run. Raises InventoryError, SettingsError."""
    return _loaded(settings.load())


_loaded = functools.cache(load)


def enabled(groups: Collection[str] | None = None, among: Components | None = None) -> list[Component]:
    """The enabled components; with `groups`, only those on their machines."""
    every = (current() if among is None else among).values()
    return [c for c in every if c.enabled and (groups is None or c.on(groups))]


def database_of(provides: str) -> str:
    """The database of the enabled component that provides `provides`. Raises InventoryError when there is none."""
    for component in enabled():
        if component.provides == provides and component.databases:
            return next(iter(component.databases))
    raise InventoryError(f"no enabled component provides {provides}", f"enable one in {paths.ANSIBLE / FLAGS}")


# Reading


def _flags(ansible: Path) -> dict[str, bool]:
    file = ansible / FLAGS
    flags = (_yaml(file) or {}).get("voip_components")
    if not isinstance(flags, dict) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise InventoryError(f"{file}: voip_components must say true or false for each component")
    return flags


def _yaml(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(), Loader=_Once)  # noqa: S506  # a SafeLoader
    except (OSError, yaml.YAMLError) as error:
        raise InventoryError(f"{file}: {' '.join(str(error).split())}") from None


class _Once(yaml.SafeLoader):
    """Refuses a repeated key, as YAML 1.2, 3.2.1.1 does; PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises yaml.YAMLError."""
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


@functools.cache
def _validator() -> Any:
    import jsonschema  # noqa: PLC0415  # takes 60 ms, needed only here

    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def _component(file: Path, flag: bool, conf: Settings) -> Component:
    values = _yaml(file)
    if wrong := next(iter(_validator().iter_errors(values)), None):
        key = ".".join(map(str, wrong.absolute_path)) or "the file"
        raise InventoryError(f"{file}: {key}: {wrong.message}", f"see {SCHEMA}")
    only = values.get("only", {})
    databases = {name: _database(file, name, d) for name, d in values.get("databases", {}).items()}
    issued = {
        "postgresql": [login["password"] for d in databases.values() for login in d["logins"].values()],
        "redis": [user["password"] for user in values.get("redis_users", {}).values()],
        "rabbitmq": [user["password"] for user in values.get("rabbitmq", {}).get("users", {}).values()],
    }
    secrets = tuple(
        Secret(
            name,
            secret.get("path", file.parent.name),
            secret["field"],
            secret.get("reader", "machine"),
            next((server for server, names in issued.items() if name in names), ""),
        )
        for name, secret in values.get("secrets", {}).items()
    )
    unknown = {name for names in issued.values() for name in names} - {s.name for s in secrets}
    if unknown:
        raise InventoryError(f"{file}: a login has the password {min(unknown)}, which is none of its secrets")
    return Component(
        name=file.parent.name,
        enabled=flag
        and only.get("secrets", conf.secrets) == conf.secrets
        and only.get("infra", conf.infra) == conf.infra,
        groups=tuple(values["group"]),
        stage=values["stage"],
        after=tuple(values.get("after", ())),
        provides=values.get("provides", ""),
        units=tuple(values.get("units", ())),
        packages=tuple(values.get("packages", ())),
        ports=tuple(_port(file, name, port, conf) for name, port in values.get("ports", {}).items()),
        secrets=secrets,
        certificates={name: c["domain"] for name, c in values.get("certificates", {}).items()},
        secret_files=tuple(map(PurePosixPath, values.get("secret_files", ()))),
        databases=databases,
        redis_users=values.get("redis_users", {}),
        rabbitmq=values.get("rabbitmq", {}),
        metrics=values.get("metrics", {}),
        away=values.get("away", ""),
        status=values.get("status", ""),
        status_secrets=tuple(values.get("status_secrets", ())),
    )


def _port(file: Path, name: str, values: Mapping[str, Any], conf: Settings) -> Port:
    text = f"{conf.rtp_port_min}-{conf.rtp_port_max}" if values["port"] == "rtp" else str(values["port"])
    first, _, last = text.partition("-")
    ports = range(int(first), int(last or first) + 1)
    if not ports or not 1 <= ports[0] <= ports[-1] <= 65535:
        raise InventoryError(f"{file}: ports.{name}.port: {values['port']} is not a range of ports")
    return Port(name, values["protocol"], ports, values.get("external", False), tuple(values.get("internal", ())))


def _database(file: Path, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {**values, "schema": (file.parent / values["schema"]).read_text()}
    except OSError as error:
        raise InventoryError(f"{file}: databases.{name}.schema: {error}") from None


# Checking


def _check(component: Component, every: Components, file: Path) -> None:
    """Check that a descriptor's references to other components exist."""
    for name in component.after:
        if name not in every or every[name].stage != component.stage:
            raise InventoryError(f"{file}: after: {name} is no component of the stage {component.stage}")
    known = {secret.name for other in every.values() for secret in other.secrets}
    for name in component.status_secrets:
        if name not in known:
            raise InventoryError(f"{file}: status_secrets: no component has a secret {name}")
    if component.metrics and component.metrics["port"] not in {port.name for port in component.ports}:
        raise InventoryError(f"{file}: metrics.port: {component.metrics['port']} is none of its ports")


def _check_names(every: Components, ansible: Path) -> None:
    """Check that names are unique. Alternatives may share names: only one of them is enabled."""
    taken: dict[tuple[str, object], Component] = {}

    def names(component: Component) -> Iterator[tuple[str, object]]:
        yield from (("ports", port.name) for port in component.ports)
        yield from (("secrets", secret.name) for secret in component.secrets)
        yield from (("a field in Vault", f"{s.path}: {s.field}") for s in component.secrets)
        yield from (("certificates", name) for name in component.certificates)
        yield from (("secret_files", str(path)) for path in component.secret_files)
        yield from (("databases", name) for name in component.databases)
        yield from (("logins", login) for d in component.databases.values() for login in d["logins"])
        yield from (("redis_users", name) for name in component.redis_users)
        yield from ((f"rabbitmq.{kind}", name) for kind, names in component.rabbitmq.items() for name in names)

    for component in every.values():
        for what, name in names(component):
            other = taken.setdefault((what, name), component)
            both = other.enabled and component.enabled
            if other is not component and (both or not component.provides or component.provides != other.provides):
                file = ansible / "roles" / component.name / "component.yml"
                raise InventoryError(f"{file}: {what}: {name} is {other.name}'s already", "give it another name")


def _check_ports(chosen: Iterable[Component], ansible: Path) -> None:
    """Check that no two daemons listen on one port of a machine's address in a network."""
    for one, two in itertools.combinations_with_replacement(chosen, 2):
        if not (one.on(two.groups) or two.on(one.groups)):
            continue
        for a, b in itertools.product(one.ports, two.ports):
            network = (a.external and b.external) or (a.internal and b.internal)
            if (
                a is not b
                and network
                and a.protocol == b.protocol
                and a.ports[0] <= b.ports[-1]
                and b.ports[0] <= a.ports[-1]
            ):
                raise InventoryError(
                    f"{ansible / 'roles' / two.name / 'component.yml'}: ports.{b.name}: {one.name} listens on"
                    f" {a.protocol} {a.text} already",
                    f"give one of them another port, or disable it in {ansible / FLAGS}",
                )


def _in_order(stage: list[Component], ansible: Path) -> Iterator[Component]:
    rest = list(stage)
    while rest:
        names = {c.name for c in rest}
        ready = next((c for c in rest if names.isdisjoint(c.after)), None)
        if ready is None:
            file = ansible / "roles" / rest[0].name / "component.yml"
            raise InventoryError(f"{file}: after: {', '.join(sorted(names))} wait for each other")
        rest.remove(ready)
        yield ready


def check_groups(every: Components, groups: Collection[str], ansible: Path = paths.ANSIBLE) -> None:
    """Raises InventoryError for an enabled component of a group, or a source, that the inventory lacks."""
    for component in enabled(among=every):
        named = {"group": component.groups} | {f"ports.{p.name}.internal": p.internal for p in component.ports}
        for key, names in named.items():
            if unknown := set(names) - {*groups, "all", *((COMPUTER,) if key != "group" else ())}:
                file = ansible / "roles" / component.name / "component.yml"
                raise InventoryError(
                    f"{file}: {key}: the inventory has no group {min(unknown)}",
                    f"there are: {', '.join(sorted(groups))}",
                )


# Derived data


def secrets(every: Components) -> dict[str, Secret]:
    """The secrets of `every` component by name."""
    return {secret.name: secret for component in every.values() for secret in component.secrets}


def vault_class(group: str) -> str:
    """The name of a group's AppRole and policy: sip, of sip_proxies, as devstack-core has it."""
    return group.partition("_")[0]


def classes(every: Components) -> dict[str, dict[str, Any]]:
    """By class of machines: its `group`, the `secrets` it may read by path, its `certificates` by PKI role.

    `domain`: whether those may be for the SIP domain, too.
    """
    found: dict[str, dict[str, Any]] = {}
    for component in enabled(among=every):
        paths_ = dict.fromkeys(s.path for s in component.secrets if s.reader == "machine")
        for group in component.groups if paths_ or component.certificates else ():
            empty = {"group": group, "secrets": [], "certificates": [], "domain": False}
            mine = found.setdefault(vault_class(group), empty)
            mine["secrets"] += [path for path in paths_ if path not in mine["secrets"]]
            mine["certificates"] += component.certificates
            mine["domain"] |= any(component.certificates.values())
    return found


def variables(every: Components) -> dict[str, Any]:
    """The components' variables for Ansible, for all machines.

    Variables of a disabled component are set too, unless another component has the name: a role's scenario needs no
    flag.
    """
    by_flag = sorted(every.values(), key=lambda component: component.enabled)
    values: dict[str, Any] = {}
    for component in by_flag:
        values[f"voip_with_{component.name}"] = component.enabled
        values |= {port.variable: port.ports[0] if len(port.ports) == 1 else port.text for port in component.ports}
        values |= {s.name: Template(f"{{{{ lookup('voip_secret', '{s.name}') }}}}") for s in component.secrets}
    chosen = enabled(among=every)
    values["voip_databases"] = [
        {
            "name": name,
            "groups": list(component.groups),
            "schema": database["schema"],
            "logins": [{"name": n, **_with_password(login)} for n, login in database["logins"].items()],
        }
        for component in chosen
        for name, database in component.databases.items()
    ]
    values["voip_redis_users"] = [
        {
            "name": name,
            **_with_password(user),
            # The old password stays valid until the user has the new one: src/voip_stack/secrets/rotation.py passes it.
            "before": Template(f"{{{{ {user['password']}_before | default('') }}}}"),
        }
        for component in chosen
        for name, user in component.redis_users.items()
    ]
    values["voip_scrape_jobs"] = scrape_jobs(every)
    for kind in ("exchanges", "queues", "users"):
        values[f"voip_rabbitmq_{kind}"] = [
            {"name": name, **_with_password(item)}
            for component in chosen
            for name, item in component.rabbitmq.get(kind, {}).items()
        ]
    return values


def scrape_jobs(every: Components) -> list[dict[str, Any]]:
    """The Prometheus scrape targets: `port` and `path` on each machine of `groups`."""
    return [
        {
            "name": component.name,
            "groups": list(component.groups),
            "port": next(port.ports[0] for port in component.ports if port.name == component.metrics["port"]),
            "path": component.metrics.get("path", "/metrics"),
        }
        for component in enabled(among=every)
        if component.metrics
    ]


def _with_password(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: Template(f"{{{{ {v} }}}}") if k == "password" else v for k, v in values.items()}


def host_variables(every: Components, groups: Collection[str]) -> dict[str, Any]:
    """The components' variables for Ansible, for a machine of `groups`."""
    here = enabled(groups, every)
    return {
        "voip_roles": {stage: [c.name for c in here if c.stage == stage] for stage in STAGES},
        "voip_services": [
            {"name": port.name, "protocol": port.protocol, "ports": port.text, **reached}
            for component in here
            for port in component.ports
            for reached in port.reached
        ],
        "voip_secret_directories": sorted({str(path.parent) for c in here for path in c.secret_files}),
        "voip_log_units": [unit for component in here for unit in component.units],
        "voip_vault_class": next((name for name, c in classes(every).items() if c["group"] in groups), ""),
    }
