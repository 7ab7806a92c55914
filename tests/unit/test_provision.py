"""The stamps that `up` trusts, without a machine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from voip_stack import inventory, packages, provision, secrets, settings, vms
from voip_stack.packages import proxy
from voip_stack.secrets import rotation


@pytest.fixture
def stamps(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Each machine's stamp; a machine that is missing here does not answer."""
    found: dict[str, str] = {}

    def run(name: str, *_command: str, sudo: bool) -> subprocess.CompletedProcess[str]:
        assert sudo
        return subprocess.CompletedProcess([], 0 if name in found else 255, found.get(name, "") + "\n", "")

    monkeypatch.setattr(vms.ssh, "run", run)
    return found


def test_a_machine_is_stale_without_a_stamp_or_with_an_old_one(
    stamps: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = inventory.load().select(["sip-1", "media-1", "pbx-1"])
    monkeypatch.setattr(provision, "_digest", lambda machine: f"today-{machine.name}")
    stamps |= {"sip-1": "today-sip-1", "media-1": "today-sip-1"}
    assert provision.stale(machines) == ["media-1", "pbx-1"]


def test_a_new_secret_makes_machines_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = inventory.load().machine("infra-1")
    monkeypatch.setenv("VOIP_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("VOIP_SECRETS", "file")
    settings.load.cache_clear()
    try:
        before = provision._digest(machine)
        assert provision._digest(machine) == before
        (tmp_path / "postgresql_password_cdr").write_text("new")
        assert provision._digest(machine) != before
    finally:
        monkeypatch.undo()
        settings.load.cache_clear()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, ["mkdir"]),
        ({"only_tags": "rtpengine"}, []),
        ({"extra_vars": ["rtpengine_table=-1"]}, ["rm"]),
        ({"extra_vars": ["rtpengine_table=-1"], "check": True}, []),
    ],
)
def test_a_run_with_variables_of_its_own_leaves_machines_stale(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: list[str]
) -> None:
    said: list[str] = []

    def on_each(machines: Sequence[inventory.Machine], command: Callable[[inventory.Machine], str]) -> dict[str, str]:
        said.append(command(machines[0]).split()[0])
        return {}

    monkeypatch.setattr(provision, "_on_each", on_each)
    monkeypatch.setattr(provision, "_digest", lambda machine: f"today-{machine.name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    for module, name in ((vms, "require_running"), (proxy, "start")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(packages, "ensure", lambda *_, **__: None)
    provision.run(**options)
    assert said == told


def test_after_a_rotation_machines_are_as_stale_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[str] = []
    kept = {"asterisk_ami_secret": "old"}
    monkeypatch.setattr(vms, "require_running", lambda _: None)
    monkeypatch.setattr(provision, "run", lambda **_: None)  # roles write secrets in files
    monkeypatch.setattr(provision, "stale", lambda _: ["media-1"])
    monkeypatch.setattr(provision, "mark", lambda machines: marked.extend(m.name for m in machines))
    monkeypatch.setattr(secrets, "get", lambda name: kept.get(name, "old"))
    monkeypatch.setattr(secrets, "put", kept.__setitem__)
    monkeypatch.setattr(rotation, "_await_delivery", lambda *_: None)
    rotation.rotate("asterisk", lambda _: None)
    assert kept["asterisk_ami_secret"] != "old"
    assert sorted(marked) == sorted({*inventory.load().machines} - {"media-1"})
