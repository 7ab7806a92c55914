"""Each component's login does its daemon's work and nothing else, from its own machines and from nowhere else."""

import struct
import uuid

import pytest
from guests import inventory_of, secret

from voip_stack import lab

ADDRESS = inventory_of("postgresql-1")["internal_address"]


@pytest.fixture
def sql(host):
    """sql(login, statement): what psql says as that login, over the network."""

    def run(login, statement, password=None):
        return host.run(
            "PGPASSWORD=%s psql --no-psqlrc --tuples-only --no-align --set=ON_ERROR_STOP=1 --command=%s %s",
            password or secret(f"postgresql_password_{login}"),
            statement,
            f"host={ADDRESS} dbname={login} user={login}",
        )

    return run


def test_listens_inside_and_on_loopback_only(host):
    found = {line.split()[3] for line in host.check_output("ss -Hltn 'sport = :5432'").splitlines()}
    assert found == {f"{ADDRESS}:5432", "127.0.0.1:5432"}


def test_parameters_are_in_force(host):
    ask = "runuser -u postgres -- psql -tAc %s"
    assert host.check_output(ask, "SHOW max_connections") == "42"
    assert host.check_output(ask, "SHOW shared_buffers") == "32MB"
    assert host.check_output(ask, "SHOW password_encryption") == "scram-sha-256"


def test_kamailio_registers_phones(sql):
    insert = """
        INSERT INTO location (ruid, username, contact, expires, callid, last_modified)
        VALUES ('r', 'u', 'sip:u@192.0.2.1', now(), 'c', now())
    """
    done = sql("kamailio", insert)
    assert done.rc == 0, done.stderr
    assert sql("kamailio", "SELECT count(*) FROM location WHERE ruid = 'r'").stdout.strip() == "1"
    assert sql("kamailio", "DELETE FROM location WHERE ruid = 'r'").rc == 0
    assert sql("kamailio", "SELECT count(*) FROM subscriber").rc == 0


def test_cdr_writes_and_cannot_read(sql):
    insert = f"INSERT INTO cdr (start, uniqueid, src, dst) VALUES (now(), '{uuid.uuid4()}', 'a', 'b')"
    assert sql("cdr", insert).rc == 0
    assert "permission denied" in sql("cdr", "SELECT * FROM cdr").stderr


def test_asterisk_reads_its_endpoints(sql):
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
        ("cdr", "CREATE TABLE mine (a int)"),
        ("cdr", "COPY cdr TO PROGRAM 'id'"),
    ],
)
def test_nothing_else(sql, login, statement):
    done = sql(login, statement)
    assert done.rc != 0
    assert "permission denied" in done.stderr


def test_a_wrong_password_is_refused(sql):
    assert "password authentication failed" in sql("kamailio", "SELECT 1", password="wrong").stderr


def test_no_login_reaches_another_database(host):
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
def test_a_proxy_gets_its_own_database_only(user, database, admitted):
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
