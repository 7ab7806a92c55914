"""Build one package as root for another user, anew: `python -m voip_stack.packages NAME`."""

import sys

from voip_stack import cli, packages

if __name__ == "__main__":
    cli.guard(packages.ensure, sys.argv[1], refresh=True)
