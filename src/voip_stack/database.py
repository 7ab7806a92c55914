"""SQL with all rights: on the machine of PostgreSQL, over ssh, or in the user's devstack-core."""

from __future__ import annotations

import os
import shutil
import subprocess

from voip_stack import devstack, inventory, lab, vms
from voip_stack.errors import HostError, VmError, VoipError

_SECONDS = 60  # for one script
_OPTIONS = ("--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1")
_NO_SERVER = 2  # psql's exit status: not reached


def quoted(text: str) -> str:
    """`text` as an SQL string constant (PostgreSQL, 4.1.2.1); a NUL can't be in one."""
    return "'" + text.replace("\0", "").replace("'", "''") + "'"


def _psql() -> tuple[list[str], dict[str, str]]:
    """The command line and environment of a psql on this computer, in the user's devstack-core."""
    # Homebrew links libpq nowhere.
    places = [os.environ.get("PATH", ""), "/opt/homebrew/opt/libpq/bin", "/usr/local/opt/libpq/bin"]
    program = shutil.which("psql", path=os.pathsep.join(places))
    if not program:
        raise HostError("psql is missing", "./voip doctor --fix; on macOS: brew install libpq")
    login = devstack.postgresql()
    argv = lab.current().inside(program, *_OPTIONS, f"--host={login.address}", f"--port={login.port}")
    argv += [f"--username={login.user}", f"--dbname={login.place}"]
    return argv, {**os.environ, "PGPASSWORD": login.password, "PGCONNECT_TIMEOUT": "15"}


def run(script: str) -> str:
    """The output of an SQL script, which says where to \\connect; by standard input, where no process list shows it.

    Raises VmError when the server can't be reached, VoipError with PostgreSQL's words when it refuses.
    """
    name, address = inventory.load().infra()
    outside = inventory.load().devstack is not None
    hint = "./voip infra.check" if outside else "./voip status"
    where = f"PostgreSQL on {name} ({address})"
    if outside:
        done = _in_devstack(script, where)
    else:
        done = vms.ssh.run(name, "sudo", "-u", "postgres", "psql", *_OPTIONS, input=script)
    if done.returncode == vms.ssh.LATE:
        raise VmError(f"{where} does not answer: {done.stderr}", hint)
    if done.returncode in (vms.ssh.NO_SSH, _NO_SERVER):
        raise VmError(f"{where} can't be reached", hint, done.stderr)
    if done.returncode != 0:
        raise VoipError(
            f"{where} refused", "./voip infra.setup" if outside else f"./voip provision --limit {name}", done.stderr
        )
    return done.stdout


def _in_devstack(script: str, where: str) -> subprocess.CompletedProcess[str]:
    argv, environment = _psql()
    try:
        return subprocess.run(
            argv, input=script, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise VmError(f"{where} does not answer within {_SECONDS} s", "./voip infra.check") from None
