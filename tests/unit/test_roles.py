"""The role and scenario made by `skeleton.new`."""

from __future__ import annotations

import py_compile
import shutil
from pathlib import Path

import pytest
import yaml

from voip_stack.errors import VoipError
from voip_stack.roletest import skeleton


def test_a_new_role_has_everything_under_its_own_name(tmp_path: Path) -> None:
    made = skeleton.new("nfs_server", tmp_path)
    assert tmp_path / "ansible/roles/nfs_server/templates/nfs_server.service.j2" in made
    assert tmp_path / "molecule/nfs_server/test_nfs_server.py" in made
    assert not any("skeleton" in file.read_text() for file in made)


def test_what_python_has_compiled_of_the_skeleton_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "skeleton"
    shutil.copytree(skeleton.SKELETON, copy)
    monkeypatch.setattr(skeleton, "SKELETON", copy)
    py_compile.compile(str(copy / "scenario/test_skeleton.py"), doraise=True)
    assert not any(file.suffix == ".pyc" for file in skeleton.new("nfs_server", tmp_path))


def test_its_specification_mirrors_its_defaults(tmp_path: Path) -> None:
    skeleton.new("nfs_server", tmp_path)
    role = tmp_path / "ansible/roles/nfs_server"
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text())
    options = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    assert {name: option["default"] for name, option in options.items()} == defaults


@pytest.mark.parametrize("name", ["NFS", "nfs-server", "2nd", "../x", "skeleton", ""])
def test_a_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(VoipError, match="no name for a role"):
        skeleton.new(name, tmp_path)


def test_a_role_that_exists_is_not_touched(tmp_path: Path) -> None:
    skeleton.new("nfs_server", tmp_path)
    with pytest.raises(VoipError, match="is there already"):
        skeleton.new("nfs_server", tmp_path)
