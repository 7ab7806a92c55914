"""Files written whole, and locks."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from voip_stack import files


def test_a_file_is_written_with_its_mode_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    files.write(tmp_path / "new" / "secret", "one\n")
    files.write(tmp_path / "new" / "secret", b"two\n", mode=0o644)
    assert (tmp_path / "new" / "secret").read_text() == "two\n"
    assert stat.S_IMODE((tmp_path / "new" / "secret").stat().st_mode) == 0o644
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["secret"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    files.write(tmp_path / "file", "before")
    with pytest.raises(UnicodeEncodeError):
        files.write(tmp_path / "file", "\ud800")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("file", "before")]


def test_what_somebody_else_has_written_meanwhile_stays(tmp_path: Path) -> None:
    files.write_new(tmp_path / "file", "theirs")
    files.write_new(tmp_path / "file", "ours")
    assert (tmp_path / "file").read_text() == "theirs"


def test_a_lock_is_waited_for_and_a_busy_one_is_named(tmp_path: Path) -> None:
    order = []
    with files.locked(tmp_path / "lock"):
        with (
            pytest.raises(files.BusyError, match="another command is at work on sip-1"),
            files.locked(tmp_path / "lock", 0, "sip-1"),
        ):
            pass

        def other() -> None:
            with files.locked(tmp_path / "lock"):
                order.append("other")

        thread = threading.Thread(target=other)
        thread.start()
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]
