import dataclasses
import gzip
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from voip_stack import packages, settings
from voip_stack.deadline import Deadline
from voip_stack.errors import HostError, PackageError
from voip_stack.packages import build, proxy, recipes, repository

needs_apt = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg on this computer")
needs_proxy = pytest.mark.skipif(
    not (shutil.which("apt-cacher-ng", path="/usr/sbin:/usr/bin") and shutil.which("socat")), reason="no apt-cacher-ng"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a free port for the test's own proxy."""
    port = next(p for p in range(20000 + os.getpid() % 1000, proxy.MAX_PORT) if _is_free(p))
    mine = {"cache_dir": tmp_path, "package_proxy_port": port, "debian_mirror": "", "extra_packages": None}
    chosen = dataclasses.replace(settings.load(), **mine)  # type: ignore[arg-type]
    monkeypatch.setattr(settings, "load", lambda: chosen)
    yield tmp_path
    proxy.stop()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((proxy.LOOPBACK, port)) != 0


def add_build(name: str, version: str, at: int, key: str = "") -> repository.Built:
    """A build of an empty package, as `packages.ensure` leaves one."""
    key = key or (recipes.key(name) if name in recipes.RECIPES else "other")
    directory = repository.root() / f"{name}-{version}-{key}"
    control = directory / "tree" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(
        f"Package: {name}\nVersion: 1:{version}\nArchitecture: all\nMaintainer: Nobody <nobody@voip.local>\n"
        "Description: a test\n of the index\n"
    )
    deb = directory / f"{name}_{version}_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", directory / "tree", deb], check=True)
    shutil.rmtree(directory / "tree")
    repository.write_manifest(directory, name=name, version=f"1:{version}", key=key, at=at, seconds=1.0)
    repository.publish()
    return repository.builds()[0]


def get(path: str, address: str = proxy.LOOPBACK) -> bytes:
    """The proxy's answer for `path`, asked directly."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://{address}:{settings.load().package_proxy_port}{path}", timeout=10) as answer:
        return bytes(answer.read())


def get_by_socket(path: str) -> tuple[int, bytes]:
    """The proxy's answer for `path` to the lab, through the UNIX socket."""
    connection = http.client.HTTPConnection("packages.voip.local", 3143, timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(proxy.socket_path()))
    connection.request("GET", path)
    answer = connection.getresponse()
    content = answer.status, answer.read()
    connection.close()
    return content


# Recipes


def test_an_unknown_package_is_refused_with_the_likely_one() -> None:
    with pytest.raises(PackageError, match="asterix") as caught:
        packages.key("asterix")
    assert "asterisk" in caught.value.hint


def test_a_changed_recipe_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = packages.key("asterisk")
    assert packages.key("asterisk") == before
    changed = dataclasses.replace(recipes.RECIPES["asterisk"], environment=(("DEB_BUILD_OPTIONS", "noopt"),))
    monkeypatch.setitem(recipes.RECIPES, "asterisk", changed)
    assert packages.key("asterisk") != before


def test_a_package_is_built_for_the_roles_that_install_it() -> None:
    assert packages.needed_by(["kamailio", "asterisk"]) == ["asterisk"]
    assert packages.needed_by(["vault_client", "vault_server"]) == ["vault"]
    assert packages.needed_by(["vault"]) == []


def test_what_a_go_module_pins_is_part_of_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = packages.key("vault")
    (tmp_path / "go.sum").write_text("another sum\n")
    monkeypatch.setattr(recipes.Recipe, "files", property(lambda _: [tmp_path / "go.sum"]))
    assert packages.key("vault") != before


# The repository


@needs_apt
def test_the_index_names_every_deb_with_its_sum(cache: Path) -> None:
    built = add_build("asterisk", "22.10.1+x~y-1", at=1_700_000_000)
    index = (cache / "packages" / "Packages").read_text()
    deb = built.debs[0]
    assert f"Filename: ./{deb.parent.name}/{deb.name}\n" in index
    assert f"SHA256: {hashlib.sha256(deb.read_bytes()).hexdigest()}\n" in index
    assert "Version: 1:22.10.1+x~y-1\n" in index
    assert gzip.decompress((cache / "packages" / "Packages.gz").read_bytes()).decode() == index
    release = (cache / "packages" / "Release").read_text()
    assert f" {hashlib.sha256(index.encode()).hexdigest()} {len(index)} Packages\n" in release
    assert "Date: Tue, 14 Nov 2023 22:13:20 UTC\n" in release


@needs_apt
def test_publishing_again_rewrites_nothing(cache: Path) -> None:
    add_build("asterisk", "22.1", at=1)
    before = {f.name: f.stat().st_mtime_ns for f in (cache / "packages").glob("[PR]*")}
    repository.publish()
    assert {f.name: f.stat().st_mtime_ns for f in (cache / "packages").glob("[PR]*")} == before


