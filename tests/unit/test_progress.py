"""The output of `./voip provision` while Ansible runs: a real ansible-playbook, on this computer under two names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from voip_stack import paths

PLAY = """
- hosts: all
  gather_facts: false
  strategy: host_pinned
  roles:
    - role: common
    - {role: kamailio, when: inventory_hostname == 'sip-1'}
    - {role: asterisk, when: inventory_hostname == 'pbx-1'}
"""
ROLES = {
    "common/tasks/main.yml": """
- name: Name {{ inventory_hostname }}
  ansible.builtin.copy:
    content: "name={{ inventory_hostname }}\\n"
    dest: "{{ place }}/{{ inventory_hostname }}"
    mode: "0644"
  notify: Tell
""",
    "common/handlers/main.yml": """
- name: Tell {{ inventory_hostname }}
  listen: Tell
  ansible.builtin.command: {argv: ["true"]}
""",
    "kamailio/tasks/main.yml": """
- name: Configure Kamailio
  ansible.builtin.copy:
    content: "{{ item.name }}\\n"
    dest: "{{ place }}/{{ item.name }}"
    mode: "0644"
  loop: [{name: kamailio.cfg}, {name: tls.cfg}]
  loop_control: {label: "{{ item.name }}"}
  notify: Restart Kamailio
- name: Write the certificate
  ansible.builtin.include_role: {name: vault_client}
- name: Look at it
  ansible.builtin.command: {argv: ["true"]}
  changed_when: false
""",
    "kamailio/handlers/main.yml": """
- name: Restart Kamailio
  ansible.builtin.command: {argv: ["true"]}
""",
    "vault_client/tasks/main.yml": """
- name: Render it
  ansible.builtin.command: {argv: ["true"]}
""",
    "asterisk/tasks/main.yml": """
- name: Check the configuration of {{ inventory_hostname }}
  ansible.builtin.command: {argv: [sh, -c, "echo extensions.conf is wrong at line 7; exit 1"]}
""",
}


@pytest.fixture
def provision(tmp_path: Path) -> Any:
    """provision(options): the output for a person, and the report."""
    for name, text in ROLES.items():
        file = tmp_path / "roles" / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
    (tmp_path / "play.yml").write_text(PLAY)
    local = f"ansible_connection=local ansible_python_interpreter={sys.executable}"
    (tmp_path / "hosts").write_text(f"sip-1 {local}\npbx-1 {local}\n")
    (tmp_path / "made").mkdir()
    report = tmp_path / "report.json"
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(paths.ANSIBLE / "ansible.cfg"),
        "ANSIBLE_HOME": str(tmp_path / "home"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_CALLBACKS_ENABLED": "voip_summary",
        "VOIP_REPORT": str(report),
    }

    def run(*options: str, code: int = 0, stdout: str = "voip_summary") -> tuple[str, dict[str, Any]]:
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "hosts", "play.yml", *options]
        command.append(f"--extra-vars=place={tmp_path / 'made'}")
        values = environment | {"ANSIBLE_STDOUT_CALLBACK": stdout}
        done = subprocess.run(command, cwd=tmp_path, env=values, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, json.loads(report.read_text())

    return run


def lines(said: str) -> list[str]:
    """The progress, with times as N, without the place of a failure."""
    progress = said.partition("\nWhat changed\n")[0]
    return [re.sub(r"\d+\.\d s", "N s", re.sub(r"^ +\d+ s", "N s", line)) for line in progress.splitlines() if line]


def test_each_machine_and_role_has_a_line_with_its_changes_below(provision: Any) -> None:
    said, report = provision("--limit=sip-1")
    # Handlers run at the end of the play.
    assert [line.split() for line in lines(said)] == [
        ["N", "s", "sip-1", "common", "N", "s"],
        ["Name", "sip-1"],
        ["N", "s", "sip-1", "kamailio", "N", "s"],
        ["Configure", "Kamailio:", "kamailio.cfg,", "tls.cfg"],
        ["vault_client", ":", "Render", "it"],
        ["N", "s", "sip-1", "common", "N", "s"],
        ["Tell", "sip-1"],
        ["N", "s", "sip-1", "kamailio", "N", "s"],
        ["Restart", "Kamailio"],
    ]
    assert "asterisk" not in said  # all its tasks are skipped there
    assert report["changed"]["sip-1"] == [
        "common : Name sip-1",
        "kamailio : Configure Kamailio",
        "vault_client : Render it",
        "common : Tell sip-1",
        "kamailio : Restart Kamailio",
    ]
    assert set(report["seconds"]) == {"common", "kamailio", "vault_client"}


def test_a_failure_tells_at_once_what_a_person_needs(provision: Any) -> None:
    said, report = provision(code=2)
    failed, message, output, place = [line.strip() for line in said.partition("FAILED")[2].splitlines()[:4]]
    assert failed == "pbx-1      asterisk : Check the configuration of pbx-1"
    assert message == "non-zero return code"
    assert output == "extensions.conf is wrong at line 7"
    assert place.endswith("asterisk/tasks/main.yml:2")
    assert report["changed"] == {
        "pbx-1": ["common : Name pbx-1", "common : Tell pbx-1"],
        "sip-1": [*report["changed"]["sip-1"]],
    }
    (kept,) = report["failed"]
    assert (kept["host"], kept["role"], kept["message"]) == ("pbx-1", "asterisk", f"{message}\n{output}")
    assert set(report["seconds"]["asterisk"]) == {"pbx-1"}
    assert set(report["seconds"]["kamailio"]) == {"sip-1"}


def test_a_dry_run_shows_each_difference_under_its_task(provision: Any) -> None:
    said, _ = provision("--check", "--diff", "--limit=sip-1")
    told = [line.strip() for line in said.splitlines()]
    where = told.index("Name sip-1")
    assert told[where + 1].startswith("--- before")
    assert told[where + 4] == "+name=sip-1"


def test_a_machine_that_does_not_answer_is_named(provision: Any) -> None:
    nobody = "--extra-vars=ansible_connection=ssh ansible_host=127.0.0.1 ansible_port=1"
    said, report = provision("--limit=pbx-1", nobody, code=4)
    assert re.search(r"UNREACHABLE pbx-1   common : Name pbx-1\n .*refused", said)
    assert (report["failed"][0]["unreachable"], report["seconds"]) == ("yes", {})


def test_a_wordy_run_is_ansibles_own_with_our_tables(provision: Any) -> None:
    said, report = provision("--limit=sip-1", "-v", stdout="default")
    assert "TASK [common : Name sip-1]" in said
    assert lines(said)[0].startswith("Using ")
    assert said.count("\nWhat changed\n") == 1
    assert report["changed"]["sip-1"]
