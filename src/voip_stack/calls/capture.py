"""The lab's traffic during a call: captured by dumpcap, decoded by tshark, measured here.

Both networks are captured at their bridges, so every leg is seen: phone and proxy, proxy and PBX, and the media.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from voip_stack import inventory, lab
from voip_stack.calls import audio
from voip_stack.calls.phone import Phone, traces
from voip_stack.deadline import Deadline
from voip_stack.errors import CallError, HostError
from voip_stack.lab.base import privileged

PCMA = 8  # RFC 3551, table 4
_FLUSH = 0.5  # seconds after which dumpcap has written the packets it captured
_LONGEST = 3600  # seconds after which a capture ends by itself, if we are killed
_FIELDS = (
    *("frame.time_epoch", "ip.src", "ip.dst", "udp.srcport", "udp.dstport"),
    *("sip.Method", "sip.Status-Line", "sip.CSeq", "sip.Call-ID", "sip.r-uri.user", "udp.payload"),
)


@dataclass(frozen=True)
class Sip:
    """A SIP message on the wire. `time` in seconds since 1970; addresses as text."""

    time: float
    source: str
    destination: str
    method: str  # of the request, or of the request that the response answers
    cseq: int
    status: int | None  # None for a request
    reason: str
    call_id: str
    target: str  # the user part of a request URI


@dataclass(frozen=True)
class Rtp:
    """An RTP packet (RFC 3550, 5.1). `time` in seconds since 1970."""

    time: float
    sequence: int
    timestamp: int
    payload_type: int
    payload: bytes


@dataclass(frozen=True)
class Stream:
    """RTP packets of one source to one port, in the order of their arrival."""

    source: str
    source_port: int
    destination: str
    destination_port: int
    ssrc: int
    packets: tuple[Rtp, ...]

    @property
    def expected(self) -> int:
        """Packets sent, by their sequence numbers (RFC 3550, A.3)."""
        extended = 0
        highest = lowest = self.packets[0].sequence
        for before, now in itertools.pairwise(p.sequence for p in self.packets):
            extended += ((now - before + 0x8000) & 0xFFFF) - 0x8000
            highest = max(highest, self.packets[0].sequence + extended)
            lowest = min(lowest, self.packets[0].sequence + extended)
        return highest - lowest + 1

    @property
    def lost(self) -> int:
        """Packets that did not arrive."""
        return max(0, self.expected - len({p.sequence for p in self.packets}))

    @property
    def jitter_ms(self) -> float:
        """The highest interarrival jitter in milliseconds (RFC 3550, A.8)."""
        jitter = highest = 0.0
        for before, now in itertools.pairwise(self.packets):
            ticks = ((now.timestamp - before.timestamp + 0x80000000) & 0xFFFFFFFF) - 0x80000000
            transit = (now.time - before.time) * audio.RATE - ticks
            jitter += (abs(transit) - jitter) / 16
            highest = max(highest, jitter)
        return highest * 1000 / audio.RATE


@dataclass(frozen=True)
class Recording:
    """The SIP messages and RTP streams of a capture, in order of time."""

    messages: tuple[Sip, ...]
    streams: tuple[Stream, ...]

    def streams_to(self, address: object) -> list[Stream]:
        return [s for s in self.streams if s.destination == str(address)]

    def streams_from(self, address: object) -> list[Stream]:
        return [s for s in self.streams if s.source == str(address)]

    def heard(
        self, address: object, since: float = 0.0, until: float = math.inf, ports: range = range(65536)
    ) -> list[int]:
        """The audio sent to `address` between two times (seconds since 1970), on `ports`: 16-bit samples at 8 kHz."""
        packets = [
            (p.time, p.payload)
            for s in self.streams_to(address)
            if s.destination_port in ports
            for p in s.packets
            if p.payload_type == PCMA and since <= p.time <= until
        ]
        return audio.decode(b"".join(payload for _, payload in sorted(packets)))


class Capture:
    """A capture into `file` (pcapng), for the duration of `with`. Raises HostError, CallError.

    `interfaces` are by default those of the lab's networks. With `phones`, only their packets are captured: a capture
    of many calls for minutes takes minutes to decode.
    """

    def __init__(self, file: Path | None = None, interfaces: Sequence[str] = (), phones: Sequence[Phone] = ()) -> None:
        self.file = file or traces() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.pcapng"
        home = lab.current()
        self.interfaces = interfaces or [home.interface(name).source for name in inventory.load().networks]
        hosts = " or ".join(f"host {phone.address}" for phone in phones)
        self.filter = "(udp or tcp port 5060)" + (f" and ({hosts})" if hosts else "")
        self._decoded: tuple[int, Recording] | None = None  # with the file's size at that time

    def __enter__(self) -> Self:
        for tool in ("dumpcap", "tshark"):
            if not shutil.which(tool):
                raise HostError(f"{tool} is missing", "./voip doctor --fix")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        sources = [word for interface in self.interfaces for word in ("-i", interface)]
        argv = ["dumpcap", "-q", *sources, "-f", self.filter, "-a", f"duration:{_LONGEST}", "-w", "-"]
        log = self.file.with_suffix(".log")
        # Through a pipe: under sudo, the file stays the user's.
        with self.file.open("wb") as output, log.open("wb") as errors:
            self._process = subprocess.Popen(
                privileged(*lab.current().inside(*argv)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        # dumpcap writes the section headers once every interface is open.
        started = Deadline(10).until(
            lambda: self.file.stat().st_size > 0 or self._process.poll() is not None, every=0.05
        )
        if not started or self._process.poll() is not None:
            self.stop()
            raise CallError(f"no capture on {', '.join(self.interfaces)}", "./voip lab.status", log.read_text())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the capture; it contains everything up to this moment."""
        if self._process.poll() is not None:
            return
        try:
            self._process.wait(_FLUSH)
        except subprocess.TimeoutExpired:
            try:
                self._process.terminate()
            except PermissionError:  # it runs under sudo
                subprocess.run(privileged("kill", str(self._process.pid)), timeout=10, check=False)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def recording(self) -> Recording:
        """The recording so far; also while the capture runs. Raises CallError."""
        size = self.file.stat().st_size
        if not self._decoded or self._decoded[0] != size:
            self._decoded = size, decode(self.file)
        return self._decoded[1]

    def heard_by(self, phone: Phone) -> audio.Tone:
        """The strongest tone that `phone` heard."""
        return audio.measure(self.recording().heard(phone.address, ports=phone.media_ports))

    def level_of(self, phone: Phone, frequency_hz: float) -> float:
        """The level in dBm0 of one tone in the audio that `phone` heard."""
        return audio.level(self.recording().heard(phone.address, ports=phone.media_ports), frequency_hz)


