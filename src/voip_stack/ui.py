"""Output for a person: commands call these functions, the library prints nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from voip_stack.tell import Progress

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line of progress."""
    out.print(text, markup=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A plain table; numbers are right-aligned by the caller's formatting."""
    grid = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        grid.add_row(*("" if cell is None else str(cell) for cell in row))
    # As wide as needed: a cut address is of no use in a pipe, and a narrow terminal wraps by itself.
    natural = Measurement.get(out, out.options.update(max_width=1000), grid).maximum
    Console(highlight=False, width=max(natural, out.width)).print(grid)


def as_json(value: object) -> None:
    """`value` on standard output as JSON, for programs."""
    json.dump(value, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def teller() -> Progress:
    """A Progress that prints one line per machine and event, with the seconds since now."""
    begin = time.monotonic()

    def tell(name: str, what: str) -> None:
        say(f"  {time.monotonic() - begin:5.0f} s  {name:<10} {what}")

    return tell


@dataclass
class Steps:
    """Named steps with their times in seconds: the table at the end of `up`."""

    done: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        say(f"==> {name}")
        start = time.monotonic()
        try:
            yield
        finally:
            self.done.append((name, time.monotonic() - start))
