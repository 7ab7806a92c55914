"""What Asterisk writes is in the table once and in the queue at least once, whatever was away or died meanwhile."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from guests import Guest, Host, inventory_of, secret

from voip_stack import cdr, lab, paths
from voip_stack.deadline import Deadline

SPOOL = "/var/spool/cdr"
REFUSED = "/var/lib/cdr-spool/refused.csv"
PEER = inventory_of("peer")["internal_address"]
EVENT = json.loads((paths.REPOSITORY / "docs/cdr-event.schema.json").read_text())
# As Asterisk writes them.
CONFIGURATION = (paths.ANSIBLE / "roles/asterisk/templates/cdr_custom.conf.j2").read_text()
FIELDS = re.sub(r"\(.*?\)", "", CONFIGURATION.partition("fields = ")[2].strip()).split(",")
CALL = {
    "start": "1764064800.250000",
    "answer": "1764064801.500000",
    "end": "1764064805.000000",
    "clid": '"Ann \\"the, boss\\"" <1001>',
    "src": "1001",
    "dst": "600",
    "dcontext": "from-proxy",
    "channel": "PJSIP/sip-1-00000001",
    "lastapp": "Echo",
    "duration": "4",
    "billsec": "3",
    "disposition": "ANSWERED",
    "amaflags": "DOCUMENTATION",
    "linkedid": "pbx-1-1764064800.1",
    "sequence": "7",
}
# All that is in the queue. It is empty then. Run on this computer: Python takes seconds to begin on a guest.
READ = """
import json, pika, sys
with pika.BlockingConnection(pika.URLParameters(sys.stdin.read())) as broker:
    channel = broker.channel()
    while True:
        method, properties, body = channel.basic_get("cdr", auto_ack=True)
        if method is None:
            break
        told = properties.message_id, properties.delivery_mode, properties.content_type
        print(json.dumps([method.routing_key, *told, json.loads(body)]))
"""

Write = Callable[..., None]
Sql = Callable[[str], list[str]]
Rows = Callable[[str], int]
Event = list[Any]  # routing key, message id, delivery mode, type, body
Events = Callable[..., list[Event]]


def new() -> str:
    return f"pbx-1-{uuid.uuid4()}"


def line(uniqueid: str, **changed: str) -> str:
    """A CDR as Asterisk writes it (res_cdrel_custom, quoting_method all)."""
    text = io.StringIO()
    csv.DictWriter(text, FIELDS, "", quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(
        CALL | {"uniqueid": uniqueid} | changed
    )
    return text.getvalue()


@pytest.fixture
def write(host: Host) -> Write:
    """write(lines): append them to the spool, as Asterisk does."""

    def append(*lines: str) -> None:
        script = f"umask 027; cat >> {SPOOL}/cdr.csv <<'EOF'\n{''.join(lines)}EOF\n"
        host.check_output("runuser -u asterisk -- sh -c %s", script)

    return append


@pytest.fixture
def sql(guest: Guest) -> Sql:
    """sql(statement): what it selects from the database cdr, a line per row."""
    command = "runuser -u postgres -- psql --no-psqlrc -tAq -c %s cdr"
    return lambda statement: guest("peer").check_output(command, statement).splitlines()


@pytest.fixture
def rows(sql: Sql) -> Rows:
    """rows(uniqueid): how many there are of that channel, within a minute at least one."""

    def count(uniqueid: str) -> int:
        query = f"SELECT FROM cdr WHERE uniqueid = '{uniqueid}'"
        Deadline(60).wait(lambda: sql(f"SELECT count(*) FROM ({query}) AS found") != ["0"], "the row is there", every=1)
        return int(sql(f"SELECT count(*) FROM ({query}) AS found")[0])

    return count


@pytest.fixture(scope="module")
def seen() -> list[Event]:
    """The events that were read, oldest first."""
    return []


@pytest.fixture
def events(seen: list[Event]) -> Events:
    """events(uniqueid): those of that channel's CDRs that were ever read, within two minutes at least `least`."""
    url = f"amqp://cdr_reader:{secret('rabbitmq_password_cdr_reader')}@{PEER}:5672/voip?socket_timeout=20"
    argv = lab.current().inside(sys.executable, "-c", READ)

    def of(uniqueid: str) -> list[Event]:
        return [event for event in seen if event[4]["uniqueid"] == uniqueid]

    def read(uniqueid: str, least: int = 1) -> list[Event]:
        def come() -> bool:
            done = subprocess.run(argv, input=url, capture_output=True, text=True, timeout=60, check=False)
            seen.extend(json.loads(text) for text in done.stdout.splitlines())
            return len(of(uniqueid)) >= least

        assert Deadline(120).until(come, every=1), f"{len(of(uniqueid))} of {least} events of {uniqueid}"
        return of(uniqueid)

    return read


@pytest.fixture
def set_aside(host: Host) -> Callable[[], list[str]]:
    """set_aside(): the lines that were found to be no CDRs."""

    def read() -> list[str]:
        return host.run(f"cat {REFUSED}").stdout.splitlines()

    return read


def kill(machine: Host, unit: str) -> None:
    machine.check_output("systemctl kill --signal=KILL %s", unit)


