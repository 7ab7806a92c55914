"""Progress by machine and role, what changed, time per role; the same as JSON in the file that VOIP_REPORT names."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible import constants
from ansible.errors import AnsibleError
from ansible.playbook.handler import Handler
from ansible.plugins.callback import CallbackBase
from ansible.template import Templar

if TYPE_CHECKING:
    from ansible.executor.stats import AggregateStats
    from ansible.executor.task_result import CallbackTaskResult
    from ansible.inventory.host import Host
    from ansible.playbook.play import Play
    from ansible.playbook.task import Task

DOCUMENTATION = """
name: voip_summary
type: aggregate
short_description: progress by machine and role, changes per machine, time per role
description:
  - Prints two tables at the end, beside another callback's output.
  - As the stdout callback it prints progress too, a line per machine and role; machines run at their own pace.
"""
INDENT = " " * 13


# Actions that do nothing to the machine; the check of a role's arguments runs whatever tags are wanted.
NOTHING = ("validate_argument_spec", "include_role", "include_tasks", "set_fact")


@dataclasses.dataclass
class Visit:
    """A machine's way through a role, or its handlers of that role at the end of the play."""

    role: str
    start: float
    seconds: float = 0
    did: bool = False  # a task that was not skipped
    changes: list[str] = dataclasses.field(default_factory=list)


def outermost(task: Any) -> str:
    """The role that the play names. The task may be of another one, which that role includes."""
    name = task._role.get_name() if task._role else ""
    while task := getattr(task, "_parent", None):
        name = task._role.get_name() if task._role else name
    return name or "(play)"


def words(result: dict[str, Any]) -> str:
    """What a module or a loop's items say of their failure."""
    failed = [r for r in result.get("results", ()) if isinstance(r, dict) and r.get("failed")]
    if failed:
        return "\n".join(f"{label(r)}: {words(r)}" for r in failed)
    # A config that its daemon refuses: why stands on standard error, or else on standard output.
    found = [str(result.get(key) or "").strip() for key in ("msg", "stderr", "module_stderr")]
    if not found[0] or not any(found[1:]):
        found += [str(result.get(key) or "").strip() for key in ("stdout", "module_stdout")]
    return "\n".join(filter(None, found)) or str(result.get("censored", "it does not say why"))


def label(item: dict[str, Any]) -> str:
    return str(item.get("_ansible_item_label", item.get("item", "")))


