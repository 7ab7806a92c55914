"""Waiting with one clock."""

import time
from collections.abc import Callable

from voip_stack.errors import VoipError


class LateError(VoipError):
    """Something did not come true in time."""


class Deadline:
    """A point on the monotonic clock, `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the deadline was set."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.seconds - self.elapsed)

    @property
    def is_due(self) -> bool:
        return self.left == 0.0

    def until(self, check: Callable[[], object], every: float = 0.5) -> bool:
        """Whether `check`, called every `every` seconds, becomes true before the deadline is due.

        A caller that ignores the answer wants wait().
        """
        while not check():
            if self.is_due:
                return False
            time.sleep(min(every, self.left) or 0.01)
        return True

    def wait(self, check: Callable[[], object], what: str, every: float = 0.5) -> None:
        """Return once `check` is true. Raises LateError, naming `what`, when the deadline is due before."""
        if not self.until(check, every):
            raise LateError(f"not within {self.seconds:.0f} s: {what}")