@needs_apt
def test_only_the_newest_build_of_a_name_is_served_and_prune_removes_the_others(cache: Path) -> None:
    old = add_build("asterisk", "22.1", at=1)
    other_recipe = add_build("asterisk", "22.2", at=2, key="0123456789ab")
    forgotten = add_build("gone", "1.0", at=3)
    new = add_build("asterisk", "22.3", at=4)
    left_by_a_killed_build = cache / "packages" / ".asterisk-0123456789ab.partial"
    left_by_a_killed_build.mkdir()
    index = (cache / "packages" / "Packages").read_text()
    assert "22.3" in index
    assert "22.1" not in index
    expected = {old.directory, other_recipe.directory, forgotten.directory, left_by_a_killed_build}
    assert set(packages.prune(dry=True)) == expected
    assert len(packages.builds()) == 4
    assert set(packages.prune()) == expected
    assert packages.builds() == [new]
    assert "Package: gone" not in (cache / "packages" / "Packages").read_text()


@needs_apt
def test_prune_leaves_a_running_build_alone(cache: Path) -> None:
    at_work = cache / "packages" / ".asterisk-k.partial"
    with repository.locked("asterisk-k"):
        at_work.mkdir()
        assert packages.prune() == []
    assert packages.prune() == [at_work]


@needs_apt
def test_what_is_built_is_not_built_again(cache: Path) -> None:
    built = add_build("asterisk", "22.1", at=1)
    assert packages.ensure("asterisk") == built.directory
    assert cache in built.directory.parents


# Building


@pytest.mark.parametrize(
    ("log", "message", "hint"),
    [
        (
            "E: Release file for http://m/debian/dists/unstable/InRelease is expired (invalid since 17d). Updates",
            "expired",
            "VOIP_APT_IGNORE_EXPIRED=yes",
        ),
        ("cc1: error\nfatal: No space left on device", "disk is full", "packages.prune"),
        ("W: Failed\nE: Failed to fetch http://m  503  Resource temporarily unavailable", "can't be reached", "doctor"),
        ("pbx.c:12: error: expected ';'\nmake: *** [pbx.o] Error 1", "compilation failed", "the whole log"),
    ],
)
def test_a_failed_build_says_why_and_what_to_do(tmp_path: Path, log: str, message: str, hint: str) -> None:
    file = tmp_path / "log"
    file.write_text(log)
    failure = build._failure("asterisk", "compilation", file)
    assert message in failure.message
    assert hint in failure.hint
    assert log.splitlines()[-1] in failure.details


def test_without_root_and_sudo_the_command_for_root_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(proxy, "start", lambda: "http://127.0.0.1:9")
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(HostError, match="needs root") as caught:
        packages.ensure("asterisk")
    assert "packages.build" in caught.value.hint


@needs_root
def test_a_failed_build_leaves_only_its_log_and_can_be_run_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "start", lambda: "http://127.0.0.1:9")
    monkeypatch.setattr(build, "_mmdebstrap", lambda tree, _: ["sh", "-c", f"mkdir {tree}; echo half; exit 3"])
    for _ in range(2):
        with pytest.raises(PackageError, match="chroot failed") as caught:
            packages.ensure("asterisk")
        assert caught.value.details == "half"
    assert [p.name for p in (cache / "packages").iterdir() if p.is_dir()] == []


