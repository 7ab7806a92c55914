"""The machines' own view of a call: forwarding in the kernel, unreleased resources, its CDR."""

from __future__ import annotations

import concurrent.futures
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from voip_stack import inventory, vms
from voip_stack.calls.sipp import Leg
from voip_stack.deadline import Deadline
from voip_stack.errors import CallError, InventoryError, VmError, VoipError
from voip_stack.lab import http_client
from voip_stack.services import database

Held = Mapping[tuple[str, str], int]  # the resources of calls, by machine and kind
_EVERY = 0.5
_SESSIONS = "RTPEngine sessions"
_Key = TypeVar("_Key")
_Found = TypeVar("_Found")


def _ssh(machine: str, script: str) -> str:
    """The output of `script` on `machine`, run by sh as root. Raises CallError when ssh does not answer."""
    # The script's own exit status doesn't matter: kamcmd's 255, without Kamailio, is also ssh's for an unreachable
    # machine.
    try:
        done = vms.ssh.run(machine, "sh", "-c", f"{script}\ntrue", sudo=True, check=True)
    except VmError as error:
        raise CallError(error.message, error.hint, error.details) from None
    return done.stdout + done.stderr


def machines(group: str) -> list[str]:
    """The machines of `group`; a call may be on any of them. Raises InventoryError when there is none."""
    found = inventory.load().group(group)
    if not found:
        raise InventoryError(f"no machine is in the group {group}", "add one in ansible/inventory/development.yml")
    return [m.name for m in found]


def _at_once(looks: Mapping[_Key, Callable[[], _Found]]) -> dict[_Key, _Found]:
    """The results of all `looks`, run in parallel: it takes as long as the slowest."""
    with concurrent.futures.ThreadPoolExecutor(len(looks)) as pool:
        return dict(zip(looks, pool.map(lambda look: look(), looks.values()), strict=True))


@dataclass(frozen=True)
class Metrics:
    """RTPEngine's counters at a moment of the monotonic clock (seconds)."""

    at: float
    sessions: int
    kernel_streams: int
    kernel_packets: int
    userspace_packets: int


def parse_metrics(text: str, at: float = 0.0) -> Metrics:
    """Metrics from RTPEngine's Prometheus page. Raises CallError when a needed one is missing."""

    def value(name: str, kind: str) -> int:
        found = re.search(rf'^rtpengine_{name}\{{type="{kind}"\}} (\d+)', text, re.MULTILINE)
        if not found:
            raise CallError(f"RTPEngine's metrics lack {name} of the type {kind}")
        return int(found.group(1))

    return Metrics(
        at,
        value("sessions", "own"),
        value("mediastreams", "kernel"),
        value("packets_total", "kernel"),
        value("packets_total", "userspace"),
    )


def metrics(name: str) -> Metrics:
    """The counters of RTPEngine on machine `name` now. Raises CallError when it does not answer within 10 s."""
    stack = inventory.load()
    address, port = str(stack.machine(name).internal), stack.port("rtpengine-http")
    try:
        answer = http_client.ask(address, port, "/metrics", timeout=10)
        return parse_metrics(answer.body.decode(), time.monotonic())
    except OSError as error:
        raise CallError(
            f"{name}: RTPEngine's metrics do not answer: {error}", "./voip provision --tags rtpengine"
        ) from None


def all_metrics() -> dict[str, Metrics]:
    """The counters of every RTPEngine now, by machine. Raises CallError like metrics()."""
    return _at_once({name: partial(metrics, name) for name in machines("media_servers")})


@dataclass(frozen=True)
class Forwarding:
    """How media was forwarded during a call. Rates in packets per second, over the last seconds of the call."""

    machines: tuple[str, ...]  # machines with the call's sessions; the figures are their sums
    streams: int  # maximum number forwarded by the kernel alone
    kernel_rate: float
    userspace_rate: float
    targets: int  # entries of the kernel module's table that packets went through
    rule: bool  # RTPEngine's nftables rule is in place on each

    def __str__(self) -> str:
        rule = "nftables rule" if self.rule else "no nftables rule"
        kernel = f"{self.streams} streams, {self.kernel_rate:.0f} packets/s, {self.targets} targets, {rule}"
        return f"{', '.join(self.machines)}: kernel: {kernel}; user space: {self.userspace_rate:.0f} packets/s"

    def fault(self, streams: int, packet_rate: float) -> str | None:
        """What contradicts `streams` RTP streams of `packet_rate` each in the kernel; None when nothing does."""
        wanted = streams * packet_rate
        good = (
            self.streams >= streams
            and self.kernel_rate >= 0.75 * wanted
            and self.userspace_rate <= 0.1 * wanted
            and self.targets >= streams
            and self.rule
        )
        expected = f"{streams} streams and {wanted:.0f} packets/s belong into the kernel"
        return None if good else f"media is not forwarded in the kernel ({expected}): {self}"


_MODULE = """
cat /proc/rtpengine/[0-9]*/list 2>/dev/null
if rtpengine --config-file=/etc/rtpengine/rtpengine.conf --nftables-status >/dev/null 2>&1; then
  echo 'nftables rule: yes'
fi
"""


