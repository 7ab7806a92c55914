"""Vault serves who trusts its CA and has a token, is sealed after each start, and keeps nothing that opens it."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guests import Host, inventory_of

from voip_stack import lab, settings
from voip_stack.secrets import vault

GUEST = inventory_of("vault-1")
ADDRESS = GUEST["internal_address"]
KEYS_DIR = settings.load().secrets_dir / "molecule" / GUEST["ansible_host"]
KEYS = KEYS_DIR / "vault-1.json"
AUDIT = "/var/log/vault/audit.log"


def server(token: str = "", ca: Path | None = KEYS_DIR / "ca.pem") -> vault.Vault:
    return vault.Vault("vault-1", ADDRESS, 8200, ca, token)


@pytest.fixture(scope="session")
def keys() -> vault.Keys:
    return vault.Keys.read(KEYS)


@pytest.fixture
def root(keys: vault.Keys) -> vault.Vault:
    """Vault, unsealed, with all rights."""
    server().unseal(keys, 60)
    return server(keys.root_token)


@pytest.fixture
def engine(root: vault.Vault) -> Iterator[str]:
    """A mount of its own, gone afterwards."""
    root.ask("POST", "sys/mounts/proof", {"type": "kv"})
    yield "proof"
    server().unseal(vault.Keys.read(KEYS), 60)
    root.ask("DELETE", "sys/mounts/proof")


def handshake(context: ssl.SSLContext, server_hostname: str | None = None) -> ssl.SSLSocket:
    plain = lab.current().connect(ADDRESS, 8200, timeout=30)
    return context.wrap_socket(plain, server_hostname=server_hostname)


def test_it_listens_inside_and_on_loopback_only(host: Host) -> None:
    found = {
        line.split()[3] for line in host.check_output("ss -Hltn '( sport = :8200 or sport = :8201 )'").splitlines()
    }
    assert {a for a in found if a.endswith(":8200")} == {f"{ADDRESS}:8200", "127.0.0.1:8200"}
    assert {a for a in found if a.endswith(":8201")} <= {"127.0.0.1:8201", "127.0.0.2:8201"}


def test_who_trusts_its_authority_is_served_and_nobody_is_without_tls(root: vault.Vault) -> None:
    assert root.ask("GET", "sys/health")["sealed"] is False
    with pytest.raises(vault.VaultError, match="not the one that"):
        server(ca=Path("/etc/ssl/certs/ca-certificates.crt")).ask("GET", "sys/health")
    with pytest.raises(vault.VaultError, match="does not answer as Vault does"):
        server(ca=None).ask("GET", "sys/health")


@pytest.mark.parametrize("name", ["localhost.example", "192.0.2.1"])
def test_its_certificate_names_it_and_nobody_else(name: str) -> None:
    context = ssl.create_default_context(cafile=str(KEYS_DIR / "ca.pem"))
    with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
        handshake(context, server_hostname=name)
    with handshake(context, server_hostname=ADDRESS) as connection:
        assert connection.version() in ("TLSv1.2", "TLSv1.3")


def test_old_tls_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        handshake(context)


def test_a_wrong_token_and_none_are_refused(root: vault.Vault) -> None:
    assert root.ask("GET", "sys/mounts")["data"]
    for token in ("", "hvs.wrong"):
        with pytest.raises(vault.VaultError) as refused:
            server(token).ask("GET", "sys/mounts")
        assert refused.value.status == 403


def wait_until_it_answers() -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        try:
            return server().ask("GET", "sys/seal-status")
        except vault.VaultError:
            assert time.monotonic() < deadline, "Vault did not come back"
            time.sleep(0.5)


def test_a_crash_seals_it_and_its_key_brings_everything_back(
    host: Host, root: vault.Vault, engine: str, keys: vault.Keys
) -> None:
    root.ask("POST", f"{engine}/survivor", {"value": "still here"})
    host.check_output("kill -KILL $(systemctl show --value --property MainPID vault)")
    assert wait_until_it_answers()["sealed"] is True
    with pytest.raises(vault.VaultError, match="is sealed"):
        root.ask("GET", f"{engine}/survivor")
    assert server().unseal(keys, 60) is True
    assert root.ask("GET", f"{engine}/survivor")["data"] == {"value": "still here"}


def test_another_key_does_not_open_it(host: Host, root: vault.Vault, tmp_path: Path) -> None:
    assert root.ask("GET", "sys/mounts")["data"]
    host.check_output("systemctl restart vault")
    wait_until_it_answers()
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"unseal_keys_b64": ["A" * 43 + "="], "root_token": "hvs.other"}))
    with pytest.raises(vault.VaultError):
        server().unseal(vault.Keys.read(file), 60)
    assert server().ask("GET", "sys/seal-status")["sealed"] is True


def test_each_request_is_logged_and_no_secret_with_it(
    host: Host, root: vault.Vault, engine: str, keys: vault.Keys
) -> None:
    root.ask("POST", f"{engine}/named", {"value": "unlogged-" + "x" * 20})
    log = host.file(AUDIT)
    assert (log.user, log.mode) == ("vault", 0o600)
    said = log.content.decode()
    assert f'"path":"{engine}/named"' in said
    assert "unlogged-" not in said
    assert keys.root_token not in said


def test_its_log_is_rotated_and_it_writes_the_new_one(host: Host, root: vault.Vault) -> None:
    before = host.check_output(f"stat -c %i {AUDIT}")
    host.check_output("logrotate --force /etc/logrotate.d/vault")
    root.ask("GET", "sys/mounts")
    assert host.check_output(f"stat -c %i {AUDIT}") != before
    assert '"path":"sys/mounts"' in host.file(AUDIT).content_string
    assert root.ask("GET", "sys/seal-status")["sealed"] is False  # a reload, no restart


def test_what_opens_it_is_on_this_computer_alone(host: Host, keys: vault.Keys) -> None:
    assert KEYS.stat().st_mode & 0o777 == 0o600
    assert KEYS_DIR.stat().st_mode & 0o777 == 0o700
    assert (KEYS_DIR / "ca.key").stat().st_mode & 0o777 == 0o600
    assert (KEYS_DIR / "vault-1.key").stat().st_mode & 0o777 == 0o600
    told = {
        "files": "find / -xdev -type f -mmin -120 -size -2000k -exec cat {} + 2>/dev/null",
        "the journal": "journalctl --no-pager -o cat",
        "processes": "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null",
    }
    for where, command in told.items():
        said = host.run(command).stdout_bytes.decode(errors="replace")
        assert said
        assert not [key for key in (keys.root_token, *keys.unseal) if key in said], where


def test_nobody_else_reads_its_files(host: Host) -> None:
    listed = host.check_output(
        "stat -c '%a %U %G' /etc/vault.d /etc/vault.d/tls.key /etc/vault.d/vault.hcl /var/lib/vault"
    )
    assert listed.splitlines() == ["750 root vault", "640 root vault", "640 root vault", "700 vault vault"]
    limits = host.check_output(
        "systemctl show --property LimitCORE --property MemorySwapMax --property NoNewPrivileges vault"
    )
    assert set(limits.splitlines()) == {"LimitCORE=0", "MemorySwapMax=0", "NoNewPrivileges=yes"}


def test_who_does_not_speak_does_not_keep_others_from_it(root: vault.Vault) -> None:
    silent = [lab.current().connect(ADDRESS, 8200, timeout=30) for _ in range(20)]
    try:
        assert root.ask("GET", "sys/mounts")["data"]
    finally:
        for connection in silent:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
