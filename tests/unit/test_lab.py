import json
import os
import plistlib
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import libvirt
import pytest
from invoke.context import Context

from voip_stack import inventory, lab, settings, vms
from voip_stack.deadline import Deadline
from voip_stack.errors import LabError
from voip_stack.inventory import Inventory
from voip_stack.lab import libvirt_networks, namespace
from voip_stack.lab.base import Daemon, Interface, Lab, alive
from voip_stack.lab.libvirt_networks import LibvirtLab
from voip_stack.lab.namespace import NamespaceLab
from voip_stack.lab.netns import Namespace
from voip_stack.lab.outside import Outside
from voip_stack.lab.vmnet import VmnetLab
from voip_stack.tasks.lab import shell

SCHEMAS = Path("/usr/share/libvirt/schemas")
L = TypeVar("L", bound=Lab)
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


@pytest.fixture(scope="module")
def stock() -> Inventory:
    return inventory.load()


def home(kind: type[L], stock: Inventory, tmp_path: Path, env: str = "") -> L:
    return kind(settings.parse(env, {"VOIP_CACHE_DIR": str(tmp_path)}), stock)


@pytest.mark.parametrize(
    ("env", "system", "expected"),
    [
        ("", "Darwin", VmnetLab),
        ("VOIP_LIBVIRT_URI=test:///default", "Linux", LibvirtLab),
        ("VOIP_LIBVIRT_URI=qemu+unix:///system?socket=/nonexistent", "Linux", NamespaceLab),
        ("VOIP_LAB=namespace\nVOIP_LIBVIRT_URI=test:///default", "Linux", NamespaceLab),
        ("VOIP_LAB=libvirt\nVOIP_LIBVIRT_URI=qemu+unix:///system?socket=/nonexistent", "Linux", LibvirtLab),
    ],
)
def test_the_lab_is_at_home_where_a_libvirtd_answers_unless_one_is_named(
    env: str, system: str, expected: type[Lab], stock: Inventory
) -> None:
    assert type(lab.choose(settings.parse(env, {}), stock, system)) is expected


class _Here:
    def up(self) -> None:
        """Already up."""

    def inside(self, *argv: str) -> list[str]:
        return list(argv)


def test_in_the_labs_shell_plain_ssh_knows_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lab, "current", _Here)
    monkeypatch.setattr(vms.ssh, "config_path", lambda: tmp_path / "a cache" / "config")
    (tmp_path / "a cache").mkdir()
    (tmp_path / "a cache" / "config").write_text("Host 192.168.64.10\n  HostKeyAlias sip-1\n")
    shell(Context(), command="ssh -G voip@192.168.64.10")
    assert "hostkeyalias sip-1" in capfd.readouterr().out.splitlines()


