"""Where images are kept: `<cache>/images/NAME-KEY/`, complete or absent, never half-made."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from voip_stack import files, settings
from voip_stack.errors import ImageError


@dataclass(frozen=True)
class Image:
    """A bootable image. `disk` is a raw ext4 file without partitions that overlays stand on: nobody writes to it."""

    name: str
    key: str
    disk: Path
    kernel: Path
    initrd: Path
    kernel_args: str

    @property
    def directory(self) -> Path:
        return self.disk.parent

    @property
    def bytes_used(self) -> int:
        """Bytes on the computer's disk."""
        return sum(f.stat().st_blocks * 512 for f in self.directory.iterdir())


def root() -> Path:
    return settings.load().cache_dir / "images"


def digest(*parts: object) -> str:
    """A short key of text and of files; a directory counts with every file in it but what Python has compiled."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
                if file.is_dir() or file.suffix == ".pyc":
                    continue
                total.update(str(file.relative_to(part)).encode() + b"\0" + file.read_bytes() + b"\0")
        else:
            total.update(repr(part).encode() + b"\0")
    return total.hexdigest()[:16]


@contextlib.contextmanager
def building(directory: Path) -> Iterator[Path]:
    """A partial directory beside `directory`, renamed to it when the block ends well.

    One builder at a time; what a killed one left is removed first. Raises ImageError when the disk is full.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial")
    with files.locked(directory.parent / f".{directory.name}.lock"):
        remove(partial)
        try:
            partial.mkdir()
            yield partial
            if not directory.exists():
                partial.rename(directory)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ImageError(
                f"the disk of {directory.parent} is full", "free some space, e.g. with: ./voip images.prune"
            ) from None
        finally:
            remove(partial)


def remove(directory: Path) -> None:
    """Remove a tree if it is there; not across file systems, in case something is mounted in it."""
    if not directory.exists():
        return
    device = directory.stat().st_dev
    for path in directory.rglob("*"):
        if path.is_dir() and not path.is_symlink() and path.stat().st_dev != device:
            raise ImageError(f"{path} is mounted", f"umount {path}")
    shutil.rmtree(directory)


def save(image: Image) -> None:
    """Write down what `image` is, beside its disk."""
    values = {k: v.name if isinstance(v, Path) else v for k, v in asdict(image).items()}
    (image.directory / "image.json").write_text(json.dumps(values, indent=1))


def find(directory: Path) -> Image | None:
    """The image in `directory`, None when there is none. Marks it as used now, for `prune`."""
    description = directory / "image.json"
    if not description.exists():
        return None
    os.utime(description)
    return _read(description)


def _read(description: Path) -> Image:
    values = json.loads(description.read_text())
    files = {k: description.parent / values.pop(k) for k in ("disk", "kernel", "initrd")}
    return Image(**values, **files)


def list_images() -> list[Image]:
    """All complete images, the last used first."""
    found = sorted(root().glob("*/image.json"), key=lambda f: f.stat().st_mtime, reverse=True)
    return [_read(f) for f in found]


def prune(used: Iterable[str], current: Iterable[str], dry: bool = False) -> list[Path]:
    """Remove what no machine stands on (keys in `used`) and what no current recipe makes (keys in `current`).

    Returns the removed directories; only names them when `dry`.
    """
    keep = {*used, *current}
    gone = [d for d in root().glob("*-*") if d.is_dir() and d.name.rpartition("-")[2] not in keep]
    gone += [d for d in root().glob(".*.partial") if d.is_dir()]
    if not dry:
        for directory in gone:
            remove(directory)
    return gone


def forget(names: Iterable[str]) -> None:
    """Let go of the base tree and of the images of `names` that exist, so that they are made anew.

    A machine that stands on one keeps it: the directory is only renamed out of the way, for `prune` to remove later.
    """
    for directory in root().glob("*-*"):
        if directory.name.startswith("base-") or directory.name.rpartition("-")[0] in names:
            remove(directory) if directory.name.startswith("base-") else (directory / "image.json").unlink(True)
