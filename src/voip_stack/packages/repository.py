"""The cache of built packages, which is a flat apt repository too: `<cache>/packages/NAME-VERSION-KEY/*.deb`.

The user's own .debs are copied into it, each as a build of its own: what is served changes with the index alone.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path

from voip_stack import files, settings
from voip_stack.errors import HostError, PackageError, SettingsError
from voip_stack.packages import recipes

RECIPE, SOURCE, EXTRA = "recipe", "source", "extra"
_MANIFEST = "package.json"
NAME, VERSION = r"[a-z0-9][a-z0-9+.-]+", r"[0-9][A-Za-z0-9.+:~-]*"  # deb-control(5), deb-version(7)


@dataclass(frozen=True)
class Built:
    """What one build left. `at` is seconds since the epoch, `seconds` how long it took.

    `kind`: by a RECIPE of ours, from a SOURCE tree of the user's, or an EXTRA .deb, which nobody built here.
    """

    directory: Path
    name: str
    version: str
    key: str
    at: int
    seconds: float
    kind: str = RECIPE
    origin: str = ""  # of an extra: the user's file
    sha256: str = ""  # of a source tree's tarball
    # What the index says of each file; a build of an older version of this code has none.
    stanzas: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

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


def built_from(sha256: str) -> Built | None:
    """The build of the source tree whose tarball has this sum."""
    return next((b for b in builds() if b.sha256 == sha256), None)


def write_manifest(directory: Path, **values: str | float) -> Built:
    """Describe the build in `directory`; from then on it counts as complete."""
    stanzas = {deb.name: _stanza(deb) for deb in directory.glob("*.deb")}
    (directory / _MANIFEST).write_text(json.dumps({**values, "stanzas": stanzas}, indent=1))
    return Built(directory, **values, stanzas=stanzas)  # type: ignore[arg-type]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Whoever else wants `name` waits; a killed holder lets go."""
    with files.locked(root() / f".{name}.lock"):
        yield


def publish() -> None:
    """Bring the repository up to date: the newest build of each name, and the user's own .debs as they are now.

    An extra .deb that was seen before (path, size, time of change) is not read again. Each file of the index (Packages,
    Packages.gz, Release) is written in one go. Raises PackageError for an extra that can't be used, SettingsError when
    the directory of VOIP_EXTRA_PACKAGES is missing; what is served then stays as it was.
    """
    partial = root() / ".index.partial"
    with locked("index"):
        remove(partial)
        partial.mkdir()
        try:
            before = builds()
            extras = list(_extras(before, partial))
            served = _served([*extras, *(b for b in before if b.kind != EXTRA)])
            packages = _index(served)
            for build in served:
                if build.directory.parent == partial:
                    hand_over(build.directory, *build.directory.iterdir())
                    build.directory.rename(root() / build.directory.name)
            _write(packages.encode(), max((b.at for b in served if b.kind != EXTRA), default=0))
            for build in before:
                if build.kind == EXTRA and build not in extras:
                    build.directory.rename(partial / build.directory.name)
        finally:
            remove(partial)


def check(build: Built) -> None:
    """Raise PackageError when `build` can't be served beside all others."""
    _index(_served([build, *builds()]))


def _extras(before: Iterable[Built], partial: Path) -> Iterator[Built]:
    """The user's own .debs; those that are not among the builds of `before` are copied to `partial`, and checked."""
    directory = settings.load().extra_packages
    if not directory:
        return
    if not directory.is_dir():
        raise SettingsError(
            f"VOIP_EXTRA_PACKAGES={directory}: there is no such directory", "make it, or name another: see .env.example"
        )
    known = {b.key: b for b in before if b.kind == EXTRA}
    for file in sorted(directory.glob("[!.]*.deb")):
        try:
            state = file.stat()
            key = hashlib.sha256(repr((str(file), state.st_size, state.st_mtime_ns)).encode()).hexdigest()[:12]
            yield known.get(key) or _copied(file, partial, key, int(state.st_mtime))
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise PackageError(f"{file} can't be read: {error.strerror}", f"mend or remove it: {file}") from None


