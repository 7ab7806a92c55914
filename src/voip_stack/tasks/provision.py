"""Provisioning."""

from invoke.context import Context
from invoke.tasks import task

from voip_stack import provision as provisioning
from voip_stack import ui
from voip_stack.services import check as check_services
from voip_stack.tell import lines


@task(
    iterable=["extra_vars"],
    incrementable=["verbose"],
    help={
        "limit": "machines or groups, comma-separated",
        "tags": "only these tags: a role's name, install, configure, service",
        "skip-tags": "leave these tags out",
        "check": "change nothing, show what would change",
        "verbose": "Ansible's own output; -vvv for more",
        "extra-vars": "a variable, as -e rtpengine_table=-1; can be repeated",
    },
)
def provision(
    c: Context,
    limit: str = "",
    tags: str = "",
    skip_tags: str = "",
    check: bool = False,
    verbose: int = 0,
    extra_vars: list[str] | None = None,
) -> None:
    """Apply the roles and the inventory to the running machines; arguments after `--` go to Ansible."""
    check_services.require()
    provisioning.run(
        limit=limit,
        only_tags=tags,
        skip_tags=skip_tags,
        check=check or c.config.run.dry,
        verbosity=verbose,
        extra_vars=extra_vars or (),
        extra_args=(c.remainder or "").split(),
        progress=lines(ui.say),
    )
