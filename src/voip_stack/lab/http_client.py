"""HTTP to a server in the lab."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from voip_stack import lab
from voip_stack.host import speed


@dataclass(frozen=True)
class Answer:
    """An answer of HTTP (RFC 9110): its status code and its content."""

    status: int
    body: bytes


def ask(
    address: str,
    port: int,
    path: str,
    *,
    method: str = "GET",
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
    ca: Path | None = None,
    timeout: float = 30.0,
) -> Answer:
    """The answer to one request. With `ca`, a file of PEM, by TLS, to a server whose certificate it vouches for.

    Each step may take `timeout` seconds, as a fast computer takes. Raises OSError for what is no answer of HTTP;
    ssl.SSLError, which is one, for a certificate that is not good.
    """
    seconds = speed.patient(timeout)
    connection = http.client.HTTPConnection(address, port, timeout=seconds)
    try:
        connection.sock = lab.current().connect(address, port, timeout=seconds)
        if ca:
            context = ssl.create_default_context(cafile=str(ca))
            connection.sock = context.wrap_socket(connection.sock, server_hostname=address)
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return Answer(response.status, response.read())
    except http.client.HTTPException as error:
        raise ConnectionError(f"no answer of HTTP: {error!r}") from None
    finally:
        connection.close()