def _copied(file: Path, partial: Path, key: str, at: int) -> Built:
    """A checked copy of the user's .deb `file`. Raises PackageError for one that no machine here could install."""
    copy = partial / f"{key}.deb"
    shutil.copyfile(file, copy)
    try:
        control = _dpkg_deb("--field", copy)
        _dpkg_deb("--contents", copy)  # reads all of it: a download may have ended early
    except subprocess.CalledProcessError as error:
        raise PackageError(
            f"{file} is no readable .deb", "get it anew, or remove it", error.stderr.decode(errors="replace")
        ) from None
    fields = _fields(control.decode(errors="replace"))
    name, version, architecture = (fields.get(f, "") for f in ("Package", "Version", "Architecture"))
    if not (re.fullmatch(NAME, name) and re.fullmatch(VERSION, version)):
        raise PackageError(f"{file} is no usable .deb: its Package is {name!r}, its Version {version!r}", "remove it")
    if architecture not in ("all", recipes.architecture()):
        raise PackageError(
            f"{file} is for {architecture or 'no architecture'}, the machines are {recipes.architecture()}",
            f"remove it, or get the package for {recipes.architecture()} or all",
        )
    directory = partial / f"{name}-{without_epoch(version)}-{key}"
    directory.mkdir()
    copy.rename(directory / f"{name}_{without_epoch(version)}_{architecture}.deb")
    return write_manifest(
        directory, name=name, version=version, key=key, at=at, seconds=0.0, kind=EXTRA, origin=str(file)
    )


def without_epoch(version: str) -> str:
    return version.rpartition(":")[2]


def _served(builds: Iterable[Built]) -> list[Built]:
    """All extras, and of the others the first of each name."""
    first: dict[tuple[str, str], Built] = {}
    for build in builds:
        first.setdefault((build.kind, build.key if build.kind == EXTRA else build.name), build)
    return list(first.values())


def _index(builds: Iterable[Built]) -> str:
    """The text of Packages. Raises PackageError when one version of a package has two contents."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    text = ""
    for build in builds:
        for deb in build.debs:
            stanza = build.stanzas.get(deb.name) or _stanza(deb)
            fields, whose = _fields(stanza), build.origin or f"the {build.kind} build of {build.name}"
            named = fields["Package"], fields["Version"]
            sha256, other = found.setdefault(named, (fields["SHA256"], whose))
            if sha256 != fields["SHA256"]:
                raise PackageError(
                    f"{' '.join(named)} is there twice, with different content: {other}, {whose}",
                    "remove one of them, or give yours another version: dch --local +mine",
                )
            text += f"{stanza}Filename: ./{build.directory.name}/{deb.name}\n\n" if other == whose else ""
    return text


def _write(packages: bytes, at: int) -> None:
    """Write the index where it is another than before. `at` is seconds since the epoch."""
    index = {"Packages": packages, "Packages.gz": gzip.compress(packages, mtime=0)}
    release = root() / "Release"
    if release.exists():  # apt silently stays with what it has when a Release is older, as after `prune`
        at = max(at, int(parsedate_to_datetime(_fields(release.read_text())["Date"]).timestamp()))
    # The date of what is in it: a guest whose clock is behind (restored from saved memory) refuses a later one.
    index["Release"] = _release(index, at)
    for name, content in index.items():
        file = root() / name
        if not file.exists() or file.read_bytes() != content:
            files.write(file, content, mode=0o644)
    hand_over(root(), *(root() / name for name in index))


def _stanza(deb: Path) -> str:
    """A package's entry in the index, but for its place: its own control fields, and what the file is."""
    content = deb.read_bytes()
    return (
        f"{_dpkg_deb('--field', deb).decode().rstrip()}\nSize: {len(content)}\n"
        f"SHA256: {hashlib.sha256(content).hexdigest()}\n"
    )


def _dpkg_deb(action: str, deb: Path) -> bytes:
    try:
        return subprocess.run(["dpkg-deb", action, str(deb)], check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise HostError("dpkg-deb is missing", "install dpkg") from None


def _fields(text: str) -> dict[str, str]:
    """The fields of a control file's paragraph, each by its first line."""
    return dict(re.findall(r"^(\S+): *(.*?) *$", text, re.MULTILINE))


def _release(index: dict[str, bytes], at: int) -> bytes:
    sums = "".join(f" {hashlib.sha256(c).hexdigest()} {len(c)} {n}\n" for n, c in index.items())
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
    """Remove builds that are not the newest of a recipe of today, and what killed builds left; the user's own stay.

    Returns the removed directories; only names them when `dry`.
    """
    keep = {b.directory for name in recipes.RECIPES if (b := current(name))}
    gone = [b.directory for b in builds() if b.kind == RECIPE and b.directory not in keep]
    gone += [p for p in root().glob(".*.partial") if p.is_dir() and not _in_use(p)]
    if not dry and gone:
        for directory in gone:
            remove(directory)
        publish()
    return gone


def _in_use(partial: Path) -> bool:
    """Whether a build is at work in `partial`."""
    try:
        with files.locked(root() / f"{partial.name.removesuffix('.partial')}.lock", seconds=0):
            return False
    except files.BusyError:
        return True
