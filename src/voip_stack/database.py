"""SQL on the machine of PostgreSQL, over ssh."""

from __future__ import annotations

import subprocess

from voip_stack import inventory, vms
from voip_stack.errors import VmError, VoipError

_SECONDS = 60  # for one ssh with one script


def quoted(text: str) -> str:
    """`text` as an SQL string constant (PostgreSQL, 4.1.2.1); a NUL can't be in one."""
    return "'" + text.replace("\0", "").replace("'", "''") + "'"


def run(script: str) -> str:
    """The output of an SQL script, which begins with \\connect; by standard input, where no process list shows it.

    Raises VmError when the machine can't be reached, VoipError with PostgreSQL's words when it refuses.
    """
    servers = inventory.load().group("infra")
    if not servers:
        raise VoipError("the inventory has no machine in the group infra", "see ansible/inventory/hosts.yml")
    psql = ["sudo", "-u", "postgres", "psql", "--no-psqlrc", "--quiet", "--no-align", "--tuples-only"]
    argv = vms.ssh_argv(servers[0].name, *psql, "--set=ON_ERROR_STOP=1")
    try:
        done = subprocess.run(argv, input=script, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise VmError(f"{servers[0].name} does not answer within {_SECONDS} s", "./voip vms.status") from None
    if done.returncode == 255:  # ssh's own
        raise VmError(f"{servers[0].name} can't be reached", "./voip vms.status", done.stderr)
    if done.returncode != 0:
        raise VoipError(f"PostgreSQL on {servers[0].name} refused", "./voip provision --limit infra-1", done.stderr)
    return done.stdout
