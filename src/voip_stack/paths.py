"""Where things live. The repository holds no state; caches and secrets are the user's."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ANSIBLE = REPOSITORY / "ansible"
INVENTORY = ANSIBLE / "inventory"
LIBVIRT = REPOSITORY / "libvirt"
