"""Progress messages. The library prints nothing: its caller chooses the receiver, by default nobody."""

from collections.abc import Callable

Tell = Callable[[str], None]  # one line
Progress = Callable[[str, str], None]  # the name of a machine or a package, its event


def lines(tell: Tell) -> Progress:
    """A Progress that passes one line per event to `tell`: NAME: WHAT."""
    return lambda name, what: tell(f"{name}: {what}")


def nobody(*_: str) -> None:
    """Tell nobody."""
