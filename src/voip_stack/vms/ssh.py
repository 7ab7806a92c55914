"""ssh to the machines: keys, the configuration that Ansible and people use, commands. The options stand only here."""

from __future__ import annotations

import os
import select
import shlex
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from voip_stack import files, inventory, lab, settings
from voip_stack.errors import VmError
from voip_stack.host import speed
from voip_stack.inventory import Machine
from voip_stack.vms import store, tools

NO_SSH = 255  # ssh(1): the exit status of ssh itself, when the machine could not be reached
LATE = 124  # as timeout(1) has it


def config_path() -> Path:
    """The configuration for `ssh -F`: every machine that exists, by name and by address."""
    return settings.load().cache_dir / "ssh" / "config"


def commands() -> Path:
    """A directory to begin a PATH with: its `ssh` knows the machines, by `ssh voip@192.168.64.10` too."""
    program = config_path().with_name("bin") / "ssh"
    # The standard PATH, which ours is not in: there it would find itself.
    files.write(program, f'#!/bin/sh\ncommand -p ssh -F {shlex.quote(str(config_path()))} "$@"\n', mode=0o755)
    return program.parent


def identity() -> Path:
    """The user's key for the machines; made at first use."""
    return ensure_key(settings.load().secrets_dir / "id_ed25519", "voip-stack")


def ensure_key(path: Path, comment: str) -> Path:
    """An ed25519 key pair at `path` (0600), made when there is none. Raises VmError."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".key-") as directory:
        made = Path(directory) / path.name
        tools.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(made), writes=made)
        # Machines are made in parallel: the first one's key is everybody's.
        with files.locked(path.parent / f".{path.name}.lock"):
            if not path.exists():
                made.with_name(made.name + ".pub").replace(path.with_name(path.name + ".pub"))
                made.replace(path)
    return path


def public(key: Path) -> str:
    """The public half of `key`, one line."""
    return key.with_name(key.name + ".pub").read_text().strip()


def write_config(machine: Machine, host_key: Path) -> None:
    """Let ssh know `machine` and the key it will show. Its part lies in the machine's directory and goes with it."""
    directory = store.directory(machine.name)
    domain = inventory.load().domain
    names = [machine.name, f"{machine.name}.{domain}", str(machine.internal)]
    kind, key = public(host_key).split()[:2]
    files.write(directory / "known_hosts", f"{machine.name} {kind} {key}\n")
    lines = [
        f"Host {' '.join(names)}",
        f"  HostName {machine.internal}",
        f"  HostKeyAlias {machine.name}",
        f"  UserKnownHostsFile {_quoted(directory / 'known_hosts')}",
    ]
    files.write(directory / "ssh_config", "\n".join(lines) + "\n")
    proxy = lab.current().proxy_command()
    lines = [
        "# Written by ./voip vms.create",
        f"Include {_quoted(store.root() / '*' / 'ssh_config')}",
        "Host *",
        f"  User {inventory.load().user}",
        f"  IdentityFile {_quoted(identity())}",
        "  IdentitiesOnly yes",
        "  PasswordAuthentication no",
        "  GSSAPIAuthentication no",
        "  StrictHostKeyChecking yes",
        "  UpdateHostKeys no",
        f"  ConnectTimeout {speed.patient(10):.0f}",
        "  ServerAliveInterval 10",
        "  ServerAliveCountMax 6",
        "  LogLevel ERROR",
        *([f"  ProxyCommand {proxy}"] if proxy else []),
    ]
    files.write(config_path(), "\n".join(lines) + "\n")


def _quoted(path: Path) -> str:
    return f'"{path}"'


def argv(name: str, *command: str, options: Sequence[str] = ()) -> list[str]:
    """The command line of an ssh to machine `name`; `command` is quoted for the remote shell."""
    return ["ssh", "-F", str(config_path()), *options, name, *([shlex.join(command)] if command else [])]


class UnreachableError(VmError):
    """A machine does not answer by ssh, or not in time."""


def run(
    machine: str,
    *command: str,
    input: str = "",  # noqa: A002  # as subprocess.run has it
    sudo: bool = False,
    check: bool = False,
    timeout: float = 60.0,
) -> subprocess.CompletedProcess[str]:
    """Run `command` on `machine`, as root with `sudo`, with the text `input` on its standard input.

    At most `timeout` seconds long, as a fast computer takes. What did not answer has the return code NO_SSH or LATE.
    With `check` those raise UnreachableError, and any other failure VmError with the end of what the command said.
    """
    seconds = speed.patient(timeout)
    words = ("sudo", *command) if sudo else command
    line = argv(machine, *words, options=["-o", "BatchMode=yes"])
    try:
        done = subprocess.run(
            line, input=input, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
        silent = done.returncode == NO_SSH
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(line, LATE, "", f"no answer within {seconds:.0f} s")
        silent = True
    if check and silent:
        raise UnreachableError(f"{machine} does not answer by ssh", "./voip vms.status", done.stderr)
    if check and done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise VmError(f"{machine}: {shlex.join(command)[:100]} failed", f"./voip vms.ssh {machine}", said)
    return done


def banner(address: str, timeout: float) -> bool:
    """Whether an ssh server greets at TCP port 22 of `address` (RFC 4253, 4.2), by the way that ssh would take."""
    proxy = lab.current().proxy_command()
    if not proxy:
        try:
            with socket.create_connection((address, 22), timeout=timeout) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False
    command = shlex.split(proxy.replace("%h", address).replace("%p", "22"))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout  # noqa: S101  # the pipe asked for above
        try:
            answered, _, _ = select.select([process.stdout], [], [], timeout)
            return bool(answered) and os.read(process.stdout.fileno(), 4) == b"SSH-"
        finally:
            process.kill()