def decode(file: Path) -> Recording:
    """The SIP messages and RTP streams in a capture. Raises CallError when tshark can't read it."""
    fields = [word for name in _FIELDS for word in ("-e", name)]
    argv = [
        "tshark",
        "-n",
        "-r",
        str(file),
        "-Y",
        "(udp || sip) && !icmp",
        "-T",
        "fields",
        "-E",
        "occurrence=f",
        *fields,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=300, check=False)
    rows = [row.split("\t") for row in done.stdout.splitlines()]
    # A running capture may end within a packet; the packets before that are good.
    if done.returncode and not rows:
        raise CallError(f"tshark can't read {file}", "./voip doctor", done.stderr[-1000:])
    return parse([row for row in rows if len(row) == len(_FIELDS)])


def parse(rows: Sequence[Sequence[str]]) -> Recording:
    """A Recording from tshark's rows (the columns are _FIELDS)."""
    messages: list[Sip] = []
    streams: dict[tuple[str, int, str, int, int], list[Rtp]] = {}
    for row in rows:
        stamp, source, destination, source_port, destination_port, method, status, cseq, call_id, user, payload = row
        if cseq:
            number, _, cseq_method = cseq.partition(" ")
            code = status.split()[1] if status else ""
            reason = status.removeprefix("SIP/2.0 ")
            verb = method or cseq_method
            messages.append(
                Sip(
                    float(stamp),
                    source,
                    destination,
                    verb,
                    int(number),
                    int(code) if code else None,
                    reason,
                    call_id,
                    user,
                )
            )
            continue
        octets = bytes.fromhex(payload)
        # Version 2; 72 to 76 in the second octet is RTCP (RFC 5761, 4).
        if len(octets) < 12 or octets[0] >> 6 != 2 or 72 <= octets[1] & 0x7F <= 76:
            continue
        header = 12 + 4 * (octets[0] & 15)
        ssrc = int.from_bytes(octets[8:12])
        packet = Rtp(
            float(stamp),
            int.from_bytes(octets[2:4]),
            int.from_bytes(octets[4:8]),
            octets[1] & 0x7F,
            octets[header:],
        )
        key = (source, int(source_port), destination, int(destination_port), ssrc)
        streams.setdefault(key, []).append(packet)
    return Recording(tuple(messages), tuple(Stream(*key, tuple(packets)) for key, packets in streams.items()))
