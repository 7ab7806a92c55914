"""Ports, as a network sees them: `listen udp/5060 ...` serves them, `ask ADDRESS udp/5060 ...` prints which answer.

Runs on guests and on this computer with nothing but Python. A port that is taken already is served by who has it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

READY = "/run/listeners"  # all ports are served from then on


def split(word: str) -> tuple[socket.SocketKind, int]:
    protocol, _, port = word.partition("/")
    return (socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM), int(port)


def listen(words: Sequence[str]) -> NoReturn:
    sockets = []
    for word in words:
        kind, port = split(word)
        server = socket.socket(socket.AF_INET, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        if kind == socket.SOCK_STREAM:
            server.listen()
        sockets.append(server)
    Path(READY).touch()
    while True:
        for server in select.select(sockets, [], [])[0]:
            if server.type == socket.SOCK_STREAM:
                server.accept()[0].close()
            else:
                data, source = server.recvfrom(100)
                server.sendto(data, source)


def ask(address: str, words: Sequence[str]) -> None:
    waiting: dict[socket.socket, str] = {}
    for word in words:
        kind, port = split(word)
        client = socket.socket(socket.AF_INET, kind)
        client.bind((os.environ.get("PROBE_FROM", ""), 0))  # as one of this machine's addresses
        client.setblocking(False)
        client.connect_ex((address, port))
        waiting[client] = word
    answered: set[str] = set()
    end = time.monotonic() + 3  # of a guest under emulation, too
    while waiting and time.monotonic() < end:
        for client in waiting:
            if client.type == socket.SOCK_DGRAM:
                with contextlib.suppress(OSError):
                    client.send(b"?")  # again: one may get lost
        datagrams = [c for c in waiting if c.type == socket.SOCK_DGRAM]
        streams = [c for c in waiting if c.type == socket.SOCK_STREAM]
        readable, writable, _ = select.select(datagrams, streams, [], 0.5)
        for client in readable:
            try:
                client.recv(100)
            except OSError:
                continue  # nobody listens there: that would be the listener's fault
            answered.add(waiting.pop(client))
        for client in writable:
            word = waiting.pop(client)
            if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                answered.add(word)
    print(json.dumps(sorted(answered)))


if __name__ == "__main__":
    if sys.argv[1] == "listen":
        listen(sys.argv[2:])
    else:
        ask(sys.argv[2], sys.argv[3:])
