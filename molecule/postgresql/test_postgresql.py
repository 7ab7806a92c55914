"""Each component's login does its daemon's work and nothing else, from its own machines and from nowhere else."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from guests import Host, Result, inventory_of, secret

from voip_stack import lab, paths

ADDRESS = inventory_of("postgresql-1")["internal_address"]
DATABASES = {"cdr_publisher": "cdr"}  # others have the name of their login
EVENT = json.loads((paths.REPOSITORY / "docs/cdr-event.schema.json").read_text())
Sql = Callable[..., Result]
Events = Callable[[object], list[dict[str, Any]]]


@pytest.fixture
def sql(host: Host) -> Sql:
    """sql(login, statement): what psql says as that login, over the network."""

    def run(login: str, statement: str, password: str | None = None) -> Result:
        return host.run(
            "PGPASSWORD=%s psql --no-psqlrc --tuples-only --no-align --set=ON_ERROR_STOP=1 --command=%s %s",
            password or secret(f"postgresql_password_{login}"),
            statement,
            f"host={ADDRESS} dbname={DATABASES.get(login, login)} user={login}",
        )

    return run


def test_listens_inside_and_on_loopback_only(host: Host) -> None:
    found = {line.split()[3] for line in host.check_output("ss -Hltn 'sport = :5432'").splitlines()}
    assert found == {f"{ADDRESS}:5432", "127.0.0.1:5432"}


def test_parameters_are_in_force(host: Host) -> None:
    ask = "runuser -u postgres -- psql -tAc %s"
    assert host.check_output(ask, "SHOW max_connections") == "42"
    assert host.check_output(ask, "SHOW shared_buffers") == "32MB"
    assert host.check_output(ask, "SHOW password_encryption") == "scram-sha-256"


def test_kamailio_registers_phones(sql: Sql) -> None:
    insert = """
        INSERT INTO location (ruid, username, contact, expires, callid, last_modified)
        VALUES ('r', 'u', 'sip:u@192.0.2.1', now(), 'c', now())
    """
    done = sql("kamailio", insert)
    assert done.rc == 0, done.stderr
    assert sql("kamailio", "SELECT count(*) FROM location WHERE ruid = 'r'").stdout.strip() == "1"
    assert sql("kamailio", "DELETE FROM location WHERE ruid = 'r'").rc == 0
    assert sql("kamailio", "SELECT count(*) FROM subscriber").rc == 0


def cdr(uniqueid: object, sequence: int = 0, more: str = "") -> str:
    return (
        "INSERT INTO cdr (start, answer, uniqueid, sequence, src, dst, disposition) VALUES"
        f" ('2026-11-25 10:00:00.5', NULL, '{uniqueid}', {sequence}, 'a', 'b', 'NO ANSWER') {more}"
    )


@pytest.fixture
def events(sql: Sql) -> Events:
    """events(uniqueid): the events of that channel's CDRs."""

    def read(uniqueid: object) -> list[dict[str, Any]]:
        query = f"SELECT payload FROM cdr_event WHERE payload->>'uniqueid' = '{uniqueid}' ORDER BY id"
        return [json.loads(line) for line in sql("cdr_publisher", query).stdout.splitlines()]

    return read


def test_cdr_writes_and_cannot_read(sql: Sql) -> None:
    assert sql("cdr", cdr(uuid.uuid4())).rc == 0
    assert "permission denied" in sql("cdr", "SELECT * FROM cdr").stderr


def test_a_cdr_leaves_an_event_as_it_is_documented(sql: Sql, events: Events) -> None:
    name = f"pbx-1-{uuid.uuid4()}"
    assert sql("cdr", cdr(name, sequence=7)).rc == 0
    (event,) = events(name)
    jsonschema.validate(event, EVENT)
    assert event["id"] == f"{name}:7"
    assert event["start"] == "2026-11-25T10:00:00.500000Z"
    assert event["answer"] is None
    assert (event["src"], event["dst"], event["disposition"]) == ("a", "b", "NO ANSWER")


