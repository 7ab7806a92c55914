"""Commands on machines, with a program that replaces ssh."""

from __future__ import annotations

from pathlib import Path

import pytest

from voip_stack import vms
from voip_stack.errors import VmError
from voip_stack.host import speed
from voip_stack.vms.ssh import UnreachableError


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program that replaces ssh: its text handles the machine in $1 and the command in $2."""
    program = tmp_path / "ssh"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(vms.ssh, "argv", lambda machine, *words, **_: ["ssh", machine, " ".join(words)])
    monkeypatch.setattr(speed, "slowness", lambda: 2.0)
    return program


def does(program: Path, text: str) -> None:
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_a_command_gets_its_input_and_runs_as_root_if_asked(ssh: Path) -> None:
    does(ssh, "echo $1: $2; cat")
    assert vms.ssh.run("sip-1", "psql", "-X", input="SELECT 1", sudo=True).stdout == "sip-1: sudo psql -X\nSELECT 1"
    assert vms.ssh.run("sip-1", "id").stdout == "sip-1: id\n"


def test_what_fails_is_only_told_unless_it_is_checked(ssh: Path) -> None:
    does(ssh, "echo no such unit >&2; exit 4")
    assert vms.ssh.run("sip-1", "systemctl").returncode == 4
    with pytest.raises(VmError, match="sip-1: systemctl failed") as caught:
        vms.ssh.run("sip-1", "systemctl", check=True)
    assert caught.value.details == "no such unit"
    assert not isinstance(caught.value, UnreachableError)


def test_a_machine_that_does_not_answer_is_said_to_be_so(ssh: Path) -> None:
    does(ssh, "echo no route >&2; exit 255")
    assert vms.ssh.run("sip-1", "true").returncode == vms.ssh.NO_SSH
    with pytest.raises(UnreachableError, match="sip-1 does not answer by ssh") as caught:
        vms.ssh.run("sip-1", "true", check=True)
    assert caught.value.details == "no route\n"


def test_a_slow_computer_gets_the_time_that_it_needs_and_no_more(ssh: Path) -> None:
    does(ssh, "exec sleep 0.8")
    assert vms.ssh.run("sip-1", "true", timeout=0.6).returncode == 0
    done = vms.ssh.run("sip-1", "true", timeout=0.1)
    assert done.returncode == vms.ssh.LATE
    with pytest.raises(UnreachableError):
        vms.ssh.run("sip-1", "true", timeout=0.1, check=True)
