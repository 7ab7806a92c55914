from collections.abc import Sequence
from ipaddress import IPv4Address
from itertools import count
from pathlib import Path

import pytest

from voip_stack.calls import audio, capture, ladder
from voip_stack.calls.capture import PCMA, Capture, Recording, Rtp, Sip, Stream, parse
from voip_stack.calls.phone import Phone

A, SIP_OUT, SIP_IN, PBX, B = "192.168.65.101", "192.168.65.10", "192.168.64.10", "192.168.64.30", "192.168.65.102"
COLUMNS = {A: "phone A", SIP_OUT: "sip-1", SIP_IN: "sip-1", PBX: "pbx-1", B: "phone B"}


def stream(sequences: Sequence[int], late: float = 0.0) -> Stream:
    """Packets every 20 ms, every second one `late` seconds late."""
    packets = [
        Rtp(100 + n / 50 + (late if n % 2 else 0), s & 0xFFFF, n * 160, PCMA, b"\xd5" * 160)
        for n, s in enumerate(sequences)
    ]
    return Stream("192.168.65.20", 10000, A, 6000, 1, tuple(packets))


def test_loss_is_counted_across_the_wrap_of_sequence_numbers() -> None:
    received = [n for n in range(65530, 65550) if n not in (65535, 65540)]
    assert stream(received).expected == 20
    assert stream(received).lost == 2


def test_reordered_and_doubled_packets_are_not_lost() -> None:
    assert stream([1, 3, 2, 4, 4]).lost == 0


def test_jitter_is_that_of_rfc_3550() -> None:
    assert stream(range(500)).jitter_ms == pytest.approx(0, abs=0.01)
    assert stream(range(500), late=0.004).jitter_ms == pytest.approx(4, abs=0.1)


def test_rtp_is_told_from_other_datagrams() -> None:
    rtp = bytes([0x80, 8, 0, 7]) + bytes([0, 0, 0, 160]) + b"\1\2\3\4" + b"\xd5" * 160
    rtcp = bytes([0x80, 200]) + bytes(26)
    rows = [["1.0", A, B, "6000", "6000", "", "", "", "", "", p.hex()] for p in (rtp, rtcp, b"DNS", rtp[:11])]
    (found,) = parse(rows).streams
    assert found.packets == (Rtp(1.0, 7, 160, 8, b"\xd5" * 160),)
    assert len(parse(rows).heard(B)) == audio.PACKET


def test_a_capture_of_some_phones_leaves_the_others_out(tmp_path: Path) -> None:
    phones = [Phone("2901", "", IPv4Address(address), proxy=IPv4Address(SIP_OUT)) for address in (A, B)]
    assert Capture(tmp_path / "c", ["eth0"]).filter == "(udp or tcp port 5060)"
    assert Capture(tmp_path / "c", ["eth0"], phones).filter == f"(udp or tcp port 5060) and (host {A} or host {B})"


def test_what_was_captured_is_decoded_again_only_when_more_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def decode(file: Path) -> Recording:
        decoded.append(file.stat().st_size)
        return Recording((), ())

    monkeypatch.setattr(capture, "decode", decode)
    running = Capture(tmp_path / "c", ["eth0"])
    for content in ("a", "a", "ab"):
        running.file.write_text(content)
        assert running.recording() == Recording((), ())
    assert decoded == [1, 2]


def flow(*lines: str) -> Recording:
    """`A>sip INVITE` is a request, `A<sip 200 INVITE` the answer to it; 0.1 s apart. Call-ID: one per pair of hosts."""
    hosts = {"A": A, "sip": SIP_OUT, "sipi": SIP_IN, "pbx": PBX, "B": B}
    messages = []
    for time, line in zip(count(), lines, strict=False):
        hop, rest = line.split(" ", 1)
        left, right = hop.replace("<", ">").split(">")
        source, destination = (left, right) if ">" in hop else (right, left)
        words = rest.split()
        status = int(words[0]) if words[0].isdigit() else None
        method = words[-1]
        reason = "" if status is None else " ".join(words[:-1])
        call_id = "a" if "A" in hop or "pbx" in right else "b"
        messages.append(
            Sip(1000 + time / 10, hosts[source], hosts[destination], method, 1, status, reason, call_id, "2999")
        )
    return Recording(tuple(messages), ())


GOOD = (
    "A>sip INVITE",
    "A<sip 100 Trying INVITE",
    "sipi>pbx INVITE",
    "sipi<pbx 200 OK INVITE",
    "A<sip 200 OK INVITE",
    "A>sip ACK",
)


def test_a_good_call_has_no_leg_to_blame() -> None:
    assert ladder.blame(flow(*GOOD), COLUMNS) is None


def test_a_challenge_that_was_met_is_no_fault() -> None:
    challenged = flow("A>sip REGISTER", "A<sip 401 Unauthorized REGISTER", "A>sip REGISTER", "A<sip 200 OK REGISTER")
    assert ladder.blame(challenged, COLUMNS) is None


def test_the_refusal_is_named_where_it_began() -> None:
    refused = flow(
        "A>sip INVITE",
        "sipi>pbx INVITE",
        "sipi<pbx 503 Service Unavailable INVITE",
        "A<sip 503 Service Unavailable INVITE",
    )
    assert ladder.blame(refused, COLUMNS) == "sip-1 -> pbx-1: 503 Service Unavailable to INVITE"


def test_silence_is_named_before_the_time_out_it_causes() -> None:
    silent = flow("A>sip INVITE", "sipi>pbx INVITE", *["sipi>pbx INVITE"] * 8, "A<sip 408 Request Timeout INVITE")
    assert ladder.blame(silent, COLUMNS) == "sip-1 -> pbx-1: no answer to INVITE"


def test_a_proxy_that_is_down_is_named() -> None:
    assert ladder.blame(flow(*["A>sip REGISTER"] * 8), COLUMNS) == "phone A -> sip-1: no answer to REGISTER"


def test_a_cancelled_call_has_no_leg_to_blame() -> None:
    given_up = flow(
        "A>sip INVITE",
        "A<sip 180 Ringing INVITE",
        "A>sip CANCEL",
        "A<sip 200 canceling CANCEL",
        "A<sip 487 Request Terminated INVITE",
        "A>sip ACK",
    )
    assert ladder.blame(given_up, COLUMNS) is None


def test_the_ladder_points_every_arrow_at_its_receiver_and_fits_the_screen() -> None:
    long = "A<sip 407 Proxy Authentication Required INVITE"
    drawn = ladder.draw(flow(*GOOD, long, "sip>B INVITE"), COLUMNS, [(1000.45, "media")]).splitlines()
    assert drawn[0].split() == ["phone", "A", "sip-1", "pbx-1", "phone", "B"]
    assert max(map(len, drawn)) <= 110
    assert "── 1 INVITE 2999 ──" in drawn[1]
    assert "│<─" in drawn[2]
    assert ">│" in drawn[1]
    assert "200 OK (1 INVITE)" in drawn[4]
    assert "media" in drawn[6]
    assert any("407" in line for line in drawn)
    assert drawn[3].startswith("   0.200 ")
