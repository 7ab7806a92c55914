"""Disk images of the machines."""

from invoke.context import Context
from invoke.tasks import task

from voip_stack import images, inventory, ui, vms
from voip_stack.tell import lines


@task(
    help={
        "names": "machines or groups, comma-separated, or `plain`; all machines when left out",
        "refresh": "build again from today's packages",
    }
)
def build(_c: Context, names: str = "", refresh: bool = False) -> None:
    """Bake disk images with the stack's roles; existing ones are left."""
    wanted = [n for n in names.split(",") if n]
    chosen = [images.PLAIN] if wanted == [images.PLAIN] else [m.name for m in inventory.load().select(wanted)]
    steps = ui.Steps()
    if refresh:
        images.forget(chosen)
    for name in chosen:
        with steps.step(f"image {name}"):
            images.ensure(name, lines(ui.say))
    ui.table(["image", "seconds"], [(n, f"{s:.1f}") for n, s in steps.done])


@task(name="list", help={"json": "print JSON"})
def list_(_c: Context, json: bool = False) -> None:
    """The images in the cache, with their size on disk."""
    used = vms.image_keys()
    current = images.current_keys()
    rows = [
        {
            "name": i.name,
            "key": i.key,
            "mib": i.bytes_used // 1024**2,
            "state": ("in use" if i.key in used else "") or ("current" if i.key in current else "old"),
        }
        for i in images.list_images()
    ]
    if json:
        ui.as_json(rows)
    else:
        ui.table(["image", "key", "MiB", "state"], [list(r.values()) for r in rows])


@task
def prune(c: Context) -> None:
    """Remove images that no machine uses and that the current roles would no longer make."""
    gone = images.prune(vms.image_keys(), images.current_keys(), dry=c.config.run.dry)
    for directory in gone:
        ui.say(f"{'would remove' if c.config.run.dry else 'removed'} {directory.name}")
    ui.say(f"{len(gone)} removed" if gone else "nothing to remove")
