"""PostgreSQL: SQL with all rights, over ssh or in a devstack-core, and this stack's objects in a devstack-core.

Databases and logins are those of the role postgresql, from the same template. Source: PostgreSQL's manual (COMMENT,
pg_roles).
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

from voip_stack import inventory, lab, secrets, vms
from voip_stack.errors import HostError, VmError, VoipError
from voip_stack.services import Step, devstack, templates
from voip_stack.services.devstack import Login

MARK = "voip-stack"  # prefix of the comments on databases and roles made by this stack
_OLDEST = 14  # the first with CREATE OR REPLACE TRIGGER
_SECONDS = 60  # for one script
_OPTIONS = ("--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1")
_NO_SERVER = 2  # psql's exit status: no connection


def quoted(text: str) -> str:
    """`text` as an SQL string constant (PostgreSQL, 4.1.2.1); a NUL can't be in one."""
    return "'" + text.replace("\0", "").replace("'", "''") + "'"


@functools.cache
def superuser() -> Login:
    """The login of a devstack-core's superuser, which is not called postgres. Raises VoipError."""
    return devstack.login("PostgreSQL", inventory.load().port("postgresql"), "postgres", place="database")


def _psql() -> tuple[list[str], dict[str, str]]:
    """The command line and environment of a psql on this computer, in the user's devstack-core."""
    # Homebrew does not link libpq.
    places = [os.environ.get("PATH", ""), "/opt/homebrew/opt/libpq/bin", "/usr/local/opt/libpq/bin"]
    program = shutil.which("psql", path=os.pathsep.join(places))
    if not program:
        raise HostError("psql is missing", "./voip doctor --fix; on macOS: brew install libpq")
    login = superuser()
    argv = lab.current().inside(program, *_OPTIONS, f"--host={login.address}", f"--port={login.port}")
    argv += [f"--username={login.user}", f"--dbname={login.place}"]
    return argv, {**os.environ, "PGPASSWORD": login.password, "PGCONNECT_TIMEOUT": "15"}


def run(script: str) -> str:
    """The output of an SQL script, which chooses databases by \\connect; passed on standard input, hidden from ps.

    Raises VmError when the server can't be reached, VoipError with PostgreSQL's words when it refuses.
    """
    name, address = inventory.load().infra()
    outside = inventory.load().devstack is not None
    hint = "./voip infra.check" if outside else "./voip status"
    where = f"PostgreSQL on {name} ({address})"
    if outside:
        done = _in_devstack(script, where)
    else:
        done = vms.ssh.run(name, "sudo", "-u", "postgres", "psql", *_OPTIONS, input=script)
    if done.returncode == vms.ssh.LATE:
        raise VmError(f"{where} does not answer: {done.stderr}", hint)
    if done.returncode in (vms.ssh.NO_SSH, _NO_SERVER):
        raise VmError(f"{where} can't be reached", hint, done.stderr)
    if done.returncode != 0:
        raise VoipError(
            f"{where} refused", "./voip infra.setup" if outside else f"./voip provision --limit {name}", done.stderr
        )
    return done.stdout


def _in_devstack(script: str, where: str) -> subprocess.CompletedProcess[str]:
    argv, environment = _psql()
    try:
        return subprocess.run(
            argv, input=script, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise VmError(f"{where} does not answer within {_SECONDS} s", "./voip infra.check") from None


@dataclass(frozen=True)
class Layout:
    """The objects of the role postgresql: SQL for psql."""

    sql: str = field(repr=False)
    databases: dict[str, list[str]]  # logins by database

    @property
    def mark(self) -> str:
        return f"{MARK} {hashlib.sha256(self.sql.encode()).hexdigest()}"

    @property
    def roles(self) -> list[str]:
        """The owners and the logins."""
        return [f"{name}_owner" for name in self.databases] + [n for names in self.databases.values() for n in names]


def layout(secret: templates.Secret = secrets.get) -> Layout:
    """The layout from the role's own template. Raises VoipError when `secret` does."""
    databases = templates.told("voip_databases", secret)
    sql = templates.render("postgresql", "setup.sql.j2", postgresql_databases=databases)
    return Layout(sql, {d["name"]: [login["name"] for login in d["logins"]] for d in databases})


def version() -> str:
    """Raises VoipError when it is too old, VmError when it can't be reached."""
    version = run("SHOW server_version;").split()[0]
    if int(version.partition(".")[0]) < _OLDEST:
        raise VoipError(f"{superuser()} is version {version}", f"this stack needs {_OLDEST} or later")
    return version


def _marks(wanted: Layout) -> tuple[dict[str, str], dict[str, str]]:
    """The comments of the layout's existing databases and roles."""
    names = ", ".join(map(quoted, wanted.databases))
    roles = ", ".join(map(quoted, wanted.roles))
    rows = run(
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


def plan(wanted: Layout) -> Iterator[Step]:
    """The steps for PostgreSQL's missing objects. Raises VoipError for one that exists but isn't ours."""
    version()
    databases, roles = _marks(wanted)
    for kind, found in (("database", databases), ("role", roles)):
        foreign = [name for name, comment in found.items() if not comment.startswith(MARK)]
        if foreign:
            raise VoipError(
                f"{superuser()} has a {kind} {foreign[0]} that this stack has not made",
                f"rename it, or say that it is ours: COMMENT ON {kind.upper()} {foreign[0]} IS '{MARK}'",
            )
    if any(databases.get(name) != wanted.mark for name in wanted.databases):
        # Marked on creation: so an interrupted run's objects are known as ours.
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
        yield f"PostgreSQL: databases {', '.join(wanted.databases)} with their logins", lambda: run(text)


def removal(wanted: Layout) -> Iterator[Step]:
    """The existing objects of plan(). Raises VoipError."""
    databases, roles = _marks(wanted)
    for name, comment in databases.items():
        if comment.startswith(MARK):
            script = f"DROP DATABASE {name} WITH (FORCE);"
            yield f"PostgreSQL: the database {name}", functools.partial(run, script)
    for name, comment in roles.items():
        if comment.startswith(MARK):
            yield f"PostgreSQL: the role {name}", functools.partial(run, f"DROP ROLE {name};")
