"""Packages that the stack builds, and the proxy that serves all packages."""

import time

from invoke.context import Context
from invoke.tasks import task

from voip_stack import packages, settings, ui
from voip_stack.errors import PackageError
from voip_stack.tell import lines


@task(
    positional=[],
    help={
        "names": "packages, such as asterisk; comma-separated",
        "source": "or: a source tree with debian/: a directory, a tarball, or a tarball's URL",
        "sha256": "the tarball's sum; a URL needs it",
        "refresh": "build the newest source, even if there is a build",
    },
)
def build(_c: Context, names: str = "", source: str = "", sha256: str = "", refresh: bool = False) -> None:
    """Build a package's .debs in a clean chroot, once; an existing build is left."""
    wanted = [n for n in names.split(",") if n]
    if bool(wanted) == bool(source) or (sha256 and not source):
        raise PackageError(
            "name what to build: either a package or a source tree",
            "./voip packages.build asterisk\n./voip packages.build --source FILE-OR-URL --sha256 HEX",
        )
    if source:
        ui.say(f"{source}: {packages.ensure_source(source, sha256, refresh, lines(ui.say))}")
    for name in wanted:
        ui.say(f"{name}: {packages.ensure(name, refresh, lines(ui.say))}")


@task(name="list", help={"json": "print JSON"})
def list_(_c: Context, json: bool = False) -> None:
    """The stack's packages, their builds in the cache, and the extra packages, whose directory is read first."""
    packages.publish()
    rows: list[dict[str, object]] = [
        {
            "name": b.name,
            "version": b.version,
            "key": b.key,
            "built": time.strftime("%F %R", time.localtime(b.at)),
            "seconds": b.seconds,
            "state": ("current" if b.is_current else "old") if b.kind == packages.RECIPE else b.kind,
            "origin": b.origin,
            "sha256": b.sha256,
            "debs": [d.name.partition("_")[0] for d in b.debs],
        }
        for b in packages.builds()
    ]
    there = {b.name for b in packages.builds() if b.is_current}
    rows += [{"name": n, "state": "not built", "key": packages.key(n)} for n in packages.RECIPES if n not in there]
    if json:
        ui.as_json(rows)
        return
    columns = ("name", "version", "key", "built", "seconds", "state")
    for row in rows:
        # A person calls 1:22.10.1+dfsg+…-1 22.10.1.
        if row["name"] in packages.RECIPES:
            row["version"] = str(row.get("version", "")).rpartition(":")[2].partition("+")[0]
    ui.table(columns, [[row.get(c) for c in columns] for row in rows])


@task
def prune(c: Context) -> None:
    """Remove builds that the current recipes would no longer make, and the remains of killed builds."""
    dry = bool(c.config.run.dry)
    gone = packages.prune(dry=dry)
    for directory in gone:
        ui.say(f"{'would remove' if dry else 'removed'} {directory.name}")
    if not gone:
        ui.say("nothing to remove")


@task(help={"action": "status, start or stop", "offline": "start: serve cached files only, without the network"})
def proxy(_c: Context, action: str = "status", offline: bool = False) -> None:
    """The caching package proxy of bakes and guests: --action=start, stop or status."""
    if action == "start":
        packages.proxy.start(offline=offline)
    elif action == "stop":
        packages.proxy.stop()
    elif action != "status":
        raise PackageError(f"the package proxy has no action {action!r}", "one of: status, start, stop")
    now = packages.proxy.status()
    listens = [f"{a}:{settings.load().package_proxy_port}" for a in now.bind] + (
        [str(now.socket)] if now.running else []
    )
    state = ("running, offline" if now.offline else "running") if now.running else "stopped"
    ui.table(["package proxy", "listens on"], [(state, ", ".join(listens))])
