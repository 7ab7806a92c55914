"""A phone on a lasting TLS connection, as a program: it registers, and answers a call on it with busy (RFC 3261).

SIPp can't do that: it accepts calls only on a listening socket, and a phone behind NAT is reached only on its own
connection. Arguments: the proxy's address, the domain, the CA file, the user, the password file. Prints `registered`.
"""

import hashlib
import re
import socket
import ssl
import sys
import uuid
from pathlib import Path


def _header(message: str, name: str) -> str:
    found = re.search(rf"^{name}:\s*(.*?)\r$", message, re.MULTILINE | re.IGNORECASE)
    return found.group(1) if found else ""


def _hash(*parts: str) -> str:
    return hashlib.md5(":".join(parts).encode(), usedforsecurity=False).hexdigest()


class _Phone:
    def __init__(self, proxy: str, domain: str, ca: str, user: str, password: str) -> None:
        self.domain, self.user, self.password = domain, user, password
        plain = socket.create_connection((proxy, 5061), timeout=60)
        self.connection = ssl.create_default_context(cafile=ca).wrap_socket(plain, server_hostname=domain)
        self.stream = self.connection.makefile("rb")
        self.call_id, self.number = uuid.uuid4().hex, 0

    def read(self) -> str:
        """The next message; the lines between messages are keep-alives (RFC 5626)."""
        lines: list[bytes] = []
        while not lines or lines[-1] != b"\r\n":
            line = self.stream.readline()
            if not line:
                sys.exit("the proxy closed the connection")
            if lines or line != b"\r\n":
                lines.append(line)
        message = b"".join(lines).decode()
        return message + self.stream.read(int(_header(message, "Content-Length") or 0)).decode()

    def register(self, expires: int) -> None:
        """Bind the user to this connection for `expires` seconds; end the program on a refusal."""
        answer = self._register(expires, self._authorization(self._register(expires)))
        if not answer.startswith("SIP/2.0 200 "):
            sys.exit(answer)

    def _register(self, expires: int, authorization: str = "") -> str:
        """Send one REGISTER, return the answer. The Contact has an unreachable address."""
        self.number += 1
        who = f"<sip:{self.user}@{self.domain}>"
        self.connection.sendall(
            f"REGISTER sip:{self.domain} SIP/2.0\r\n"
            f"Via: SIP/2.0/TLS 192.0.2.9:5061;branch=z9hG4bK{uuid.uuid4().hex};rport\r\n"
            f"From: {who};tag=tls\r\nTo: {who}\r\nCall-ID: {self.call_id}\r\nCSeq: {self.number} REGISTER\r\n"
            f"Contact: <sip:{self.user}@192.0.2.9:5061;transport=tls>\r\nMax-Forwards: 70\r\nExpires: {expires}\r\n"
            f"{authorization}Content-Length: 0\r\n\r\n".encode()
        )
        return self.read()

    def _authorization(self, challenge: str) -> str:
        """Digest credentials with MD5 (RFC 8760)."""
        fields = dict(re.findall(r'(\w+)="?([^",\s]+)"?', _header(challenge, "WWW-Authenticate")))
        uri, nonce, cnonce = f"sip:{self.domain}", fields["nonce"], uuid.uuid4().hex
        ha1, ha2 = _hash(self.user, fields["realm"], self.password), _hash("REGISTER", uri)
        response = _hash(ha1, nonce, "00000001", cnonce, "auth", ha2)
        return (
            f'Authorization: Digest username="{self.user}", realm="{fields["realm"]}", nonce="{nonce}", uri="{uri}", '
            f'response="{response}", algorithm=MD5, qop=auth, nc=00000001, cnonce="{cnonce}"\r\n'
        )

    def answer(self, request: str, status: str) -> None:
        """Answer `request` with `status`."""
        copied = "".join(
            f"{line}\r\n" for line in request.split("\r\n") if re.match(r"(Via|From|Call-ID|CSeq|Record-Route):", line)
        )
        self.connection.sendall(
            f"SIP/2.0 {status}\r\n{copied}To: {_header(request, 'To')};tag=tls\r\nContent-Length: 0\r\n\r\n".encode()
        )


def _main(proxy: str, domain: str, ca: str, user: str, password: str) -> None:
    phone = _Phone(proxy, domain, ca, user, Path(password).read_text())
    phone.register(300)
    print("registered", flush=True)  # noqa: T201  # for the test
    while not (message := phone.read()).startswith("ACK "):
        if message.startswith("INVITE "):
            phone.answer(message, "486 Busy Here")
        elif message.startswith("OPTIONS "):
            phone.answer(message, "200 OK")
    phone.register(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
