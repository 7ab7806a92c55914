"""Evidence of green scenarios: `molecule/proven.yml`, a line for each with the digest of what it depends on.

The runner writes a line after a green run on a clean tree. A scenario whose digest is another today is stale. What
counts: the roles that it applies, the scenario, what all scenarios share, the variables of inventory and components
that these name, and the locked versions. The library counts for two small scenarios alone (scenario_library).
"""

from __future__ import annotations

import re
import subprocess
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from voip_stack import components, files, inputs, packages, paths, settings
from voip_stack.errors import VoipError
from voip_stack.images.store import digest
from voip_stack.roletest import scenarios
from voip_stack.vms import store

FILE = scenarios.SCENARIOS / "proven.yml"
_HEAD = """---
# Written by `nox -s molecule` after a green run on a clean tree; docs/roles.md says what counts. Not edited by hand.
# seconds: as a fast computer takes, two scenarios at a time. package: what was tested, where a package may be missing.
# yamllint disable rule:line-length
"""
_LINE = re.compile(r"(\w+): (\{.*\})")
_DATE = "%Y-%m-%dT%H:%MZ"

# Of every scenario. The two files of variables are read by Ansible itself and by tests, which name none of them.
_SHARED = (
    *(
        "molecule/shared",
        "molecule/conftest.py",
        ".config/molecule",
        "ansible/ansible.cfg",
        "ansible/plugins",
        "ansible/tasks",
    ),
    *(f"ansible/inventory/group_vars/all/{name}.yml" for name in ("connection", "networks")),
    "ansible/roles/common/templates/apt-proxy.conf.j2",  # which prepares a plain guest
)
_LIBRARY = (  # of src/voip_stack: what guests stand on
    *("vms", "images", "lab", "host", "packages", "roletest"),
    *("deadline.py", "files.py", "inventory.py", "paths.py", "settings.py"),
)


@dataclass(frozen=True)
class Proof:
    """A green run of a scenario. `seconds` as a fast computer takes; `package` is the daemon's name and version."""

    digest: str
    date: str  # UTC, to the minute
    tests: int
    seconds: int
    accelerator: str
    package: str = ""

    def __str__(self) -> str:
        return f"{self.date[:10]}, {self.tests} tests" + (f", {self.package}" if self.package else "")


def load(file: Path = FILE) -> dict[str, Proof]:
    """The proofs by scenario. Raises VoipError, naming the line, for a file that the runner did not write so."""
    found: dict[str, Proof] = {}
    lines = file.read_text().splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith(("#", "---")):
            continue
        try:
            match = _LINE.fullmatch(line)
            if not match:
                raise ValueError("is no line of the runner's")
            name, proof = match.group(1), _parse(yaml.safe_load(match.group(2)))
            if name in found:
                raise ValueError(f"{name} stands there twice")
            if not (scenarios.SCENARIOS / name / "molecule.yml").exists():
                raise ValueError(f"there is no scenario {name}")
        except (ValueError, yaml.YAMLError) as error:
            said = str(error).splitlines()[0]
            hint = f"remove the line, and its scenario is run again; or: git checkout -- molecule/{file.name}"
            raise VoipError(f"{file.name} line {number}: {said}", hint, line) from None
        found[name] = proof
    return found


def _parse(values: Any) -> Proof:
    known = {field.name: field.type for field in fields(Proof)}
    wrong = set(values) - set(known) if isinstance(values, dict) else {"no mapping"}
    missing = set(known) - {"package"} - set(values)
    if wrong or missing:
        raise ValueError(
            ", ".join([f"unknown: {k}" for k in sorted(wrong)] + [f"missing: {k}" for k in sorted(missing)])
        )
    proof = Proof(**values)
    if not re.fullmatch(r"[0-9a-f]{16}", str(proof.digest)):
        raise ValueError(f"digest: {proof.digest!r} is none")
    try:
        when = time.strptime(proof.date, _DATE)
    except (ValueError, TypeError):
        raise ValueError(f"date: {proof.date!r} is none, e.g. 2026-12-01T09:30Z") from None
    if time.mktime(when) > time.mktime(time.gmtime()) + 86400:
        raise ValueError(f"date: {proof.date} is still to come")
    for key in ("tests", "seconds"):
        if not isinstance(getattr(proof, key), int) or getattr(proof, key) < 1:
            raise ValueError(f"{key}: {getattr(proof, key)!r} is no count")
    return proof


