"""The stack at a glance: machines, daemons and what they carry, and what calls lack while one of them is away."""

from __future__ import annotations

import concurrent.futures
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from voip_stack import cdr, inventory, secrets, vms
from voip_stack.calls import probes
from voip_stack.errors import CallError, VmError, VoipError
from voip_stack.inventory import Component, Machine


@dataclass(frozen=True)
class Part:
    """A machine, or a daemon on it. `figures` is what it carries; `faults` is empty when all is well."""

    machine: str
    name: str
    state: str  # of the domain, or of the systemd unit
    figures: str = ""
    faults: tuple[str, ...] = ()
    hint: str = ""  # what to do about them


# Runs on RabbitMQ's machine, which has the client for the role's proof. rabbitmqctl would start an Erlang of its own:
# 30 s under emulation. A passive declaration counts messages and needs no right to the queue
# (https://www.rabbitmq.com/docs/access-control#authorisation).
_QUEUE = """
import sys, pika
to = pika.URLParameters(sys.stdin.readline().strip())
to.socket_timeout, to.stack_timeout = 600, None  # timeout(1) ends what takes too long
try:
    with pika.BlockingConnection(to) as broker:
        found = broker.channel().queue_declare("cdr", passive=True)
        print("figure", found.method.message_count, "events wait in the queue cdr", flush=True)
except (pika.exceptions.AMQPError, OSError) as error:
    said = repr(error)
    if "ConnectionRefused" in said:
        print("fault it refuses connections: events of CDRs wait in PostgreSQL")
    elif "ClosedByBroker" in said:
        print("fault it refuses", to.credentials.username + ":", said)
    else:  # it gives a slow client up, too
        print("figure queue cdr unknown:", said)
"""


@dataclass(frozen=True)
class _Probe:
    """What calls lack while a role's daemon is `away`, and how it is asked.

    `script` is run by sh as root, and prints `figure WORDS` and `fault WORDS` for what does not work. What is only slow
    to answer lacks its figures and is no fault. $login is that of who reads events, empty when it can't be had.
    """

    away: str
    script: str = ""


_PROBES = {
    "vault_server": _Probe(
        "no secret can be renewed; calls need none",
        """
        export VAULT_ADDR=https://127.0.0.1:8200 VAULT_CACERT=/etc/vault.d/ca.pem
        vault status | awk '$1 == "Version" { print "figure version", $2 }
            $1 == "Sealed" && $2 != "false" { print "fault it is sealed: ./voip vms.start unseals it" }'
        """,
    ),
    "kamailio": _Probe(
        "no phone can register or call",
        """
        kamcmd stats.get_statistics usrloc: | awk '/registered_users/ { print "figure", $NF, "registrations" }'
        kamcmd dlg.stats_active | awk '$1 == "all:" { print "figure", $2, "calls" }'
        kamcmd dispatcher.list | awk '$1 == "URI:" { uri = $2 }
            $1 == "FLAGS:" && $2 !~ /^A/ { print "fault the PBX", uri, "does not answer OPTIONS: calls get a 503" }'
        pem=/etc/kamailio/certificate.pem
        openssl x509 -noout -enddate -dateopt iso_8601 -in $pem |
            awk -F '[= ]' '{ print "figure certificate until", $2 }'
        openssl x509 -noout -checkend 604800 -in $pem >/dev/null ||
            echo "fault its certificate ends within a week: ./voip provision; secrets.status says more"
        kamcmd rtpengine.show all | awk '$1 == "url:" { url = $2 }
            $1 == "disabled:" && $2 !~ /^0/ { print "fault RTPEngine at", url, "does not answer: calls get a 503" }'
        """,
    ),
    "rtpengine": _Probe(
        "calls get a 503",
        """
        [ -e /proc/rtpengine/control ] || echo "fault its kernel module is not loaded"
        """,
    ),
    "asterisk": _Probe(
        "calls get a 503",
        """
        asterisk -rx 'core show channels count' | awk '/active channel/ { print "figure", $1, "channels" }'
        asterisk -rx 'realtime load voicemail mailbox 0' >/dev/null # it connects at its first question
        asterisk -rx 'odbc show all' | awk '/Name:/ { name = $2 }
            /Number of active connections:/ && $5 == 0 { print "fault no connection to the database", name }'
        """,
    ),
    "cdr": _Probe(
        "CDRs wait on the PBX",
        """
        spool=$(systemctl show --property=ReadWritePaths --value cdr-spool.service)
        echo "figure $(cat "$spool"/* 2>/dev/null | wc -l) CDRs wait"
        state=$(systemctl is-active cdr-publisher.service)
        [ "${state:-active}" = active ] ||
            echo "fault cdr-publisher.service is $state: events of CDRs wait in PostgreSQL"
        """,
    ),
    "postgresql": _Probe(
        "no phone can register or call; CDRs wait on the PBX",
        """
        cd /
        runuser -u postgres -- psql -XAtq cdr -c 'SELECT count(*) FROM cdr_event' |
            sed 's/$/ events of CDRs wait/; s/^/figure /'
        runuser -u postgres -- psql -XAtq -F ' of ' -c "SELECT count(*), current_setting('max_connections')
            FROM pg_stat_activity WHERE backend_type = 'client backend'" | sed 's/$/ connections/; s/^/figure /'
        """,
    ),
    "redis": _Probe("a restart of RTPEngine takes the sound from its calls"),
    "rabbitmq": _Probe(
        "events of CDRs wait in PostgreSQL",
        f"""
        if [ -z "$login" ]; then
            echo "figure queue cdr unknown: its reader's password can't be had"
        else
            echo "$login" | timeout 30 python3 -c {shlex.quote(_QUEUE)}
            [ $? != 124 ] || echo "figure queue cdr unknown: no answer within 30 s"
        fi
        """,
    ),
}


