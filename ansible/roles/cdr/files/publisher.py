"""Publish events of CDRs from their outbox in PostgreSQL to RabbitMQ: publisher.py; publisher.py --check only logs in.

In order, and at least once: an event leaves the outbox when RabbitMQ has confirmed that a queue has it. What was
interrupted is published again, with the same message_id.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import pika
import psycopg

EXCHANGE = "cdr"
EVENTS = "SELECT id, payload->>'id', payload->>'disposition', payload::text FROM cdr_event ORDER BY id LIMIT 100"
LONGEST_WAIT = 15  # seconds between two tries
AWAY = (psycopg.Error, pika.exceptions.AMQPError, OSError)


def publish(database: psycopg.Connection, channel: pika.adapters.blocking_connection.BlockingChannel) -> bool:
    """Publish the oldest events; whether there were any. Raises UnroutableError, NackError when no queue took one."""
    events = database.execute(EVENTS).fetchall()
    confirmed = []
    try:
        for number, name, disposition, text in events:
            properties = pika.BasicProperties(message_id=name, content_type="application/json", delivery_mode=2)
            key = "call." + (disposition or "unknown").lower().replace(" ", "_")
            channel.basic_publish(EXCHANGE, key, text.encode(), properties, mandatory=True)
            confirmed.append(number)
    finally:
        database.execute("DELETE FROM cdr_event WHERE id = ANY(%s)", [confirmed])
    return bool(events)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # it tells each failure several times
    credentials = Path(os.environ["CREDENTIALS_DIRECTORY"])
    login = (credentials / "postgresql").read_text()
    parameters = pika.URLParameters((credentials / "rabbitmq").read_text().strip())
    broker_name = f"RabbitMQ on {parameters.host}:{parameters.port}, virtual host {parameters.virtual_host}"
    wait = 1
    while True:
        try:
            with psycopg.connect(login, autocommit=True) as database:
                database.execute(EVENTS)
                with pika.BlockingConnection(parameters) as broker:
                    if "--check" in sys.argv:
                        return
                    channel = broker.channel()
                    channel.confirm_delivery()
                    logging.info("PostgreSQL and RabbitMQ are there")
                    while True:
                        while publish(database, channel):
                            pass
                        wait = 1
                        broker.process_data_events(time_limit=1)  # a pause, in which heartbeats are answered
        except AWAY as error:
            said = str(error).strip() if isinstance(error, psycopg.Error) else f"{broker_name}: {error!r}"
            if "--check" in sys.argv:
                sys.exit(f"events of CDRs can't be published: {said}")
            logging.warning("%s; again in %d s", said, wait)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


if __name__ == "__main__":
    main()
