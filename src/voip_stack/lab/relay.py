"""A way out of the lab's namespace to TCP ports of this computer's loopback, where a devstack-core is published.

`python -m voip_stack.lab.relay NAMESPACE ADDRESS PORT ...` listens on ADDRESS in the namespace and connects out here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import sys

from voip_stack.lab.netns import Namespace

_CHUNK = 65536


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand on what comes, and its end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


async def _serve(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer), contextlib.suppress(OSError):
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(far_writer):
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))


def _listen(namespace: Namespace, address: str, port: int) -> socket.socket:
    listener = namespace.open_socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    return listener


async def _main(namespace: str, address: str, ports: list[int]) -> None:
    sockets = [_listen(Namespace(namespace), address, port) for port in ports]
    servers = [
        await asyncio.start_server(functools.partial(_serve, port), sock=listener)
        for port, listener in zip(ports, sockets, strict=True)
    ]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], [int(port) for port in sys.argv[3:]]))
