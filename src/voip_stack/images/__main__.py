"""Bake one image as root for another user: `python -m voip_stack.images NAME UID:GID`."""

import os
import sys

from voip_stack import cli, settings, ui
from voip_stack.images import ensure, store
from voip_stack.tell import lines


def main() -> None:
    name, owner = sys.argv[1:]
    uid, gid = (int(n) for n in owner.split(":"))
    image = ensure(name, lines(ui.say))
    for path in [image.directory, *image.directory.iterdir(), store.root(), settings.load().cache_dir]:
        os.chown(path, uid, gid)


if __name__ == "__main__":
    cli.guard(main)
