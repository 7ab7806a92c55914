"""Call detail records: who called whom, when, for how long."""

import csv as csv_format
import json as json_format
import sys
from typing import Any

from invoke.context import Context
from invoke.tasks import task

from voip_stack import cdr, ui


def _short(record: dict[str, Any]) -> tuple[object, ...]:
    """The columns that a person needs first."""
    start = record["start"].partition(".")[0].replace("T", " ")
    return start, record["src"], record["dst"], record["disposition"], f"{record['billsec'] or 0:7}"


@task(
    name="list",
    help={
        "src": "from this number",
        "dst": "to this number",
        "since": "begun since: 2026-11-25T14:30 (UTC), or 30m, 2h, 3d ago",
        "limit": "number of records, the newest ones",
        "csv": "print CSV, all columns",
        "json": "print JSON, all columns",
    },
)
def list_(
    _c: Context, src: str = "", dst: str = "", since: str = "", limit: int = 20, csv: bool = False, json: bool = False
) -> None:
    """The newest records. Times are UTC, talk is seconds."""
    found = cdr.list_(src, dst, since, limit)
    if json:
        ui.as_json(found)
    elif csv:
        writer = csv_format.DictWriter(sys.stdout, cdr.COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    else:
        ui.table(["start", "from", "to", "disposition", "   talk"], [_short(record) for record in found])


@task(help={"json": "print the events as JSON, one per line"})
def tail(_c: Context, json: bool = False) -> None:
    """Follow new CDRs as RabbitMQ delivers them, until Ctrl-C."""
    for event in cdr.follow():
        ui.say(json_format.dumps(event) if json else "  ".join(str(cell) for cell in _short(event)))
