"""The proof that the stack carries calls: one real call, measured at every place that sees it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from voip_stack import inventory, settings, subscribers, vms
from voip_stack.calls import audio, ladder, probes
from voip_stack.calls.capture import PCMA, Capture, Recording, Sip, Stream
from voip_stack.calls.phone import TONES_HZ, Phone, proxy_address, traces
from voip_stack.deadline import Deadline
from voip_stack.errors import CallError

CALLER, CALLEE = "2998", "2999"
NAMES = ("phone A", "phone B")
SECONDS = 12.0  # of talk: the kernel takes over after about 3, and its counters need some more
_RING = 1.0
_PACKET_RATE = audio.RATE / audio.PACKET
_STREAMS = 4  # two RTPEngine sessions (phone and PBX, PBX and phone), two directions each
_KEPT = 10  # directories of earlier runs that are kept
_TONE_TOLERANCE_HZ, _LEVEL_TOLERANCE_DB = 5, 3
_BILLSEC_TOLERANCE = 2.0  # the PBX counts whole seconds, and sees answer and end a little apart from the phone
_MODULE_AFTER = 6.0  # seconds into the call


@dataclass(frozen=True)
class Direction:
    """Audio from one phone to the other. Frequencies in Hz, levels in dBm0, jitter in ms."""

    name: str
    sent_hz: int
    heard_hz: float
    level_dbm0: float
    share: float  # fraction of the time in which the tone was heard
    sent: int  # packets sent by the speaking phone
    received: int  # packets received by the hearing phone
    lost: int  # between RTPEngine and the hearing phone, by sequence numbers
    jitter_ms: float

    def fault(self) -> str | None:
        """The fault; None when all is well."""
        if not self.sent:
            return f"{self.name}: the phone sent no sound"
        if not self.received:
            return f"{self.name}: {self.sent} packets were sent, none arrived"
        if abs(self.heard_hz - self.sent_hz) > _TONE_TOLERANCE_HZ or self.share < 0.8:
            heard = f"{self.heard_hz:.1f} Hz, {self.share:.0%} of the time"
            return f"{self.name}: sent at {self.sent_hz} Hz, heard at {heard}"
        if abs(self.level_dbm0 - audio.SEND_DBM0) > _LEVEL_TOLERANCE_DB:
            return f"{self.name}: sent at {audio.SEND_DBM0:.1f} dBm0, heard at {self.level_dbm0:.1f} dBm0"
        if self.received < 0.95 * self.sent:
            return f"{self.name}: only {self.received} of {self.sent} packets arrived"
        return None


@dataclass(frozen=True)
class Result:
    """A proven call. Times in seconds; `capture` is the pcapng file."""

    caller: str
    callee: str
    setup: float
    duration: float
    directions: tuple[Direction, ...]
    pbx: str  # the machine that carried the call; all candidates when none did
    forwarding: probes.Forwarding
    left: dict[str, str]  # resources that BYE did not release, by machine
    records: tuple[probes.Cdr, ...]
    ladder: str
    capture: Path


def columns(recording: Recording, caller: Phone, callee: Phone) -> dict[str, str]:
    """The columns: address to name. Shows the proxies and PBXs of the call; the first when none took part."""
    seen = {address for m in ladder.visible(recording.messages) for address in (m.source, m.destination)}
    names: dict[str, str] = {}
    for group in ("sip_proxies", "pbx_servers"):
        known = inventory.load().group(group)
        took_part = [m for m in known if seen.intersection(map(str, m.addresses.values()))]
        names |= {str(a): m.name for m in took_part or known[:1] for a in m.addresses.values()}
    return {str(caller.address): NAMES[0], **names, str(callee.address): NAMES[1]}


def verify(proxy: str = "") -> Result:
    """Let one phone outside call another through `proxy`, PBX and RTPEngine, and check the whole call.

    `proxy` is a machine of the inventory, the first proxy when empty. Raises InventoryError, VmError and HostError
    before the call, CallError with the ladder when the call is wrong in any way.
    """
    outside = proxy_address(proxy)
    stack = inventory.load()
    vms.require_running(list(stack.machines.values()))
    directory = _directory()
    caller, callee = (
        Phone(number, _account(number), address, tone_hz=tone, name=name, traces=directory, proxy=outside)
        for number, name, address, tone in zip((CALLER, CALLEE), NAMES, stack.phones, TONES_HZ, strict=False)
    )
    held = probes.held()  # by other calls
    with Capture(directory / "call.pcapng") as capture:
        try:
            before = len(probes.cdrs(CALLER, CALLEE))
            with _registered(caller, callee):
                forwarding = _call(caller, callee, held)
            left = probes.released(before=held)
            records = _records(before)
        except CallError as error:
            capture.stop()
            recording = capture.recording()
            drawn = draw(recording, caller, callee)
            message = ladder.blame(recording, columns(recording, caller, callee)) or error.message
            raise CallError(message, _hint(capture.file, error.hint), f"{drawn}\n\n{error.details}") from error
    recording = capture.recording()
    result = measure(recording, caller, callee, forwarding, left, records, capture.file)
    wrong = faults(result)
    if blamed := ladder.blame(recording, columns(recording, caller, callee)):
        wrong.insert(0, blamed)
    if wrong:
        others = "".join(f"\nalso: {fault}" for fault in wrong[1:])
        raise CallError(wrong[0], _hint(capture.file), report(result) + others)
    return result


def measure(
    recording: Recording,
    caller: Phone,
    callee: Phone,
    forwarding: probes.Forwarding,
    left: dict[str, str],
    records: list[probes.Cdr],
    capture: Path,
) -> Result:
    """The measurements of a recorded call."""
    phone = str(caller.address)
    invite = _first(recording, lambda m: m.method == "INVITE" and m.source == phone)
    answer = _first(recording, lambda m: m.method == "INVITE" and m.status == 200 and m.destination == phone)
    bye = _first(recording, lambda m: m.method == "BYE" and m.status is None)
    return Result(
        caller=caller.number,
        callee=callee.number,
        setup=answer - invite,
        duration=bye - answer,
        directions=(
            _direction("phone A -> phone B", caller, callee, recording, answer, bye),
            _direction("phone B -> phone A", callee, caller, recording, answer, bye),
        ),
        pbx=_pbx(recording),
        forwarding=forwarding,
        left=left,
        records=tuple(records),
        ladder=draw(recording, caller, callee),
        capture=capture,
    )


def faults(result: Result) -> list[str]:
    """The faults of a call, each with its leg or machine; empty when all is well."""
    found = [d.fault() for d in result.directions]
    found.append(result.forwarding.fault(_STREAMS, _PACKET_RATE))
    found += [f"{machine}: not released after BYE: {what}" for machine, what in result.left.items()]
    if len(result.records) != 1:
        found.append(f"{result.pbx}: {len(result.records)} CDRs of this call in the database, not 1")
    for record in result.records[:1]:
        if record.disposition != "ANSWERED" or abs(record.billsec - result.duration) > _BILLSEC_TOLERANCE:
            what = f"{record.disposition}, {record.billsec} s"
            found.append(f"{result.pbx}: the CDR says {what}; the call was answered for {result.duration:.1f} s")
    return [fault for fault in found if fault]


def draw(recording: Recording, caller: Phone, callee: Phone) -> str:
    """The call as a ladder, with a line at each phone's first received packet."""
    notes = []
    for speaker, listener, way in ((caller, callee, "phone A to phone B"), (callee, caller, "phone B to phone A")):
        packets = [p for s in recording.streams_to(listener.address) for p in s.packets if p.payload_type == PCMA]
        if packets:
            text = f"media, {way}: {speaker.tone_hz} Hz, {len(packets)} packets"
            notes.append((min(p.time for p in packets), text))
    return ladder.draw(recording, columns(recording, caller, callee), notes)


