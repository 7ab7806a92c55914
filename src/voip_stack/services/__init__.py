"""What this stack keeps in PostgreSQL, RabbitMQ and Vault: what of it is missing, making it, removing it again."""

from collections.abc import Callable, Iterable, Iterator

Step = tuple[str, Callable[[], object]]  # what is missing (or there), and what makes (or removes) it


def make(steps: Iterable[Step]) -> Iterator[str]:
    """Do the steps. Yields the title of each when it is done."""
    for title, work in steps:
        work()
        yield title
