"""Is this computer fit for the stack?"""

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from voip_stack import ui
from voip_stack.host import doctor as doctors


@task(name="doctor", help={"fix": "apply the fixes that can be automated", "json": "print JSON"})
def doctor(c: Context, fix: bool = False, json: bool = False) -> None:
    """Check CPU, memory, disk, tools, accelerator, lab and packages; every finding names its fix."""
    findings = doctors.examine_and_fix(fix and not c.config.run.dry, ui.say)
    rows = doctors.rows(findings)
    if json:
        ui.as_json(rows)
    else:
        ui.table(["check", "state", "found", "fix"], [list(r.values()) for r in rows])
    if any(f.state is doctors.State.FAILED for f in findings):
        raise Exit(code=1)
