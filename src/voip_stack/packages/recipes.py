"""What we build because Debian 13 lacks it. One more package is one more entry in RECIPES."""

from __future__ import annotations

import difflib
import hashlib
import platform
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from voip_stack import components
from voip_stack.errors import PackageError

SUITE = "trixie"  # what the packages are for, and built in

# Debian's names of the architectures that we build on.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def architecture() -> str:
    """This computer's architecture by Debian's name."""
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


@dataclass(frozen=True)
class Recipe:
    """How .debs come to be: shell scripts, run as root one after the other in a clean chroot with build-essential.

    They leave their .debs in /build, where the user `builder` may write. Each phase is (what a person reads, script).
    """

    name: str
    keep: tuple[str, ...]  # the binary packages to serve, the rest is left behind; empty: all, but for debug symbols
    phases: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...] = ()
    source: bool = False  # whether the folder of its name beside this file is put at /build/source

    @property
    def files(self) -> list[Path]:
        """What comes with us and goes to /build/source."""
        return sorted(Path(__file__).with_name(self.name).iterdir()) if self.source else []


def debian_source(
    source: str,
    line: str,
    keep: tuple[str, ...],
    suite: str = "unstable",
    backports: tuple[str, ...] = (),
    first: tuple[str, ...] = (),
) -> Recipe:
    """An ordinary, unpatched Debian build of `source` as another suite of Debian has it.

    `line` is what its version has to start with, epoch included: which series (LTS) we follow. `backports` are build
    tools that have to be newer than Debian 13's. `first` are build dependencies that apt has to settle on before the
    others, where it would choose badly among alternatives.
    """
    sources = f"""
        mirror=$(awk '$1 == "deb" {{ print $2; exit }}' /etc/apt/sources.list)
        echo "deb $mirror {SUITE}-backports main" >/etc/apt/sources.list.d/backports.list
        echo "deb-src $mirror {suite} main" >/etc/apt/sources.list.d/source.list
        apt-get update
        version=$(apt-cache showsrc --only-source {source} |
            awk '$1 == "Version:" && index($2, "{line}") == 1 {{ print $2 }}' | sort --version-sort | tail --lines=1)
        [ -n "$version" ] || {{ echo "no version {line}* of {source} in {suite}"; exit 1; }}
        cd /build
        runuser -u builder -- apt-get source --download-only "{source}=$version"
        runuser -u builder -- dpkg-source --extract ./*.dsc source
    """
    install = "apt-get install --yes --no-install-recommends"
    dependencies = "\n".join(
        (
            " ".join((install, *(f"{tool}/{SUITE}-backports" for tool in backports))),
            *(f"{install} {package}" for package in first),
            "apt-get build-dep --yes --no-install-recommends /build/*.dsc",
        )
    )
    compilation = "cd /build/source && runuser -u builder -- dpkg-buildpackage --build=binary --no-sign"
    return Recipe(
        name=source,
        keep=keep,
        phases=(("source", sources), ("build dependencies", dependencies), ("compilation", compilation)),
        environment=(
            ("DEB_BUILD_PROFILES", "nodoc nocheck"),
            # noopt: no -O3 of the package's own; -O1 takes two thirds of the time. We serve no debug symbols.
            ("DEB_BUILD_OPTIONS", "nodoc nocheck noautodbgsym noopt"),
            ("DEB_CPPFLAGS_APPEND", "-D_FORTIFY_SOURCE=2"),  # of Debian's hardening, what noopt takes away
            ("DEB_CFLAGS_APPEND", "-g0 -O1"),
            ("DEB_CXXFLAGS_APPEND", "-g0 -O1"),
            # An emulated guest unpacks it in a fraction of the time that xz takes.
            ("DPKG_DEB_COMPRESSOR_TYPE", "zstd"),
        ),
    )


def source_tree(name: str) -> Recipe:
    """An ordinary Debian build of a source tree of the user's: the folder $TOP of /build/source.tar carries debian/.

    It compiles without the network: what it needs is in the tree or a package of Debian's, as Debian's policy has it.
    """
    unpack = """
        cd /build
        runuser -u builder -- mkdir unpacked
        runuser -u builder -- tar --extract --file=source.tar --directory=unpacked
        runuser -u builder -- mv "unpacked/$TOP" source
    """
    dependencies = "apt-get update && apt-get build-dep --yes --no-install-recommends /build/source"
    build = "cd /build/source && unshare --net runuser -u builder -- dpkg-buildpackage --build=binary --no-sign"
    return Recipe(
        name=name,
        keep=(),
        phases=(("source", unpack), ("build dependencies", dependencies), ("compilation without network", build)),
        environment=(
            ("DEB_BUILD_PROFILES", "nodoc nocheck"),
            ("DEB_BUILD_OPTIONS", "nodoc nocheck noautodbgsym"),
            ("DPKG_DEB_COMPRESSOR_TYPE", "zstd"),
        ),
    )


