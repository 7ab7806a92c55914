"""Virtual machines: made from the inventory and an image, reached by ssh, brought back from saved memory."""

from voip_stack.vms import ssh
from voip_stack.vms.lifecycle import (
    create,
    destroy,
    existing,
    image_keys,
    require_running,
    start,
    stop,
)
from voip_stack.vms.saved import paused, revert, snapshot, snapshots
from voip_stack.vms.state import Status, status
from voip_stack.vms.store import console_end, console_log

__all__ = [
    "Status",
    "console_end",
    "console_log",
    "create",
    "destroy",
    "existing",
    "image_keys",
    "paused",
    "require_running",
    "revert",
    "snapshot",
    "snapshots",
    "ssh",
    "start",
    "status",
    "stop",
]
