"""Provisioning: the playbook against running guests, and the evidence a person needs when it fails."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voip_stack import components, images, inventory, lab, packages, paths, secrets, settings, vms
from voip_stack.errors import ProvisionError
from voip_stack.host import speed
from voip_stack.images.store import digest
from voip_stack.inventory import Machine
from voip_stack.tell import Progress, nobody

PLAYBOOK = paths.ANSIBLE / "playbooks" / "provision-vms.yml"
# The stamp on a machine: the digest of the inputs of its last complete, successful provisioning.
STAMP = "/var/lib/voip-stack/provisioned"


@dataclass(frozen=True)
class Report:
    """The result of a run: changed tasks by machine, seconds by role and machine."""

    changed: dict[str, list[str]]
    seconds: dict[str, dict[str, float]]
    failed: list[dict[str, str]]

    @property
    def changes(self) -> int:
        return sum(len(tasks) for tasks in self.changed.values())


def mitogen_strategy_plugins() -> Path | None:
    """Mitogen's strategy plugins, None when it is switched off or not installed."""
    found = importlib.util.find_spec("ansible_mitogen") if settings.load().mitogen else None
    return Path(found.origin).parent / "plugins" / "strategy" if found and found.origin else None


def environment() -> dict[str, str]:
    """Ansible's environment here: our configuration, the settings, Mitogen if it is available."""
    values = {**os.environ, **settings.load().environment(), "ANSIBLE_CONFIG": str(paths.ANSIBLE / "ansible.cfg")}
    # Per connection. Several emulated guests answer late on a slow computer when asked at once.
    values |= {"ANSIBLE_TIMEOUT": str(round(speed.patient(60)))}
    plugins = mitogen_strategy_plugins()
    if plugins:
        values |= {"ANSIBLE_STRATEGY_PLUGINS": str(plugins), "VOIP_STRATEGY": "mitogen_host_pinned"}
        # Mitogen warns about each Ansible newer than its last release; we run the pair pinned in our lock.
        values |= {"ANSIBLE_DEPRECATION_WARNINGS": "no"}
    return values


def tags() -> list[str]:
    """The tags of the playbook."""
    return [*inventory.load().components, "install", "configure", "service"]


def _digest(machine: Machine) -> str:
    """The inputs of a machine's provisioning: those of its image, settings, secrets in files, Vault's CA.

    Also the machines of the groups that its roles name: their addresses are in its daemons' configuration. /etc/hosts,
    which names all machines, is updated by the next provisioning. The agent delivers a new secret in Vault.
    """
    conf = settings.load()
    names = secrets.catalogue() if conf.secrets == "file" else ("vault/ca.pem",)
    kept = [file for name in names if (file := conf.secrets_dir / name).exists()]
    named = images.groups_named(machine.name)
    others = [(m.name, *m.addresses.values()) for m in inventory.load().machines.values() if set(m.groups) & named]
    return digest(images.key(machine.name), others, conf.environment(), *kept)


def _on_each(machines: Sequence[Machine], script: Callable[[Machine], str]) -> dict[str, str]:
    """The output of a shell script on each machine, as root; empty for one that does not answer."""

    def run(machine: Machine) -> str:
        return vms.ssh.run(machine.name, "sh", "-c", script(machine), sudo=True).stdout.strip()

    with concurrent.futures.ThreadPoolExecutor(max(1, len(machines))) as pool:
        return dict(zip([m.name for m in machines], pool.map(run, machines), strict=True))


def stale(machines: Sequence[Machine]) -> list[str]:
    """The names of `machines` with an outdated stamp: other roles, inventory, settings or secrets.

    A machine that somebody has changed by hand is not among them: only run() finds that.
    """
    found = _on_each(machines, lambda _machine: f"cat {STAMP}")
    return [m.name for m in machines if found[m.name] != _digest(m)]


