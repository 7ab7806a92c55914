"""Source trees of the user's, as tarballs whose content and sum were checked. Nothing is unpacked on this computer."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import lzma
import re
import shutil
import subprocess
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from voip_stack.errors import HostError, PackageError
from voip_stack.packages import repository

_ZSTD = b"\x28\xb5\x2f\xfd"  # RFC 8878, 3.1.1
_PATIENCE = 60  # seconds without a byte of a download
_WHAT = "name a directory or a tarball (.tar, .tar.gz, .xz, .bz2, .zst) whose top folder carries debian/"


@dataclass(frozen=True)
class Tree:
    """A source tree: the folder `top` of `tarball` carries debian/. `name` and `version` are debian/changelog's."""

    tarball: Path
    sha256: str  # of what the user named; of a directory: of the tarball that was made of it
    top: str
    name: str
    version: str


@contextlib.contextmanager
def fetched(where: str, sha256: str = "") -> Iterator[Tree]:
    """The source tree at `where`: a directory, a tarball, or the http, https or file URL of one; gone at the end.

    Raises PackageError when it can't be read, has another sum than `sha256`, or is no source tree; HostError without
    the program zstd for a .zst.
    """
    url = re.match(r"(https?|file)://", where)
    if url and not sha256:
        raise PackageError(f"{where} needs the sum that it should have", "add: --sha256 HEX, as sha256sum prints it")
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise PackageError(f"{sha256} is no SHA-256", "64 hexadecimal digits, as sha256sum prints them")
    name = f"source-{hashlib.sha256(where.encode()).hexdigest()[:12]}"
    with repository.locked(name):
        partial = repository.root() / f".{name}.partial"
        repository.remove(partial)
        partial.mkdir()
        try:
            tarball = partial / "source.tar"
            try:
                if Path(where).is_dir():
                    _pack(Path(where), tarball)
                else:
                    with _opened(where, bool(url)) as source, tarball.open("wb") as file:
                        shutil.copyfileobj(source, file)
            except (OSError, http.client.HTTPException) as error:
                raise PackageError(f"{where} can't be read: {error}", _WHAT) from None
            with tarball.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 and found != sha256.lower():
                raise PackageError(
                    f"{where} has the SHA-256 {found}, not {sha256.lower()}",
                    "it was changed, or came incomplete: get it again, or compare with whoever published the sum",
                )
            yield _examined(_plain(tarball), found, where)
        finally:
            repository.remove(partial)


def _opened(where: str, url: bool) -> BinaryIO:
    if not url:
        return Path(where).open("rb")
    opened: BinaryIO = urllib.request.urlopen(where, timeout=_PATIENCE)  # noqa: S310  # the schemes are matched above
    return opened


def _pack(directory: Path, tarball: Path) -> None:
    """A tarball of `directory` without its .git; the same for the same files, whoever owns them."""

    def anybody(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mtime = int(member.mtime)
        return None if PurePosixPath(member.name).name == ".git" else member

    with tarfile.open(tarball, "w") as tar:
        tar.add(directory.resolve(), "source", filter=anybody)


def _plain(tarball: Path) -> Path:
    """The tarball without zstd, which Python's tarfile does not read."""
    with tarball.open("rb") as file:
        if file.read(4) != _ZSTD:
            return tarball
    plain = tarball.with_name("plain.tar")
    try:
        done = subprocess.run(["zstd", "-dqo", str(plain), str(tarball)], check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise HostError("zstd is missing, which unpacks .tar.zst", "install zstd, or name a .tar.xz") from None
    if done.returncode != 0:
        raise PackageError("the tarball is broken", "get it anew", done.stderr)
    return plain


def _examined(tarball: Path, sha256: str, where: str) -> Tree:
    """The tree in `tarball`, whose names stay below one folder: the chroot's user builder unpacks it, nobody else."""
    try:
        with tarfile.open(tarball) as tar:
            members = [(PurePosixPath(m.name), m) for m in tar.getmembers()]
            for path, member in members:
                if path.is_absolute() or ".." in path.parts or member.isdev():
                    raise PackageError(f"{where} holds {member.name!r}, which leads out of it", "don't trust it")
            logs = [(p, m) for p, m in members if p.parts[-2:] == ("debian", "changelog") and m.isfile()]
            # debian/ in the tarball's own top, or in its only folder that has one
            tops = {p.parents[1]: m for p, m in logs if len(p.parts) <= 3}
            top = PurePosixPath() if PurePosixPath() in tops else next(iter(tops), None)
            log = tar.extractfile(tops[top]) if top is not None else None
            first = log.readline().decode(errors="replace") if log else ""
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        hint = "dpkg-source --extract makes a directory of a .dsc; name that" if where.endswith(".dsc") else _WHAT
        raise PackageError(f"{where} is no readable tarball: {error}", hint) from None
    if top is None or (len(tops) > 1 and top.parts):
        raise PackageError(f"{where} carries no debian/changelog in its top folder", _WHAT)
    heading = re.match(rf"({repository.NAME}) \(({repository.VERSION})\) ", first)
    if not heading:
        raise PackageError(
            f"{where}: debian/changelog begins with {first.rstrip()!r}", "it has to begin with: NAME (VERSION) SUITE;"
        )
    return Tree(tarball, sha256, str(top) if top.parts else "", heading[1], heading[2])
