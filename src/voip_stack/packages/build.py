"""Building .debs in a clean chroot: complete or absent, and whatever kills it leaves no process and no mount."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from voip_stack import settings
from voip_stack.errors import HostError, PackageError, UnavailableError
from voip_stack.packages import proxy, recipes, repository, source
from voip_stack.tell import Progress, nobody

# Ends with its parent (setpriv), takes all its children along (unshare's pid namespace), and its mounts are its own.
_CONTAINED = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
)

_IN_CHROOT = """
set -eu
tree=$1 script=$2; shift 2
mount -t proc proc "$tree/proc"
mount -t sysfs -o ro sysfs "$tree/sys"
mount --rbind /dev "$tree/dev"
mount -t tmpfs tmpfs "$tree/tmp"
exec env --ignore-environment "$@" chroot "$tree" sh -eu -c "$script"
"""

_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/build",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}

_NOT_THERE = re.compile(r"^no version .* of .* in .*$", re.MULTILINE)  # as the recipes say it

# What a log's end says, and what to do about it.
_CAUSES = (
    (
        r"is expired \(invalid since",
        "a package index of the mirror has expired",
        "a stale mirror: set VOIP_DEBIAN_MIRROR to another, or accept it with VOIP_APT_IGNORE_EXPIRED=yes",
    ),
    (r"No space left on device", "the disk is full", "free some space, e.g. with: ./voip packages.prune"),
    (
        r"Could not connect|Temporary failure|Connection (failed|timed out)|\b50[0-9]  ",
        "the mirror can't be reached",
        "is the network there? see: ./voip doctor",
    ),
)
_CAUSES_WITHOUT_NETWORK = (
    (
        r"(?i)could(n't| not) resolve|name resolution|network is unreachable|no such host",
        "it wants to download",
        "put what it needs into the tree, or name Debian's package of it in debian/control's Build-Depends",
    ),
    _CAUSES[1],
)

# Of the user's own environment: how downloads that are not apt's leave this computer.
_DOWNLOADS = ("GOPROXY", "GONOPROXY", "GOSUMDB", "GONOSUMDB", "GOPRIVATE", "HTTPS_PROXY", "NO_PROXY")

_SAY_EVERY = 60  # seconds


def ensure(name: str, refresh: bool = False, progress: Progress = nobody) -> Path:
    """The directory with the .debs of package `name`; built when there is none, or anew on `refresh`.

    Takes about 5 minutes on two cores. Raises PackageError with the end of the log, UnavailableError when the mirror
    has no such source, HostError without root.
    """
    recipe = recipes.find(name)
    found = repository.current(name)
    if found and not refresh:
        return found.directory
    if os.geteuid() != 0:
        _as_root(name, name, name)
    else:
        with repository.locked(f"{name}-{recipes.key(name)}"):
            again = repository.current(name)
            if not again or again == found:  # nobody built it while we waited
                _build(recipe, recipes.key(name), progress)
        repository.publish()
    built = repository.current(name)
    if not built:
        raise PackageError(f"{name} was not built", f"see what it says as root: ./voip packages.build {name}")
    return built.directory


def ensure_source(where: str, sha256: str = "", refresh: bool = False, progress: Progress = nobody) -> Path:
    """The directory with the .debs of a source tree that carries debian/; built once for each sum, or on `refresh`.

    `where` is a directory, a tarball, or the http, https or file URL of one; `sha256` the tarball's sum, which a URL
    has to have. The build takes the place of older ones of the same source package. Raises PackageError when the tree
    can't be had, is none, or does not build; HostError without root or zstd.
    """
    repository.publish()  # an extra package that is broken is told now, not after the build
    with source.fetched(where, sha256) as tree:
        key = tree.sha256[:12]
        if refresh or not repository.built_from(tree.sha256):
            if os.geteuid() != 0:
                _as_root(tree.name, f"--source {where}", "--source", str(tree.tarball), tree.sha256)
            else:
                with repository.locked(f"{tree.name}-{key}"):
                    _build(recipes.source_tree(tree.name), key, progress, tree)
            for build in repository.builds():
                if build.kind == repository.SOURCE and build.name == tree.name and build.sha256 != tree.sha256:
                    repository.remove(build.directory)
            repository.publish()
    built = repository.built_from(tree.sha256)
    assert built, tree  # noqa: S101  # else an error was raised above
    return built.directory


def _as_root(name: str, again: str, *arguments: str) -> None:
    environment = settings.load().environment()
    keep = "--preserve-env=" + ",".join((*environment, *_DOWNLOADS, "SSL_CERT_FILE"))
    proxy.start()  # as the user, who owns its cache
    command = ["sudo", keep, sys.executable, "-m", "voip_stack.packages", *arguments]
    try:
        done = subprocess.run(command, env=os.environ | environment, check=False)
    except FileNotFoundError:
        raise HostError(f"building {name} needs root", f"as root: ./voip packages.build {again}") from None
    if done.returncode != 0:
        kind = UnavailableError if done.returncode == UnavailableError.exit_code else PackageError
        raise kind(f"{name} could not be built as root", "the error stands above")


def _build(recipe: recipes.Recipe, key: str, progress: Progress, users: source.Tree | None = None) -> None:
    start = time.monotonic()
    partial = repository.root() / f".{recipe.name}-{key}.partial"
    tree, result = partial / "tree", partial / "result"
    log = settings.load().cache_dir / "logs" / f"package-{recipe.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    progress(recipe.name, f"building .debs, once; the log is {log}")
    repository.remove(partial)
    result.mkdir(parents=True)
    try:
        _run(recipe.name, "chroot", [*_CONTAINED, *_mmdebstrap(tree, proxy.start())], log, progress)
        values = _ENVIRONMENT | dict(recipe.environment) | _parallel(recipe) | _sources(recipe, tree / "build")
        if users:
            shutil.copyfile(users.tarball, tree / "build" / "source.tar")
            (tree / "build" / "source.tar").chmod(0o644)
            values["TOP"] = users.top
        environment = [f"{k}={v}" for k, v in values.items()]
        for label, script in recipe.phases:
            command = [*_CONTAINED, "sh", "-c", _IN_CHROOT, "sh", str(tree), script, *environment]
            _run(recipe.name, label, command, log, progress)
        note = {"name": recipe.name, "key": key}
        if users:
            _collect_all(recipe.name, tree / "build", result)
            note |= {"version": users.version, "kind": repository.SOURCE, "sha256": users.sha256}
        else:
            note["version"] = _collect(recipe, tree / "build", result)
        seconds = round(time.monotonic() - start, 1)
        built = repository.write_manifest(result, **note, at=int(time.time()), seconds=seconds)
        if users:
            repository.check(built)
        final = repository.root() / f"{recipe.name}-{repository.without_epoch(built.version)}-{key}"
        if final.exists():  # the same version built anew
            final.rename(partial / "old")
        repository.hand_over(result, *result.iterdir(), log)
        result.rename(final)
        progress(recipe.name, f"{built.version} is ready after {seconds:.0f} s")
    finally:
        repository.remove(partial)


def _sources(recipe: recipes.Recipe, build: Path) -> dict[str, str]:
    """Put what comes with us in place, and tell the environment that the build's own downloads need."""
    if not recipe.source:
        return {}
    shutil.copytree(recipe.files[0].parent, build / "source")
    values = {name: os.environ[name] for name in _DOWNLOADS if os.environ.get(name)}
    if bundle := os.environ.get("SSL_CERT_FILE"):  # a computer behind a proxy that looks into TLS
        shutil.copy(bundle, build / "authorities.pem")
        values["SSL_CERT_FILE"] = "/build/authorities.pem"
    return values


