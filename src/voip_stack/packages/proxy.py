"""Where guests, bakes and builds get their packages: an apt-cacher-ng of our own, beside any that the system runs.

It listens on this computer's loopback, on the lab's bridge where that is here, and through socat on a UNIX socket, by
which the lab's namespace reaches it. It also serves what we built, as http://HOST:PORT/voip-packages/.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from voip_stack import files, settings
from voip_stack.deadline import Deadline
from voip_stack.errors import HostError, PackageError
from voip_stack.packages import repository

LOOPBACK = "127.0.0.1"
MAX_PORT = 32767  # apt-cacher-ng 3.7.4: "Error resolving address for binding: Success" above it
PATIENCE = 10  # seconds for the daemons to start or to end

_CONFIG = """\
# Written anew at each start.
CacheDir: {home}/cache
LogDir: {home}/log
# Made by apt-cacher-ng, which answers only its own acngtool there.
SocketPath: {home}/control.sock
ForeGround: 1
Port: {port}
BindAddress: {bind}
LocalDirs: voip-packages {packages}
# No maintenance by whoever can reach the port.
ReportPage:
NetworkTimeout: 20
# Seconds for which an index counts as fresh: machines provisioned together see one state of the archive.
FreshIndexMaxAge: 300
# 1: never connect, serve what is cached, old indexes too.
Offlinemode: {offline:d}
"""


@dataclass(frozen=True)
class Process:
    """A process that is told from a later one of the same number by its start, in clock ticks since boot."""

    pid: int
    start: int

    @staticmethod
    def of(pid: int) -> Process | None:
        """The live process `pid`."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else Process(pid, int(fields[19]))

    @property
    def is_alive(self) -> bool:
        return Process.of(self.pid) == self

    def end(self) -> None:
        """End it and wait for that, by force if need be."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                if self.is_alive:
                    os.kill(self.pid, how)
            except PermissionError:
                raise PackageError("the package proxy belongs to another user", f"sudo kill {self.pid}") from None
            if Deadline(PATIENCE / 2).until(lambda: not self.is_alive, every=0.05):
                return


@dataclass(frozen=True)
class Status:
    """The proxy as it is. `bind` are the addresses it listens on; `socket` leads to it from the lab's namespace."""

    running: bool
    url: str
    bind: tuple[str, ...]
    socket: Path
    offline: bool


def socket_path() -> Path:
    return settings.load().cache_dir / "run" / "apt-proxy.sock"


def url() -> str:
    """The proxy as seen from this computer."""
    return f"http://{LOOPBACK}:{settings.load().package_proxy_port}"


def start(bind: Iterable[str] = (), offline: bool | None = None) -> str:
    """The URL of the proxy, which runs and listens on loopback, on `bind` and where it listened before.

    `offline`: serve only what is cached; None leaves that as it is. Restarts the proxy only where something changes.
    Raises PackageError when an address or the port can't be had, HostError when a program is missing.
    """
    repository.publish()
    with _locked():
        before = _load()
        wanted = list(dict.fromkeys([LOOPBACK, *(before.bind if before else ()), *bind]))
        offline = bool(before and before.offline) if offline is None else offline
        # From the environment of whoever started it: a bake under sudo has another, and must not restart it.
        upstream = before.upstream if before and before.is_alive else _upstream()
        if before and before.is_alive and _config_file().read_text() == _config(wanted, offline, upstream):
            return url()
        _stop()
        # An address of before may be gone with its bridge; one that is asked for must be there.
        wanted = [a for a in wanted if a in (LOOPBACK, *bind) or _is_local(a)]
        _launch(wanted, offline, upstream)
    return url()


def stop() -> bool:
    """End the proxy; False when it did not run."""
    with _locked():
        return _stop()


def status() -> Status:
    """The proxy as it is now."""
    state = _load()
    if not state or not state.is_alive:
        return Status(False, url(), (), socket_path(), False)
    return Status(True, url(), tuple(state.bind), socket_path(), state.offline)


@dataclass(frozen=True)
class _State:
    """What we started."""

    processes: tuple[Process, ...]
    bind: tuple[str, ...]
    offline: bool
    upstream: str  # the proxy that leads to the Internet, as a URL; empty: none

    @property
    def is_alive(self) -> bool:
        return bool(self.processes) and all(p.is_alive for p in self.processes)


def _home() -> Path:
    return settings.load().cache_dir / "apt"


def _config_file() -> Path:
    return _home() / "conf" / "acng.conf"


def _state_file() -> Path:
    return settings.load().cache_dir / "run" / "apt-proxy.json"


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    with files.locked(_state_file().with_name("apt-proxy.lock")):
        yield


