"""The measured slowness of this computer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from voip_stack import settings
from voip_stack.host import speed


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    conf = settings.parse("", {"VOIP_CACHE_DIR": str(tmp_path)})
    monkeypatch.setattr(settings, "load", lambda: conf)
    return tmp_path


def test_it_is_measured_and_kept_for_ten_minutes(cache: Path) -> None:
    first = speed.slowness()
    assert 0.05 < first < 50
    assert float((cache / "slowness").read_text()) == pytest.approx(first, abs=0.001)
    (cache / "slowness").write_text("17")
    assert speed.slowness() == 17
    os.utime(cache / "slowness", (1, 1))
    assert speed.slowness() != 17


def test_a_measurement_replaces_the_one_that_was_kept(cache: Path) -> None:
    (cache / "slowness").write_text("17.000")
    found = speed.measure()
    assert speed.slowness() == pytest.approx(found, abs=0.001)


def test_the_users_word_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = settings.parse("VOIP_SLOWNESS=2.5", {"VOIP_CACHE_DIR": str(tmp_path)})
    monkeypatch.setattr(settings, "load", lambda: conf)
    assert speed.slowness() == speed.measure() == 2.5


def test_a_slow_computer_gets_more_time_and_a_fast_one_no_less(monkeypatch: pytest.MonkeyPatch) -> None:
    for slowness, seconds in ((4.0, 40), (0.5, 10)):
        monkeypatch.setattr(speed, "slowness", lambda slowness=slowness: slowness)
        assert speed.patient(10) == seconds
