"""Test sessions: `nox --list`. Each has an environment of its own, from the same hash-locked list."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "unit"]

HERE = Path(__file__).parent
SHELL = ["voip", ".ci/run"]


def install(session: nox.Session) -> None:
    """The locked requirements, and the library from src/."""
    stamp = Path(session.virtualenv.location) / ".requirements"
    lock = (HERE / "requirements" / "dev.txt").read_text()
    if not stamp.exists() or stamp.read_text() != lock:
        build = str(HERE / "requirements" / "build.txt")
        session.install("--require-hashes", "--build-constraints", build, "-r", str(HERE / "requirements" / "dev.txt"))
        stamp.write_text(lock)
    session.env["PYTHONPATH"] = str(HERE / "src")
    session.env["ANSIBLE_CONFIG"] = str(HERE / "ansible" / "ansible.cfg")


def need(session: nox.Session, *tools: str) -> None:
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        session.error(f"missing: {', '.join(missing)}; ./voip doctor --fix installs them")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, mypy --strict, ansible-lint (production), yamllint, shellcheck, components' descriptors, every XML file."""
    need(session, "shellcheck", "xmllint")
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("yamllint", "--strict", ".")
    session.run("ansible-lint", "--offline", "--profile", "production", "ansible", "molecule", silent=True)
    session.run("shellcheck", *SHELL, external=True)
    session.run("invoke", "components.list", silent=True)  # reads and checks every descriptor
    scenarios = [*(HERE / "src/voip_stack/calls/scenarios").glob("*.xml"), *(HERE / "molecule").glob("*/*.xml")]
    session.run("xmllint", "--noout", "--nonet", *map(str, sorted(scenarios)), external=True)


@nox.session
def unit(session: nox.Session) -> None:
    """The library alone: no virtual machine, libvirt's own test driver where libvirt is involved."""
    install(session)
    session.run("pytest", "tests/unit", *session.posargs)


@nox.session(default=False)
def molecule(session: nox.Session) -> None:
    """Each role alone on guests of its own: `-- ROLE ...`, `-- --stale`, `-- --budget MINUTES`, `-- --jobs 1`."""
    install(session)
    session.run("python", "-m", "voip_stack.roletest.runner", *session.posargs, env=dict(os.environ))


@nox.session(default=False)
def mutants(session: nox.Session) -> None:
    """Roles broken on purpose (molecule/ROLE/mutants.yml): each break must turn its scenario red. `-- ROLE ...`."""
    install(session)
    session.run("python", "-m", "voip_stack.roletest.mutants", *session.posargs, env=dict(os.environ))


@nox.session(default=False)
def integration(session: nox.Session) -> None:
    """The full stack with real calls: brought up, then tests/{integration,security,functional,quality}."""
    install(session)
    if "--part=rest" not in session.posargs:
        session.run("invoke", "up")
    session.run("python", "-m", "voip_stack.suites", *session.posargs, env=dict(os.environ))


@nox.session(default=False)
def providers(session: nox.Session) -> None:
    """The full stack with secrets in files, with a double of devstack-core in place of infra-1, and back each time."""
    install(session)
    session.run("invoke", "up")
    session.run("pytest", "--timeout=1800", "tests/providers", *session.posargs, env=dict(os.environ))
