"""The library prints nothing: only commands do, and the programs that run tests."""

import re

from voip_stack import paths
from voip_stack.tell import lines, nobody

LIBRARY = paths.REPOSITORY / "src" / "voip_stack"
SPEAKING = {"cli.py", "ui.py", "testrun.py", *(f"roletest/{name}.py" for name in ("mutants", "runner", "scenarios"))}


def test_only_commands_know_how_to_print() -> None:
    found = {
        name
        for file in LIBRARY.rglob("*.py")
        if re.search(r"^from voip_stack import .*\bui\b", file.read_text(), re.MULTILINE)
        and not (name := str(file.relative_to(LIBRARY))).startswith("tasks/")
        and file.name != "__main__.py"
    }
    assert found <= SPEAKING


def test_who_tells_of_a_name_can_tell_lines() -> None:
    told: list[str] = []
    lines(told.append)("asterisk", "compilation")
    lines(nobody)("asterisk", "compilation")
    assert told == ["asterisk: compilation"]
