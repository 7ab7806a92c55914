"""This stack's objects in PostgreSQL, RabbitMQ and Vault: finding the missing ones, making and removing them."""

from collections.abc import Callable, Iterable, Iterator

Step = tuple[str, Callable[[], object]]  # title of an object, and the call that makes (or removes) it


def make(steps: Iterable[Step]) -> Iterator[str]:
    """Run the steps. Yields the title of each when it is done."""
    for title, work in steps:
        work()
        yield title
