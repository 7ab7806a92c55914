"""What Molecule calls in a scenario's environment: `python -m voip_stack.roletest.scenarios ACTION`.

The actions are create, claim, reboot, destroy and login. The scenario's `hosts.yml` lists the guests: each host with a
variable `guest` is one, and the variable holds what differs from a guest's defaults. `create` writes how they are
reached into Molecule's own inventory. scenario_unit and scenario_check there say what to look at when the first
guest's role fails.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from voip_stack import cli, files, lab, packages, paths, provision, settings, ui
from voip_stack.errors import InventoryError
from voip_stack.inventory import Machine
from voip_stack.roletest import slots
from voip_stack.roletest.slots import Wanted
from voip_stack.tell import lines
from voip_stack.vms import ssh, store

SCENARIOS = paths.REPOSITORY / "molecule"
REBOOTED = "rebooted"  # this file says that a scenario's guest was: what comes back from an outage is not tested again


def hosts(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The hosts of an inventory's group and of its children, with their variables."""
    found: dict[str, dict[str, Any]] = {name: values or {} for name, values in (group.get("hosts") or {}).items()}
    for child in (group.get("children") or {}).values():
        for name, values in hosts(child or {}).items():
            found[name] = found.get(name, {}) | values
    return found


def groups(scenario: str) -> dict[str, set[str]]:
    """The groups of each host of `scenario`."""
    found: dict[str, set[str]] = {}

    def walk(group: dict[str, Any], above: set[str]) -> None:
        for host in group.get("hosts") or {}:
            found.setdefault(host, set()).update(above)
        for name, child in (group.get("children") or {}).items():
            walk(child or {}, above | {name})

    walk(yaml.safe_load((SCENARIOS / scenario / "hosts.yml").read_text())["all"], set())
    return found


def wanted(file: Path) -> list[Wanted]:
    """The guests that the inventory `file` asks for. Raises InventoryError naming the host and the key."""
    found = []
    for name, values in hosts(yaml.safe_load(file.read_text())["all"]).items():
        if "guest" not in values:
            continue
        options = dict(values["guest"] or {})
        try:
            options["networks"] = tuple(options.get("networks", Wanted.networks))
            found.append(Wanted(name, **options))
        except TypeError:
            known = ", ".join(Wanted.__dataclass_fields__)
            raise InventoryError(f"{file}: {name}: guest: an unknown key in {options}", f"known are: {known}") from None
    if not found:
        raise InventoryError(f"{file} asks for no guest", "give a host the variable `guest`, if only `guest: {}`")
    return found


def reach(machine: Machine) -> dict[str, str]:
    """How Ansible, testinfra and `molecule login` reach a guest, and its addresses, by the names that roles use."""
    addresses = {f"{network}_address": str(address) for network, address in machine.addresses.items()}
    conf = settings.load()
    return {
        "ansible_host": machine.name,
        "ansible_user": lab.current().inventory.user,
        "ansible_ssh_common_args": f"-F {ssh.config_path()}",
        **addresses,
        # From .env, which Molecule does not read.
        "voip_cache_dir": str(conf.cache_dir),
        "voip_secrets_dir": str(conf.secrets_dir),
        "voip_package_proxy_port": str(conf.package_proxy_port),
    }


def create(scenario: str) -> None:
    """Restore the guests of this scenario and write Molecule's inventory of them."""
    directory = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"])
    asked = wanted(directory / "hosts.yml")
    lab.current().up()
    packages.proxy.start(lab.current().package_addresses)
    for name in packages.needed_by(roles(scenario)):
        packages.ensure(name, progress=lines(ui.say))
    made = slots.create(scenario, asked, ui.say)
    inventory = {"all": {"hosts": {name: reach(machine) for name, machine in made.items()}}}
    files.write(Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], "inventory", "guests.json"), json.dumps(inventory))
    Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], REBOOTED).unlink(missing_ok=True)


def variables(scenario: str) -> dict[str, Any]:
    """The variables of all hosts of `scenario`."""
    return dict(yaml.safe_load((SCENARIOS / scenario / "hosts.yml").read_text())["all"].get("vars", {}))


def roles(scenario: str) -> set[str]:
    """The roles that `scenario` applies to its hosts, the peers' too."""

    def found(node: Any) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            yield from value if key == "scenario_roles" else found(value)

    return set(found(yaml.safe_load((SCENARIOS / scenario / "hosts.yml").read_text())))


def tested_package(scenario: str) -> str:
    """Name and version of `scenario_package` on the tested guest; empty when the scenario names none."""
    name = variables(scenario).get("scenario_package")
    if not name:
        return ""
    first = slots.guests_of(scenario)[wanted(SCENARIOS / scenario / "hosts.yml")[0].host]
    return ssh.run(first, "dpkg-query", "--show", "--showformat=${Package} ${Version}", name).stdout


def evidence(scenario: str) -> str:
    """Why `scenario` failed, as its guests tell: journals, the configuration's check, the console, the way in."""
    names = [guest.host for guest in wanted(SCENARIOS / scenario / "hosts.yml")]
    looks = variables(scenario)
    there = slots.guests_of(scenario)
    first = there.get(names[0])
    if first is None:
        return "its guests were not made"
    parts = []
    for name in filter(there.get, names):
        listed = ssh.run(there[name], "systemctl", "list-units", "--failed", "--plain", "--no-legend")
        units = [line.split()[0] for line in listed.stdout.splitlines() if line]
        if name == names[0] and looks["scenario_unit"] not in units:
            units.append(looks["scenario_unit"])
        parts += [provision.journal(there[name], unit).replace(f" on {there[name]} ", f" on {name} ") for unit in units]
    check = looks["scenario_check"]
    said = ssh.run(first, "sh", "-c", f"({check}) 2>&1 | tail -n 15", sudo=True).stdout.rstrip()
    parts.append(f"--- {check}\n{said or 'nothing to say'}")
    console = store.console_log(first).read_text(errors="replace").splitlines()[-12:]
    parts.append("\n".join([f"--- the console of {names[0]} ends with", *console]))
    parts.append(f"--- to look at it: molecule login --scenario-name {scenario} --host {names[0]}")
    return "\n".join(parts)


def main() -> None:
    scenario = os.environ.get("MOLECULE_SCENARIO_NAME", "")
    match sys.argv[1:]:
        case ["create"]:
            create(scenario)
        case ["claim"]:
            slots.claim(scenario)
        case ["reboot"]:
            slots.reboot(scenario, wanted(Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"], "hosts.yml"))[0])
            Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], REBOOTED).touch()
        case ["destroy"]:
            slots.destroy(scenario, ui.say)
        case ["login", machine]:
            os.execvp("ssh", ssh.argv(machine, options=["-t"]))  # noqa: S606  # the user's own ssh
        case _:
            sys.exit("usage: python -m voip_stack.roletest.scenarios create|claim|reboot|destroy|login MACHINE")


if __name__ == "__main__":
    cli.guard(main)