def watch(leg: Leg, before: Held, module_after: float, window: float = 5.0) -> Forwarding:
    """Watch RTPEngine until `leg` has ended; rates are those of the last `window` seconds.

    Of several RTPEngines, those count that have more sessions than `before` the call: its two sessions may be on two of
    them. The kernel modules' tables are read `module_after` seconds from now. Raises CallError when an RTPEngine does
    not answer.
    """
    start = Deadline(module_after)
    samples: list[dict[str, Metrics]] = []
    looks = {name: partial(_ssh, name, _MODULE) for name in machines("media_servers")}
    module: concurrent.futures.Future[dict[str, str]] | None = None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        while leg.returncode is None:
            samples.append(all_metrics())
            if module is None and start.is_due:
                module = pool.submit(_at_once, looks)
            time.sleep(_EVERY)
    grown = {n for sample in samples for n, now in sample.items() if now.sessions > before.get((n, _SESSIONS), 0)}
    # If none has more, because other calls ended meanwhile, all count.
    names = [name for name in looks if name in grown] or list(looks)
    return forwarding(samples, module.result() if module else {}, names, window)


def forwarding(
    samples: Sequence[Mapping[str, Metrics]], modules: Mapping[str, str], names: Sequence[str], window: float
) -> Forwarding:
    """Forwarding on the machines `names`, from samples during a call and the kernel modules' tables, by machine.

    The rates are those of the last `window` seconds.
    """
    sums = [_sum([sample[name] for name in names]) for sample in samples]
    end = sums[-1] if sums else Metrics(0, 0, 0, 0, 0)
    recent = [s for s in sums if s.at >= end.at - window] or [end]
    seconds = max(end.at - recent[0].at, 0.001)
    listed = [modules.get(name, "") for name in names]
    packets = re.findall(r"^\s+stats: .*?(\d+) packets", "\n".join(listed), re.MULTILINE)
    return Forwarding(
        machines=tuple(names),
        streams=max((s.kernel_streams for s in sums), default=0),
        kernel_rate=(end.kernel_packets - recent[0].kernel_packets) / seconds,
        userspace_rate=(end.userspace_packets - recent[0].userspace_packets) / seconds,
        targets=len([n for n in packets if int(n) > 0]),
        rule=all("nftables rule: yes" in text for text in listed),
    )


def _sum(parts: Sequence[Metrics]) -> Metrics:
    """The counters of several RTPEngines, read at the same time."""
    return Metrics(
        max(p.at for p in parts),
        sum(p.sessions for p in parts),
        sum(p.kernel_streams for p in parts),
        sum(p.kernel_packets for p in parts),
        sum(p.userspace_packets for p in parts),
    )


@dataclass(frozen=True)
class Cdr:
    """A call detail record; times in seconds."""

    source: str
    destination: str
    disposition: str
    duration: int
    billsec: int


def cdrs(source: str, destination: str) -> list[Cdr]:
    """The CDRs of calls between two numbers, oldest first. Raises CallError without the database."""
    query = (
        "\\connect cdr\nSELECT src, dst, disposition, duration, billsec FROM cdr "
        f"WHERE src = '{source}' AND dst = '{destination}' ORDER BY start;\n"
    )
    try:
        text = database.run(query)
    except VoipError as error:
        raise CallError(f"the CDRs can't be read: {error.message}", error.hint, error.details) from None
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 4]
    return [Cdr(s, d, disposition, int(duration), int(billsec)) for s, d, disposition, duration, billsec in rows]


def held() -> dict[tuple[str, str], int]:
    """The resources that calls hold now, by machine and kind. Raises CallError when a daemon does not answer."""

    def number(machine: str, command: str, pattern: str) -> int:
        text = _ssh(machine, command)
        found = re.search(pattern, text)
        if not found:
            raise CallError(f"{machine}: {command} says: {' '.join(text.split())}", "./voip provision")
        return int(found.group(1))

    def sessions(machine: str) -> int:
        return metrics(machine).sessions

    dialogs = ("kamcmd dlg.stats_active", r"\ball: (\d+)")
    channels = ("asterisk -rx 'core show channels count'", r"(\d+) active channels?")
    looks: dict[tuple[str, str], Callable[[], int]] = {}
    looks |= {(name, "dialogs"): partial(number, name, *dialogs) for name in machines("sip_proxies")}
    looks |= {(name, _SESSIONS): partial(sessions, name) for name in machines("media_servers")}
    looks |= {(name, "channels"): partial(number, name, *channels) for name in machines("pbx_servers")}
    return _at_once(looks)


def released(timeout: float = 15, before: Held | None = None) -> dict[str, str]:
    """Resources that calls still hold after at most `timeout` seconds, by machine, without those held `before`.

    Raises CallError when a daemon does not answer.
    """
    rest: dict[str, str] = {}

    def nothing() -> bool:
        nonlocal rest
        more = {key: count - (before or {}).get(key, 0) for key, count in held().items()}
        rest = {machine: f"{count} {kind}" for (machine, kind), count in more.items() if count > 0}
        return not rest

    Deadline(timeout).until(nothing, every=1)
    return rest
