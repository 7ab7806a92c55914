"""CDRs of calls while every service on their path is killed again and again."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from voip_stack import cdr, vms
from voip_stack.calls import probes
from voip_stack.calls.phone import Phone
from voip_stack.deadline import Deadline
from voip_stack.services import database

CALLS, KILLS = 200, 3  # kills per unit
UNITS = {  # by unit: a machine, or a group
    "postgresql@17-main": "infra-1",
    "rabbitmq-server": "infra-1",
    "cdr-publisher": "pbx_servers",
    "cdr-spool": "pbx_servers",
}
# All events in the queue `cdr`. They are not acknowledged, so they stay there for the queue's reader.
READ = """
import pika, sys
with pika.BlockingConnection(pika.URLParameters(sys.stdin.read())) as broker:
    for method, properties, body in broker.channel().consume("cdr", inactivity_timeout=3):
        if method is None:
            break
        print(properties.message_id, body.decode())
"""


def events(numbers: tuple[str, str], since: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of calls between two numbers in the queue: message id, payload. None while it is away."""
    done = vms.ssh.run(probes.machines("pbx_servers")[0], "python3", "-c", READ, input=cdr.login(), timeout=120)
    found = [line.partition(" ") for line in done.stdout.splitlines()]
    told = [(name, json.loads(text)) for name, _, text in found]
    return [
        (name, event) for name, event in told if (event["src"], event["dst"]) == numbers and event["start"] >= since
    ]


def processed(ssh: Callable[..., str]) -> int:
    """Calls that all PBXs have processed since their start: each makes one CDR."""
    found = re.findall(r"(\d+) calls? processed", ssh("pbx_servers", "asterisk", "-rx", "core show channels count"))
    assert len(found) == len(probes.machines("pbx_servers"))
    return sum(map(int, found))


@pytest.mark.alone
@pytest.mark.usefixtures("unlimited")
@pytest.mark.takes(150)
def test_no_cdr_is_lost_and_none_counted_twice_whatever_is_killed(
    phones: list[Phone], ssh: Callable[..., str], record_property: Callable[[str, object], None]
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # noqa: T201  # to repeat a failed run
    chance = random.Random(seed)  # noqa: S311  # not a secret
    kills = [unit for unit in UNITS for _ in range(KILLS)]
    chance.shuffle(kills)
    caller, numbers = phones[0], (phones[0].number, "600")
    since = database.run(
        "\\connect cdr\nSELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS');\n"
    ).strip()
    begin, before = time.monotonic(), processed(ssh)
    answered = refused = 0
    while answered < CALLS or kills:
        # Without PostgreSQL the proxy can't authenticate and refuses: such a call has no CDR, and is repeated.
        wanted = max(CALLS - answered, 5 * len(kills))
        with caller.call("600", seconds=1, count=wanted, at_once=6) as leg:
            while kills and leg.returncode is None:
                time.sleep(chance.uniform(1, 6))
                unit = kills.pop()
                ssh(UNITS[unit], "systemctl", "kill", "--signal=KILL", unit)
            leg.wait()
        answered += leg.events.count("answered")
        refused += wanted - leg.events.count("answered")
        assert refused < 10 * CALLS, "the proxy lets nobody in any more"
    assert probes.released(60) == {}  # a phone may have given up before the answer
    made = processed(ssh) - before
    said = time.monotonic()
    found: list[tuple[str, dict[str, Any]]] = []

    def come() -> bool:
        nonlocal found
        found = events(numbers, since)
        return len({name for name, _ in found}) >= made

    Deadline(120).until(come, every=2)
    rows = database.run(
        f"\\connect cdr\nSELECT uniqueid || ':' || sequence FROM cdr WHERE src = '{numbers[0]}' AND dst = '600'"
        f" AND start >= '{since}';\n"
    ).split()
    ids = [name for name, _ in found]
    record_property("CDRs; calls answered, refused without PostgreSQL", f"{made}; {answered}, {refused}")
    record_property("events that came more than once", len(ids) - len(set(ids)))
    record_property(
        "calls and kills, and until the last event", f"{said - begin:.0f} s, {time.monotonic() - said:.0f} s"
    )
    assert answered <= made
    assert len(rows) == made
    assert sorted(set(ids)) == sorted(rows)
    assert len({json.dumps(event, sort_keys=True) for _, event in found}) == len(rows), "one id, different events"
