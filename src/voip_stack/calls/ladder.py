"""A call as a ladder, and the leg that went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from voip_stack.calls.capture import Recording, Sip

_GAP = 29  # from one column to the next: four columns and the times fit into 110
_TIME = 9
_CHALLENGES = (401, 407)
# The last message of a capture may be a request whose answer was still on its way.
_IN_FLIGHT = 0.5


def draw(recording: Recording, columns: Mapping[str, str], notes: Sequence[tuple[float, str]] = ()) -> str:
    """The ladder of `recording`.

    `columns`: address to heading, in the order of the columns; two addresses of a machine share a heading.
    `notes`: lines of text at their times (seconds since 1970), as for media. Times are seconds from the first message.
    """
    headings = list(dict.fromkeys(columns.values()))
    place = {heading: _TIME + 4 + i * _GAP for i, heading in enumerate(headings)}
    width = _TIME + 4 + (len(headings) - 1) * _GAP + 12
    messages = [m for m in visible(recording.messages) if {m.source, m.destination} <= set(columns)]
    if not messages:
        return "(no SIP message was seen)"
    start = messages[0].time
    lines = ["".ljust(_TIME) + _heading(headings, place)]
    rows = [(m.time, _arrow(m, columns, place, width)) for m in messages]
    rows += [(time, _note(text, place, width)) for time, text in notes]
    lines += [f"{time - start:8.3f} {row[_TIME:]}".rstrip() for time, row in sorted(rows, key=lambda r: r[0])]
    return "\n".join(lines)


def visible(messages: Sequence[Sip]) -> list[Sip]:
    """The messages of calls and registrations, without keepalives."""
    return [m for m in messages if m.method not in ("OPTIONS", "NOTIFY")]


def _heading(headings: Sequence[str], place: Mapping[str, int]) -> str:
    line = ""
    for heading in headings:
        line = line.ljust(max(0, place[heading] - _TIME - len(heading) // 2)) + heading
    return line


def _rails(place: Mapping[str, int], width: int) -> list[str]:
    row = [" "] * width
    for position in place.values():
        row[position] = "│"
    return row


def _arrow(message: Sip, columns: Mapping[str, str], place: Mapping[str, int], width: int) -> str:
    row = _rails(place, width)
    start, end = place[columns[message.source]], place[columns[message.destination]]
    left, right = sorted((start, end))
    row[left + 1 : right] = "─" * (right - left - 1)
    row[end - 1 if end > start else end + 1] = ">" if end > start else "<"
    what = f"{message.cseq} {message.method}" if message.status is None else f"{message.reason}"
    tail = f" {message.target}" if message.status is None and message.method == "INVITE" and message.target else ""
    label = f" {what}{tail} " if message.status is None else f" {what} ({message.cseq} {message.method}) "
    room = _GAP - 5
    if len(label) > room:
        # Shorten the reason phrase; the reader needs code and CSeq.
        label = f" {message.status} ({message.cseq} {message.method}) " if message.status else f"{label[: room - 2]}… "
    # The label is beside the sender, so that it never covers a column that the arrow only passes.
    position = start + 3 if end > start else start - 2 - len(label)
    row[position : position + len(label)] = label
    return "".join(row)


def _note(text: str, place: Mapping[str, int], width: int) -> str:
    row = _rails(place, width)
    left, right = min(place.values()), max(place.values())
    row[left + 1 : right] = f" {text} ".center(right - left - 1, "═")
    return "".join(row)


def blame(recording: Recording, columns: Mapping[str, str]) -> str | None:
    """The leg that went wrong, as `sip-1 -> pbx-1: 503 Service Unavailable to INVITE`; None when all is well.

    A request without a final answer counts before a refusal, which may only be its consequence (408). Of several such
    requests the last counts, which got furthest. Of refusals the first counts, where they began.
    """
    messages = visible(recording.messages)
    end = messages[-1].time if messages else 0.0
    refused: list[tuple[float, str]] = []
    unanswered: list[tuple[float, str]] = []
    cancelled = {m.call_id for m in messages if m.method == "CANCEL"}
    for request in messages:
        if request.status is not None or request.method == "ACK":
            continue
        leg = (
            f"{columns.get(request.source, request.source)} -> {columns.get(request.destination, request.destination)}"
        )
        key = (request.call_id, request.cseq, request.method, request.destination, request.source)
        answers = [
            m
            for m in messages
            if m.status is not None and (m.call_id, m.cseq, m.method, m.source, m.destination) == key
        ]
        final = [m for m in answers if m.status is not None and m.status >= 200]
        if not final and request.time < end - _IN_FLIGHT:
            only = f", only {answers[-1].reason}" if answers else ""
            what = f"no final answer to {request.method}{only}" if answers else f"no answer to {request.method}"
            unanswered.append((request.time, f"{leg}: {what}"))
        for answer in final:
            status = answer.status or 0
            expected = status < 300 or status in _CHALLENGES or (status == 487 and request.call_id in cancelled)
            if not expected:
                refused.append((answer.time, f"{leg}: {answer.reason} to {request.method}"))
    if unanswered:
        return max(unanswered)[1]
    return min(refused)[1] if refused else None
