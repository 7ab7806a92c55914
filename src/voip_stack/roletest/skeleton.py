"""A new role with its scenario, from the skeleton in ansible/skeleton."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from voip_stack import paths
from voip_stack.errors import VoipError

SKELETON = paths.ANSIBLE / "skeleton"
_NAME = "skeleton"  # stands for the role's name, in texts and in names of files


def new(name: str, repository: Path = paths.REPOSITORY) -> list[Path]:
    """Make ansible/roles/NAME and molecule/NAME, which pass as they are; the files made.

    Raises VoipError for a name that ansible-lint's role-name rule refuses, or one that is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name == _NAME:
        raise VoipError(f"{name!r} is no name for a role", "take small letters, digits and _, e.g.: nfs_server")
    targets = {
        SKELETON / "role": repository / "ansible/roles" / name,
        SKELETON / "scenario": repository / "molecule" / name,
    }
    for target in targets.values():
        if target.exists():
            raise VoipError(f"{target.relative_to(repository)} is there already", "choose another name")
    made = []
    for source, target in targets.items():
        for file in sorted(f for f in source.rglob("*") if f.is_file() and f.suffix != ".pyc"):
            path = target / str(file.relative_to(source)).replace(_NAME, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file.read_text().replace(_NAME, name))
            made.append(path)
    return made