def _parallel(recipe: recipes.Recipe) -> dict[str, str]:
    """All cores, for builds that go by Debian's conventions; no part of the key: it changes nothing in the result."""
    options = dict(recipe.environment).get("DEB_BUILD_OPTIONS", "")
    return {"DEB_BUILD_OPTIONS": f"{options} parallel={os.cpu_count() or 1}".strip()}


def _mmdebstrap(tree: Path, apt_proxy: str) -> list[str]:
    conf = settings.load()
    return [
        "mmdebstrap",
        "--mode=root",
        "--variant=buildd",
        f"--architectures={recipes.architecture()}",
        f'--aptopt=Acquire::http::Proxy "{apt_proxy}"',
        '--aptopt=Acquire::Retries "3"',
        *(['--aptopt=Acquire::Check-Valid-Until "false"'] if conf.apt_ignore_expired else []),
        "--dpkgopt=force-unsafe-io",
        '--customize-hook=chroot "$1" useradd --home-dir /build --create-home builder',
        recipes.SUITE,
        str(tree),
        *([conf.debian_mirror] if conf.debian_mirror else []),
    ]


def _run(name: str, label: str, command: list[str], log: Path, progress: Progress = nobody) -> None:
    """Run one phase with its output in `log`, telling from time to time that it still runs."""
    start = time.monotonic()
    progress(name, label)
    with log.open("ab") as file:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd="/"
            )
        except FileNotFoundError:
            raise HostError(f"{command[0]} is missing", "./voip doctor --fix") from None
        try:
            while True:
                try:
                    status = process.wait(_SAY_EVERY)
                    break
                except subprocess.TimeoutExpired:
                    progress(name, f"{label}, {time.monotonic() - start:.0f} s so far")
        finally:
            process.kill()
            process.wait()
    if status != 0:
        raise _failure(name, label, log)


def _failure(name: str, label: str, log: Path) -> PackageError:
    """The error that the end of `log` tells."""
    lines = log.read_text(errors="replace").splitlines()
    end = "\n".join(lines[-40:])
    if missing := _NOT_THERE.search(end):
        return UnavailableError(
            f"{name}: {missing.group()}", f"name another mirror: VOIP_DEBIAN_MIRROR\nthe log: {log}"
        )
    for pattern, cause, hint in _CAUSES_WITHOUT_NETWORK if label.endswith("without network") else _CAUSES:
        if re.search(pattern, end):
            return PackageError(
                f"{name}: {label} failed: {cause}", f"{hint}\nthe whole log: {log}", "\n".join(lines[-5:])
            )
    return PackageError(f"{name}: {label} failed", f"the whole log: {log}", "\n".join(lines[-15:]))


def _collect(recipe: recipes.Recipe, source: Path, result: Path) -> str:
    """Move the .debs to keep to `result`; returns their version. Raises PackageError when one is missing."""
    for package in recipe.keep:
        debs = list(source.glob(f"{package}_*.deb"))
        if len(debs) != 1:
            raise PackageError(f"{recipe.name}: the build made {len(debs)} packages named {package}, not one")
        debs[0].rename(result / debs[0].name)
    main = next(result.glob(f"{recipe.keep[0]}_*.deb"))
    show = ["dpkg-deb", "--field", str(main), "Version"]
    return subprocess.run(show, check=True, capture_output=True, text=True).stdout.strip()


def _collect_all(name: str, source: Path, result: Path) -> None:
    """Move all .debs to `result` but those of debug symbols. Raises PackageError when there is none."""
    debs = [d for d in source.glob("*.deb") if not d.is_symlink() and "-dbgsym_" not in d.name]
    if not debs:
        raise PackageError(
            f"{name}: the build made no .deb", "see debian/control and the target binary of debian/rules"
        )
    for deb in debs:
        deb.rename(result / deb.name)
