"""A component is one folder: everything else follows from its descriptor, and a wrong descriptor gives one message."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from voip_stack import components, inputs, inventory, paths, settings
from voip_stack.errors import InventoryError
from voip_stack.inventory import Inventory

CONF = settings.parse("", {})
SAMPLE: dict[str, Any] = {
    "group": ["pbx_servers"],
    "stage": "telephony",
    "after": ["asterisk"],
    "units": ["sample.service"],
    "packages": ["asterisk"],
    "ports": {"sample-api": {"protocol": "tcp", "port": 7001, "internal": ["sip_proxies", "computer"]}},
    "secrets": {
        "postgresql_password_sample": {"field": "db_password"},
        "redis_password_sample": {"field": "redis_password"},
        "rabbitmq_password_sample": {"field": "amqp_password"},
        "sample_token": {"path": "sample-admin", "field": "token", "reader": "computer"},
    },
    "certificates": {"sample-role": {"domain": False}},
    "secret_files": ["/etc/sample/secrets.conf"],
    "databases": {
        "sample": {
            "schema": "files/database.sql",
            "logins": {"sample": {"connections": 3, "password": "postgresql_password_sample"}},
        }
    },
    "redis_users": {"sample": {"password": "redis_password_sample", "keys": ["sample:*"], "commands": ["get"]}},
    "rabbitmq": {
        "queues": {"sample": {"exchange": "cdr", "routing_key": "call.#"}},
        "users": {
            "sample": {"password": "rabbitmq_password_sample", "configure": "^$", "write": "^$", "read": "^sample$"}
        },
    },
    "metrics": {"port": "sample-api"},
    "away": "nothing is sampled",
    "status": "echo figure 1 sample",
    "status_secrets": ["sample_token"],
}


@pytest.fixture
def ansible(tmp_path: Path) -> Path:
    """A copy of ansible/, to which a component may be added."""
    shutil.copytree(paths.ANSIBLE, tmp_path / "ansible")
    return tmp_path / "ansible"


def add(ansible: Path, values: dict[str, Any], flag: bool | None = True) -> None:
    """Add the component `sample`, and its flag unless that is None."""
    role = ansible / "roles" / "sample"
    (role / "files").mkdir(parents=True)
    (role / "component.yml").write_text(yaml.safe_dump(values))
    (role / "files" / "database.sql").write_text("CREATE TABLE IF NOT EXISTS sample (id int);\n")
    (role / "tasks").mkdir()
    (role / "tasks/main.yml").write_text("- name: Sample\n  ansible.builtin.debug: {msg: sampled}\n  tags: [install]\n")
    if flag is not None:
        file = ansible / components.FLAGS
        file.write_text(file.read_text() + f"  sample: {str(flag).lower()}\n")


def stack(every: components.Components) -> Inventory:
    """The repository's machines with these components."""
    hosts = {
        m.name: (
            list(m.groups),
            {f"{network}_address": str(address) for network, address in m.addresses.items()}
            | {"memory_mib": m.memory_mib, "vcpus": m.vcpus, "disk_gib": m.disk_gib},
        )
        for m in inventory.load().machines.values()
    }
    common = yaml.safe_load((paths.INVENTORY / "group_vars/all/networks.yml").read_text())
    return inventory.parse(hosts, common, every)


def test_a_component_is_in_every_derived_view_by_its_folder_and_its_flag(ansible: Path) -> None:
    add(ansible, SAMPLE)
    every = components.load(CONF, ansible)
    ours, told, pbx = stack(every), components.variables(every), components.host_variables(every, ["pbx_servers"])
    # The machines, the order of roles, tags, the stack's packages.
    assert "sample" in [c.name for c in ours.components_of(ours.machine("pbx-1"))]
    assert pbx["voip_roles"]["telephony"] == ["asterisk", "cdr", "sample"]
    assert "sample" not in components.host_variables(every, ["sip_proxies"])["voip_roles"]["telephony"]
    assert every["sample"].packages == ("asterisk",)
    # The firewall, the port scans of the tests.
    service = {"name": "sample-api", "protocol": "tcp", "ports": "7001", "network": "internal"}
    assert service | {"sources": ["sip_proxies", "computer"]} in pbx["voip_services"]
    assert "sample-api" in [s.name for s in ours.services_of(ours.machine("pbx-1"), "internal")]
    assert (told["voip_port_sample_api"], ours.port("sample-api")) == (7001, 7001)
    # Secrets: their variables, Vault's policies, their issuers, the files that the agent may write.
    assert told["postgresql_password_sample"] == "{{ lookup('voip_secret', 'postgresql_password_sample') }}"
    read = components.classes(every)["pbx"]
    assert (read["secrets"], read["certificates"]) == (["asterisk", "cdr", "sample"], ["asterisk-role", "sample-role"])
    assert {s.name: s.issuer for s in every["sample"].secrets} == {
        "postgresql_password_sample": "postgresql",
        "redis_password_sample": "redis",
        "rabbitmq_password_sample": "rabbitmq",
        "sample_token": "",
    }
    assert "/etc/sample" in pbx["voip_secret_directories"]
    # The servers' databases and users.
    (database,) = (d for d in told["voip_databases"] if d["name"] == "sample")
    assert database["groups"] == ["pbx_servers"]
    assert "CREATE TABLE" in database["schema"]
    assert database["logins"] == [{"name": "sample", "connections": 3, "password": "{{ postgresql_password_sample }}"}]
    assert "sample" in [user["name"] for user in told["voip_redis_users"]]
    assert "sample" in [queue["name"] for queue in told["voip_rabbitmq_queues"]]
    assert "sample" in [user["name"] for user in told["voip_rabbitmq_users"]]
    # Metrics, logs.
    assert {"name": "sample", "groups": ["pbx_servers"], "port": 7001, "path": "/metrics"} in told["voip_scrape_jobs"]
    assert "sample.service" in pbx["voip_log_units"]