def test_a_cdr_that_comes_again_is_one_row_and_one_event(host: Host, sql: Sql, events: Events) -> None:
    name = uuid.uuid4()
    for _ in range(2):
        assert sql("cdr", cdr(name, more="ON CONFLICT DO NOTHING")).rc == 0
    query = f"SELECT count(*) FROM cdr WHERE uniqueid = '{name}'"
    assert host.check_output("runuser -u postgres -- psql -tAc %s cdr", query) == "1"
    assert len(events(name)) == 1


def test_a_cdr_that_is_taken_back_leaves_no_event(sql: Sql, events: Events) -> None:
    name = uuid.uuid4()
    assert sql("cdr", f"BEGIN; {cdr(name)}; ROLLBACK").rc == 0
    assert events(name) == []


def test_a_published_event_is_removed(sql: Sql, events: Events) -> None:
    name = uuid.uuid4()
    assert sql("cdr", cdr(name)).rc == 0
    assert sql("cdr_publisher", f"DELETE FROM cdr_event WHERE payload->>'uniqueid' = '{name}'").rc == 0
    assert events(name) == []


def test_asterisk_reads_its_endpoints(sql: Sql) -> None:
    assert sql("asterisk", "SELECT count(*) FROM ps_endpoints").rc == 0


@pytest.mark.parametrize(
    ("login", "statement"),
    [
        ("kamailio", "DELETE FROM subscriber"),
        ("kamailio", "CREATE TABLE mine (a int)"),
        ("asterisk", "UPDATE ps_auths SET password = 'x'"),
        ("asterisk", "INSERT INTO ps_endpoints (id) VALUES ('x')"),
        ("asterisk", "SET ROLE asterisk_owner"),
        ("cdr", "DELETE FROM cdr"),
        ("cdr", "SELECT * FROM cdr_event"),
        ("cdr", "INSERT INTO cdr_event (payload) VALUES ('{}')"),
        ("cdr", "CREATE TABLE mine (a int)"),
        ("cdr", "COPY cdr TO PROGRAM 'id'"),
        ("cdr_publisher", "SELECT * FROM cdr"),
        ("cdr_publisher", "INSERT INTO cdr_event (payload) VALUES ('{}')"),
        ("cdr_publisher", "UPDATE cdr_event SET payload = '{}'"),
        ("cdr_publisher", "CREATE TABLE mine (a int)"),
    ],
)
def test_nothing_else(sql: Sql, login: str, statement: str) -> None:
    done = sql(login, statement)
    assert done.rc != 0
    assert "permission denied" in done.stderr


def test_a_wrong_password_is_refused(sql: Sql) -> None:
    assert "password authentication failed" in sql("kamailio", "SELECT 1", password="wrong").stderr


def test_no_login_reaches_another_database(host: Host) -> None:
    password = secret("postgresql_password_cdr")
    done = host.run("PGPASSWORD=%s psql -tAc 'SELECT 1' %s", password, f"host={ADDRESS} dbname=asterisk user=cdr")
    assert "no pg_hba.conf entry" in done.stderr


@pytest.mark.parametrize(
    ("user", "database", "admitted"),
    [
        ("kamailio", "kamailio", True),
        ("asterisk", "asterisk", False),
        ("cdr", "cdr", False),
        ("postgres", "postgres", False),
    ],
)
def test_a_proxy_gets_its_own_database_only(user: str, database: str, admitted: bool) -> None:
    """By the server's first word, before any password: R (which authentication) or E (an error).

    https://www.postgresql.org/docs/17/protocol-message-formats.html
    """
    pairs = ("user", user, "database", database, "")
    body = struct.pack("!i", 196608) + b"".join(word.encode() + b"\0" for word in pairs)  # protocol 3.0
    with lab.current().connect(ADDRESS, 5432, timeout=10) as connection:
        connection.sendall(struct.pack("!i", len(body) + 4) + body)
        answer = connection.recv(4096)
    if admitted:
        assert answer[:1] == b"R"
        assert b"SCRAM-SHA-256" in answer
    else:
        assert answer[:1] == b"E"
        assert b"no pg_hba.conf entry" in answer
