"""Rotation of secrets: in the server that knows them, in the store, and in the daemons' files."""

from __future__ import annotations

import concurrent.futures
import json
import tempfile
import time
from collections.abc import Sequence

from voip_stack import inventory, provision, secrets, vms
from voip_stack.components import Secret, enabled
from voip_stack.deadline import Deadline
from voip_stack.errors import VoipError
from voip_stack.services import check, make
from voip_stack.tell import Tell, lines

_DELIVERY_SECONDS = 120  # the agent checks every 30 s


def known() -> list[str]:
    """The names that rotate() accepts: those of Vault's paths."""
    return list(dict.fromkeys(secret.path for secret in secrets.catalogue().values()))


def _select(component: str) -> list[Secret]:
    servers = {c.name for c in enabled()}
    chosen = (s for s in secrets.catalogue().values() if component in ("all", s.path))
    found = [s for s in chosen if not s.issuer or s.issuer in servers]
    if not found:
        raise VoipError(f"no component {component!r} has a secret", f"name one of: all, {', '.join(known())}")
    return found


def rotate(component: str, tell: Tell) -> None:
    """Give `component` (or all) new secrets while the stack runs.

    The server learns the new password first, then the store, then the files of the daemons that log in; their
    connections go on meanwhile. Redis forgets the old password last: RTPEngine learns the new one by a restart, and
    then restores its calls. Another rotation, or `provision`, repairs one that was interrupted.

    Raises VoipError.
    """
    chosen = _select(component)
    stack = inventory.load()
    machines = list(stack.machines.values())
    vms.require_running(machines)
    stale = provision.stale(machines)
    old = {secret.name: secrets.get(secret.name) for secret in chosen}  # raises before any change
    new = {secret.name: secrets.generate() for secret in chosen}
    servers = list(dict.fromkeys(secret.issuer for secret in chosen if secret.issuer))
    if servers:
        tell(f"new passwords in {', '.join(servers)}")
        _tell_servers(servers, new | {f"{name}_before": value for name, value in old.items()}, tell)
    tell(f"new secrets in {secrets.provider().place}")
    for name, value in new.items():
        secrets.put(name, value)
    if not secrets.provider().by_agent:
        roles = {c.name for c in enabled() if set(c.secrets) & set(chosen)}
        if roles:
            provision.run(only_tags=",".join(sorted(roles)), progress=lines(tell))
    tell("waiting for the files of who logs in")
    _await_delivery(chosen, new)
    if "redis" in servers and not stack.devstack:
        tell("the old password of redis is worth nothing any more")
        provision.run(limit="infra", only_tags="redis", progress=lines(tell))
    # Machines that were up to date are so again: `up` need not check every setting.
    provision.mark([machine for machine in machines if machine.name not in stale])


def _tell_servers(servers: Sequence[str], new: dict[str, str], tell: Tell) -> None:
    """Make the new passwords (`new`, by name) valid in the servers that know them."""
    if inventory.load().devstack:
        for _ in make(check.in_servers(lambda name: new.get(name) or secrets.get(name))):
            pass
        return
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="voip-secrets-") as values:  # mode 0600
        json.dump(new, values)
        values.flush()
        provision.run(limit="infra", only_tags=",".join(servers), extra_vars=[f"@{values.name}"], progress=lines(tell))


def _await_delivery(chosen: Sequence[Secret], new: dict[str, str]) -> None:
    """Wait until each machine has all its new secrets in files. Raises VoipError, which names those that don't."""
    stack = inventory.load()
    expected = {
        machine.name: [
            new[s.name]
            for component in stack.components_of(machine)
            for s in component.secrets
            if s in chosen and s.reader == "machine"
        ]
        for machine in stack.machines.values()
    }
    waiting = {name: values for name, values in expected.items() if values}
    deadline = Deadline(_DELIVERY_SECONDS)
    while waiting:
        with concurrent.futures.ThreadPoolExecutor(len(waiting)) as pool:
            has = dict(zip(waiting, pool.map(_has, waiting, waiting.values()), strict=True))
        waiting = {name: values for name, values in waiting.items() if not has[name]}
        if waiting and deadline.is_due:
            name = next(iter(waiting))
            raise VoipError(
                f"{', '.join(waiting)}: the new secrets are not in the files after {deadline.seconds:.0f} s",
                f"./voip vms.ssh {name} --command 'sudo journalctl --unit vault-agent --lines 20'; ./voip provision",
            )
        if waiting:
            time.sleep(1)


def _has(machine: str, values: Sequence[str]) -> bool:
    """Whether each of `values` is in a file of `machine`; passed on standard input, which no process list shows."""
    stack = inventory.load()
    files = [str(file) for c in stack.components_of(stack.machine(machine)) for file in c.secret_files]
    script = f"while read -r value; do grep -qsFf - {' '.join(files)} <<E || exit 1\n$value\nE\ndone"
    text = "".join(f"{value}\n" for value in values)
    return vms.ssh.run(machine, "sh", "-c", script, input=text, sudo=True).returncode == 0


def status() -> list[tuple[str, str, str]]:
    """Secrets, certificates of CAs, the machines' logins, each with its age or expiry. Raises VoipError."""
    return [(dated.name, dated.place, _said(dated)) for dated in secrets.provider().dated()]


def _said(dated: secrets.Dated) -> str:
    if dated.ends:
        return f"ends in {_days(dated.ends.timestamp() - time.time())}"
    return f"{_days(time.time() - dated.made.timestamp())} old" if dated.made else dated.state


def _days(seconds: float) -> str:
    hours = int(seconds // 3600)
    return f"{hours // 24} d {hours % 24} h" if hours >= 24 else f"{hours} h {int(seconds % 3600 // 60)} min"