def ansible_says(ansible: Path, *command: str) -> str:
    """The output of an Ansible command in the copy."""
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ansible / "ansible.cfg"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "ANSIBLE_NOCOLOR": "1",
    }
    program = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ansible_is_told_the_same(ansible: Path) -> None:
    add(ansible, SAMPLE)
    every = components.load(CONF, ansible)
    said = json.loads(ansible_says(ansible, "ansible-inventory", "--host=pbx-1"))
    expected = components.variables(every) | components.host_variables(every, ["pbx_servers"])
    assert {name: said[name] for name in expected} == expected


def test_the_playbook_applies_its_role_where_its_group_is_and_by_its_tag(ansible: Path) -> None:
    add(ansible, SAMPLE | {"stage": "machine", "after": []})
    for tags, hosts in (("sample", ["pbx-1"]), ("install", ["pbx-1"]), ("redis", [])):
        said = ansible_says(
            ansible,
            *("ansible-playbook", str(ansible / "playbooks/provision-vms.yml"), f"--tags={tags}"),
            *("--limit=pbx-1,sip-1", "--extra-vars=ansible_connection=local ansible_become=false", "--check"),
            "--skip-tags=common,network_config,vault_client,asterisk,cdr,kamailio",
        )
        assert re.findall(r'ok: \[(.*)\] => .*\{\n +"msg": "sampled"', said) == hosts


def test_without_its_flag_a_role_can_be_tested_and_is_nowhere_in_the_stack(ansible: Path) -> None:
    add(ansible, SAMPLE, flag=None)
    every = components.load(CONF, ansible)
    told = components.variables(every)
    assert not every["sample"].enabled
    assert (told["voip_port_sample_api"], told["voip_with_sample"]) == (7001, False)
    assert "redis_password_sample" in told
    views = [told["voip_databases"], told["voip_redis_users"], components.classes(every)]
    assert "sample" not in json.dumps([*views, components.host_variables(every, ["pbx_servers"])])


def test_who_does_not_use_a_component_does_not_depend_on_it(ansible: Path) -> None:
    before = inputs.known(ansible, components.load(CONF, ansible), [["sip_proxies"]])
    add(ansible, SAMPLE)
    after = inputs.known(ansible, components.load(CONF, ansible), [["sip_proxies"]])
    text = "{{ voip_port_postgresql }} {{ voip_services }} {{ postgresql_password_kamailio }}"
    assert inputs.named(text, before) == inputs.named(text, after)
    assert inputs.named("{{ voip_databases }}", before) != inputs.named("{{ voip_databases }}", after)


def port(name: str, **values: Any) -> dict[str, Any]:
    """A change of SAMPLE: its one port, which nothing else refers to."""
    return {"metrics": None, "ports": {name: {"protocol": "tcp", "port": 7001, "internal": ["sip_proxies"], **values}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unit": ["sample.service"]}, "sample/component.yml: the file: .*'unit' was unexpected"),
        ({"stage": "late"}, "component.yml: stage: 'late' is not one of"),
        ({"group": "pbx_servers"}, "component.yml: group: 'pbx_servers' is not of type 'array'"),
        (port("sample", protocol="sctp"), "ports.sample.protocol: 'sctp' is not one of"),
        (port("sample", port="9-7"), "ports.sample.port: 9-7 is not a range of ports"),
        (port("ami"), "ports: ami is asterisk's already"),
        (port("sample", port=5038), "sample/component.yml: ports.sample: asterisk listens on tcp 5038 already"),
        ({"secrets": {}}, "a login has the password .*_password_sample, which is none of its secrets"),
        ({"status_secrets": ["nobodys"]}, "status_secrets: no component has a secret nobodys"),
        (
            {"secret_files": ["/etc/asterisk/secret_ari.conf"]},
            "secret_files: .*/secret_ari.conf is asterisk's",
        ),
        ({"certificates": {"kamailio-role": {"domain": True}}}, "certificates: kamailio-role is kamailio's already"),
        ({"after": ["kamailio", "redis"]}, "after: redis is no component of the stage telephony"),
        ({"metrics": {"port": "http"}}, "metrics.port: http is none of its ports"),
        ({"databases": {"sample": {**SAMPLE["databases"]["sample"], "schema": "none.sql"}}}, "schema: .*No such file"),
    ],
)
def test_a_wrong_descriptor_is_one_message(ansible: Path, change: dict[str, Any], words: str) -> None:
    add(ansible, {key: value for key, value in (SAMPLE | change).items() if value is not None})
    with pytest.raises(InventoryError, match=words):
        components.load(CONF, ansible)


