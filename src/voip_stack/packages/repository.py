"""The cache of built packages, which is a flat apt repository too: `<cache>/packages/NAME-VERSION-KEY/*.deb`."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from voip_stack import settings
from voip_stack.packages import recipes

_MANIFEST = "package.json"


@dataclass(frozen=True)
class Built:
    """What one build left. `at` is seconds since the epoch, `seconds` how long it took."""

    directory: Path
    name: str
    version: str
    key: str
    at: int
    seconds: float

    @property
    def debs(self) -> list[Path]:
        return sorted(self.directory.glob("*.deb"))

    @property
    def is_current(self) -> bool:
        """Whether today's recipe makes it."""
        return self.name in recipes.RECIPES and self.key == recipes.key(self.name)


def root() -> Path:
    return settings.load().cache_dir / "packages"


def builds() -> list[Built]:
    """All complete builds, the newest first."""
    manifests = root().glob(f"[!.]*/{_MANIFEST}")
    return sorted((Built(m.parent, **json.loads(m.read_text())) for m in manifests), key=lambda b: b.at, reverse=True)


def current(name: str) -> Built | None:
    """The newest build of package `name` by today's recipe."""
    return next((b for b in builds() if b.name == name and b.is_current), None)


def write_manifest(directory: Path, **values: str | float) -> None:
    """Describe the build in `directory`; from then on it counts as complete."""
    (directory / _MANIFEST).write_text(json.dumps(values, indent=1))


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Whoever else wants `name` waits; a killed holder lets go."""
    root().mkdir(parents=True, exist_ok=True)
    with (root() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def publish() -> None:
    """Write the index (Packages, Packages.gz, Release) of the newest build of each name; each file in one go."""
    with locked("index"):
        newest: dict[str, Built] = {}
        for build in builds():
            newest.setdefault(build.name, build)
        packages = "".join(_stanza(deb) for build in newest.values() for deb in build.debs).encode()
        files = {"Packages": packages, "Packages.gz": gzip.compress(packages, mtime=0)}
        # The date of what is in it: a guest whose clock is behind (restored from saved memory) refuses a later one.
        files["Release"] = _release(files, max((b.at for b in newest.values()), default=0))
        for name, content in files.items():
            file = root() / name
            if not file.exists() or file.read_bytes() != content:
                partial = root() / f".{name}.partial"
                partial.write_bytes(content)
                partial.rename(file)
        hand_over(root(), *(root() / name for name in files))


def _stanza(deb: Path) -> str:
    """A package's entry in the index: its own control fields, and where and what the file is."""
    control = subprocess.run(["dpkg-deb", "--field", str(deb)], check=True, capture_output=True, text=True).stdout
    content = deb.read_bytes()
    return (
        f"{control.rstrip()}\nFilename: ./{deb.relative_to(root())}\nSize: {len(content)}\n"
        f"SHA256: {hashlib.sha256(content).hexdigest()}\n\n"
    )


def _release(files: dict[str, bytes], at: int) -> bytes:
    sums = "".join(f" {hashlib.sha256(c).hexdigest()} {len(c)} {n}\n" for n, c in files.items())
    # deb(5) and apt want the zone as UTC.
    date = formatdate(at, usegmt=True).replace("GMT", "UTC")
    head = f"Origin: voip-stack\nLabel: voip-stack\nSuite: {recipes.SUITE}\nArchitectures: {recipes.architecture()}\n"
    return f"{head}Date: {date}\nSHA256:\n{sums}".encode()


def hand_over(*paths: Path) -> None:
    """What root made in a user's cache belongs to that user."""
    if os.geteuid() == 0:
        owner = settings.load().cache_dir.stat()
        for path in paths:
            os.chown(path, owner.st_uid, owner.st_gid)


def remove(path: Path) -> None:
    """Remove a tree, never across a mount in it."""
    subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=True)


def prune(dry: bool = False) -> list[Path]:
    """Remove builds that are not the newest of a recipe of today, and what killed builds left.

    Returns the removed directories; only names them when `dry`.
    """
    keep = {b.directory for name in recipes.RECIPES if (b := current(name))}
    gone = [b.directory for b in builds() if b.directory not in keep]
    gone += [p for p in root().glob(".*.partial") if p.is_dir() and not _in_use(p)]
    if not dry and gone:
        for directory in gone:
            remove(directory)
        publish()
    return gone


def _in_use(partial: Path) -> bool:
    """Whether a build is at work in `partial`."""
    with (root() / f"{partial.name.removesuffix('.partial')}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
