"""Call detail records: those in PostgreSQL, and new ones' events from RabbitMQ."""

from __future__ import annotations

import json
import re
import subprocess
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from voip_stack import inventory, secrets, vms
from voip_stack.errors import VmError, VoipError
from voip_stack.services import database

COLUMNS = (
    *("start", "answer", "end", "clid", "src", "dst", "dcontext", "channel", "dstchannel", "lastapp", "lastdata"),
    *("duration", "billsec", "disposition", "amaflags", "accountcode", "peeraccount"),
    *("uniqueid", "linkedid", "userfield", "sequence"),
)
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}

# Runs on the PBX: RabbitMQ lets it in, and the role cdr has installed the client. It uses its own queue, which ends
# with the connection: the events in the queue `cdr` are for that queue's reader.
_FOLLOW = """
import os, sys, threading, pika
login, queue = sys.stdin.readline().split()
# The end of standard input is the end of who follows.
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
try:
    with pika.BlockingConnection(pika.URLParameters(login)) as broker:
        channel = broker.channel()
        channel.queue_declare(queue, exclusive=True)
        channel.queue_bind(queue, "cdr", "#")
        for _, _, body in channel.consume(queue, auto_ack=True):
            print(body.decode(), flush=True)
except (pika.exceptions.AMQPError, OSError) as error:
    sys.exit(repr(error))
"""


def moment(text: str, now: datetime) -> datetime:
    """A time typed by a person: ISO 8601 (UTC unless it names a zone), or 30m, 2h, 3d before `now`.

    Raises VoipError for anything else.
    """
    if found := re.fullmatch(r"(\d{1,6})([mhd])", text):
        return now - timedelta(**{_UNITS[found[2]]: int(found[1])})
    try:
        given = datetime.fromisoformat(text)
    except ValueError:
        raise VoipError(f"{text!r} is no time", "write it like 2026-11-25, 2026-11-25T14:30, 30m, 2h or 3d") from None
    return given if given.tzinfo else given.replace(tzinfo=UTC)


def list_(src: str = "", dst: str = "", since: str = "", limit: int = 20) -> list[dict[str, Any]]:
    """At most `limit` CDRs, newest first: from `src`, to `dst`, begun at or after `since`.

    Raises VoipError for an invalid time or number of records, VmError when the database can't be reached.
    """
    if limit < 1:
        raise VoipError(f"{limit} records can't be shown", "take 1 or more")
    wanted = [f"{column} = {database.quoted(value)}" for column, value in (("src", src), ("dst", dst)) if value]
    if since:
        begin = moment(since, datetime.now(UTC)).astimezone(UTC).replace(tzinfo=None)
        wanted.append(f"start >= {database.quoted(begin.isoformat())}")
    columns = ", ".join(f'"{column}"' for column in COLUMNS)
    query = f"SELECT {columns} FROM cdr WHERE {' AND '.join(wanted) or 'true'} ORDER BY start DESC, id DESC"  # noqa: S608
    rows = database.run(f"\\connect cdr\nSELECT coalesce(json_agg(r), '[]') FROM ({query} LIMIT {limit}) AS r;\n")
    return list(json.loads(rows))


def login() -> str:
    """The AMQP URL of the events' reader, with the password. Raises VoipError."""
    stack = inventory.load()
    _, address = stack.infra()
    return f"amqp://cdr_reader:{secrets.get('rabbitmq_password_cdr_reader')}@{address}:{stack.port('amqp')}/voip"


def follow() -> Iterator[dict[str, Any]]:
    """The events of CDRs (docs/cdr-event.schema.json), each as it arrives, until the caller stops.

    Raises VmError when the PBX can't be reached, VoipError when RabbitMQ can't or goes away.
    """
    pbx = inventory.load().group("pbx_servers")[0].name
    command = vms.ssh.argv(pbx, "python3", "-c", _FOLLOW)
    who = login()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr  # noqa: PT018, S101  # the pipes requested above
        try:
            process.stdin.write(f"{who} cdr.tail.{uuid.uuid4()}\n")  # on standard input: no process list shows it
            process.stdin.flush()
            yield from map(json.loads, process.stdout)
            said = process.stderr.read()
            if process.wait() == vms.ssh.NO_SSH:
                raise VmError(f"{pbx} can't be reached", "./voip vms.status", said)
            raise VoipError(f"RabbitMQ ({who.rpartition('@')[2]}) delivers no more events", "./voip status", said)
        finally:
            process.terminate()
