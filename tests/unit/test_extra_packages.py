import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

from voip_stack import packages, settings
from voip_stack.errors import HostError, PackageError, SettingsError
from voip_stack.packages import build, proxy, repository, source
from voip_stack.tasks import packages as tasks

pytestmark = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg on this computer")


@pytest.fixture
def extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's directory of .debs, and an empty cache."""
    directory = tmp_path / "extra"
    directory.mkdir()
    chosen = dataclasses.replace(settings.load(), cache_dir=tmp_path / "cache", extra_packages=directory)
    monkeypatch.setattr(settings, "load", lambda: chosen)
    yield directory
    assert not list(repository.root().glob(".*.partial")), "something half done was left"


def make_deb(file: Path, name: str, version: str = "1.0", architecture: str = "all", content: str = "") -> Path:
    """A real .deb with one file in it."""
    tree = file.with_suffix(".tree")
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: Nobody <nobody@voip.local>\n"
        "Description: a test\n of the index\n"
    )
    (tree / "content").write_text(content)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, file], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return file


def index() -> str:
    return (repository.root() / "Packages").read_text()


def served(field: str) -> list[str]:
    """The values of one field in the index."""
    return [line.removeprefix(f"{field}: ") for line in index().splitlines() if line.startswith(f"{field}: ")]


# The directory of .debs


def test_an_extra_package_is_served_as_it_is_until_it_is_removed(extra: Path) -> None:
    file = make_deb(extra / "any name.deb", "prompts", "1:2.0+a~b")
    (extra / "README").write_text("is no package, and nobody says it should be one")
    packages.publish()
    copy = repository.root() / served("Filename")[0]
    assert copy.name == "prompts_2.0+a~b_all.deb"
    assert copy.read_bytes() == file.read_bytes()
    assert served("SHA256") == [hashlib.sha256(file.read_bytes()).hexdigest()]
    file.unlink()
    packages.publish()
    assert index() == ""
    assert packages.builds() == []
    assert not copy.exists()


