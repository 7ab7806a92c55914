"""What is wrong with this computer, and how to mend it. Every finding can be acted on."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from voip_stack import host, inventory, lab, settings
from voip_stack.errors import HostError
from voip_stack.host.tools import tools
from voip_stack.lab.base import privileged, tool_environment
from voip_stack.tell import Tell

PYTHON = (3, 11)
DISK_EMPTY_GIB = 10  # base tree, images, builds and packages of a first `up`
DISK_LEAST_GIB = 3  # the machines' own disks grow
MEMORY_SHARE = 0.75  # guests touch less than they are given
_NETWORK_SECONDS = 10


class State(Enum):
    OK = "ok"
    WARNING = "warning"  # it works, but worse
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, how to mend it, and the repair itself where we can do it."""

    name: str
    state: State
    found: str
    mend: str = ""
    fix: Callable[[], None] | None = None


def examine() -> Iterator[Finding]:
    """Look at everything, the cheap things first. Raises SettingsError or InventoryError when those can't be read."""
    for check in (_python, _cpu, _memory, _disk, _tools, _accelerator, _lab, _packages):
        yield from check()


def examine_and_fix(fix: bool, tell: Tell) -> list[Finding]:
    """All findings; with `fix`, what can be mended is, and looked at again."""
    findings = list(examine())
    repairs = [f for f in findings if fix and f.fix and f.state is not State.OK]
    for finding in repairs:
        tell(f"{finding.name}: {finding.mend}")
        assert finding.fix  # noqa: S101  # selected above
        finding.fix()
    return list(examine()) if repairs else findings


def require(tell: Tell, fix: bool = False) -> None:
    """Raise HostError naming what keeps the stack from running here; with `fix`, mend what can be mended first."""
    findings = examine_and_fix(fix, tell)
    for finding in findings:
        if finding.state is State.WARNING:
            tell(f"warning: {finding.name}: {finding.found}; {finding.mend}")
    failed = [f for f in findings if f.state is State.FAILED]
    if failed:
        first = failed[0]
        others = f" (and {len(failed) - 1} more: ./voip doctor)" if failed[1:] else ""
        raise HostError(f"{first.name}: {first.found}{others}", first.mend)


def _graded(name: str, found: str, mend: str, *, good: bool, enough: bool) -> Finding:
    state = State.OK if good else State.WARNING if enough else State.FAILED
    return Finding(name, state, found, "" if good else mend)


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= PYTHON
    yield _graded("python", version, f"install Python {PYTHON[0]}.{PYTHON[1]} or later", good=good, enough=False)


def _cpu() -> Iterator[Finding]:
    cpus = host.current().cpus
    found = f"{cpus} of {host.current().architecture.name}"
    yield _graded("cpu", found, "two or more make all of it faster", good=cpus > 1, enough=True)


def _memory() -> Iterator[Finding]:
    has = host.current().memory_mib
    wanted = sum(m.memory_mib for m in inventory.load().machines.values())
    yield _graded(
        "memory",
        f"{has} MiB, the machines may take {wanted}",
        "lower memory_mib in ansible/inventory/development.yml",
        good=has >= wanted,
        enough=has >= wanted * MEMORY_SHARE,
    )


def _disk() -> Iterator[Finding]:
    cache = settings.load().cache_dir
    there = next(p for p in (cache, *cache.parents) if p.exists())
    if not os.access(there, os.W_OK):
        yield Finding("disk", State.FAILED, f"{there} can't be written", "set VOIP_CACHE_DIR to a directory of yours")
        return
    free = shutil.disk_usage(there).free / 1024**3
    filled = (cache / "images").is_dir()
    yield _graded(
        "disk",
        f"{free:.0f} GiB free for {cache}",
        "./voip images.prune; or set VOIP_CACHE_DIR to a larger disk",
        good=free >= (DISK_LEAST_GIB if filled else DISK_EMPTY_GIB),
        enough=free >= DISK_LEAST_GIB,
    )


