"""Telling what happens meanwhile. The library prints nothing: who calls it says who is told, nobody by default."""

from collections.abc import Callable

Tell = Callable[[str], None]  # one line
Progress = Callable[[str, str], None]  # the name of a machine or a package, what happens to it


def lines(tell: Tell) -> Progress:
    """A Progress that tells `tell` a line for each: NAME: WHAT."""
    return lambda name, what: tell(f"{name}: {what}")


def nobody(*_: str) -> None:
    """Tell nobody."""