def test_a_cdr_is_a_row_and_an_event_as_it_is_documented(write: Write, sql: Sql, rows: Rows, events: Events) -> None:
    name = new()
    write(line(name))
    assert rows(name) == 1
    query = (
        f"SELECT start, answer, \"end\", clid, billsec, sequence, userfield IS NULL FROM cdr WHERE uniqueid = '{name}'"
    )
    (row,) = sql(query)
    times = "2025-11-25 10:00:00.25|2025-11-25 10:00:01.5|2025-11-25 10:00:05"
    assert row == f'{times}|"Ann \\"the, boss\\"" <1001>|3|7|t'
    ((key, message_id, delivery_mode, content_type, event),) = events(name)
    assert (key, message_id, delivery_mode) == ("call.answered", f"{name}:7", 2)
    assert content_type == "application/json"
    jsonschema.validate(event, EVENT)
    assert event["id"] == message_id
    assert event["answer"] == "2025-11-25T10:00:01.500000Z"
    assert event["clid"] == '"Ann \\"the, boss\\"" <1001>'


def test_a_call_that_nobody_answered_has_no_time_of_an_answer(write: Write, events: Events) -> None:
    name = new()
    write(line(name, answer="0.000000", billsec="0", disposition="NO ANSWER"))
    ((key, _, _, _, event),) = events(name)
    assert key == "call.no_answer"
    jsonschema.validate(event, EVENT)
    assert event["answer"] is None


def test_a_cdr_that_comes_again_is_one_row_and_one_event(
    write: Write, rows: Rows, events: Events, set_aside: Callable[[], list[str]]
) -> None:
    name, later, aside = new(), new(), set_aside()
    write(line(name), line(name))
    assert rows(name) == 1
    write(line(name), line(later))
    assert len(events(later)) == 1
    assert len(events(name)) == 1
    assert rows(name) == 1
    assert set_aside() == aside


def test_a_line_that_is_no_cdr_is_set_aside_and_holds_nothing_up(
    host: Host, write: Write, rows: Rows, set_aside: Callable[[], list[str]]
) -> None:
    name, aside = new(), set_aside()
    bad = [
        "half a li\n",
        '"1","2\n',
        line(new(), start="0.000000"),
        line(new(), duration="long"),
        line(new(), clid="x" * 81),
    ]
    write(*bad, line(name))
    assert rows(name) == 1
    assert set_aside() == [*aside, *(text.rstrip("\n") for text in bad)]
    assert "not a CDR, kept in" in host.check_output("journalctl --no-pager -u cdr-spool")


def test_bytes_that_are_no_text_do_not_lose_a_cdr(host: Host, sql: Sql, rows: Rows) -> None:
    name = new()
    text = line(name, clid="Zo\\353 <1001>")  # Latin-1
    host.check_output("runuser -u asterisk -- sh -c %s", f"umask 027; printf '{text}' >> {SPOOL}/cdr.csv")
    assert rows(name) == 1
    assert sql(f"SELECT clid FROM cdr WHERE uniqueid = '{name}'") == ["Zo\N{REPLACEMENT CHARACTER} <1001>"]


def test_what_asterisk_is_still_writing_is_waited_for(host: Host, rows: Rows) -> None:
    """The file is moved away between Asterisk's opening it and its writing."""
    early, late = new(), new()
    slowly = """
import sys, time
with open(sys.argv[1], "a") as file:
    file.write(sys.argv[2])
    file.flush()
    time.sleep(8)
    file.write(sys.argv[3])
"""
    written = "runuser -u asterisk -- sh -c 'umask 027; exec python3 -c \"$@\"' sh %s %s %s %s"
    host.check_output(written, slowly, f"{SPOOL}/cdr.csv", line(early), line(late))
    assert rows(late) == 1
    assert rows(early) == 1


@pytest.mark.outage
def test_cdrs_of_a_time_without_postgresql_arrive_when_it_is_back(
    guest: Guest, host: Host, write: Write, rows: Rows, events: Events
) -> None:
    name = new()
    kill(guest("peer"), "postgresql@17-main")
    guest("peer").check_output("systemctl stop postgresql@17-main")
    try:
        write(line(name))
        kept = f"cat {SPOOL}/*.batch"
        assert Deadline(30).until(lambda: name in host.run(kept).stdout, every=1), "it was not moved"
    finally:
        guest("peer").check_output("systemctl start postgresql@17-main")
    assert rows(name) == 1
    assert len(events(name)) == 1
    assert host.check_output(f"ls {SPOOL}") == ""


@pytest.mark.outage
def test_events_of_a_time_without_rabbitmq_arrive_in_order_when_it_is_back(
    guest: Guest, write: Write, sql: Sql, rows: Rows, events: Events, seen: list[Event]
) -> None:
    names = [new() for _ in range(5)]
    kill(guest("peer"), "rabbitmq-server")
    write(*(line(name) for name in names))
    assert rows(names[-1]) == 1
    assert sql("SELECT count(*) FROM cdr_event") == ["5"]
    events(names[-1])
    assert [event[4]["uniqueid"] for event in seen if event[4]["uniqueid"] in names] == names