def test_a_package_that_has_not_changed_is_not_read_again(extra: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_deb(extra / "a.deb", "prompts")
    packages.publish()
    before = index()
    with monkeypatch.context() as patch:
        patch.setattr(repository, "_dpkg_deb", lambda *_: pytest.fail("it was read"))
        packages.publish()
    assert index() == before
    make_deb(file, "prompts", content="is longer now")
    packages.publish()
    assert served("SHA256") == [hashlib.sha256(file.read_bytes()).hexdigest()]
    assert len(packages.builds()) == 1


def test_two_versions_are_both_there_for_apt_to_choose_the_newer(extra: Path) -> None:
    make_deb(extra / "a.deb", "prompts", "1.9")
    make_deb(extra / "b.deb", "prompts", "1.10")
    packages.publish()
    assert sorted(served("Version")) == ["1.10", "1.9"]


def test_the_same_file_twice_is_served_once(extra: Path) -> None:
    shutil.copy(make_deb(extra / "a.deb", "prompts"), extra / "b.deb")
    packages.publish()
    assert served("Package") == ["prompts"]


def truncated(directory: Path) -> Path:
    file = make_deb(directory / "bad.deb", "bad", content=os.urandom(9000).hex())
    file.write_bytes(file.read_bytes()[:-500])
    return file


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda d: (d / "bad.deb").write_text("<html>404</html>"), "is no readable .deb"),
    "truncated": (truncated, "is no readable .deb"),
    "another architecture": (lambda d: make_deb(d / "bad.deb", "bad", architecture="s390x"), "is for s390x"),
    "a directory": (lambda d: (d / "bad.deb").mkdir(), "can't be read"),
    "a link to nothing": (lambda d: (d / "bad.deb").symlink_to(d / "nothing"), "can't be read"),
    "another content": (
        lambda d: make_deb(d / "bad.deb", "prompts", content="of another"),
        "prompts 1.0 is there twice, with different content: .*bad.deb.*good.deb|.*good.deb.*bad.deb",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_package_is_named_and_what_is_served_stays(extra: Path, kind: str) -> None:
    make_deb(extra / "good.deb", "prompts")
    packages.publish()
    files = {f: f.read_bytes() for f in repository.root().rglob("*") if f.is_file()}
    (extra / "good.deb").rename(extra / "renamed-good.deb")  # an error leaves everything unchanged
    make_deb(extra / "another.deb", "sounds")
    make, message = BAD[kind]
    make(extra)
    for _ in range(2):
        with pytest.raises(PackageError, match=message) as caught:
            packages.publish()
        assert "bad.deb" in caught.value.message
        assert "remove" in caught.value.hint
        assert {f: f.read_bytes() for f in repository.root().rglob("*") if f.is_file()} == files
    bad = extra / "bad.deb"
    bad.rmdir() if kind == "a directory" else bad.unlink()
    packages.publish()
    assert sorted(served("Package")) == ["prompts", "sounds"]


def test_a_directory_that_the_user_named_has_to_be_there(extra: Path) -> None:
    extra.rmdir()
    with pytest.raises(SettingsError, match="VOIP_EXTRA_PACKAGES=.*extra"):
        packages.publish()


def test_apt_takes_an_index_from_which_the_newest_was_removed(extra: Path) -> None:
    directory = repository.root() / "gone-1.0-k"
    directory.mkdir(parents=True)
    make_deb(directory / "gone_1.0_all.deb", "gone")
    repository.write_manifest(directory, name="gone", version="1.0", key="k", at=1_700_000_000, seconds=1.0)
    make_deb(extra / "a.deb", "prompts")
    packages.publish()
    packages.prune()
    assert served("Package") == ["prompts"]
    # apt keeps its index when the new one has an earlier date.
    assert "Date: Tue, 14 Nov 2023 22:13:20 UTC\n" in (repository.root() / "Release").read_text()


def test_list_looks_at_the_extra_packages_and_shows_them(extra: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make_deb(extra / "a.deb", "prompts", "1:2.0+mine1")
    tasks.list_.body(None, json=True)
    row = next(r for r in json.loads(capsys.readouterr().out) if r["name"] == "prompts")
    assert (row["state"], row["version"], row["origin"]) == ("extra", "1:2.0+mine1", str(file))
    tasks.list_.body(None)
    assert "1:2.0+mine1" in capsys.readouterr().out
    assert packages.prune() == []


# Source trees


def make_tree(directory: Path, version: str = "1.0") -> Path:
    """A source tree, reduced to its directory and its changelog."""
    (directory / "debian").mkdir(parents=True, exist_ok=True)
    (directory / "debian" / "changelog").write_text(f"greeting ({version}) unstable; urgency=low\n")
    return directory


def make_tarball(file: Path, tree: Path, top: str = "greeting-1.0") -> Path:
    with tarfile.open(file, "w:xz" if file.suffix == ".xz" else "w") as tar:
        tar.add(tree, top)
    if file.suffix == ".zst":
        file.rename(file.with_suffix(""))
        subprocess.run(["zstd", "-q", file.with_suffix("")], check=True)
    return file


@pytest.fixture
def fake_chroot(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A chroot in which each build makes greeting and its debug symbols; yields the versions built."""
    built: list[str] = []

    def run(_name: str, label: str, command: list[str], _log: Path, *_: object) -> None:
        if label == "chroot":
            Path(command[-1], "build").mkdir(parents=True)
        if not label.startswith("compilation"):
            return
        home = Path(command[command.index("sh", 5) + 4], "build")
        top = next(c.removeprefix("TOP=") for c in command if c.startswith("TOP="))
        with tarfile.open(home / "source.tar") as tar:
            path = PurePosixPath(top, "debian", "changelog")
            changelog = tar.extractfile(next(m for m in tar.getmembers() if PurePosixPath(m.name) == path))
            assert changelog
            version = changelog.read().decode().split()[1].strip("()")
        built.append(version)
        make_deb(home / f"greeting_{version}_all.deb", "greeting", version, content=str(len(built)))
        make_deb(home / f"greeting-dbgsym_{version}_all.deb", "greeting-dbgsym", version)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(proxy, "start", lambda: "http://127.0.0.1:9")
    monkeypatch.setattr(build, "_mmdebstrap", lambda tree, _: ["mmdebstrap", str(tree)])
    monkeypatch.setattr(build, "_run", run)
    return built


@pytest.mark.parametrize("name", ["a.tar", "a.tar.xz", "a.tar.zst", "folder"])
def test_a_source_tree_is_built_once_for_each_sum(
    extra: Path, tmp_path: Path, fake_chroot: list[str], name: str
) -> None:
    tree = make_tree(tmp_path / "folder")
    where = tree if name == "folder" else make_tarball(tmp_path / name, tree)
    directory = packages.ensure_source(str(where))
    assert [d.name for d in directory.glob("*.deb")] == ["greeting_1.0_all.deb"]
    assert served("Package") == ["greeting"]
    assert packages.ensure_source(str(where)) == directory
    assert fake_chroot == ["1.0"]
    assert packages.ensure_source(str(where), refresh=True) == directory
    assert fake_chroot == ["1.0", "1.0"]
    note = json.loads((directory / "package.json").read_text())
    assert (note["name"], note["version"], note["kind"]) == ("greeting", "1.0", "source")
    if where.is_file():
        assert note["sha256"] == hashlib.sha256(where.read_bytes()).hexdigest()
    assert packages.prune() == []
    assert extra.is_dir()


def test_a_new_build_takes_the_place_of_the_old_and_going_back_builds_again(
    extra: Path, tmp_path: Path, fake_chroot: list[str]
) -> None:
    one = make_tarball(tmp_path / "1.tar", make_tree(tmp_path / "tree"), top=".")
    two = make_tarball(tmp_path / "2.tar", make_tree(tmp_path / "tree", "2.0"))
    for where in (one, two, one):
        packages.ensure_source(str(where))
        assert served("Version") == fake_chroot[-1:]
    assert fake_chroot == ["1.0", "2.0", "1.0"]
    assert len(packages.builds()) == 1
    assert extra.is_dir()


def test_a_build_of_a_version_that_is_an_extra_package_too_is_refused(
    extra: Path, tmp_path: Path, fake_chroot: list[str]
) -> None:
    make_deb(extra / "greeting.deb", "greeting", content="not what is built")
    with pytest.raises(PackageError, match="greeting 1.0 is there twice") as caught:
        packages.ensure_source(str(make_tree(tmp_path / "tree")))
    assert "dch" in caught.value.hint
    assert fake_chroot == ["1.0"]
    packages.publish()
    assert served("Filename")[0].endswith("greeting_1.0_all.deb")
    assert [b.kind for b in packages.builds()] == ["extra"]


def test_without_root_and_sudo_the_command_for_root_is_named(
    extra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(proxy, "start", lambda: "http://127.0.0.1:9")
    tree = make_tree(tmp_path / "tree")
    (extra / "rm").symlink_to("/bin/rm")
    monkeypatch.setenv("PATH", str(extra))
    with pytest.raises(HostError, match="building greeting needs root") as caught:
        packages.ensure_source(str(tree))
    assert f"packages.build --source {tree}" in caught.value.hint


def test_a_url_is_fetched_and_has_to_have_its_sum(extra: Path, tmp_path: Path, fake_chroot: list[str]) -> None:
    tarball = make_tarball(tmp_path / "a.tar.xz", make_tree(tmp_path / "tree"))
    with pytest.raises(PackageError, match="needs the sum") as caught:
        packages.ensure_source(tarball.as_uri())
    assert "--sha256" in caught.value.hint
    for where in (tarball.as_uri(), str(tarball)):
        with pytest.raises(PackageError, match="has the SHA-256 [0-9a-f]{64}, not 0000"):
            packages.ensure_source(where, "0" * 64)
    with pytest.raises(PackageError, match="is no SHA-256"):
        packages.ensure_source(str(tarball), "cafe")
    with pytest.raises(PackageError, match="can't be read"):
        packages.ensure_source((tmp_path / "nothing").as_uri(), "0" * 64)
    assert fake_chroot == []
    assert packages.builds() == []
    packages.ensure_source(tarball.as_uri(), hashlib.sha256(tarball.read_bytes()).hexdigest().upper())
    assert served("Package") == ["greeting"]
    assert extra.is_dir()


@pytest.mark.parametrize("name", ["../evil", "greeting-1.0/../../evil", "/etc/evil", "greeting-1.0/pipe"])
def test_a_tarball_that_leads_out_of_itself_is_refused(extra: Path, tmp_path: Path, name: str) -> None:
    tarball = make_tarball(tmp_path / "a.tar", make_tree(tmp_path / "tree"))
    with tarfile.open(tarball, "a") as tar:
        member = tarfile.TarInfo(name)
        member.type = tarfile.FIFOTYPE if name.endswith("pipe") else tarfile.REGTYPE
        tar.addfile(member, io.BytesIO())
    with pytest.raises(PackageError, match=f"{name}.* leads out"), source.fetched(str(tarball)):
        pass
    assert not list(tmp_path.rglob("evil"))
    assert extra.is_dir()


def test_what_is_no_source_tree_is_told_apart(extra: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    tarball = make_tarball(tmp_path / "whole.tar.xz", tree)
    (tmp_path / "half.tar.xz").write_bytes(tarball.read_bytes()[:150])
    (tmp_path / "greeting.dsc").write_text("Format: 3.0 (native)\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "debian").mkdir(parents=True)
    (tmp_path / "odd" / "debian" / "changelog").write_text("../../etc (1.0) unstable; urgency=low\n")
    make_tarball(tmp_path / "deep.tar", tree, top="a/b")
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        tar.add(tree, "a")
        tar.add(tree, "b")
    for name, message, hint in (
        ("half.tar.xz", "is no readable tarball", "name a directory or a tarball"),
        ("greeting.dsc", "is no readable tarball", "dpkg-source --extract"),
        ("empty", "carries no debian/changelog", "name a directory or a tarball"),
        ("deep.tar", "carries no debian/changelog", "name a directory or a tarball"),
        ("two.tar", "carries no debian/changelog", "name a directory or a tarball"),
        ("odd", "begins with '../../etc", "NAME (VERSION)"),
        ("nothing", "can't be read", "name a directory or a tarball"),
    ):
        with pytest.raises(PackageError, match=message) as caught, source.fetched(str(tmp_path / name)):
            pass
        assert hint in caught.value.hint
    assert extra.is_dir()


def test_a_build_that_wants_to_download_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("fatal: unable to access 'https://m/x/': Could not resolve host: m\nmake: *** [build] Error 128\n")
    failure = build._failure("greeting", "compilation without network", log)
    assert "it wants to download" in failure.message
    assert "Build-Depends" in failure.hint


@pytest.mark.parametrize(
    "options", [{}, {"names": "asterisk", "source": "a.tar"}, {"names": "asterisk", "sha256": "0" * 64}]
)
def test_the_command_says_what_it_can_build(options: dict[str, str]) -> None:
    with pytest.raises(PackageError, match="name what to build") as caught:
        tasks.build.body(None, **options)
    assert "--source FILE-OR-URL" in caught.value.hint
