"""Prove that RabbitMQ lets users in: probe.py ADDRESS PORT VHOST, their passwords by name as JSON on standard input."""

import json
import sys

import pika

address, port, vhost = sys.argv[1], int(sys.argv[2]), sys.argv[3]
for user, password in json.load(sys.stdin).items():
    credentials = pika.PlainCredentials(user, password)
    try:
        pika.BlockingConnection(pika.ConnectionParameters(address, port, vhost, credentials)).close()
    except pika.exceptions.AMQPError as error:
        sys.exit(f"RabbitMQ on {address}:{port} does not let {user} into {vhost}: {error!r}")
