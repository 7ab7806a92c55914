"""Network namespaces: made, entered and removed (ip-netns(8), setns(2))."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
from pathlib import Path
from typing import Any

from voip_stack.errors import LabError
from voip_stack.lab.base import privileged, run

RUN = Path("/run/netns")
_CLONE_NEWNET = 0x40000000


class Namespace:
    """A named network namespace of this computer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = RUN / name

    @property
    def exists(self) -> bool:
        """Whether it is there and whole: the name that a crash may leave is an empty file on the disk's own device."""
        try:
            return self.path.stat().st_dev != RUN.stat().st_dev
        except FileNotFoundError:
            return False

    def make(self) -> None:
        """Make it, or mend what a crash left; loopback up, nothing forwarded."""
        if not self.exists:
            self.remove()
            run(*privileged("ip", "netns", "add", self.name))
        # Some computers hand the setting of their own router down to new namespaces.
        run(*self.command("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0"))
        self.ip("link", "set", "lo", "up")

    def remove(self) -> None:
        """Remove the name; the namespace and its interfaces go when the last process has left it."""
        if self.path.exists():
            run(*privileged("ip", "netns", "delete", self.name))

    def command(self, *argv: str) -> list[str]:
        """The command line that runs `argv` in here."""
        return privileged("nsenter", f"--net={self.path}", *argv)

    def ip(self, *argv: str) -> None:
        """Configure with ip(8). Raises LabError."""
        run(*privileged("ip", "-n", self.name, *argv))

    def links(self) -> dict[str, dict[str, Any]]:
        """The interfaces in here by name, as ip(8) describes them."""
        answer = run(*privileged("ip", "-n", self.name, "-json", "address", "show")) if self.exists else "[]"
        return {link["ifname"]: link for link in json.loads(answer or "[]")}

    def processes(self) -> dict[int, str]:
        """The processes in here, number and name."""
        if not self.exists:
            return {}
        found = {}
        for pid in run(*privileged("ip", "netns", "pids", self.name)).split():
            # One may have ended since.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[int(pid)] = Path(f"/proc/{pid}/comm").read_text().strip()
        return found

    def open_socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """An IPv4 socket in here. It stays here; the calling thread comes back. Raises LabError."""
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there from Python 3.12 on

        def enter(descriptor: int) -> None:
            if libc.setns(descriptor, _CLONE_NEWNET):
                raise LabError(f"can't enter {self.name}: {os.strerror(ctypes.get_errno())}", "run this as root")

        try:
            there = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            raise LabError(f"the lab's network {self.name} is not there", "./voip lab.up") from None
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            enter(there)
            try:
                return socket.socket(socket.AF_INET, kind)
            finally:
                enter(here)
        finally:
            os.close(there)
            os.close(here)
