"""What every home of the lab offers to the layers above."""

from __future__ import annotations

import abc
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from voip_stack.deadline import Deadline
from voip_stack.errors import HostError, LabError
from voip_stack.inventory import Inventory
from voip_stack.settings import Settings
from voip_stack.tell import Tell, nobody


@dataclass(frozen=True)
class Interface:
    """How an interface of a machine reaches a network: libvirt's type and source, or a socket of socket_vmnet."""

    type: str = "bridge"  # bridge, network
    source: str = ""
    vmnet_socket: str = ""


@dataclass(frozen=True)
class Part:
    """One thing that the lab consists of, and whether it is there."""

    name: str
    up: bool
    detail: str


class Lab(abc.ABC):
    """Where the stack's addresses live."""

    name: ClassVar[str]

    def __init__(self, settings: Settings, inventory: Inventory) -> None:
        self.settings = settings
        self.inventory = inventory

    @property
    @abc.abstractmethod
    def uri(self) -> str:
        """libvirt's URI of the daemon that runs the machines."""

    @property
    def package_addresses(self) -> tuple[str, ...]:
        """Addresses of this computer on which the package proxy itself must listen for the machines."""
        return (str(self.inventory.networks["internal"].computer),)

    @abc.abstractmethod
    def up(self) -> None:
        """Make what is missing and mend what is broken; nothing to do costs nothing. Raises LabError, HostError."""

    def let_in(self, *ports: int) -> None:  # noqa: B027  # nothing to do where the lab is a part of this computer
        """Let the lab reach TCP ports of a devstack-core that this computer publishes. Raises LabError."""

    @abc.abstractmethod
    def down(self, tell: Tell = nobody) -> None:
        """Stop the machines that run and remove every process, interface, socket. Raises LabError."""

    @abc.abstractmethod
    def status(self) -> list[Part]:
        """The lab's parts as they are."""

    @abc.abstractmethod
    def interface(self, network: str) -> Interface:
        """How a machine's interface is attached to the network called `network`."""

    def inside(self, *argv: str) -> list[str]:
        """The command line that runs `argv` where this computer's addresses on the lab's networks are."""
        return list(argv)

    @abc.abstractmethod
    def outside(self, *argv: str) -> list[str]:
        """The command line that runs `argv` as the phones outside."""

    def proxy_command(self) -> str | None:
        """ssh's ProxyCommand into the lab; None where no detour is needed."""
        return None

    def open_socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """An IPv4 socket that lives where the computer's addresses on the lab's networks are."""
        return socket.socket(socket.AF_INET, kind)

    def connect(self, address: str, port: int, timeout: float) -> socket.socket:
        """A TCP connection to `address` in the lab, within `timeout` seconds. Raises OSError as socket does."""
        connection = self.open_socket()
        try:
            connection.settimeout(timeout)
            connection.connect((address, port))
        except BaseException:
            connection.close()
            raise
        return connection


def run(*argv: str, check: bool = True) -> str:
    """The output of a system command. Raises LabError with what it said, HostError when it is not there."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=tool_environment(),
        )
    except FileNotFoundError:
        raise HostError(f"{argv[0]} is missing", "./voip doctor --fix") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"no end after 60 s: {' '.join(argv)}", "./voip lab.status") from None
    if check and done.returncode:
        raise LabError(f"this failed: {' '.join(argv)}", "./voip doctor", done.stderr.strip() or done.stdout.strip())
    return done.stdout


def privileged(*argv: str) -> list[str]:
    """The command line that runs `argv` as root; sudo asks on the terminal when it must."""
    return list(argv) if os.geteuid() == 0 else ["sudo", *argv]


def tool_environment() -> dict[str, str]:
    """The environment with the directories of daemons on PATH, where Debian does not lead users."""
    return {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]), "LC_ALL": "C"}


@dataclass(frozen=True)
class Daemon:
    """A process that outlives us; the number in `pid_file` counts only while the process has these arguments."""

    argv: Sequence[str]
    pid_file: Path

    @property
    def pid(self) -> int | None:
        """Its number while it runs."""
        try:
            pid = int(self.pid_file.read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return None
        return pid if arguments == [a.encode() for a in self.argv] else None

    def stop(self) -> None:
        """End it and wait for that. Raises LabError when it stays."""
        if pid := self.pid:
            end([pid])
        self.pid_file.unlink(missing_ok=True)


def end(pids: Sequence[int], patience: float = 10) -> None:
    """Ask the processes to end, then make them; `patience` in seconds each. Raises LabError when one stays."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                continue
            except PermissionError:
                raise LabError(f"process {pid} of the lab belongs to another user", f"sudo kill {pid}") from None
        if Deadline(patience).until(lambda: not any(alive(pid) for pid in pids), every=0.05):
            return
    raise LabError(f"these processes do not end: {' '.join(str(p) for p in pids if alive(p))}", "restart this computer")


def alive(pid: int) -> bool:
    """Whether process `pid` runs; a zombie, which waits only for its parent, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
