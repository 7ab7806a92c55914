"""The lab in a network namespace of our own, with a libvirtd in it: collides with nothing, reaches nothing.

libvirtd gets its own /etc/libvirt, /var/lib/libvirt, … by bind mounts in a mount namespace, so that it shares neither
sockets nor definitions with a libvirtd of the system, and needs no setting there.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import libvirt

from voip_stack import files
from voip_stack.deadline import Deadline
from voip_stack.errors import LabError
from voip_stack.inventory import Inventory
from voip_stack.lab.base import Daemon, Interface, Lab, Part, end, run, tool_environment
from voip_stack.lab.netns import Namespace
from voip_stack.lab.outside import Outside
from voip_stack.settings import Settings
from voip_stack.tell import Tell, nobody

RUN = Path("/run/voip-stack")  # short: the path of a UNIX socket has at most 107 bytes
SOCKET = RUN / "libvirt" / "libvirt-sock"
_USER = "libvirt-qemu"  # the name that Debian and Ubuntu build into libvirt; it runs nothing here
_FORWARDER_IDLE = 600  # seconds; apt keeps connections open while it unpacks
_FORWARDER_CHILDREN = 64

_LIBVIRTD_CONF = """\
# Written anew at each start. The directory of the socket is root's alone (0700): that is the authentication.
auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_ro_perms = "0700"
unix_sock_rw_perms = "0700"
unix_sock_admin_perms = "0700"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""

_QEMU_CONF = """\
# Written anew at each start.
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
# The console's log is written by QEMU itself: no virtlogd needed.
stdio_handler = "file"
# Where no systemd rules the control groups, libvirt would leave its own behind.
cgroup_controllers = []
# A mount namespace per guest protects device nodes that these guests don't get, and costs time.
namespaces = []
# No AppArmor or SELinux profile knows our directories.
security_driver = "none"
"""


