"""Raw SIP: what no phone would send, and what comes back.

Run as a program where the phone is, it holds one socket and does what standard input says, JSON by lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

if __name__ != "__main__":
    from voip_stack import lab
    from voip_stack.calls.sip import Message
    from voip_stack.errors import CallError
    from voip_stack.inventory import Address

SDP = """v=0
o=- 1 1 IN IP4 {address}
s=-
c=IN IP4 {address}
t=0 0
m=audio 6000 RTP/AVP 8
a=rtpmap:8 PCMA/8000
"""


class Wire:
    """A socket at `address` (port 0: any) with the proxy at its other end; UDP takes messages from anybody.

    Leave it as a context manager. Raises CallError when the connection is refused.
    """

    def __init__(
        self,
        address: Address,
        port: int = 0,
        *,
        proxy: Address,
        proxy_port: int = 5060,
        transport: str = "udp",
        inside: bool = False,
    ) -> None:
        self.address, self.proxy, self.transport = str(address), str(proxy), transport
        home = lab.current().inside if inside else lab.current().outside
        self._process = subprocess.Popen(
            home(sys.executable, __file__, transport, self.address, str(port), self.proxy, str(proxy_port)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.port = int(self._do({}, 10)["port"])
        except BaseException:
            self.close()
            raise

    def _do(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        if not self._process.stdin or not self._process.stdout:
            raise CallError(f"{self.transport} from {self.address} was not opened")
        if order:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], seconds + 10)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise CallError(f"{self.transport} from {self.address} to {self.proxy} failed", "is the proxy up?")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the connection."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.terminate()
        self._process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def here(self) -> str:
        return f"{self.address}:{self.port}"

    def send(self, text: str) -> None:
        """Send it to the proxy, with the line ends of SIP."""
        self._do({"send": text.replace("\r\n", "\n").replace("\n", "\r\n")}, 5)

    def receive(self, timeout: float = 2) -> Message:
        """The next message within `timeout` seconds; an empty one when none comes, or the connection was closed."""
        return Message(self._do({"receive": timeout}, timeout)["text"])

    def closed_within(self, timeout: float) -> bool:
        """Whether the far end closes the connection within `timeout` seconds."""
        return bool(self._do({"receive": timeout}, timeout)["closed"])

    def ask(self, text: str, timeout: float = 4) -> Message:
        """Send a request and return its final response, an empty message when none comes.

        The failure of an INVITE is acknowledged; a success is for the test to.
        """
        request = Message(text)
        self.send(text)
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            got = self.receive(left)
            if not got.text:
                break
            mine = got.header("Call-ID") == request.header("Call-ID") and got.header("CSeq") == request.header("CSeq")
            if mine and (got.status or 0) >= 200:
                if request.method == "INVITE" and (got.status or 0) >= 300:
                    uri, cseq = request.start_line.split()[1], request.header("CSeq").split()[0]
                    via, sender = request.header("Via"), request.header("From")
                    self.send(
                        f"ACK {uri} SIP/2.0\nVia: {via}\nFrom: {sender}\nTo: {got.header('To')}\n"
                        f"Call-ID: {request.header('Call-ID')}\nCSeq: {cseq} ACK\nMax-Forwards: 70\n"
                        "Content-Length: 0\n\n"
                    )
                return got
        return Message("")

    def request(
        self,
        method: str,
        uri: str,
        user: str,
        domain: str,
        *,
        to: str = "",
        tag: str = "",
        to_tag: str = "",
        call_id: str = "",
        cseq: int = 1,
        branch: str = "",
        contact: str = "",
        headers: Iterable[str] = (),
        body: str = "",
    ) -> str:
        """A request as a phone would write it, with any of its parts as you like."""
        sender = user if "<" in user else f"<sip:{user}@{domain}>"
        lines = [
            f"{method} {uri} SIP/2.0",
            f"Via: SIP/2.0/{self.transport.upper()} {self.here};branch=z9hG4bK{branch or secrets.token_hex(8)};rport",
            f"From: {sender};tag={tag or secrets.token_hex(4)}",
            f"To: <{to or uri}>" + (f";tag={to_tag}" if to_tag else ""),
            f"Call-ID: {call_id or secrets.token_hex(8)}",
            f"CSeq: {cseq} {method}",
            "Max-Forwards: 70",
            contact or f"Contact: <sip:{'x' if '<' in user else user}@{self.here}>",
            *headers,
        ]
        if body:
            lines.append("Content-Type: application/sdp")
        body = body.replace("\r\n", "\n").replace("\n", "\r\n")
        return "\n".join([*lines, f"Content-Length: {len(body)}", "", body])

    def authenticated(
        self, method: str, uri: str, user: str, password: str, domain: str, timeout: float = 5, **parts: Any
    ) -> Message:
        """Ask, answer the challenge as `user`, and return what comes of it."""
        parts = {"call_id": secrets.token_hex(8), "tag": secrets.token_hex(4)} | parts
        first = self.ask(self.request(method, uri, parts.pop("sender", user), domain, **parts))
        if first.status not in (401, 407):
            return first
        parts["headers"] = [*parts.get("headers", ()), digest(first, method, uri, user, password)]
        return self.ask(self.request(method, uri, parts.pop("sender", user), domain, cseq=2, **parts), timeout)


def digest(
    challenge: Message,
    method: str,
    uri: str,
    user: str,
    password: str,
    count: int = 1,
    flaws: dict[str, str] | None = None,
) -> str:
    """The header that answers a challenge (RFC 7616, qop=auth); `flaws` are fields of it as they should not be."""
    name = "WWW-Authenticate" if challenge.status == 401 else "Proxy-Authenticate"
    asked = {
        key.strip().lower(): value.strip().strip('"')
        for key, _, value in (part.partition("=") for part in challenge.header(name).partition(" ")[2].split(","))
    }
    flaws = flaws or {}
    algorithm = flaws.get("algorithm", "MD5")

    def h(text: str) -> str:
        return hashlib.new(algorithm.replace("-", ""), text.encode(), usedforsecurity=False).hexdigest()

    fields = {"username": user, "realm": asked["realm"], "nonce": asked["nonce"], "uri": uri, "algorithm": algorithm}
    fields |= {"qop": "auth", "nc": f"{count:08x}", "cnonce": secrets.token_hex(4)}
    ha1, ha2 = h(f"{user}:{asked['realm']}:{password}"), h(f"{method}:{uri}")
    fields["response"] = h(f"{ha1}:{asked['nonce']}:{fields['nc']}:{fields['cnonce']}:auth:{ha2}")
    bare = ("algorithm", "qop", "nc")
    text = ", ".join(f"{k}={v}" if k in bare else f'{k}="{v}"' for k, v in (fields | flaws).items() if v)
    return f"{'Authorization' if challenge.status == 401 else 'Proxy-Authorization'}: Digest {text}"


def _message(buffer: bytes) -> tuple[bytes, bytes]:
    """The first whole message of a stream, empty when there is none, and the rest."""
    buffer = buffer.lstrip(b"\r\n")
    head, found, rest = buffer.partition(b"\r\n\r\n")
    lengths = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    length = int(lengths[0]) if lengths else 0
    if not found or len(rest) < length:
        return b"", buffer
    return head + found + rest[:length], rest[length:]


def _open(transport: str, here: tuple[str, int], there: tuple[str, int]) -> socket.socket:
    if transport == "udp":
        connection = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        connection.bind(here)
        return connection
    connection = socket.create_connection(there, 10, source_address=here)
    if transport == "tls":
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # a stranger trusts whom he attacks
        connection = context.wrap_socket(connection)
    return connection


def _main(transport: str, here: str, port: str, proxy: str, proxy_port: str) -> None:
    there = (proxy, int(proxy_port))
    connection = _open(transport, (here, int(port)), there)
    buffer, closed = b"", False
    print(json.dumps({"port": connection.getsockname()[1]}), flush=True)  # noqa: T201  # for who started it
    for line in sys.stdin:
        order = json.loads(line)
        message = b""
        if "send" in order:
            with contextlib.suppress(OSError):
                data = order["send"].encode("latin-1")
                connection.sendto(data, there) if transport == "udp" else connection.sendall(data)
        else:
            end = time.monotonic() + order["receive"]
            message, buffer = _message(buffer)
            while not message and not closed and (left := end - time.monotonic()) > 0:
                connection.settimeout(left)
                try:
                    data = connection.recv(65535)
                    closed = not data and transport != "udp"
                    message, buffer = (data.lstrip(b"\r\n"), b"") if transport == "udp" else _message(buffer + data)
                except TimeoutError:
                    break
                except OSError:
                    closed = True
        text = message.decode("latin-1").replace("\r\n", "\n")
        print(json.dumps({"text": text, "closed": closed}), flush=True)  # noqa: T201


if __name__ == "__main__":
    _main(*sys.argv[1:])