def record(name: str, proof: Proof, file: Path = FILE) -> None:
    """Write the line of scenario `name`; the others stay as they are. Raises VoipError for a file that is damaged."""
    with store.locked("proven"):
        proofs = load(file) | {name: proof}
        lines = [f"{name}: {_flow(asdict(proof))}\n" for name, proof in sorted(proofs.items())]
        files.write(file, _HEAD + "".join(lines), mode=0o644)


def _flow(values: dict[str, Any]) -> str:
    dumped = yaml.safe_dump(
        {k: v for k, v in values.items() if v}, default_flow_style=True, sort_keys=False, width=1000
    )
    return dumped.strip()


def now() -> str:
    return time.strftime(_DATE, time.gmtime())


def unclean() -> list[str]:
    """The files of this checkout that differ from its commit, proofs aside. A checkout without git is all unclean."""
    command = [
        "git",
        "-C",
        str(paths.REPOSITORY),
        "status",
        "--porcelain",
        "--",
        ".",
        f":!{FILE.relative_to(paths.REPOSITORY)}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ["git is missing"]
    return [line[3:] for line in done.stdout.splitlines()] if done.returncode == 0 else ["not a checkout of git"]


def stale(names: Iterable[str], proofs: dict[str, Proof]) -> list[str]:
    """Those of the scenarios `names` that are not proven as they are today, in the same order."""
    return [name for name in names if name not in proofs or proofs[name].digest != digest_of(name)]


def digest_of(scenario: str, repository: Path = paths.REPOSITORY) -> str:
    """The digest of what `scenario` depends on."""
    roles = roles_of(scenario, repository)
    told = scenarios.variables(scenario)
    wanted = [*(f"ansible/roles/{role}" for role in roles), f"molecule/{scenario}", *_SHARED]
    wanted += told.get("scenario_reads", [])
    if told.get("scenario_library"):
        wanted += ["libvirt", *(f"src/voip_stack/{part}" for part in _LIBRARY)]
    files = [file for path in wanted for file in _files(repository / path)]
    texts = {str(file.relative_to(repository)): file.read_bytes() for file in files}
    every = components.load(settings.parse("", {}), repository / "ansible")  # never by the user's own settings
    variables = inputs.known(repository / "ansible", every, scenarios.groups(scenario).values())
    told_of = inputs.named(b"\n".join(texts.values()).decode(errors="replace"), variables)
    recipes = [packages.decided(name) for name in packages.needed_by(roles)]
    return digest(sorted(texts.items()), sorted(told_of.items()), recipes, _versions(repository))


def _files(path: Path) -> list[Path]:
    """The files below `path` that can change what a scenario does."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    # A descriptor counts by the variables that follow from it, where they are named.
    left_out = ("README.md", "mutants.yml", "component.yml")
    return [f for f in found if f.is_file() and not f.is_symlink() and f.suffix != ".pyc" and f.name not in left_out]


def roles_of(scenario: str, repository: Path = paths.REPOSITORY) -> list[str]:
    """The roles that `scenario` applies, and those that these or its own tasks include or depend on."""
    found: set[str] = set()
    more = scenarios.roles(scenario) | _included(repository / "molecule" / scenario)
    while more:
        found |= more
        more = {name for role in more for name in _included(repository / "ansible/roles" / role)} - found
    return sorted(found)


def _included(directory: Path) -> set[str]:
    """The roles that the tasks, handlers and metadata in `directory` name."""

    def names(node: Any) -> Iterator[str]:
        if isinstance(node, list):
            for item in node:
                yield from names(item)
        elif isinstance(node, dict):
            for key, value in node.items():
                if key.rpartition(".")[2] in ("include_role", "import_role") and isinstance(value, dict):
                    yield str(value["name"])
                elif key == "dependencies":
                    yield from (str(item["role"] if isinstance(item, dict) else item) for item in value)
                yield from names(value)

    files = (file for part in ("tasks", "handlers", "meta") for file in directory.glob(f"{part}/**/*.yml"))
    return {name for file in files for name in names(yaml.safe_load(file.read_text()))}


def _versions(repository: Path) -> list[str]:
    """The locked versions, without the files' hashes, and what pytest is told."""
    locked = re.findall(r"^\S+==\S+", (repository / "requirements/dev.txt").read_text(), re.MULTILINE)
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    return [*locked, repr(project["tool"]["pytest"])]