def go_module(name: str, version: str, go: str, tags: str, description: str) -> Recipe:
    """The program of a Go module, linked statically: `main.go` beside its go.mod and go.sum, which pin every module.

    `go` is the compiler of Debian's backports to build it with, `tags` are the program's own build tags.
    """
    tools = f"""
        mirror=$(awk '$1 == "deb" {{ print $2; exit }}' /etc/apt/sources.list)
        echo "deb $mirror {SUITE}-backports main" >/etc/apt/sources.list.d/backports.list
        apt-get update
        apt-get install --yes --no-install-recommends ca-certificates golang-{go}-go/{SUITE}-backports \
            golang-{go}-src/{SUITE}-backports
    """
    compilation = f"""
        cd /build/source
        runuser -u builder -- /usr/lib/go-{go}/bin/go build -mod=readonly -trimpath -buildvcs=false \
            -tags={tags} -ldflags="-s -w" -o /build/{name} .
    """
    fields = {
        "Package": name,
        "Version": f"{version}-1~voip1",
        "Architecture": architecture(),
        "Maintainer": "voip-stack <root@localhost>",
        "Description": description,
    }
    control = " ".join(shlex.quote(f"{field}: {value}") for field, value in fields.items())
    package = f"""
        mkdir -p /build/tree/DEBIAN
        install -D --mode=755 /build/{name} /build/tree/usr/bin/{name}
        printf '%s\\n' {control} >/build/tree/DEBIAN/control
        dpkg-deb --root-owner-group -Zzstd --build /build/tree /build
    """
    return Recipe(
        name=name,
        keep=(name,),
        phases=(("compiler", tools), ("compilation", compilation), ("package", package)),
        environment=(
            ("CGO_ENABLED", "0"),
            ("GOTOOLCHAIN", "local"),
            ("GOTMPDIR", "/build"),
            # The compiler tidies its memory less often, which is an eighth of its work; the linker would take 5 GiB.
            ("GOGC", "400"),
            ("GOMEMLIMIT", "2GiB"),
        ),
        source=True,
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        debian_source(
            "asterisk",
            line="1:22.",
            keep=("asterisk", "asterisk-config", "asterisk-modules"),
            backports=("debhelper", "libdebhelper-perl"),  # the source asks for debhelper-compat 14
            first=("libjack-jackd2-dev",),  # else apt takes libjack-dev, which portaudio19-dev conflicts with
        ),
        go_module(
            "vault",
            version="1.21.1",  # as go.mod has it
            go="1.26",
            tags="minimal",  # only what is its own: kv, AppRole, PKI, transit; raft and inmem storage
            description="HashiCorp Vault, secrets and certificates (Business Source License 1.1)",
        ),
    )
}


def find(name: str) -> Recipe:
    """The recipe called `name`. Raises PackageError, which lists what there is."""
    try:
        return RECIPES[name]
    except KeyError:
        close = difflib.get_close_matches(name, RECIPES, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(RECIPES)}"
        raise PackageError(f"no recipe for a package named {name}", hint) from None


def key(name: str) -> str:
    """A short key of all that we decide about package `name`; its version is Debian's to decide. Needs no network."""
    recipe = find(name)
    decided = repr((recipe, SUITE, architecture())).encode() + b"".join(f.read_bytes() for f in recipe.files)
    return hashlib.sha256(decided).hexdigest()[:12]


def decided(name: str) -> str:
    """All that we decide about package `name`, the same on every architecture."""
    recipe = find(name)
    here = f"Architecture: {architecture()}"
    return repr((recipe, SUITE)).replace(here, "Architecture:") + "".join(f.read_text() for f in recipe.files)


def needed_by(roles: Iterable[str]) -> list[str]:
    """The packages of our own building that `roles` install. Raises PackageError for one that has no recipe."""
    every = components.current()
    wanted = {name for role in roles if role in every for name in every[role].packages}
    return [find(name).name for name in sorted(wanted)]