@pytest.mark.outage
def test_an_event_that_no_queue_takes_is_kept_until_one_does(
    guest: Guest, write: Write, sql: Sql, rows: Rows, events: Events
) -> None:
    name = new()
    guest("peer").check_output("rabbitmqctl --silent delete_queue --vhost voip cdr")
    try:
        write(line(name))
        assert rows(name) == 1
        refused = guest("cdr-1")
        told = "journalctl --no-pager -u cdr-publisher --since -60s"
        assert Deadline(30).until(lambda: "Unroutable" in refused.check_output(told), every=1)
        assert sql("SELECT count(*) FROM cdr_event") == ["1"]
    finally:
        guest("peer").check_output("rabbitmqctl --silent import_definitions /etc/rabbitmq/definitions.json")
    assert len(events(name)) == 1


@pytest.mark.outage
def test_a_publisher_killed_before_it_removed_an_event_publishes_it_again_under_its_id(
    guest: Guest, host: Host, write: Write, sql: Sql, events: Events
) -> None:
    name = new()
    host.check_output("systemctl stop cdr-publisher")
    write(line(name))
    assert Deadline(30).until(lambda: sql("SELECT count(*) FROM cdr_event") == ["1"], every=1)
    # Nobody can remove it until this ends.
    hold = "BEGIN; SELECT FROM cdr_event FOR UPDATE; SELECT pg_sleep(300)"
    command = "systemd-run --quiet --uid=postgres psql -c %s cdr"
    guest("peer").check_output(command, hold)
    locks = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    assert Deadline(15).until(lambda: sql(locks) == ["1"], every=0.5)
    host.check_output("systemctl start cdr-publisher")
    assert len(events(name)) == 1
    kill(host, "cdr-publisher")
    again = events(name, least=2)
    sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
    assert {event[1] for event in again} == {f"{name}:7"}
    assert all(event == again[0] for event in again)
    assert Deadline(60).until(lambda: sql("SELECT count(*) FROM cdr_event") == ["0"], every=1)


def test_who_follows_sees_an_event_and_takes_none_from_the_queue(
    guest: Guest, host: Host, write: Write, events: Events
) -> None:
    name = new()
    login = f"amqp://cdr_reader:{secret('rabbitmq_password_cdr_reader')}@{PEER}:5672/voip cdr.tail.test"
    script = '(echo "$0"; sleep 300) | python3 -c "$1" >/tmp/followed 2>&1'
    host.check_output("systemd-run --quiet --collect --unit=follower sh -c %s %s %s", script, login, cdr._FOLLOW)

    def queues() -> list[str]:
        return guest("peer").check_output("rabbitmqctl --silent list_queues --vhost voip name").splitlines()

    assert Deadline(30).until(lambda: "cdr.tail.test" in queues(), every=1)
    write(line(name))
    assert Deadline(30).until(lambda: name in host.check_output("cat /tmp/followed"), every=1)
    assert len(events(name)) == 1
    host.check_output("systemctl stop follower")
    assert Deadline(60).until(lambda: "cdr.tail.test" not in queues(), every=1), "its queue stays"


@pytest.mark.parametrize(("service", "capabilities"), [("spool", {"cap_lease"}), ("publisher", set())])
def test_a_broken_service_gains_nothing(host: Host, service: str, capabilities: set[str]) -> None:
    pid = host.check_output("systemctl show --value -p MainPID %s", f"cdr-{service}")
    status = dict(text.split(":\t", 1) for text in host.check_output("cat /proc/%s/status", pid).splitlines())
    assert status["Uid"].split()[0] != "0"
    bits = {"cap_lease": 1 << 28}
    for kind in ("CapEff", "CapBnd"):
        assert int(status[kind], 16) == sum(bits[c] for c in capabilities)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    shown = host.check_output("systemctl show -p IPAddressAllow -p IPAddressDeny %s", f"cdr-{service}")
    filters = {key: set(value.split()) for key, _, value in (text.partition("=") for text in shown.splitlines())}
    assert filters["IPAddressDeny"] == {"::/0", "0.0.0.0/0"}
    assert {a for a in filters["IPAddressAllow"] if not a.startswith(("127.", "::1"))} == {f"{PEER}/32"}
    write_to = "nsenter --target %s --mount -- touch /etc/passwd /usr/local/lib/cdr/spool.py"
    assert host.run(write_to, pid).stderr.count("Read-only file system") == 2


def test_no_password_is_seen(host: Host) -> None:
    passwords = [
        secret(name)
        for name in ("postgresql_password_cdr", "postgresql_password_cdr_publisher", "rabbitmq_password_cdr_publisher")
    ]
    for seen_by_all in (
        "ps -eo args",
        "cat /proc/[0-9]*/environ",
        "journalctl --no-pager -u cdr-spool -u cdr-publisher",
    ):
        said = host.run(seen_by_all).stdout
        assert "cdr" in said
        assert not [password for password in passwords if password in said], seen_by_all
    files = host.check_output("find /etc/cdr -type f -printf '%m %u\\n'").splitlines()
    assert files == ["600 root"] * 3
