"""Real calls by phones outside."""

from dataclasses import asdict

from invoke.context import Context
from invoke.tasks import task

from voip_stack import calls, ui


@task(help={"proxy": "the machine that both phones register with; the first proxy if left out", "json": "print JSON"})
def verify(_c: Context, proxy: str = "", json: bool = False) -> None:
    """Prove the stack with a call: registration, audio both ways, forwarding in the kernel, release, CDR."""
    result = calls.verify(proxy)
    if json:
        ui.as_json(asdict(result))
    else:
        show(result)


def show(result: calls.Result) -> None:
    """Print a proven call."""
    ui.say(calls.report(result))
    ui.say(f"capture    {result.capture}")