def _tools() -> Iterator[Finding]:
    platform = host.current()
    needed = tools(platform)
    missing = [t for t in needed if not platform.find(t.program)]
    if not missing:
        yield Finding("tools", State.OK, f"all {len(needed)}")
    for tool in missing:
        install = platform.install([tool.package(platform)])
        manager = shutil.which(install[0])
        yield Finding(
            f"tool {tool.program}",
            State.FAILED,
            f"missing ({tool.purpose})",
            " ".join(privileged(*install) if platform.system == "Linux" else install)
            if manager
            else f"install {tool.program} with this system's package manager",
            functools.partial(_install, install) if manager else None,
        )


def _install(command: list[str]) -> None:
    argv = privileged("env", "DEBIAN_FRONTEND=noninteractive", *command) if command[0] == "apt-get" else command
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(
            f"this failed: {' '.join(command)}", "is the network there?", (done.stdout + done.stderr)[-2000:]
        )


def _accelerator() -> Iterator[Finding]:
    if not host.current().find(host.current().architecture.qemu):
        return  # a finding of its own
    try:
        known = host.verdict()
    except HostError as error:
        yield Finding("accelerator", State.FAILED, error.message, error.hint)
        return
    yield Finding("accelerator", State.OK, known or "not known yet: decided when the first machine's kernel boots")


def _lab() -> Iterator[Finding]:
    home = lab.current()
    if home.name == "namespace" and os.geteuid() != 0:
        yield Finding(
            "lab",
            State.FAILED,
            f"no libvirtd answers at {settings.load().libvirt_uri}, and only root can start one",
            "sudo ./voip …; or sudo apt-get install libvirt-daemon-system && sudo usermod -aG libvirt $USER",
        )
        return
    parts = home.status()
    if home.name == "libvirt" and not parts[0].up:
        mend = "sudo systemctl start libvirtd; are you in its group? or leave VOIP_LAB out of .env"
        yield Finding("lab", State.FAILED, f"no libvirtd answers at {home.uri}", mend)
        return
    broken = [p for p in parts if not p.up]
    if not broken or not any(p.up for p in parts if p.name != "libvirtd"):
        yield Finding("lab", State.OK, f"{home.name}, {'not made yet' if broken else 'up'}")
    else:
        yield Finding("lab", State.FAILED, f"down: {', '.join(p.name for p in broken)}", "./voip lab.up", home.up)


def _packages() -> Iterator[Finding]:
    """A first index of the archive, by apt's own ways: its sources, proxies and credentials."""
    mirror = settings.load().debian_mirror
    cached = (settings.load().cache_dir / "images").is_dir()
    bad = State.WARNING if cached else State.FAILED
    problem = _fetch(f"{mirror.rstrip('/')}/dists/trixie/InRelease") if mirror else _fetch_with_apt()
    if problem:
        mend = "is the network there? with a proxy: set Acquire::http::Proxy for apt; or set VOIP_DEBIAN_MIRROR"
        yield Finding("packages", bad, f"not reachable: {problem}", mend)
    else:
        yield Finding("packages", State.OK, f"reachable{f' at {mirror}' if mirror else ''}")


def _fetch(url: str) -> str:
    """Why `url` can't be had, or nothing."""
    try:
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310  # http(s): checked by the settings
        urllib.request.urlopen(request, timeout=_NETWORK_SECONDS).close()  # noqa: S310
    except (urllib.error.URLError, OSError) as error:
        return f"{url}: {error}"
    return ""


def _fetch_with_apt() -> str:
    if not shutil.which("apt-get"):
        return ""  # nobody's archive to look at
    listing = subprocess.run(
        ["apt-get", "--print-uris", "update"], capture_output=True, text=True, env=tool_environment(), check=False
    ).stdout
    url = next((line.split("'")[1] for line in listing.splitlines() if line.startswith("'http")), "")
    if not url:
        return ""  # a local archive
    with tempfile.TemporaryDirectory() as directory:
        command = ["/usr/lib/apt/apt-helper", "-o", f"Acquire::http::Timeout={_NETWORK_SECONDS}"]
        command += ["-o", f"Acquire::https::Timeout={_NETWORK_SECONDS}", "-o", "Acquire::Retries=0"]
        done = subprocess.run(
            [*command, "download-file", url, str(Path(directory) / "index")],
            capture_output=True,
            text=True,
            check=False,
        )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [url])[0]


def rows(findings: list[Finding]) -> list[dict[str, str]]:
    """The findings as plain values."""
    return [{"check": f.name, "state": f.state.value, "found": f.found, "mend": f.mend} for f in findings]
