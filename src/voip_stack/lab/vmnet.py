"""The lab on macOS: libvirt has no networks there, QEMU talks to socket_vmnet. Rendered and tested, not run by us."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import jinja2
import libvirt

from voip_stack import paths
from voip_stack.deadline import Deadline
from voip_stack.errors import LabError
from voip_stack.inventory import Address, Network
from voip_stack.lab.base import Interface, Lab, Part, privileged, run
from voip_stack.tell import Tell, nobody

RUN = Path("/var/run/voip-stack")
DAEMONS = Path("/Library/LaunchDaemons")


def brew_prefix() -> Path:
    """Where Homebrew keeps its things on Apple Silicon, or where it says."""
    return Path(os.environ.get("HOMEBREW_PREFIX", "/opt/homebrew"))


class VmnetLab(Lab):
    """macOS. One socket_vmnet per network, started by launchd: members of another one would be isolated from it."""

    name = "vmnet"

    @property
    def uri(self) -> str:
        sockets = (Path.home() / ".cache/libvirt/libvirt-sock", brew_prefix() / "var/run/libvirt/libvirt-sock")
        found = next((s for s in sockets if s.exists()), None)
        return f"qemu:///session?socket={found}" if found else "qemu:///session"

    def label(self, network: str) -> str:
        return f"local.voip-stack.{network}"

    def vmnet_socket(self, network: str) -> Path:
        return RUN / f"{network}.sock"

    def interface(self, network: str) -> Interface:
        return Interface(vmnet_socket=str(self.vmnet_socket(network)))

    def outside(self, *argv: str) -> list[str]:
        # There are no namespaces: the phones' addresses are aliases of the computer's own one outside.
        return list(argv)

    def plist(self, network: Network) -> str:
        """launchd's description of the socket_vmnet of `network` (launchd.plist(5))."""
        if network.name == "external" and self.settings.external_bridge:
            mode = ["--vmnet-mode=bridged", f"--vmnet-interface={self.settings.external_bridge}"]
        else:
            # vmnet's DHCP server can't be turned off: it ends below the static addresses.
            lowest = min(
                m.addresses[network.name] for m in self.inventory.machines.values() if network.name in m.addresses
            )
            mode = [
                "--vmnet-mode=host",
                f"--vmnet-gateway={network.computer}",
                f"--vmnet-dhcp-end={Address(int(lowest) - 1)}",
                f"--vmnet-mask={network.subnet.netmask}",
            ]
        program = str(brew_prefix() / "opt/socket_vmnet/bin/socket_vmnet")
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(paths.LIBVIRT / "launchd"),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            autoescape=True,
        )
        return environment.get_template("socket_vmnet.plist.j2").render(
            label=self.label(network.name), arguments=[program, *mode, str(self.vmnet_socket(network.name))]
        )

    def up(self) -> None:
        run(*privileged("mkdir", "-p", str(RUN)))
        for network in self.inventory.networks.values():
            self._load(network)
        missing = [s for n in self.inventory.networks if not (s := self.vmnet_socket(n)).exists()]
        if not Deadline(10).until(lambda: all(s.exists() for s in missing)):
            log = f"/var/log/{self.label('internal')}.log"
            raise LabError(f"socket_vmnet does not listen on {missing[0]}", f"its log: {log}; ./voip doctor --fix")
        if not self._answers():
            run("brew", "services", "start", "libvirt")
            if not Deadline(20).until(self._answers):
                raise LabError("libvirtd does not answer", "brew services restart libvirt")
        outside = self.inventory.networks["external"]
        held = re.split(r"^(?=\S)", run("ifconfig"), flags=re.MULTILINE)
        for interface in (i for i in held if f"inet {outside.computer} " in i):
            for phone in (str(p) for p in self.inventory.phones if f"inet {p} " not in interface):
                run(*privileged("ifconfig", interface.partition(":")[0], "alias", phone, str(outside.subnet.netmask)))

    def down(self, tell: Tell = nobody) -> None:
        if self._answers():
            connection = libvirt.open(self.uri)
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                if domain.name() in self.inventory.machines:
                    tell(f"stopping {domain.name()}")
                    domain.destroy()
            connection.close()
        for name in self.inventory.networks:
            # What is not loaded can't be unloaded; then there is nothing to do.
            run(*privileged("launchctl", "bootout", f"system/{self.label(name)}"), check=False)
            run(*privileged("rm", "-f", str(DAEMONS / f"{self.label(name)}.plist"), str(self.vmnet_socket(name))))

    def status(self) -> list[Part]:
        parts = [
            Part(f"network {n}", self.vmnet_socket(n).exists(), str(self.vmnet_socket(n)))
            for n in self.inventory.networks
        ]
        return [*parts, Part("libvirtd", self._answers(), self.uri)]

    def _load(self, network: Network) -> None:
        """Have launchd run the daemon of `network`, as it is described now."""
        label = self.label(network.name)
        place = DAEMONS / f"{label}.plist"
        text = self.plist(network)
        if place.exists() and place.read_text() == text:
            if run("launchctl", "print", f"system/{label}", check=False):
                return
        else:
            run(*privileged("launchctl", "bootout", f"system/{label}"), check=False)
            with tempfile.NamedTemporaryFile("w", suffix=".plist") as file:
                file.write(text)
                file.flush()
                run(*privileged("install", "-o", "root", "-g", "wheel", "-m", "644", file.name, str(place)))
        run(*privileged("launchctl", "bootstrap", "system", str(place)))

    def _answers(self) -> bool:
        try:
            libvirt.open(self.uri).close()
        except libvirt.libvirtError:
            return False
        return True
