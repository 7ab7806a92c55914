"""Build one package as root for another user, anew: `python -m voip_stack.packages NAME`, or `--source FILE SHA256`."""

import sys

from voip_stack import cli, packages, ui
from voip_stack.tell import lines

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--source", where, sha256]:
            cli.guard(packages.ensure_source, where, sha256, refresh=True, progress=lines(ui.say))
        case [name]:
            cli.guard(packages.ensure, name, refresh=True, progress=lines(ui.say))
