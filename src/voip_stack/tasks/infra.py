"""What the stack needs of the services around it."""

from invoke.context import Context
from invoke.tasks import task

from voip_stack import infra, ui


@task
def setup(_c: Context) -> None:
    """Make what is missing in Vault: secrets, policies, AppRoles, PKI roles; what is there is left."""
    made = list(infra.all_of_it())
    for what in made:
        ui.say(f"made {what}")
    if not made:
        ui.say("nothing was missing")
