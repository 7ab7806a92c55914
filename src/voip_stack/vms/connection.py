"""libvirt: one way in, its errors by code, nothing on standard error."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import libvirt

from voip_stack import lab
from voip_stack.errors import HostError, VmError

NAMESPACE_URI = "urn:voip-stack:machine"

# The daemon is gone, or went away during a call.
_UNREACHABLE = (
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE,
)
_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT = 5, 6


@functools.cache
def _prepare() -> None:
    """Once per process: errors come as exceptions only, and a daemon that hangs is noticed (keepalive needs a loop)."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def loop() -> None:
        while True:
            with contextlib.suppress(libvirt.libvirtError):
                libvirt.virEventRunDefaultImpl()

    threading.Thread(target=loop, name="libvirt-events", daemon=True).start()


@contextlib.contextmanager
def connect(uri: str | None = None) -> Iterator[Any]:
    """A connection to the lab's libvirtd (or `uri`), closed at the end.

    Raises HostError when no libvirtd answers, VmError for any other complaint of libvirt inside the block.
    """
    _prepare()
    uri = uri or lab.current().uri
    with errors("libvirt", uri):
        connection = libvirt.open(uri)
        try:
            if not uri.startswith("test:"):  # it lives in our own process
                connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT)
            yield connection
        finally:
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()


@contextlib.contextmanager
def connect_if_up() -> Iterator[Any | None]:
    """As connect(), but None where no libvirtd answers."""
    with contextlib.ExitStack() as stack:
        try:
            connection = stack.enter_context(connect())
        except HostError:
            connection = None
        yield connection


@contextlib.contextmanager
def errors(subject: str, uri: str = "") -> Iterator[None]:
    """libvirt's errors inside the block as ours; `subject` begins the message."""
    try:
        yield
    except libvirt.libvirtError as error:
        # Its own complaints come from other parts of libvirt; from this one, those of the wire.
        if error.get_error_code() in _UNREACHABLE or error.get_error_domain() == libvirt.VIR_FROM_RPC:
            where = f" at {uri}" if uri else ""
            raise HostError(f"libvirtd does not answer{where}", "./voip lab.up; ./voip doctor") from error
        raise VmError(f"{subject}: {error.get_error_message()}", "./voip vms.status") from error


def absent(error: libvirt.libvirtError) -> bool:
    """Whether `error` says that the domain is not there, or not running any more."""
    return error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
