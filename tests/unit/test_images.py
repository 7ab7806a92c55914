"""The inputs of an image's key."""

from pathlib import Path

from voip_stack.images import store


def test_a_role_that_python_has_compiled_is_the_same_role(tmp_path: Path) -> None:
    plugin = tmp_path / "filter_plugins" / "rabbitmq.py"
    plugin.parent.mkdir()
    plugin.write_text("one = 1")
    before = store.digest(tmp_path)
    compiled = plugin.parent / "__pycache__" / "rabbitmq.cpython-311.pyc"
    compiled.parent.mkdir()
    compiled.write_bytes(b"any")
    assert store.digest(tmp_path) == before
    plugin.write_text("one = 2")
    assert store.digest(tmp_path) != before