def test_components_that_wait_for_each_other_are_named(ansible: Path) -> None:
    add(ansible, SAMPLE)
    file = ansible / "roles/asterisk/component.yml"
    file.write_text(file.read_text() + "after: [sample]\n")
    with pytest.raises(InventoryError, match="after: asterisk, cdr, sample wait for each other"):
        components.load(CONF, ansible)


def test_a_key_that_is_there_twice_is_refused(ansible: Path) -> None:
    file = ansible / "roles/redis/component.yml"
    file.write_text(file.read_text() + "away: nothing\n")
    with pytest.raises(InventoryError, match="redis/component.yml: away is there twice"):
        components.load(CONF, ansible)


def test_a_flag_without_a_folder_is_refused(ansible: Path) -> None:
    file = ansible / components.FLAGS
    file.write_text(file.read_text().replace("kamailio:", "kamailo:"))
    with pytest.raises(InventoryError, match="no roles/kamailo/component.yml") as caught:
        components.load(CONF, ansible)
    assert caught.value.hint == "did you mean kamailio?"
    file.write_text("voip_components: {kamailio: yes please}\n")
    with pytest.raises(InventoryError, match="must say true or false"):
        components.load(CONF, ansible)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": ["fax"]}, "sample/component.yml: group: the inventory has no group fax"),
        (
            {"ports": {"sample-api": {"protocol": "tcp", "port": 7001, "internal": ["fax"]}}},
            "ports.sample-api.internal: the inventory has no group fax",
        ),
    ],
)
def test_a_group_that_the_inventory_lacks_is_named(ansible: Path, change: dict[str, Any], words: str) -> None:
    add(ansible, SAMPLE | change)
    with pytest.raises(InventoryError, match=words):
        components.check_groups(
            components.load(CONF, ansible), ["sip_proxies", "pbx_servers", "media_servers", "infra"]
        )


def test_of_alternatives_one_is_enabled_or_both_on_ports_of_their_own(ansible: Path) -> None:
    kamailio = yaml.safe_load((ansible / "roles/kamailio/component.yml").read_text())
    other = {key: kamailio[key] for key in ("group", "stage", "provides", "ports")}
    add(ansible, other, flag=False)
    assert components.variables(components.load(CONF, ansible))["voip_port_sip_udp"] == 5060
    file = ansible / components.FLAGS
    file.write_text(file.read_text().replace("sample: false", "sample: true"))
    with pytest.raises(InventoryError, match="sample/component.yml: ports: sip-.* is kamailio's already"):
        components.load(CONF, ansible)
    other["ports"] = {f"sample-{name}": port | {"port": port["port"] + 10} for name, port in other["ports"].items()}
    (ansible / "roles/sample/component.yml").write_text(yaml.safe_dump(other))
    every = components.load(CONF, ansible)
    assert (every["sample"].enabled, every["kamailio"].enabled) == (True, True)


def test_a_component_of_one_provider_is_there_with_that_one_only() -> None:
    assert components.load(CONF)["vault_server"].enabled
    assert not components.load(settings.parse("VOIP_SECRETS=file", {}))["vault_server"].enabled
    assert not components.load(settings.parse("INFRA=devstack", {}))["redis"].enabled


def test_the_settings_say_which_ports_media_has() -> None:
    every = components.load(settings.parse("RTP_PORT_MIN=30000\nRTP_PORT_MAX=30999", {}))
    found = components.variables(every)
    assert found["voip_port_rtp"] == found["voip_port_pbx_rtp"] == "30000-30999"
    with pytest.raises(InventoryError, match="rtpengine-ng: rtpengine listens on udp 2000-2999 already"):
        components.load(settings.parse("RTP_PORT_MIN=2000\nRTP_PORT_MAX=2999", {}))