class CallbackModule(CallbackBase):  # type: ignore[misc]  # Ansible's plugins have no types
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "voip_summary"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.alone = constants.DEFAULT_STDOUT_CALLBACK == self.CALLBACK_NAME
        self.start = time.monotonic()
        self.began: dict[tuple[str, str], float] = {}
        self.role_of: dict[str, str] = {}
        # Those that have no line yet.
        self.visits: dict[str, dict[str, Visit]] = collections.defaultdict(dict)
        self.seconds: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
        self.did: set[tuple[str, str]] = set()
        self.changed: dict[str, list[str]] = collections.defaultdict(list)
        self.failed: list[dict[str, str]] = []

    def _say(self, text: str, color: str | None = None) -> None:
        if self.alone:
            self._display.display(text, color=color)

    def _close(self, host: str) -> None:
        for visit in self.visits.pop(host, {}).values():
            if visit.did:
                head = f"  {visit.start:5.0f} s  {host:<10} {visit.role:<16} {visit.seconds:7.1f} s"
                color = constants.COLOR_CHANGED if visit.changes else constants.COLOR_OK
                self._say("\n".join([head, *(textwrap.indent(change, INDENT) for change in visit.changes)]), color)

    def v2_playbook_on_play_start(self, play: Play) -> None:
        self.play = play
        # A machine's last role ends with the play: its handlers may belong to it.
        for host in list(self.visits):
            self._close(host)

    def v2_runner_on_start(self, host: Host, task: Task) -> None:
        role = outermost(task)
        self.began[host.name, task._uuid] = time.monotonic()
        # Handlers run amid another role (flush_handlers), or after the last one.
        if not isinstance(task, Handler) and self.role_of.get(host.name) != role:
            self._close(host.name)
            self.role_of[host.name] = role
        self.visits[host.name].setdefault(role, Visit(role, time.monotonic() - self.start))

    def _ended(self, result: CallbackTaskResult, skipped: bool = False) -> tuple[str, str]:
        """The machine and `role : task`, after counting the time and telling of warnings."""
        self._warn(result)
        host, task = result.host.name, result.task
        role = task._role.get_name() if task._role else ""
        began = self.began.pop((host, task._uuid), None)
        visit = self.visits[host].get(outermost(task))
        if began is not None and visit:
            seconds = time.monotonic() - began
            self.seconds[role or "(play)"][host] += seconds
            visit.seconds += seconds
            if not skipped and task.action.rpartition(".")[2] not in NOTHING:
                visit.did = True
                self.did.add((role or "(play)", host))
        name = self._name(result).removeprefix(role + " : ")
        return host, f"{role} : {name}" if role else name

    def _name(self, result: CallbackTaskResult) -> str:
        """The task's name for this machine. Ansible resolves it in the task that all share, for the first of them."""
        name = (result.task._ds or {}).get("name") or ""
        if "{{" not in name:
            return str(result.task_name)
        values = self.play.get_variable_manager().get_vars(play=self.play, host=result.host, task=result.task)
        try:
            return str(Templar(self.play.get_loader(), values).template(name))
        except AnsibleError:  # of an item
            return name

    def _warn(self, result: CallbackTaskResult) -> None:
        if self.alone:
            self._handle_warnings(result.result)

    v2_runner_item_on_ok = v2_runner_item_on_failed = v2_runner_item_on_skipped = _warn

    def v2_runner_on_ok(self, result: CallbackTaskResult) -> None:
        host, task = self._ended(result)
        if not result.result.get("changed"):
            return
        self.changed[host].append(task)
        role = outermost(result.task)
        items = [r for r in result.result.get("results", ()) if isinstance(r, dict) and r.get("changed")]
        labels = [text for r in items if isinstance(text := r.get("_ansible_item_label"), str)]
        change = task.removeprefix(role + " : ") + (f": {', '.join(labels)}" if labels else "")
        if result.task_fields.get("diff"):
            diffs = [self._get_diff(r["diff"]) for r in items or [result.result] if r.get("diff")]
            change = "\n".join([change, *(diff.rstrip() for diff in diffs if diff)])
        if visit := self.visits[host].get(role):
            visit.changes.append(change)

    def v2_runner_on_skipped(self, result: CallbackTaskResult) -> None:
        self._ended(result, skipped=True)

    def v2_runner_on_failed(self, result: CallbackTaskResult, ignore_errors: bool = False) -> None:
        host, task = self._ended(result)
        if ignore_errors:
            return
        message = words(result.result)
        said = textwrap.indent(f"{message}\n{result.task.get_path()}", INDENT)
        self._say(f"  FAILED   {host:<10} {task}\n{said}", constants.COLOR_ERROR)
        role = result.task._role.get_name() if result.task._role else ""
        # A rescue has said it in other words, if there was one before: what counts is what ended the machine's run.
        self.failed = [f for f in self.failed if f["host"] != host]
        self.failed.append({"host": host, "role": role, "task": task, "message": message})

    def v2_runner_on_unreachable(self, result: CallbackTaskResult) -> None:
        host, task = self._ended(result, skipped=True)
        message = str(result.result.get("msg", ""))
        self._say(f"  UNREACHABLE {host:<7} {task}\n{textwrap.indent(message, INDENT)}", constants.COLOR_UNREACHABLE)
        self.failed.append({"host": host, "role": "", "task": task, "message": message, "unreachable": "yes"})

    def v2_playbook_on_stats(self, stats: AggregateStats) -> None:
        for host in list(self.visits):
            self._close(host)
        hosts = sorted(stats.processed)
        say = self._display.display
        seconds: dict[str, dict[str, float]] = {}
        for role, times in self.seconds.items():
            if did := {host: time for host, time in times.items() if (role, host) in self.did}:
                seconds[role] = did
        if hosts:
            say("\nWhat changed")
            for host in hosts:
                tasks = self.changed[host]
                say(f"  {host:<10} {len(tasks) or 'nothing'}" + "".join(f"\n{INDENT}{t}" for t in tasks))
            say("\nSeconds per role  " + "".join(f"{h:>10}" for h in hosts))
            for role, times in seconds.items():
                say(f"  {role:<16}" + "".join(f"{times[h]:>10.1f}" if h in times else f"{'-':>10}" for h in hosts))
        report = os.environ.get("VOIP_REPORT")
        if report:
            values = {"changed": self.changed, "failed": self.failed, "seconds": seconds, "hosts": hosts}
            Path(report).write_text(json.dumps(values))