def mark(machines: Sequence[Machine]) -> None:
    """Stamp `machines` with the digest of the current roles, inventory, settings and secrets."""
    _on_each(machines, lambda m: f"mkdir -p {Path(STAMP).parent} && echo {_digest(m)} >{STAMP}")


def _check(limit: str, names: Sequence[str]) -> None:
    stack = inventory.load()
    for name in filter(None, limit.split(",")):
        stack.select([name])
    for name in names:
        if name not in tags():
            raise ProvisionError(f"there is no tag {name!r}", f"the tags are: {', '.join(tags())}")


def run(
    limit: str = "",
    only_tags: str = "",
    skip_tags: str = "",
    check: bool = False,
    verbosity: int = 0,
    extra_vars: Sequence[str] = (),
    extra_args: Sequence[str] = (),
    progress: Progress = nobody,
) -> Report:
    """Provision the machines of `limit` (names or groups, comma-separated; all when empty).

    Raises InventoryError and ProvisionError before anything runs for an unknown machine or tag; ProvisionError with the
    daemon's journal when a task fails.
    """
    _check(limit, [t for t in f"{only_tags},{skip_tags}".split(",") if t])
    machines = inventory.load().select([n for n in limit.split(",") if n])
    vms.require_running(machines)
    packages.proxy.start(lab.current().package_addresses)
    for name in packages.needed_by(c.name for c in components.enabled()):
        packages.ensure(name, progress=progress)
    whole = not (only_tags or skip_tags or check or extra_vars or extra_args)
    if (extra_vars or extra_args) and not check:
        _on_each(machines, lambda _machine: f"rm -f {STAMP}")
    command = [str(Path(sys.executable).with_name("ansible-playbook")), str(PLAYBOOK)]
    # Ansible's own inventory always has the group infra.
    options = {
        "--limit": limit or ("all:!infra" if inventory.load().devstack else ""),
        "--tags": only_tags,
        "--skip-tags": skip_tags,
    }
    command += [f"{option}={value}" for option, value in options.items() if value]
    command += [f"--extra-vars={value}" for value in extra_vars]
    command += ["--check", "--diff"] if check else []
    command += ["-" + "v" * verbosity] if verbosity else []
    command += extra_args
    with tempfile.NamedTemporaryFile(prefix="voip-report-") as report_file:
        values = environment() | {
            "VOIP_REPORT": report_file.name,
            "ANSIBLE_CALLBACKS_ENABLED": "voip_summary",
            "ANSIBLE_STDOUT_CALLBACK": "default" if verbosity else "voip_summary",
            "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "no",
        }
        done = subprocess.run(command, env=values, stdin=subprocess.DEVNULL, check=False)
        text = Path(report_file.name).read_text()
    found: dict[str, Any] = json.loads(text) if text else {}
    report = Report(found.get("changed", {}), found.get("seconds", {}), found.get("failed", []))
    if done.returncode != 0:
        raise _failure(report)
    if whole:
        mark(machines)
    return report


def _failure(report: Report) -> ProvisionError:
    if not report.failed:
        return ProvisionError("ansible-playbook failed before its first task", "its message stands above")
    first = report.failed[0]
    host, role = first["host"], first["role"]
    if first.get("unreachable"):
        return ProvisionError(
            f"{host} can't be reached by ssh: {first['message']}", f"./voip vms.status; ./voip vms.logs {host}"
        )
    component = inventory.load().components.get(role)
    details = journal(host, component.units[0]) if component and component.units else ""
    return ProvisionError(
        f"{host}: {first['task']}: {first['message']}", f"mend it, then: ./voip provision --limit {host}", details
    )


def journal(host: str, unit: str, lines: int = 20) -> str:
    """The end of a unit's journal on `host`, with a heading; says so when the machine does not answer."""
    done = vms.ssh.run(host, *("journalctl", "--no-pager", "-o", "cat", "-n", str(lines), "-u", unit), sudo=True)
    return f"--- the journal of {unit} on {host} ends with\n{done.stdout.rstrip() or done.stderr.rstrip()}"