def report(result: Result) -> str:
    """The ladder and the measurements, as text for a person."""
    width = max(len(d.name) for d in result.directions)
    head = f"{'':{width}}  tone Hz  heard Hz  level dBm0  heard   sent  received  lost  jitter ms"
    rows = [
        f"{d.name:{width}}  {d.sent_hz:7}  {d.heard_hz:8.1f}  {d.level_dbm0:10.1f}  {d.share:5.0%}  {d.sent:5}  "
        f"{d.received:8}  {d.lost:4}  {d.jitter_ms:9.1f}"
        for d in result.directions
    ]
    cdr = ", ".join(f"{r.disposition} {r.source} to {r.destination}, {r.billsec} s" for r in result.records) or "none"
    left = "; ".join(f"{machine}: {what}" for machine, what in result.left.items())
    lines = {
        "call": f"{result.caller} to {result.callee}: set up in {result.setup:.2f} s, {result.duration:.1f} s long",
        "media": str(result.forwarding),
        "CDR": cdr,
        "after BYE": f"left over: {left}" if left else "no dialog, no RTPEngine session, no channel",
    }
    facts = [f"{name:<10} {text}" for name, text in lines.items()]
    return "\n".join([result.ladder, "", head, *rows, "", *facts])


@contextlib.contextmanager
def _registered(*phones: Phone) -> Iterator[None]:
    """Register the phones, and unregister them at the end, whatever happens."""
    with concurrent.futures.ThreadPoolExecutor(len(phones)) as pool:
        for done in [pool.submit(phone.register) for phone in phones]:
            done.result()
        try:
            yield
        except BaseException:
            # An earlier error matters more than one of the clean-up.
            for done in [pool.submit(phone.unregister) for phone in phones]:
                done.exception()
            raise
        for done in [pool.submit(phone.unregister) for phone in phones]:
            done.result()


