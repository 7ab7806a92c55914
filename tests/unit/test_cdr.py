"""CDRs in the commands' output, and the same fields in all programs that write or read one."""

from __future__ import annotations

import ast
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import jsonschema
import pytest

from voip_stack import cdr, paths, settings, vms
from voip_stack.errors import VoipError
from voip_stack.services import database
from voip_stack.tasks import cdr as tasks

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
SCHEMA = json.loads((paths.REPOSITORY / "docs/cdr-event.schema.json").read_text())


def test_who_writes_and_who_reads_a_cdr_mean_the_same_fields() -> None:
    roles = paths.ANSIBLE / "roles"
    asterisk = (roles / "asterisk/templates/cdr_custom.conf.j2").read_text()
    written = re.search(r"^fields = (.*)$", asterisk, re.MULTILINE)
    assert written
    assert tuple(re.sub(r"\(.*?\)", "", written[1]).split(",")) == cdr.COLUMNS
    spool = ast.parse((roles / "cdr/files/spool.py").read_text())
    (columns,) = (
        node.value for node in spool.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COLUMNS"
    )
    assert eval(ast.unparse(columns)) == cdr.COLUMNS  # noqa: S307  # a sum of our own tuples
    table = (roles / "cdr/files/database.sql").read_text().partition("CREATE TABLE IF NOT EXISTS cdr (")[2]
    assert set(re.findall(r'^  "?([a-z]+)"? ', table.partition("\n);")[0], re.MULTILINE)) == {"id", *cdr.COLUMNS}


def test_the_schema_of_an_event_is_one_and_names_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["required"]) == set(SCHEMA["properties"]) == {"version", "id", *cdr.COLUMNS}


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("30m", "2026-11-25T11:30:00+00:00"),
        ("2h", "2026-11-25T10:00:00+00:00"),
        ("3d", "2026-11-22T12:00:00+00:00"),
        ("2026-11-25", "2026-11-25T00:00:00+00:00"),
        ("2026-11-25T14:30+01:00", "2026-11-25T14:30:00+01:00"),
    ],
)
def test_times_as_people_give_them(text: str, time: str) -> None:
    assert cdr.moment(text, NOW).isoformat() == time


@pytest.mark.parametrize("text", ["yesterday", "2", "-2h", "2026-13-01", "'; DROP TABLE cdr; --"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(VoipError, match="is no time"):
        cdr.moment(text, NOW)


def test_filters_reach_the_database_as_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts: list[str] = []

    def run(script: str) -> str:
        scripts.append(script)
        return "[]"

    monkeypatch.setattr(database, "run", run)
    assert cdr.list_(src="x'; DROP TABLE cdr; --", dst="600", since="2026-11-25T14:30+01:00", limit=3) == []
    assert "WHERE src = 'x''; DROP TABLE cdr; --' AND dst = '600' AND start >= '2026-11-25T13:30:00'" in scripts[0]
    assert "LIMIT 3" in scripts[0]


def test_no_records_are_no_wish() -> None:
    with pytest.raises(VoipError, match="0 records"):
        cdr.list_(limit=0)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Callable[[str], None]]:
    """broker(script): a program that replaces the follower on the PBX."""
    (tmp_path / "rabbitmq_password_cdr_reader").write_text("a-b\n")
    monkeypatch.setenv("VOIP_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("VOIP_SECRETS", "file")
    settings.load.cache_clear()
    yield lambda script: monkeypatch.setattr(vms.ssh, "argv", lambda *_: [sys.executable, "-c", script])
    settings.load.cache_clear()


def test_events_are_told_until_the_broker_is_gone(broker: Callable[[str], None]) -> None:
    broker("print('{\"id\": \"a:1\"}'); import sys; sys.exit('ConnectionClosed')")
    events = cdr.follow()
    assert next(events) == {"id": "a:1"}
    with pytest.raises(VoipError, match="no more events") as caught:
        next(events)
    assert "ConnectionClosed" in caught.value.details


def test_the_follower_gets_its_login_by_standard_input(broker: Callable[[str], None]) -> None:
    broker("import json; print(json.dumps(input().split()))")
    login, queue = next(cdr.follow())
    assert login == "amqp://cdr_reader:a-b@192.168.64.40:5672/voip"
    assert queue.startswith("cdr.tail.")


def test_csv_has_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cdr, "list_", lambda *_: [dict.fromkeys(cdr.COLUMNS, 'a "b", c')])
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    tasks.list_.body(None, csv=True)
    head, row = out.getvalue().splitlines()
    assert head == ",".join(cdr.COLUMNS)
    assert row.split('","')[1] == 'a ""b"", c'
