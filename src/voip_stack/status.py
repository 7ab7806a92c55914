"""The stack at a glance: machines, daemons, their load, and the consequences for calls while a daemon is away."""

from __future__ import annotations

import concurrent.futures
import re
from collections.abc import Sequence
from dataclasses import dataclass

from voip_stack import inventory, secrets, vms
from voip_stack.components import Component
from voip_stack.errors import VmError, VoipError
from voip_stack.inventory import Machine


@dataclass(frozen=True)
class Part:
    """A machine, or a daemon on it. `figures` is its load; `faults` is empty when all is well."""

    machine: str
    name: str
    state: str  # of the domain, or of the systemd unit
    figures: str = ""
    faults: tuple[str, ...] = ()
    hint: str = ""  # the remedy


def _script(components: Sequence[Component], machine: Machine) -> str:
    """The script for `machine`: a section per component, and one for failed units.

    It reads the secrets of _secrets(), in their order.
    """
    lines = [f"read -r {name}\n" for component in components for name in component.status_secrets]
    lines += [
        f"""
        state=$(systemctl is-active {c.units[0]})
        echo "== {c.name} $state"
        if [ "$state" = active ]; then
            :
{c.status}
        fi 2>/dev/null
        """
        for c in components
    ]
    known = " ".join(c.units[0] for c in components)
    others = f"""
        echo == others
        systemctl list-units --failed --plain --no-legend | while read -r unit rest; do
            case " {known} " in *" $unit "*) ;; *) echo "fault $unit has failed" ;; esac
        done
    """
    return "".join(lines) + others + _agent(machine) + _reach(machine)


def _secrets(components: Sequence[Component]) -> str:
    """The script's standard input: no process list shows it."""
    values = []
    for name in (name for component in components for name in component.status_secrets):
        try:
            values.append(secrets.get(name))
        except VoipError:  # Vault is sealed or away; its own part says so
            values.append("")
    return "".join(f"{value}\n" for value in values)


def _agent(machine: Machine) -> str:
    """Can it fetch new secrets from Vault?"""
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
    """Can it connect to each service that it uses on another machine?"""
    stack = inventory.load()
    tests = []
    # In parallel: a packet filter that drops packets costs the whole time-out.
    for service in stack.services:
        if service.protocol != "tcp" or service.network != "internal" or not set(service.sources) & set(machine.groups):
            continue
        for name, address in (server for group in service.groups for server in stack.servers(group)):
            port = service.ports[0]
            test = f"timeout 20 bash -c '</dev/tcp/{address}/{port}' 2>/dev/null"
            tests.append(f"{{ {test} || echo 'fault can not reach {service.name} on {name} ({address}:{port})'; }} &\n")
    return "".join(tests) + "wait\n"


def _parts(machine: Machine, components: Sequence[Component], said: str) -> list[Part]:
    """The parts in the script's output."""
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
            figures, faults = [], [f"{component.units[0]} is {state}: {component.away}"]
        hint = f"./voip vms.ssh {machine.name} --command 'sudo journalctl --unit {component.units[0]} --lines 20'"
        parts.append(Part(machine.name, name, state, ", ".join(figures), tuple(faults), hint))
    return parts


def _look(machine: Machine, state: vms.Status) -> list[Part]:
    """The machine, and its daemons if it answers."""
    stack = inventory.load()
    components = [component for component in stack.components_of(machine) if component.away]
    lacks = "; ".join(component.away for component in components)
    if state.state != "running":
        start = "start" if state.state == "off" else "create"
        hint = f"./voip vms.{start} {machine.name}"
        return [Part(machine.name, "machine", state.state, "", (f"it is {state.state}: {lacks}",), hint)]
    done = vms.ssh.run(machine.name, "sh", "-c", _script(components, machine), input=_secrets(components), sudo=True)
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
