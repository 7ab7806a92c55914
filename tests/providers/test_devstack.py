"""The stack on a user's devstack-core: a double of it, made of the real servers, instead of infra-1."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from voip_stack import calls, images, inventory, lab, packages, paths, provision, vms
from voip_stack.calls import probes
from voip_stack.inventory import Machine
from voip_stack.roletest import scenarios, slots
from voip_stack.secrets import vault

DOUBLE = Path(__file__).with_name("double.yml")
NAME = "devstack"


@dataclass(frozen=True)
class Double:
    """The double, and the environment for commands that use it."""

    machine: Machine
    environment: dict[str, str]
    before: dict[str, object] = field(default_factory=dict)

    def invoke(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "invoke", *command]
        return subprocess.run(
            argv,
            cwd=paths.REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def fail(self, *command: str) -> str:
        done = self.invoke(*command)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stdout + done.stderr

    def succeed(self, *command: str, timeout: float = 120) -> str:
        done = self.invoke(*command, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def vault(self) -> vault.Vault:
        token = vault.token_in(Path(self.environment["VOIP_DEVSTACK_TOKEN_FILE"]))
        return vault.Vault("devstack-core", str(self.machine.internal), 8200, None, token)

    def sh(self, script: str) -> str:
        return vms.ssh.run(self.machine.name, "sh", "-s", input=script, sudo=True, check=True, timeout=300).stdout

    def sql(self, query: str) -> str:
        password = self.vault.kv("postgres")["password"]
        psql = "psql -XAt -h 127.0.0.1 -U dev_admin -d dev_database"
        return self.sh(f"export PGPASSWORD={password}\n{psql} <<'E'\n{query};\nE\n").strip()

    def contents(self) -> dict[str, object]:
        """All objects that a stack could have made there."""
        server = self.vault
        paths_ = (
            "sys/policies/acl?list=true",
            "pki_int/roles?list=true",
            "secret/metadata?list=true",
        )
        found: dict[str, object] = {path: (server.find(path) or {}).get("data", {}).get("keys") for path in paths_}
        found["logins"] = {path: auth["config"] for path, auth in server.ask("GET", "sys/auth")["data"].items()}
        found["secret/asterisk"] = server.kv("asterisk")
        found["PostgreSQL"] = self.sql(
            "SELECT datname FROM pg_database UNION ALL SELECT rolname FROM pg_roles ORDER BY 1"
        )
        found["RabbitMQ"] = self.sh("rabbitmqctl --silent list_vhosts name; rabbitmqctl --silent list_users")
        return found


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Double]:
    directory = tmp_path_factory.mktemp("devstack")
    packages.proxy.start(lab.current().package_addresses)
    packages.ensure("vault")
    wanted = slots.Wanted("devstack-1", images.PEERS, memory_mib=1536, networks=("internal",))
    machine = slots.create(NAME, [wanted], lambda _: None)["devstack-1"]
    try:
        hosts = directory / "inventory.json"
        hosts.write_text(json.dumps({"all": {"hosts": {"devstack-1": scenarios.reach(machine)}}}))
        token = directory / "root-token"
        argv = [Path(sys.executable).with_name("ansible-playbook"), DOUBLE, f"--inventory={hosts}"]
        argv += [
            f"--inventory={scenarios.SCENARIOS / 'shared' / 'inventory'}",
            f"--extra-vars=double_token_file={token}",
        ]
        done = subprocess.run(
            list(map(str, argv)), env=provision.environment(), capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        settings = {
            "VOIP_INFRA": "devstack",
            "VOIP_SECRETS": "vault",
            "VOIP_DEVSTACK_ADDRESS": str(machine.internal),
            "VOIP_DEVSTACK_TOKEN_FILE": str(token),
            "VOIP_DEVSTACK_BIND": "yes",
        }
        made = Double(machine, provision.environment() | settings)
        yield replace(made, before=made.contents())
    finally:
        slots.destroy(NAME, lambda _: None)


def test_what_is_missing_is_told_before_anything_is_made(double: Double) -> None:
    done = double.invoke("infra.check", "--json")
    assert done.returncode == 1
    rows = {row["service"]: row for row in json.loads(done.stdout)}
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys(rows, "answers")
    assert {"secret/kamailio: db_password", "the AppRole sip-vm-role"} <= set(rows["Vault"]["lacks"])
    assert rows["PostgreSQL"]["lacks"] == ["databases kamailio, asterisk, cdr with their logins"]
    assert "the virtual host voip" in rows["RabbitMQ"]["lacks"]
    assert "it is a cluster" in rows["Redis"]["note"]
    assert all(row["version"] for row in rows.values())
    assert double.contents() == double.before
    said = double.fail("provision")
    assert "Vault of devstack-core" in said
    assert "./voip infra.setup" in said


def test_a_wrong_token_a_sealed_vault_and_a_closed_port_are_told(double: Double, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hvs.wrong\n")
    wrong = replace(double, environment=double.environment | {"VOIP_DEVSTACK_TOKEN_FILE": str(tmp_path / "token")})
    assert "refuses this token at" in wrong.fail("infra.setup")
    none = replace(double, environment=double.environment | {"VOIP_DEVSTACK_TOKEN_FILE": str(tmp_path / "none")})
    assert "VOIP_DEVSTACK_TOKEN_FILE names it" in none.fail("infra.setup")
    seal = "key=$(python3 -c \"import json; print(json.load(open('/root/double-vault.json'))['unseal_keys_b64'][0])\")"
    double.vault.ask("PUT", "sys/seal")
    try:
        assert "is sealed" in double.fail("infra.check")
    finally:
        double.sh(f"{seal}\nVAULT_ADDR=http://127.0.0.1:8200 vault operator unseal $key")
    double.sh("systemctl stop rabbitmq-server")
    try:
        where = f"RabbitMQ on devstack-core ({double.machine.internal}:15672)"
        assert f"{where} can't be reached" in double.fail("infra.setup")
    finally:
        double.sh("systemctl start rabbitmq-server")


def test_setup_makes_what_is_missing_and_then_nothing(double: Double) -> None:
    double.succeed("infra.setup")
    there = double.contents()
    assert double.succeed("infra.setup").strip() == "nothing was missing"
    assert double.contents() == there
    double.succeed("infra.check")
    assert double.vault.kv("asterisk")["theirs"] == "kept"


def test_a_database_of_somebody_else_is_left_alone(double: Double) -> None:
    mark = double.sql("SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = 'cdr'")
    double.sql("COMMENT ON DATABASE cdr IS 'mine'")
    try:
        assert "has a database cdr that this stack has not made" in double.fail("infra.setup")
    finally:
        double.sql(f"COMMENT ON DATABASE cdr IS '{mark}'")


def test_calls_complete_with_it_and_without_infra_1(
    double: Double, stack: inventory.Inventory, record_property: Callable[[str, object], None]
) -> None:
    infra = stack.group("infra")
    vms.stop(infra)
    try:
        begin = time.monotonic()
        double.succeed("provision", timeout=1200)
        record_property("from infra-1 to a devstack-core", f"{time.monotonic() - begin:.0f} s")
        double.succeed("calls.verify", timeout=300)
        double.succeed("status")
        files = vms.ssh.run(probes.machines("sip_proxies")[0], "cat", "/etc/kamailio/secrets.cfg", sudo=True).stdout
        assert double.vault.kv("kamailio")["db_password"] in files
        double.succeed("secrets.rotate", "cdr", timeout=600)
        double.succeed("calls.verify", timeout=300)
        assert json.loads(double.succeed("cdr.list", "--json"))
    finally:
        vms.start(infra, then=vault.reopen)
        provision.run()
    calls.verify()


def test_teardown_removes_that_and_nothing_else(double: Double) -> None:
    double.succeed("infra.teardown")
    assert double.contents() == double.before
    assert double.succeed("infra.teardown").strip() == "nothing was there"
