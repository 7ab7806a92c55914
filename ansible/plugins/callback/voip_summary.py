"""Progress by role, what changed per machine, time per role; the same as JSON in the file that VOIP_REPORT names."""

from __future__ import annotations

import collections
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ansible.plugins.callback import CallbackBase

if TYPE_CHECKING:
    from ansible.executor.stats import AggregateStats
    from ansible.executor.task_result import CallbackTaskResult
    from ansible.inventory.host import Host
    from ansible.playbook.task import Task

DOCUMENTATION = """
name: voip_summary
type: aggregate
short_description: progress by role, changes per machine, time per role
description: Prints a line when a machine enters a role, and two tables at the end.
"""


class CallbackModule(CallbackBase):  # type: ignore[misc]  # Ansible's plugins have no types
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "voip_summary"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.start = time.monotonic()
        self.began: dict[tuple[str, str], float] = {}
        self.role_of: dict[str, str] = {}
        self.seconds: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
        self.changed: dict[str, list[str]] = collections.defaultdict(list)
        self.failed: list[dict[str, str]] = []

    def v2_runner_on_start(self, host: Host, task: Task) -> None:
        role = task._role.get_name() if task._role else ""
        self.began[host.name, task._uuid] = time.monotonic()
        if role and self.role_of.get(host.name) != role:
            self.role_of[host.name] = role
            self._display.display(f"  {time.monotonic() - self.start:5.0f} s  {host.name:<10} {role}")

    def _ended(self, result: CallbackTaskResult) -> tuple[str, str]:
        host, task = result._host.name, result._task
        role = task._role.get_name() if task._role else ""
        began = self.began.pop((host, task._uuid), None)
        if began is not None:
            self.seconds[role or "(play)"][host] += time.monotonic() - began
        return host, f"{role} : {task.get_name().removeprefix(role + ' : ')}" if role else task.get_name()

    def v2_runner_on_ok(self, result: CallbackTaskResult) -> None:
        host, task = self._ended(result)
        if result._result.get("changed"):
            self.changed[host].append(task)

    def v2_runner_on_skipped(self, result: CallbackTaskResult) -> None:
        self._ended(result)

    def v2_runner_on_failed(self, result: CallbackTaskResult, ignore_errors: bool = False) -> None:
        host, task = self._ended(result)
        if not ignore_errors:
            role = result._task._role.get_name() if result._task._role else ""
            # A config that its daemon refuses: why stands on standard error.
            words = [str(result._result.get(key, "")) for key in ("msg", "stderr")]
            message = "\n".join(w.strip() for w in words if w.strip())
            # A rescue has said it in other words, if there was one before: what counts is what ended the machine's run.
            self.failed = [f for f in self.failed if f["host"] != host]
            self.failed.append({"host": host, "role": role, "task": task, "message": message})

    def v2_runner_on_unreachable(self, result: CallbackTaskResult) -> None:
        host, task = self._ended(result)
        message = str(result._result.get("msg", ""))
        self.failed.append({"host": host, "role": "", "task": task, "message": message, "unreachable": "yes"})

    def v2_playbook_on_stats(self, stats: AggregateStats) -> None:
        hosts = sorted(stats.processed)
        say = self._display.display
        if hosts:
            say("\nWhat changed")
            for host in hosts:
                tasks = self.changed[host]
                say(f"  {host:<10} {len(tasks) or 'nothing'}" + "".join(f"\n             {t}" for t in tasks))
            say("\nSeconds per role  " + "".join(f"{h:>10}" for h in hosts))
            for role, times in self.seconds.items():
                say(f"  {role:<16}" + "".join(f"{times[h]:>10.1f}" if h in times else f"{'-':>10}" for h in hosts))
        report = os.environ.get("VOIP_REPORT")
        if report:
            values = {"changed": self.changed, "failed": self.failed, "seconds": self.seconds, "hosts": hosts}
            Path(report).write_text(json.dumps(values))