@needs_root
def test_a_killed_build_leaves_no_process(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = f"""
import pathlib, sys
from voip_stack.packages import build
script = 'sleep 61.5 & nohup sleep 61.5 & echo $$ > {pid_file}; wait'
build._run("x", "sleep", [*build._CONTAINED, "sh", "-c", script], pathlib.Path({str(tmp_path / "log")!r}))
"""
    builder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    assert Deadline(20).until(pid_file.exists, every=0.05)
    time.sleep(0.2)
    descendants = _descendants(builder.pid)
    assert len(descendants) >= 4  # unshare, sh, two sleeps
    os.kill(builder.pid, signal.SIGKILL)
    builder.wait()
    assert Deadline(10).until(lambda: not any(p.is_alive for p in descendants), every=0.05)


def _descendants(pid: int) -> list[proxy.Process]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [p for p in [proxy.Process.of(int(c)) for c in children] if p]
    return found + [d for c in children for d in _descendants(int(c))]


# The proxy


@needs_proxy
@needs_apt
def test_the_proxy_serves_what_we_built_by_both_ways_and_a_new_build_at_once(cache: Path) -> None:
    proxy.start()
    assert get("/voip-packages/Packages") == b""
    built = add_build("asterisk", "22.1+a~b", at=1)
    index = (cache / "packages" / "Packages.gz").read_bytes()
    assert get("/voip-packages/./Packages.gz") == index
    assert get_by_socket("/voip-packages/Packages.gz") == (200, index)
    # apt requests + as %2b.
    quoted = f"{built.directory.name}/{built.debs[0].name}".replace("+", "%2b")
    assert get(f"/voip-packages/./{quoted}") == built.debs[0].read_bytes()
    add_build("asterisk", "22.2", at=2)
    assert b"22.2" in gzip.decompress(get_by_socket("/voip-packages/Packages.gz")[1])


@needs_proxy
@needs_apt
def test_apt_itself_updates_and_downloads_from_the_proxy(cache: Path) -> None:
    proxy.start()
    deb = add_build("asterisk", "22.1+a~b", at=1).debs[0]
    apt = cache / "apt-client"
    for directory in ("state/lists/partial", "cache/archives/partial", "etc/preferences.d"):
        (apt / directory).mkdir(parents=True)
    (apt / "etc/sources.list").write_text(f"deb [trusted=yes] {proxy.url()}/voip-packages/ ./\n")
    (apt / "status").write_text("")
    options = {
        "Dir::State": apt / "state",
        "Dir::Cache": apt / "cache",
        "Dir::Etc": apt / "etc",
        "Dir::State::status": apt / "status",
        "Acquire::http::Proxy": "DIRECT",
        "APT::Sandbox::User": "",
    }
    command = ["apt-get", *(f"-o{k}={v}" for k, v in options.items())]
    subprocess.run([*command, "update"], check=True)
    subprocess.run([*command, "download", "asterisk"], check=True, cwd=apt)
    assert next(apt.glob("*.deb")).read_bytes() == deb.read_bytes()


@needs_proxy
def test_starting_again_changes_nothing_and_one_more_address_is_added(cache: Path) -> None:
    proxy.start()
    state = (cache / "run" / "apt-proxy.json").read_text()
    proxy.start()
    assert (cache / "run" / "apt-proxy.json").read_text() == state
    proxy.start(bind=["127.0.0.2"])
    assert proxy.status().bind == ("127.0.0.1", "127.0.0.2")
    assert get("/voip-packages/Packages", "127.0.0.2") == b""
    after = (cache / "run" / "apt-proxy.json").read_text()
    proxy.start()  # as a bake does: the lab's request stays
    assert (cache / "run" / "apt-proxy.json").read_text() == after
    assert proxy.start(offline=True)
    assert proxy.status().offline


@needs_proxy
def test_an_occupied_port_is_named_and_nothing_is_left_running(cache: Path) -> None:
    port = settings.load().package_proxy_port
    with socket.create_server((proxy.LOOPBACK, port)), pytest.raises(PackageError, match=f"port {port} of 127.0.0.1"):
        proxy.start()
    assert not proxy.status().running
    assert list((cache / "run").glob("*.sock")) == []


def test_a_port_that_apt_cacher_ng_can_not_use_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = dataclasses.replace(settings.load(), package_proxy_port=40000, cache_dir=cache)
    monkeypatch.setattr(settings, "load", lambda: chosen)
    with pytest.raises(PackageError, match="port 40000"):
        proxy.start()


@needs_proxy
def test_an_address_that_is_not_here_is_named(cache: Path) -> None:
    with pytest.raises(PackageError, match=r"192\.0\.2\.1"):
        proxy.start(bind=["192.0.2.1"])
    assert not proxy.status().running
    assert (cache / "run").is_dir()


@needs_proxy
def test_a_killed_proxy_is_started_anew(cache: Path) -> None:
    proxy.start()
    state = json.loads((cache / "run" / "apt-proxy.json").read_text())
    for process in state["processes"]:
        os.kill(process["pid"], signal.SIGKILL)
    assert Deadline(5).until(lambda: not proxy.status().running, every=0.05)
    proxy.start()
    assert get("/voip-packages/Packages") == b""


def test_another_process_with_our_old_number_is_left_alone(cache: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        number = proxy.Process.of(bystander.pid)
        assert number
        assert number.is_alive
        old = {"pid": number.pid, "start": number.start - 1}
        (cache / "run").mkdir()
        (cache / "run" / "apt-proxy.json").write_text(
            json.dumps({"processes": [old], "bind": [], "offline": False, "upstream": ""})
        )
        assert proxy.stop() is False
        assert number.is_alive
        bystander.kill()


def test_https_is_passed_through_to_the_chosen_mirror_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = dataclasses.replace(settings.load(), debian_mirror="https://mirror.voip.local/debian", cache_dir=cache)
    monkeypatch.setattr(settings, "load", lambda: chosen)
    assert "PassThroughPattern: ^mirror\\.voip\\.local:443$\n" in proxy._config([proxy.LOOPBACK], False, "")


@needs_proxy
def test_another_environment_does_not_restart_the_proxy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    proxy.start()
    assert "Proxy: http://127.0.0.1:9\n" in (cache / "apt" / "conf" / "acng.conf").read_text()
    state = (cache / "run" / "apt-proxy.json").read_text()
    monkeypatch.delenv("http_proxy")
    proxy.start()
    assert (cache / "run" / "apt-proxy.json").read_text() == state
