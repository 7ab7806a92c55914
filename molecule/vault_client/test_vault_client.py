"""What is in Vault is in the files, for who may read it, on the machine that may have it; also while Vault is away."""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from guests import Guest, Host, Result, inventory_of

from voip_stack import settings
from voip_stack.secrets import vault
from voip_stack.services import vault_setup

PEER = inventory_of("vault-1")
ADDRESS = inventory_of("client-1")["internal_address"]
KEYS_DIR = settings.load().secrets_dir / "molecule" / PEER["ansible_host"]
ONE, TWO, THREE = "/etc/asterisk/one", "/etc/asterisk/two", "/etc/asterisk/three"
SECONDS = 60  # for a new secret to be in its file: the interval is 3 s, emulation is slow


def server(token: str = "") -> vault.Vault:
    return vault.Vault("vault-1", PEER["internal_address"], 8200, KEYS_DIR / "ca.pem", token)


@pytest.fixture(scope="session")
def keys() -> vault.Keys:
    return vault.Keys.read(KEYS_DIR / "vault-1.json")


@pytest.fixture
def root(keys: vault.Keys) -> vault.Vault:
    """Vault, unsealed, with all rights."""
    server().unseal(keys, 60)
    return server(keys.root_token)


def wait(check: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(1)


def put(root: vault.Vault, **changes: str) -> None:
    root.ask("POST", "secret/data/asterisk", {"data": root.kv("asterisk") | changes})


def content(host: Host, path: str) -> str:
    return host.run("cat %s", path).stdout


def pids(host: Host) -> list[str]:
    return host.check_output("systemctl show --value --property MainPID one two three").split()


def run_login(host: Host, command: str, stdin: str = "") -> Result:
    options = host.check_output("systemctl show --value --property ExecStart vault-login.service")
    argv = options.split("argv[]=")[1].split(" ;")[0].removesuffix(" renew")
    return host.run("printf %%s %s | " + argv + " " + command, stdin)


# First, since after a reboot of the guest alone Vault is still there, and after its own it is sealed.
def test_the_files_hold_what_vault_holds(host: Host, root: vault.Vault) -> None:
    there = root.kv("asterisk")
    wait(lambda: there["ami_secret"] in content(host, ONE), "the secret in its file")
    assert content(host, ONE) == f"login=one:{there['ami_secret']}@192.0.2.1\n"
    assert content(host, TWO) == f"first\n\"second\" = '{there['ari_password']}'\n"


def test_a_run_that_is_cut_off_would_be_noticed_by_the_next(host: Host) -> None:
    assert host.run("test /etc/vault-agent/known -nt /etc/vault-agent/asterisk.hcl").rc == 0


def test_only_who_should_reads_them(host: Host) -> None:
    one, two = host.file(ONE), host.file(TWO)
    assert (one.user, one.group, one.mode) == ("root", "daemon", 0o640)
    assert (two.user, two.group, two.mode) == ("root", "root", 0o600)
    listed = host.check_output("stat -c '%a %U' /etc/vault-agent /etc/vault-agent/secret-id /etc/vault-agent/role-id")
    assert listed.splitlines() == ["700 root", "600 root", "600 root"]


def test_a_new_secret_reaches_its_file_and_its_daemon_alone(host: Host, root: vault.Vault) -> None:
    before = pids(host)
    old = root.kv("asterisk")["ami_secret"]
    put(root, ami_secret="new-" + str(time.time_ns()))
    new = root.kv("asterisk")["ami_secret"]
    wait(lambda: new in content(host, ONE), "the new secret")
    wait(lambda: pids(host)[0] != before[0], "the daemon restarted")
    assert pids(host)[1:] == before[1:]
    assert old not in content(host, ONE)


# `two` has a command that fails: the agent must go on.
def test_a_daemon_that_refuses_keeps_nobody_from_a_secret(host: Host, root: vault.Vault) -> None:
    def arrived(field: str, file: str) -> bool:
        return root.kv("asterisk")[field] in content(host, file)

    for field, file in (("ari_password", TWO), ("ami_secret", ONE)):
        put(root, **{field: "after-" + str(time.time_ns())})
        wait(partial(arrived, field, file), f"{field} in {file}")


@pytest.mark.usefixtures("root")
def test_a_file_that_somebody_removed_comes_back(host: Host) -> None:
    was = content(host, ONE)
    host.check_output(f"rm {ONE}")
    wait(lambda: content(host, ONE) == was, "the file")
    assert host.file(ONE).group == "daemon"


@pytest.mark.outage
def test_its_certificate_is_of_the_intermediate_ca_and_made_anew_only_when_nobody_has_it(
    host: Host, root: vault.Vault
) -> None:
    was, before = content(host, THREE), pids(host)
    there, ca = x509.load_pem_x509_certificates(was.encode())
    assert load_pem_private_key(was.encode(), password=None).public_key() == there.public_key()
    assert ca == x509.load_pem_x509_certificate(root.ask("GET", "pki_int/cert/ca")["data"]["certificate"].encode())
    there.verify_directly_issued_by(ca)
    names = there.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["client-1.voip.local"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("192.0.2.7")]
    assert there.not_valid_after_utc - there.not_valid_before_utc == pytest.approx(
        timedelta(hours=2160), abs=timedelta(minutes=2)
    )
    assert (host.file(THREE).group, host.file(THREE).mode) == ("daemon", 0o640)
    host.check_output("systemctl restart vault-agent")
    time.sleep(10)
    assert content(host, THREE) == was
    host.check_output(f"rm {THREE}")
    wait(lambda: content(host, THREE) == was, "the certificate")
    host.check_output(f"systemctl stop vault-agent && rm {THREE} && systemctl start vault-agent")
    wait(lambda: content(host, THREE).count("BEGIN CERTIFICATE") == 2, "another certificate")
    assert content(host, THREE) != was
    wait(lambda: pids(host)[2] != before[2], "its daemon restarted")
    assert pids(host)[:2] == before[:2]


@pytest.mark.outage
def test_the_files_survive_a_restart_without_vault(
    host: Host, guest: Guest, root: vault.Vault, keys: vault.Keys
) -> None:
    was = content(host, ONE), content(host, TWO)
    before = pids(host)
    guest("vault-1").check_output("systemctl stop vault")
    try:
        host.check_output("systemctl restart vault-agent")
        time.sleep(10)
        assert (content(host, ONE), content(host, TWO)) == was
        assert pids(host) == before
        assert host.check_output("systemctl is-active vault-agent") == "active"
        refused = run_login(host, "check")
        assert refused.rc == 1
        assert f"Vault at https://{PEER['internal_address']}:8200 can't be used" in refused.stderr
    finally:
        guest("vault-1").check_output("systemctl start vault")
    sealed = run_login(host, "check")
    assert (sealed.rc, "it is sealed" in sealed.stderr) == (1, True)
    server().unseal(keys, 60)
    put(root, ami_secret="back-" + str(time.time_ns()))
    wait(lambda: root.kv("asterisk")["ami_secret"] in content(host, ONE), "the secret after Vault came back", 120)


def test_the_login_is_renewed_and_the_old_one_is_worth_nothing(host: Host, root: vault.Vault) -> None:
    lookup = "auth/voip-approle/role/pbx-vm-role/secret-id/lookup"
    old = content(host, "/etc/vault-agent/secret-id")
    host.check_output("systemctl start vault-login.service")
    new = content(host, "/etc/vault-agent/secret-id")
    assert new
    assert new != old
    assert run_login(host, "check").rc == 0
    for secret_id, known in ((new, True), (old, False)):
        found = root.ask("POST", lookup, {"secret_id": secret_id.strip()})
        assert bool(found.get("data")) == known
    left = root.ask("POST", lookup, {"secret_id": new.strip()})["data"]
    assert left["secret_id_ttl"] == 30 * 24 * 3600
    assert host.check_output("systemctl is-enabled vault-login.timer") == "enabled"


@pytest.mark.usefixtures("root")
def test_the_login_is_worth_nothing_elsewhere(host: Host) -> None:
    body = {
        name.replace("-", "_"): content(host, f"/etc/vault-agent/{name}").strip() for name in ("role-id", "secret-id")
    }
    with pytest.raises(vault.VaultError) as refused:
        server().ask("POST", "auth/voip-approle/login", body)
    assert "source address" in refused.value.message


def test_a_machine_reads_its_own_secrets_only(host: Host, root: vault.Vault) -> None:
    put(root, ami_secret="mine")
    ask = f"""
import json, ssl, urllib.request, urllib.error
ca = ssl.create_default_context(cafile="/etc/vault-agent/ca.pem")
def ask(path, body=None, token=""):
    url = "https://{PEER["internal_address"]}:8200/v1/" + path
    request = urllib.request.Request(url, body and json.dumps(body).encode())
    token and request.add_header("X-Vault-Token", token)
    try:
        return json.loads(urllib.request.urlopen(request, context=ca).read())
    except urllib.error.HTTPError as error:
        return error.code
body = {{n.replace("-", "_"): open("/etc/vault-agent/" + n).read().strip() for n in ("role-id", "secret-id")}}
token = ask("auth/voip-approle/login", body)["auth"]["client_token"]
print(json.dumps([ask(path, body, token) if body is None else ask(path, body, token) for path, body in (
    ("secret/data/asterisk", None), ("secret/data/kamailio", None),
    ("secret/data/cdr-reader", None), ("sys/mounts", None),
    ("auth/voip-approle/role/sip-vm-role/secret-id", {{"cidr_list": []}}),
    ("pki_int/issue/asterisk-role", {{"common_name": "client-1.voip.local", "ip_sans": "192.0.2.7"}}),
    ("pki_int/issue/kamailio-role", {{"common_name": "client-1.voip.local"}}),
    ("pki_int/issue/asterisk-role", {{"common_name": "client-1.voip.local", "alt_names": "voip.local"}}),
    ("pki_int/issue/asterisk-role", {{"common_name": "client-1.voip.local", "ip_sans": "192.0.2.8"}}),
    ("pki_int/issue/asterisk-role", {{"common_name": "vault-1.voip.local"}}))]))
"""
    mine, *others, certificate, role, domain, address, name = json.loads(host.check_output("python3 -c %s", ask))
    assert mine["data"]["data"]["ami_secret"] == "mine"
    assert others == [403] * 4
    assert certificate["data"]["certificate"].startswith("-----BEGIN CERTIFICATE-----")
    assert (role, domain, address, name) == (403, 403, 403, 403)


def test_a_wrapped_login_is_good_once_and_for_one_machine(host: Host, root: vault.Vault) -> None:
    made = vault_setup.login(root, "pbx", "client-1", ADDRESS)
    first = run_login(host, "unwrap", json.dumps(made))
    again = run_login(host, "unwrap", json.dumps(made))
    assert first.rc == 0
    assert again.rc == 2
    assert "somebody has unwrapped it before" in again.stderr
    assert "./voip provision --limit client-1" in again.stderr
    assert run_login(host, "check").rc == 0  # the refused one left the good one where it was


def test_refused_logins_lock_no_machine_out(host: Host) -> None:
    file = "/etc/vault-agent/secret-id"
    host.check_output(f"cp -a {file} /root/secret-id && sed -i s/^......../00000000/ {file}")
    try:
        assert {run_login(host, "check").rc for _ in range(6)} == {2}
    finally:
        host.check_output(f"mv /root/secret-id {file}")
    assert run_login(host, "check").rc == 0


def test_another_vault_is_not_trusted(host: Host) -> None:
    host.check_output(
        "cp /etc/vault-agent/ca.pem /root/ca.pem && cp /etc/ssl/certs/ca-certificates.crt /etc/vault-agent/ca.pem"
    )
    try:
        refused = run_login(host, "check")
    finally:
        host.check_output("mv /root/ca.pem /etc/vault-agent/ca.pem")
    assert refused.rc == 1
    assert "is not the one that /etc/vault-agent/ca.pem vouches for" in refused.stderr


# Last: the machine gets another login at the end.
def test_a_revoked_machine_reads_nothing(host: Host, root: vault.Vault) -> None:
    secret_id = content(host, "/etc/vault-agent/secret-id").strip()
    root.ask("POST", "auth/voip-approle/role/pbx-vm-role/secret-id/destroy", {"secret_id": secret_id})
    try:
        refused = run_login(host, "check")
        assert refused.rc == 2
        assert "refuses pbx-vm-role" in refused.stderr
    finally:
        made = vault_setup.login(root, "pbx", "client-1", ADDRESS)
        assert run_login(host, "unwrap", json.dumps(made)).rc == 0


def test_no_secret_is_told_to_anybody(host: Host, root: vault.Vault) -> None:
    values = [v for v in root.kv("asterisk").values() if len(v) > 8]
    values.append(content(host, "/etc/vault-agent/secret-id").strip())
    assert len(values) > 2
    log = Path(settings.load().cache_dir, "logs", "molecule", "vault_client.log")
    commands = {
        "the journal": "journalctl --no-pager -o cat",
        "the process list": "ps -eo args",
        "environments": "cat /proc/[0-9]*/environ 2>/dev/null",
        "files that anybody reads": "find / -xdev -type f -perm -o=r -mmin -60 -exec cat {} + 2>/dev/null",
    }
    texts = {where: host.run(command).stdout_bytes.decode(errors="replace") for where, command in commands.items()}
    texts["this run's log"] = log.read_text(errors="replace") if log.exists() else ""
    assert [(where, "found") for where, text in texts.items() for value in values if value in text] == []
