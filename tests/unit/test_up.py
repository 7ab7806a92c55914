"""The estimate of `up` for its own duration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from voip_stack import images, inventory, settings
from voip_stack.tasks import stack
from voip_stack.vms import store


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    conf = settings.parse("", {"VOIP_CACHE_DIR": str(tmp_path)})
    monkeypatch.setattr(settings, "load", lambda: conf)
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_what_it_begins_with_is_known(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.exists()
    machines = [inventory.load().machine("sip-1")]
    assert stack._begin(machines) == "nothing"
    image = images.Image("sip-1", images.key("sip-1"), Path("disk"), Path("kernel"), Path("initrd"), "")
    monkeypatch.setattr(images, "list_images", lambda: [image])
    assert stack._begin(machines) == "images that are there"
    store.directory("sip-1").mkdir(parents=True)
    assert stack._begin(machines) == "machines that are there"


def test_the_last_run_from_the_same_begin_tells_how_long_it_takes(cache: Path) -> None:
    assert stack._last_from("nothing") == {}
    runs = [
        {"at": "2026-11-29", "steps": {"call": 9}},  # of a version that did not record the starting point
        {"at": "2026-11-30", "from": "nothing", "steps": {"image sip-1": 60, "images": 80, "machines": 70, "call": 30}},
        {"at": "2026-12-01", "from": "machines that are there", "steps": {"machines": 2, "call": 27}},
    ]
    (cache / "logs" / "up.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert stack._last_from("nothing") == {"images": 80, "machines": 70, "call": 30}
    assert stack._last_from("images that are there") == {}
    assert [stack._duration(s) for s in (29, 180)] == ["29 s", "3 min"]
