"""The one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from invoke.collection import Collection
from invoke.exceptions import Exit

from voip_stack import ui
from voip_stack.errors import VoipError


def show(error: VoipError) -> None:
    """The error as text for a person: the problem, the evidence, the next step."""
    if error.details:
        ui.err.print(error.details.rstrip(), markup=False)
        ui.err.print()
    ui.err.print("[bold red]error:[/] ", end="")
    ui.err.print(error.message, markup=False)
    if error.hint:
        ui.err.print(f"  {error.hint}".replace("\n", "\n  "), markup=False)


def guard(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `call`; a user's error becomes a message and its exit status, Ctrl-C 130. Bugs keep their traceback."""
    try:
        return call(*args, **kwargs)
    except VoipError as error:
        show(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        ui.err.print("\nstopped; the same command can be run again")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has closed it, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discard the rest of the buffer
        sys.exit(141)  # like a shell's status for SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        show(VoipError("the disk is full", "free some space, e.g. with: ./voip images.prune"))
        sys.exit(1)


def guarded(collection: Collection) -> Collection:
    """`collection` with every task run under `guard`, so that plain `invoke` shows no traceback for a user's error."""
    for task in collection.tasks.values():
        body = task.body

        @functools.wraps(body)
        def run(*args: Any, _body: Callable[..., Any] = body, **kwargs: Any) -> Any:
            try:
                return guard(_body, *args, **kwargs)
            except SystemExit as stop:
                raise Exit(code=int(stop.code or 0)) from None

        task.body = run
    for child in collection.collections.values():
        guarded(child)
    return collection
