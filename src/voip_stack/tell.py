"""Telling what happens meanwhile. The library prints nothing: who calls it says who is told, nobody by default."""

from collections.abc import Callable

Tell = Callable[[str], None]  # one line
Progress = Callable[[str, str], None]  # the name of a machine or a package, what happens to it


def nobody(*_: str) -> None:
    """Tell nobody."""
