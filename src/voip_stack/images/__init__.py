"""Disk images: a Debian base tree, baked per machine with the stack's own roles, cached by what went into them."""

from voip_stack.images.bake import PLAIN, ensure
from voip_stack.images.store import Image, list_images, prune

__all__ = ["PLAIN", "Image", "ensure", "list_images", "prune"]