@pytest.mark.skipif(not (SCHEMAS / "network.rng").exists(), reason="libvirt's schemas are not here")
@pytest.mark.parametrize("name", ["internal", "external"])
def test_networks_fit_the_schema_of_libvirt_and_are_isolated(name: str, stock: Inventory) -> None:
    xml = libvirt_networks.render(stock.networks[name])
    done = subprocess.run(
        ["xmllint", "--noout", "--relaxng", str(SCHEMAS / "network.rng"), "-"],
        input=xml,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f'address="{stock.networks[name].computer}"' in xml
    assert "<forward" not in xml
    assert "<dhcp" not in xml


def test_libvirt_networks_are_made_once_and_removed(
    stock: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = libvirt.open("test:///default")
    monkeypatch.setattr(libvirt, "open", lambda _uri: connection)
    monkeypatch.setattr(connection, "close", lambda: None)
    monkeypatch.setattr(libvirt_networks, "run", lambda *_argv: "[]")
    attached: list[str] = []
    monkeypatch.setattr(Outside, "attach", lambda _self, bridge: attached.append(bridge))
    monkeypatch.setattr(Outside, "processes", lambda _self: {})
    monkeypatch.setattr(Outside, "remove", lambda _self: None)
    here = home(LibvirtLab, stock, tmp_path)
    here.up()
    here.up()
    assert {n.name() for n in connection.listAllNetworks() if n.isActive()} >= {"voip-int", "voip-ext"}
    assert attached == ["voip-ext", "voip-ext"]
    here.down()
    here.down()
    assert not {n.name() for n in connection.listAllNetworks()} & {"voip-int", "voip-ext"}


def test_a_bridge_of_the_lan_takes_the_place_of_the_external_network(stock: Inventory, tmp_path: Path) -> None:
    here = home(LibvirtLab, stock, tmp_path, "VOIP_EXTERNAL_BRIDGE=br0")
    assert here.interface("external") == Interface("bridge", "br0")
    assert here.interface("internal") == Interface("network", "voip-int")
    assert [n.name for n in here.networks] == ["internal"]


def test_an_occupied_subnet_is_named_with_the_interface_that_has_it(stock: Inventory) -> None:
    networks = list(stock.networks.values())
    routes = [{"dst": "default", "dev": "wlan0"}, {"dst": "192.168.64.0/24", "dev": "voip-int"}]
    libvirt_networks.occupied(networks, json.dumps(routes))
    routes.append({"dst": "192.168.0.0/16", "dev": "tun0"})
    with pytest.raises(LabError, match=r"192\.168\.64\.0/24 is occupied.*tun0"):
        libvirt_networks.occupied(networks, json.dumps(routes))


def test_vmnet_starts_below_the_static_addresses(stock: Inventory, tmp_path: Path) -> None:
    here = home(VmnetLab, stock, tmp_path)
    plist = plistlib.loads(here.plist(stock.networks["internal"]).encode())
    arguments = plist["ProgramArguments"]
    assert "--vmnet-gateway=192.168.64.1" in arguments
    assert "--vmnet-dhcp-end=192.168.64.9" in arguments
    assert "--vmnet-mode=host" in arguments
    assert arguments[-1] == here.interface("internal").vmnet_socket
    assert plist["KeepAlive"] is True


def test_vmnet_bridges_the_lan_when_told(stock: Inventory, tmp_path: Path) -> None:
    here = home(VmnetLab, stock, tmp_path, "VOIP_EXTERNAL_BRIDGE=en0")
    assert "--vmnet-interface=en0" in here.plist(stock.networks["external"])
    assert "bridged" not in here.plist(stock.networks["internal"])


def test_ssh_gets_into_the_namespace(stock: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    command = shlex.split(home(NamespaceLab, stock, tmp_path).proxy_command() or "")
    assert command == ["nsenter", "--net=/run/netns/voip-lab", "socat", "-", "TCP:%h:%p"]


@pytest.mark.parametrize(
    ("user", "env", "directory", "message"),
    [
        (1000, "", "", "needs root"),
        (0, "VOIP_EXTERNAL_BRIDGE=br0", "", "VOIP_EXTERNAL_BRIDGE=br0"),
        (0, "", "x" * 120, "too long for a UNIX socket"),
    ],
)
def test_what_the_namespace_can_not_do_is_said_before_anything_is_made(
    user: int, env: str, directory: str, message: str, stock: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    here = home(NamespaceLab, stock, tmp_path / directory, env)
    with pytest.raises(LabError, match=message) as caught:
        here.up()
    assert caught.value.hint
    assert not (tmp_path / directory / "run").exists()


def test_a_lab_of_another_cache_directory_is_left_alone(
    stock: Inventory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespace, "RUN", tmp_path / "run")
    monkeypatch.setattr(Namespace, "processes", lambda _self: {1: "libvirtd"})
    monkeypatch.setattr(NamespaceLab, "_network", lambda _self: pytest.fail("it touched the other one's network"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cache").symlink_to("/elsewhere")
    with pytest.raises(LabError, match="another cache directory, /elsewhere") as caught:
        home(NamespaceLab, stock, tmp_path / "mine").up()
    assert "lab.down" in caught.value.hint


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "321"])
    # Just after its start a process has no arguments yet.
    assert Deadline(5).until(lambda: b"321" in Path(f"/proc/{process.pid}/cmdline").read_bytes(), every=0.01)
    yield process
    process.kill()
    process.wait()


def test_a_pid_file_counts_only_for_the_process_that_wrote_it(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    daemon = Daemon(["sleep", "321"], tmp_path / "pid")
    assert daemon.pid is None
    daemon.pid_file.write_text(f"{sleeper.pid}\n")
    assert daemon.pid == sleeper.pid
    stranger = Daemon(["sleep", "322"], daemon.pid_file)
    assert stranger.pid is None
    stranger.stop()
    assert alive(sleeper.pid)
    daemon.pid_file.write_text(str(sleeper.pid))
    daemon.stop()
    assert not alive(sleeper.pid)
    assert not daemon.pid_file.exists()


@pytest.fixture
def scratch() -> Iterator[Namespace]:
    space = Namespace("voip-unit-test")
    yield space
    space.remove()


@root_only
@pytest.mark.skipif(not shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin"), reason="iproute2 is not here")
def test_a_namespace_is_mended_after_a_crash_and_holds_its_own_sockets(scratch: Namespace) -> None:
    scratch.path.parent.mkdir(exist_ok=True)
    scratch.path.touch()  # a crash between name and namespace leaves this
    assert not scratch.exists
    scratch.make()
    scratch.make()
    assert scratch.exists
    with scratch.open_socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with scratch.open_socket() as client:
            client.connect(listener.getsockname())
        with pytest.raises(ConnectionRefusedError), socket.socket() as outsider:
            outsider.connect(listener.getsockname())
    with subprocess.Popen(scratch.command("sleep", "321")) as process:
        seen = Deadline(5).until(lambda: process.pid in scratch.processes(), every=0.01)
        process.kill()
    assert seen
    scratch.remove()
    assert not scratch.path.exists()