def _load() -> _State | None:
    try:
        values = json.loads(_state_file().read_text())
    except FileNotFoundError:
        return None
    processes = tuple(Process(**p) for p in values.pop("processes"))
    return _State(processes, tuple(values.pop("bind")), **values)


def _save(state: _State) -> None:
    files.write(_state_file(), json.dumps(asdict(state)))


def _stop() -> bool:
    state = _load()
    alive = [p for p in state.processes if p.is_alive] if state else []
    for process in alive:
        process.end()
    socket_path().unlink(missing_ok=True)
    _state_file().unlink(missing_ok=True)
    return bool(alive)


def _config(bind: Iterable[str], offline: bool, upstream: str) -> str:
    conf = settings.load()
    text = _CONFIG.format(
        home=_home(), port=conf.package_proxy_port, bind=" ".join(bind), packages=repository.root(), offline=offline
    )
    mirror = urlsplit(conf.debian_mirror)
    if mirror.scheme == "https":
        # apt's TLS passes through, uncached, to this mirror and nowhere else.
        text += f"PassThroughPattern: ^{re.escape(mirror.hostname or '')}:{mirror.port or 443}$\n"
    elif mirror.port:
        text += f"AllowUserPorts: 80 {mirror.port}\n"
    return text + (f"Proxy: {upstream}\n" if upstream else "")


def _upstream() -> str:
    """The proxy that the user's environment names, unless that is ours."""
    named = os.environ.get("http_proxy", "")
    return "" if urlsplit(named).port == settings.load().package_proxy_port else named


def _launch(bind: list[str], offline: bool, upstream: str) -> None:
    port = settings.load().package_proxy_port
    if re.search(r"[\s;]", str(repository.root())):
        raise PackageError(
            f"apt-cacher-ng can't serve {repository.root()}", "set VOIP_CACHE_DIR to a path without spaces"
        )
    if port > MAX_PORT:
        raise PackageError(
            f"apt-cacher-ng can't listen on port {port}", f"set VOIP_PACKAGE_PROXY_PORT to {MAX_PORT} at most"
        )
    acng, socat = _tool("apt-cacher-ng"), _tool("socat")
    for address in bind:
        _check_free(address, port)
    for directory in (_config_file().parent, _home() / "cache", _home() / "log"):
        directory.mkdir(parents=True, exist_ok=True)
    _config_file().write_text(_config(bind, offline, upstream))
    output = _home() / "log" / "output.log"
    output.write_bytes(b"")
    # It runs on without an address that it can't have, and only prints that: hence the looks before and after.
    daemon = _spawn([acng, "-c", str(_config_file().parent)], output)
    _save(_State((daemon,), tuple(bind), offline, upstream))
    # apt-cacher-ng's own UNIX socket takes no requests for packages (3.7.4), so socat stands before its port.
    listen = f"UNIX-LISTEN:{socket_path()},fork,unlink-early,mode=600"
    bridge = _spawn([socat, listen, f"TCP:{LOOPBACK}:{port}"], output)
    state = _State((daemon, bridge), tuple(bind), offline, upstream)
    _save(state)

    def is_ready() -> bool:
        return not state.is_alive or (_answers(bind, port) and socket_path().is_socket())

    if not Deadline(PATIENCE).until(is_ready, every=0.05) or not state.is_alive:
        _stop()
        raise PackageError("the package proxy did not start", f"its log: {output}", output.read_text(errors="replace"))


def _spawn(command: list[str], output: Path) -> Process:
    """Start a daemon that outlives us, with what it prints in `output`."""
    with output.open("ab") as file:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd="/", start_new_session=True
        )
    # One that has ended already is its own zombie until we read it: then only the number is known.
    return Process.of(child.pid) or Process(child.pid, 0)


def _tool(name: str) -> str:
    # Debian keeps daemons where a user's PATH does not lead.
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if not found:
        raise HostError(f"{name} is missing", "./voip doctor --fix")
    return found


def _is_local(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _check_free(address: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PackageError(
                    f"port {port} of {address} is occupied, the package proxy can't use it",
                    f"see who has it: ss -ltnp 'sport = :{port}'; or choose another: VOIP_PACKAGE_PROXY_PORT",
                ) from None
            raise PackageError(
                f"the package proxy can't listen on {address} port {port}: {error.strerror}", "./voip lab.up"
            ) from None


def _answers(bind: Iterable[str], port: int) -> bool:
    for address in bind:
        try:
            socket.create_connection((address, port), timeout=1).close()
        except OSError:
            return False
    return True
