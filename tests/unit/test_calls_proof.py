from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from voip_stack.calls import audio, probes, proof
from voip_stack.calls.capture import PCMA, Recording, Rtp, Stream
from voip_stack.calls.phone import Phone
from voip_stack.calls.probes import Cdr, Forwarding, Metrics
from voip_stack.errors import CallError
from voip_stack.inventory import Address

PAGE = """\
# TYPE rtpengine_sessions gauge
rtpengine_sessions{type="own"} 2
rtpengine_sessions{type="foreign"} 0
rtpengine_mediastreams{type="userspace"} 0
rtpengine_mediastreams{type="kernel"} 4
rtpengine_mediastreams{type="mixed"} 0
rtpengine_packets_total{type="userspace"} 612
rtpengine_packets_total{type="kernel"} 1840
"""
# From the kernel module's proc_list_show(): one target with packets, one (RTCP) without.
MODULE = """\
local inet4 192.168.65.20:10000
    stats:               172000 bytes,                 1000 packets,                    0 errors
        RTP payload type   8:               172000 bytes,                 1000 packets
    last packet: 1763953200    SSRC in: 1234 [seq 1/0]
local inet4 192.168.65.20:10001
    stats:                    0 bytes,                    0 packets,                    0 errors
nftables rule: yes
"""
KERNEL = Forwarding(("media-1",), streams=4, kernel_rate=199.0, userspace_rate=1.0, targets=4, rule=True)
USERSPACE = Forwarding(("media-1",), streams=0, kernel_rate=0.0, userspace_rate=199.0, targets=0, rule=False)
HEARD = proof.Direction("phone A -> phone B", 440, 440.1, -10.2, 1.0, 600, 598, 2, 3.0)


def result(**changes: Any) -> proof.Result:
    """A faultless call, with changes."""
    good = proof.Result(
        caller="2998",
        callee="2999",
        setup=1.5,
        duration=12.0,
        directions=(HEARD, replace(HEARD, name="phone B -> phone A", sent_hz=1020, heard_hz=1020.0)),
        pbx="pbx-1",
        forwarding=KERNEL,
        left={},
        records=(Cdr("2998", "2999", "ANSWERED", 13, 12),),
        ladder="",
        capture=Path("call.pcapng"),
    )
    return replace(good, **changes)


def test_metrics_are_read_and_a_missing_one_is_named() -> None:
    assert probes.parse_metrics(PAGE, 5.0) == Metrics(5.0, 2, 4, 1840, 612)
    with pytest.raises(CallError, match="mediastreams of the type kernel"):
        probes.parse_metrics(PAGE.replace('mediastreams{type="kernel"}', "gone"))


def test_rates_are_those_of_the_calls_end() -> None:
    # Three seconds in user space, then the kernel takes over.
    samples = [{"a": Metrics(t, 2, 4 if t > 4 else 0, max(0, t - 3) * 200, min(t, 3) * 200)} for t in range(13)]
    assert probes.forwarding(samples, {"a": MODULE}, ["a"], window=5.0) == Forwarding(("a",), 4, 200.0, 0.0, 1, True)


def test_a_good_call_has_no_fault() -> None:
    assert proof.faults(result()) == []


def test_forwarding_in_user_space_is_a_fault() -> None:
    (fault,) = proof.faults(result(forwarding=USERSPACE))
    assert fault.startswith("media is not forwarded in the kernel (4 streams and 200 packets/s belong into the kernel)")
    assert fault.endswith(
        "media-1: kernel: 0 streams, 0 packets/s, 0 targets, no nftables rule; user space: 199 packets/s"
    )


@pytest.mark.parametrize(
    "change",
    [{"streams": 2}, {"kernel_rate": 100.0}, {"userspace_rate": 50.0}, {"targets": 2}, {"rule": False}],
)
def test_every_sign_of_user_space_counts(change: dict[str, Any]) -> None:
    assert proof.faults(result(forwarding=replace(KERNEL, **change)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sent": 0}, "the phone sent no sound"),
        ({"received": 0}, "none arrived"),
        ({"heard_hz": 1020.0}, "heard at 1020.0 Hz"),
        ({"share": 0.5}, "50% of the time"),
        ({"level_dbm0": -25.0}, "heard at -25.0 dBm0"),
        ({"received": 500}, "only 500 of 600 packets arrived"),
    ],
)
def test_bad_audio_names_the_direction(change: dict[str, Any], said: str) -> None:
    (fault,) = proof.faults(result(directions=(replace(HEARD, **change),)))
    assert fault.startswith("phone A -> phone B: ")
    assert said in fault


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"left": {"sip-1": "dialogs: all: 1"}}, "sip-1: not released after BYE: dialogs: all: 1"),
        ({"records": ()}, "pbx-1: 0 CDRs"),
        ({"records": (Cdr("2998", "2999", "ANSWERED", 13, 12),) * 2}, "pbx-1: 2 CDRs"),
        ({"records": (Cdr("2998", "2999", "NO ANSWER", 13, 0),)}, "the CDR says NO ANSWER, 0 s"),
        ({"records": (Cdr("2998", "2999", "ANSWERED", 40, 39),)}, "the CDR says ANSWERED, 39 s"),
    ],
)
def test_what_a_call_leaves_behind_names_the_machine(changes: dict[str, Any], said: str) -> None:
    (fault,) = proof.faults(result(**changes))
    assert said in fault


def test_the_report_fits_the_screen() -> None:
    report = proof.report(result())
    assert max(map(len, report.splitlines())) <= 110
    assert "no dialog, no RTPEngine session, no channel" in report


def test_packets_count_while_both_phones_are_in_the_call() -> None:
    """The callee speaks a second before the caller gets the answer, and one after the BYE: both go unheard."""
    caller, callee = (Phone(n, "x", Address(f"192.168.65.{last}")) for n, last in (("2998", 101), ("2999", 102)))
    tone = audio.tone(440)[: audio.PACKET]

    def stream(source: object, destination: object, since: float, until: float) -> Stream:
        times = [since + n * 0.02 for n in range(round((until - since) / 0.02))]
        packets = tuple(Rtp(t, n, n * audio.PACKET, PCMA, tone) for n, t in enumerate(times))
        return Stream(str(source), 6000, str(destination), 10000, 1, packets)

    answer, bye = 100.0, 110.0
    streams = (
        stream(callee.address, "192.168.65.20", answer - 1, bye + 1),
        stream("192.168.65.20", caller.address, answer, bye),
    )
    found = proof._direction("phone B -> phone A", callee, caller, Recording((), streams), answer, bye)
    assert found.sent == pytest.approx(500, abs=1)
    assert found.received == pytest.approx(500, abs=1)
