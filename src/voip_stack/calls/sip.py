"""SIP messages for tests and ladders (RFC 3261)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"^-{20,} \d{4}-\d\d-\d\d[ T]\S+.*\n\S+ message (sent|received)[^\n]*\n\n", re.MULTILINE)


@dataclass(frozen=True)
class Message:
    """A SIP message as sent on the wire."""

    text: str

    @property
    def start_line(self) -> str:
        return self.text.split("\n", 1)[0].strip()

    @property
    def status(self) -> int | None:
        """The status code of a response."""
        words = self.start_line.split()
        return int(words[1]) if words[:1] == ["SIP/2.0"] and words[1].isdigit() else None

    @property
    def reason(self) -> str:
        """`486 Busy Here`: code and reason phrase."""
        return self.start_line.removeprefix("SIP/2.0 ")

    @property
    def method(self) -> str:
        """The method of a request, or of the request that a response answers."""
        return self.start_line.split()[0] if self.status is None else (self.header("CSeq").split() or [""])[-1]

    def header(self, name: str) -> str:
        """The value of the first header called `name`, empty when there is none."""
        found = re.search(rf"^{re.escape(name)}\s*:\s*(.*?)\s*$", self.text, re.MULTILINE | re.IGNORECASE)
        return found.group(1) if found else ""


@dataclass(frozen=True)
class Traced:
    """A message of SIPp's trace."""

    sent: bool
    message: Message


def parse_trace(text: str) -> list[Traced]:
    """The messages of a file written by SIPp with -trace_msg, in order."""
    starts = list(_BLOCK.finditer(text))
    ends = [*(s.start() for s in starts), len(text)][1:]
    # SIPp logs an unexpected message twice, the second time after a line without a date.
    bodies = [text[s.end() : end].partition(f"\n{'-' * 20}")[0].rstrip() for s, end in zip(starts, ends, strict=True)]
    return [Traced(s.group(1) == "sent", Message(body)) for s, body in zip(starts, bodies, strict=True)]
