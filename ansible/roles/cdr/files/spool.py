"""Bring the PBX's CDRs from their spool into PostgreSQL: spool.py DIRECTORY; spool.py --check only logs in.

For each CDR Asterisk opens DIRECTORY/cdr.csv, appends a line and closes it. Here the file is moved away, its lines are
inserted in one transaction, and the file is removed once that is committed. What was interrupted is done again from the
file, and a CDR that PostgreSQL has already stays as it is. A line that it can't take is kept in
$STATE_DIRECTORY/refused.csv.
"""

from __future__ import annotations

import csv
import fcntl
import logging
import os
import sys
import time
from pathlib import Path

import psycopg

# In the order of cdr_custom.conf.
COLUMNS = (
    *("start", "answer", "end", "clid", "src", "dst", "dcontext", "channel", "dstchannel", "lastapp", "lastdata"),
    *("duration", "billsec", "disposition", "amaflags", "accountcode", "peeraccount"),
    *("uniqueid", "linkedid", "userfield", "sequence"),
)
NAMES = ", ".join(f'"{column}"' for column in COLUMNS)
TIME = "to_timestamp(nullif(%s::float8, 0)) AT TIME ZONE 'UTC'"
VALUES = ", ".join([TIME] * 3 + ["%s"] * (len(COLUMNS) - 3))
INSERT = f"INSERT INTO cdr ({NAMES}) VALUES ({VALUES}) ON CONFLICT DO NOTHING"  # noqa: S608
LONGEST_WAIT = 15  # seconds between two tries


def sync(path: Path) -> None:
    """What `path` is, file or directory, survives the machine's death."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take(directory: Path) -> None:
    """Move what Asterisk has written to a name of its own. At its next CDR, Asterisk makes a new file."""
    batch = directory / f"{time.time_ns()}.batch"
    try:
        (directory / "cdr.csv").rename(batch)
    except FileNotFoundError:
        return
    sync(batch)
    sync(directory)


def store(database: psycopg.Connection, batch: Path) -> None:
    """Insert the CDRs of a batch and remove it, unless Asterisk, which opened it under its old name, still writes."""
    with batch.open(encoding="utf-8", errors="replace", newline="") as file:
        try:
            # Refused while anybody has the file open for writing (fcntl(2)).
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except BlockingIOError:
            return
        lines = [line for line in file.read().split("\n") if line]
    with database.transaction():
        for line in lines:
            try:
                with database.transaction():
                    insert(database, line)
            except (ValueError, csv.Error, psycopg.DataError, psycopg.IntegrityError) as error:
                refuse(line, error)
    batch.unlink()


def insert(database: psycopg.Connection, line: str) -> None:
    """Insert one CDR. Raises ValueError, csv.Error, DataError or IntegrityError for a line that is none."""
    values = next(csv.reader([line], strict=True))
    if len(values) != len(COLUMNS):
        raise ValueError(f"{len(values)} values, not {len(COLUMNS)}")
    database.execute(INSERT, [value or None for value in values])


def refuse(line: str, error: Exception) -> None:
    """Keep a line aside, for a person."""
    kept = Path(os.environ["STATE_DIRECTORY"], "refused.csv")
    with kept.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    sync(kept)
    logging.error("not a CDR, kept in %s: %s: %.200s", kept, str(error).partition("\n")[0], line)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    login = Path(os.environ["CREDENTIALS_DIRECTORY"], "postgresql").read_text()
    if sys.argv[1] == "--check":
        try:
            psycopg.connect(login).close()
        except psycopg.Error as error:
            sys.exit(f"CDRs can't be written: {error}")
        return
    directory = Path(sys.argv[1])
    wait = 1
    while True:
        take(directory)
        try:
            with psycopg.connect(login, autocommit=True) as database:
                logging.info("PostgreSQL is there")
                wait = 1
                while True:
                    take(directory)
                    for batch in sorted(directory.glob("*.batch")):
                        store(database, batch)
                    time.sleep(1)
        except psycopg.Error as error:
            logging.warning("%s; again in %d s", str(error).strip(), wait)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


if __name__ == "__main__":
    main()