def _call(caller: Phone, callee: Phone, held: probes.Held) -> probes.Forwarding:
    with callee.answer(ring=_RING) as far, caller.call(callee.number, SECONDS) as near:
        near.wait_for("answered")
        forwarding = probes.watch(near, held, _MODULE_AFTER)
        near.finish()
        far.finish()
    return forwarding


def _records(before: int) -> list[probes.Cdr]:
    """The CDRs added to the `before` earlier ones; they arrive through the PBX's spool, after the call."""
    found: list[probes.Cdr] = []

    def written() -> bool:
        nonlocal found
        found = probes.cdrs(CALLER, CALLEE)[before:]
        return bool(found)

    Deadline(30).until(written, every=1)
    return found


def _first(recording: Recording, wanted: Callable[[Sip], bool]) -> float:
    """The time of the first `wanted` message, in seconds since 1970; 0 when there is none."""
    return next((m.time for m in recording.messages if wanted(m)), 0.0)


def _pbx(recording: Recording) -> str:
    """The PBX that answered the call; all of them, with commas, when none did."""
    machines = inventory.load().group("pbx_servers")
    answered = {m.source for m in recording.messages if m.method == "INVITE" and m.status == 200}
    return ", ".join(m.name for m in machines if str(m.internal) in answered) or ", ".join(m.name for m in machines)


def _direction(
    name: str, speaker: Phone, listener: Phone, recording: Recording, answer: float, bye: float
) -> Direction:
    """Audio in one direction. Packets count while both phones are in the call.

    The callee speaks from its answer until the BYE reaches it. On a slow computer each margin is a second.
    """
    streams = recording.streams_to(listener.address)

    def count(streams: Sequence[Stream]) -> int:
        return sum(answer <= p.time <= bye for s in streams for p in s.packets)

    tone = audio.measure(recording.heard(listener.address))
    return Direction(
        name=name,
        sent_hz=speaker.tone_hz,
        heard_hz=tone.tone_hz,
        level_dbm0=tone.level_dbm0,
        share=tone.share,
        sent=count(recording.streams_from(speaker.address)),
        received=count(streams),
        lost=sum(s.lost for s in streams),
        jitter_ms=max((s.jitter_ms for s in streams), default=0.0),
    )


def _account(number: str) -> str:
    """The password of a test subscriber; it is added if missing."""
    file = settings.load().secrets_dir / f"phone_{number}"
    known = any(subscriber.number == number for subscriber in subscribers.list_())
    if known and file.exists():
        return file.read_text().strip()
    password = file.read_text().strip() if file.exists() else secrets.token_urlsafe(24)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)
        file.write_text(password + "\n")
    (subscribers.passwd if known else subscribers.add)(number, password)
    return password


def _directory() -> Path:
    """A new directory for this run's capture and traces; the last runs are kept."""
    runs = sorted(traces().glob("verify-*"))
    for old in runs[: -(_KEPT - 1)]:
        shutil.rmtree(old)
    directory = traces() / time.strftime("verify-%Y%m%d-%H%M%S")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _hint(capture: Path, first: str = "") -> str:
    return "\n".join(filter(None, [first, f"all packets: wireshark {capture}"]))