class NamespaceLab(Lab):
    """Linux, as root, where no libvirtd runs: a server, CI, a container."""

    name = "namespace"

    def __init__(self, settings: Settings, inventory: Inventory) -> None:
        super().__init__(settings, inventory)
        self.inner = Namespace("voip-lab")
        self.phones = Outside(inventory)
        self.state = settings.cache_dir / "lab"
        # libvirt's directories, and what they are for ours. State lies in the cache; sockets go with a reboot.
        self.mounts = {
            "/etc/libvirt": self.state / "etc",
            "/var/lib/libvirt": self.state / "lib",
            "/var/cache/libvirt": self.state / "cache",
            "/var/log/libvirt": self.state / "log",
            "/run/libvirt": RUN / "libvirt",
        }
        config = self.state / "etc" / "libvirtd.conf"
        pid_file = RUN / "libvirtd.pid"
        self.libvirtd = Daemon(["libvirtd", "-d", "-f", str(config), "-p", str(pid_file)], pid_file)
        network = inventory.networks["internal"]
        port = settings.package_proxy_port
        listen = f"TCP-LISTEN:{port},bind={network.computer},range={network.subnet},fork,reuseaddr,backlog=64"
        self.forwarder = Daemon(
            [
                "socat",
                *("-T", str(_FORWARDER_IDLE), "-t", "60"),
                f"{listen},max-children={_FORWARDER_CHILDREN}",
                f"UNIX-CONNECT:{settings.cache_dir / 'run' / 'apt-proxy.sock'}",
            ],
            RUN / "forwarder.pid",
        )

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={SOCKET}"

    @property
    def package_addresses(self) -> tuple[str, ...]:
        return ()  # the forwarder listens in its place

    def interface(self, network: str) -> Interface:
        return Interface("bridge", self.inventory.networks[network].bridge)

    def inside(self, *argv: str) -> list[str]:
        return self.inner.command(*argv)

    def outside(self, *argv: str) -> list[str]:
        return self.phones.command(*argv)

    def proxy_command(self) -> str | None:
        return shlex.join(self.inside("socat", "-", "TCP:%h:%p"))

    def open_socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        return self.inner.open_socket(kind)

    def up(self) -> None:
        self._check()
        with self._locked():
            RUN.mkdir(mode=0o700, exist_ok=True)
            self._claim()
            self._network()
            if not self._answers():
                self._start_libvirtd()
            if not self._runs(self.forwarder):
                argv, port = self.inside(*self.forwarder.argv), self.settings.package_proxy_port
                self._start(self.forwarder, argv, port, "the way to the package proxy")
            self._let_in(self.inventory.devstack_ports)

    def let_in(self, *ports: int) -> None:
        with self._locked():
            self._let_in(ports)

    def _let_in(self, ports: Sequence[int]) -> None:
        if self.inventory.devstack != self.inventory.networks["internal"].computer:
            return
        relay = self._relay("-".join(map(str, ports)))
        if not (relay.pid and self._listens(ports[0])):
            self._start(relay, relay.argv, ports[0], "the way to the devstack-core")

    def _relay(self, ports: str) -> Daemon:
        """A devstack-core that this computer publishes on its own ports is outside of the namespace."""
        where = (self.inner.name, str(self.inventory.networks["internal"].computer))
        argv = [sys.executable, "-m", "voip_stack.lab.relay", *where, *ports.split("-")]
        return Daemon(argv, RUN / f"relay-{ports}.pid")

    def down(self, tell: Tell = nobody) -> None:
        self._check()
        with self._locked():
            self._claim()
            if os.path.samestat(Path("/proc/self/ns/net").stat(), _stat(self.inner.path)):
                raise LabError("this shell is inside the lab", "leave it (exit), then: ./voip lab.down")
            # libvirt's files of running guests: they tell of guests even where the namespace or libvirtd was lost.
            if any((RUN / "libvirt" / "qemu").glob("*.pid")):
                if not self._answers():
                    self._start_libvirtd()
                self._stop_machines(tell)
            self.forwarder.stop()
            for file in RUN.glob("relay-*.pid"):
                self._relay(file.stem.removeprefix("relay-")).stop()
            self.libvirtd.stop()
            for namespace in (self.phones, self.inner):
                # What is in there now is a forwarder's child, a phone or somebody's shell.
                rest = namespace.processes()
                if rest:
                    end(list(rest))
                if others := sorted(set(rest.values()) - {"socat"}):
                    tell(f"ended in {namespace.name}: {', '.join(others)}")
                namespace.remove()
            shutil.rmtree(RUN, ignore_errors=True)
            with contextlib.suppress(OSError):
                Path("/run/libvirt").rmdir()  # our mount point, unless a libvirtd of the system has it

    def status(self) -> list[Part]:
        links = self.inner.links()
        parts = [Part(f"namespace {self.inner.name}", self.inner.exists, str(self.inner.path))]
        for network in self.inventory.networks.values():
            link = links.get(network.bridge, {})
            has = any(a["local"] == str(network.computer) for a in link.get("addr_info", []))
            parts.append(Part(f"bridge {network.bridge}", has, f"{network.computer}/{network.subnet.prefixlen}"))
        return [
            *parts,
            self.phones.part(),
            Part("libvirtd", self._answers(), str(SOCKET)),
            Part("way to the package proxy", self._runs(self.forwarder), self.forwarder.argv[-1].partition(":")[2]),
        ]

    def _check(self) -> None:
        if os.geteuid() != 0:
            raise LabError(
                "the lab's namespace needs root",
                "sudo ./voip …; or run libvirtd (apt install libvirt-daemon-system) and be in its group",
            )
        if self.settings.external_bridge:
            raise LabError(
                f"VOIP_EXTERNAL_BRIDGE={self.settings.external_bridge}: a namespace reaches no bridge of the computer",
                "leave it empty in .env, or run libvirtd and set VOIP_LAB=libvirt",
            )
        if len(self.forwarder.argv[-1]) - len("UNIX-CONNECT:") > 107:
            raise LabError(
                f"{self.settings.cache_dir} is too long for a UNIX socket", "set VOIP_CACHE_DIR to a shorter one"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One command at a time builds or removes the lab."""
        with files.locked(self.settings.cache_dir / "run" / "lab.lock"):
            yield

    def _claim(self) -> None:
        """There is one lab per computer: refuse when it belongs to another cache directory."""
        owner = RUN / "cache"
        if owner.is_symlink() and owner.readlink() != self.settings.cache_dir and self.inner.processes():
            raise LabError(
                f"the lab runs for another cache directory, {owner.readlink()}",
                f"VOIP_CACHE_DIR={owner.readlink()} ./voip lab.down",
            )
        if RUN.exists():
            owner.unlink(missing_ok=True)
            owner.symlink_to(self.settings.cache_dir)

    def _network(self) -> None:
        self.inner.make()
        links = self.inner.links()
        for network in self.inventory.networks.values():
            if network.bridge not in links:
                self.inner.ip("link", "add", network.bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0")
            self.inner.ip("address", "replace", f"{network.computer}/{network.subnet.prefixlen}", "dev", network.bridge)
            self.inner.ip("link", "set", network.bridge, "up")
        self.phones.attach(self.inventory.networks["external"].bridge, self.inner)

    def _runs(self, daemon: Daemon) -> bool:
        """Whether `daemon` runs in today's namespace: one that was removed by hand lives on with what was in it."""
        return daemon.pid in self.inner.processes()

    def _answers(self) -> bool:
        """Whether our libvirtd runs and answers."""
        if not self._runs(self.libvirtd):
            return False
        try:
            libvirt.open(self.uri).close()
        except libvirt.libvirtError:
            return False
        return True

    def _start_libvirtd(self) -> None:
        self.libvirtd.stop()
        for place, directory in self.mounts.items():
            directory.mkdir(parents=True, exist_ok=True)
            Path(place).mkdir(parents=True, exist_ok=True)
        (self.state / "etc" / "libvirtd.conf").write_text(_LIBVIRTD_CONF)
        (self.state / "etc" / "qemu.conf").write_text(_QEMU_CONF)
        # libvirtd insists on its packaged user, who only comes with the package that starts a libvirtd of the system.
        accounts = {
            "/etc/passwd": f"{_USER}:x:64055:64055::/nonexistent:/usr/sbin/nologin",
            "/etc/group": f"{_USER}:x:64055:",
        }
        for place, line in accounts.items():
            text = Path(place).read_text()
            known = any(entry.startswith(f"{_USER}:") for entry in text.splitlines())
            (self.state / "etc" / Path(place).name).write_text(text if known else f"{text.rstrip()}\n{line}\n")
        mounts = {place: self.state / "etc" / Path(place).name for place in accounts} | self.mounts
        binds = [shlex.join(["mount", "--bind", str(source), place]) for place, source in mounts.items()]
        # /sys shows the interfaces of the namespace in which it was mounted.
        script = " && ".join([*binds, "mount -t sysfs sysfs /sys", "exec " + shlex.join(self.libvirtd.argv)])
        # -d: libvirtd returns when its sockets listen, or with what is wrong.
        run(*self.inside("unshare", "--mount", "--propagation", "private", "sh", "-c", script))
        if not Deadline(15).until(self._answers, every=0.1):
            log = self.state / "log" / "libvirtd.log"
            text = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise LabError("libvirtd of the lab does not answer", f"its log: {log}", text)

    def _listens(self, port: int) -> bool:
        """Whether something listens on `port` of the computer's address in here."""
        with contextlib.suppress(OSError), self.connect(str(self.inventory.networks["internal"].computer), port, 1):
            return True
        return False

    def _start(self, daemon: Daemon, argv: Sequence[str], port: int, title: str) -> None:
        """Start `daemon`, by `argv`, which listens on `port` of the computer's address in here. Raises LabError."""
        daemon.stop()
        log = self.state / "log" / f"{daemon.pid_file.stem}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
                env=tool_environment(),
            )
        daemon.pid_file.write_text(str(process.pid))
        ready = Deadline(10).until(lambda: self._listens(port) or process.poll() is not None, every=0.05)
        if not ready or process.poll() is not None:
            daemon.stop()
            raise LabError(f"{title} did not open", f"its log: {log}", log.read_text())

    def _stop_machines(self, tell: Tell) -> None:
        try:
            connection = libvirt.open(self.uri)
        except libvirt.libvirtError as error:
            raise LabError("libvirtd of the lab does not answer", "./voip lab.up", str(error)) from None
        try:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                tell(f"stopping {domain.name()}")
                # It may have ended by itself since.
                with contextlib.suppress(libvirt.libvirtError):
                    domain.destroy()
        finally:
            connection.close()


def _stat(path: Path) -> os.stat_result:
    """The path's stat, or that of / where it does not exist: equal to no namespace."""
    return path.stat() if path.exists() else Path("/").stat()
