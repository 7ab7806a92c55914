"""Disk images: a Debian base tree, baked per machine with the stack's own roles, cached by what went into them."""

from voip_stack.images.bake import (
    PEERS,
    PLAIN,
    PLAIN_GIB,
    current_keys,
    ensure,
    groups_named,
    key,
    packages_of,
    prepare,
)
from voip_stack.images.store import Image, forget, list_images, prune

__all__ = [
    "PEERS",
    "PLAIN",
    "PLAIN_GIB",
    "Image",
    "current_keys",
    "ensure",
    "forget",
    "groups_named",
    "key",
    "list_images",
    "packages_of",
    "prepare",
    "prune",
]