def _script(components: Sequence[Component], machine: Machine) -> str:
    """What is asked of `machine`: a section per component, and one of units that have failed."""
    lines = [
        f"""
        state=$(systemctl is-active {c.unit})
        echo "== {c.name} $state"
        if [ "$state" = active ]; then
            : {_PROBES[c.role].script}
        fi 2>/dev/null
        """
        for c in components
        if c.role in _PROBES
    ]
    known = " ".join(c.unit for c in components)
    others = f"""
        echo == others
        systemctl list-units --failed --plain --no-legend | while read -r unit rest; do
            case " {known} " in *" $unit "*) ;; *) echo "fault $unit has failed" ;; esac
        done
    """
    return "read -r login" + "".join(lines) + others + _agent(machine) + _reach(machine)


def _login(components: Sequence[Component]) -> str:
    """What the script reads: by standard input, where no process list shows it."""
    try:
        return f"{cdr.login()}\n" if any(c.role == "rabbitmq" for c in components) else "\n"
    except VoipError:  # Vault is sealed or away, which its own part says
        return "\n"


def _agent(machine: Machine) -> str:
    """Does it get what is new in Vault?"""
    if not secrets.by_agent(machine):
        return ""
    lost = f"new secrets and certificates do not come: ./voip provision --limit {machine.name}"
    return f"""
        unit=vault-agent.service
        state=$(systemctl is-active $unit)
        tried='auth.handler: (authentication successful|renewed auth token|error authenticating)'
        if [ "${{state:-active}}" != active ]; then
            echo "fault $unit is $state: {lost}"
        elif journalctl --quiet --boot --unit $unit --output cat --lines 1 --grep "$tried" | grep -q error; then
            echo "fault $unit could not log in at Vault when it last tried: {lost}"
        fi
    """


def _reach(machine: Machine) -> str:
    """Can it connect to each service of another machine that it is meant to use?"""
    stack = inventory.load()
    tests = []
    # Side by side: a packet filter that drops what it does not like costs the whole time.
    for service in stack.services:
        if service.protocol != "tcp" or service.network != "internal" or not set(service.sources) & set(machine.groups):
            continue
        for name, address in stack.servers(service.group):
            port = service.ports[0]
            test = f"timeout 20 bash -c '</dev/tcp/{address}/{port}' 2>/dev/null"
            tests.append(f"{{ {test} || echo 'fault can not reach {service.name} on {name} ({address}:{port})'; }} &\n")
    return "".join(tests) + "wait\n"


def _parts(machine: Machine, components: Sequence[Component], said: str) -> list[Part]:
    """The parts that the script's output tells of."""
    parts = []
    for section in re.split(r"^== ", said, flags=re.MULTILINE)[1:]:
        head, *lines = section.splitlines()
        name, _, state = head.partition(" ")
        figures = [line.removeprefix("figure ") for line in lines if line.startswith("figure ")]
        faults = [line.removeprefix("fault ") for line in lines if line.startswith("fault ")]
        component = next((c for c in components if c.name == name), None)
        if component is None:
            if faults:
                parts.append(Part(machine.name, "others", "", "", tuple(faults)))
            continue
        if not state:
            state, figures = "unknown", ["systemd does not answer in time"]
        elif state != "active":
            figures, faults = [], [f"{component.unit} is {state}: {_PROBES[component.role].away}"]
        elif component.role == "rtpengine":
            try:
                now = probes.metrics()
                figures.append(f"{now.sessions} sessions, {now.kernel_streams} streams in the kernel")
            except probes.SilentError as error:
                figures.append(error.message)
            except CallError as error:
                faults.append(error.message)
        hint = f"./voip vms.ssh {machine.name} --command 'sudo journalctl --unit {component.unit} --lines 20'"
        parts.append(Part(machine.name, name, state, ", ".join(figures), tuple(faults), hint))
    return parts


def _look(machine: Machine, state: vms.Status) -> list[Part]:
    """The machine, and what is on it when it can be asked."""
    stack = inventory.load()
    components = [c for c in stack.components.values() if c.enabled and c.group in machine.groups]
    lacks = "; ".join(_PROBES[c.role].away for c in components if c.role in _PROBES)
    if state.state != "running":
        start = "start" if state.state == "off" else "create"
        hint = f"./voip vms.{start} {machine.name}"
        return [Part(machine.name, "machine", state.state, "", (f"it is {state.state}: {lacks}",), hint)]
    done = vms.ssh.run(machine.name, "sh", "-c", _script(components, machine), input=_login(components), sudo=True)
    if done.returncode in (vms.ssh.LATE, vms.ssh.NO_SSH):
        return [Part(machine.name, "machine", state.state, "", (f"it does not answer by ssh: {done.stderr.strip()}",))]
    minutes = int(state.uptime or 0) // 60
    up = Part(machine.name, "machine", state.state, f"up {minutes // 60}:{minutes % 60:02} h")
    return [up, *_parts(machine, components, done.stdout)]


def look() -> list[Part]:
    """All machines and daemons, in the inventory's order. Raises VmError when none runs, or libvirt can't be asked."""
    machines = list(inventory.load().machines.values())
    states = vms.status(machines)
    if not any(state.state == "running" for state in states):
        raise VmError("no machine of the stack runs", "./voip up")
    with concurrent.futures.ThreadPoolExecutor(len(machines) or 1) as pool:
        return [part for parts in pool.map(_look, machines, states) for part in parts]
