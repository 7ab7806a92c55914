"""Secrets in files, and their places in Vault."""

import concurrent.futures
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from voip_stack import inventory, secrets, settings
from voip_stack.errors import VoipError
from voip_stack.secrets import rotation, vault
from voip_stack.secrets.vault import Vault
from voip_stack.services import vault_setup


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of the provider `file`; it does not exist yet."""
    monkeypatch.setenv("VOIP_SECRETS", "file")
    monkeypatch.setenv("VOIP_SECRETS_DIR", str(tmp_path / "secrets"))
    settings.load.cache_clear()
    yield tmp_path / "secrets"
    settings.load.cache_clear()


def test_a_secret_is_made_once_for_its_owner_alone(directory: Path) -> None:
    made = secrets.get("asterisk_ami_secret")
    assert re.fullmatch(r"[A-Za-z0-9]{32}", made)
    assert secrets.get("asterisk_ami_secret") == made
    assert (directory / "asterisk_ami_secret").stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [f.name for f in directory.iterdir()] == ["asterisk_ami_secret"]


@pytest.mark.usefixtures("directory")
def test_who_asks_at_the_same_time_gets_the_same_secret() -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(secrets.get, ["asterisk_ami_secret"] * 64))) == 1


@pytest.mark.parametrize("value", ["it's", 'a"b', "a/b", "a b", "a{{b", ""])
def test_a_secret_that_would_need_quoting_is_refused(directory: Path, value: str) -> None:
    directory.mkdir()
    (directory / "asterisk_ami_secret").write_text(f"{value}\n")
    if " " in value:  # Ansible's own lookup appended this to the secret in its files
        assert secrets.get("asterisk_ami_secret") == value.split(maxsplit=1)[0]
        return
    wrong = "holds more than" if value else "is empty"
    with pytest.raises(VoipError, match=f"ami_secret in {directory}/asterisk_ami_secret {wrong}"):
        secrets.get("asterisk_ami_secret")


def test_an_unknown_secret_is_named() -> None:
    with pytest.raises(VoipError, match="no secret named 'asterisk_ami'"):
        secrets.reference("asterisk_ami")


def test_a_reference_needs_no_quoting_either() -> None:
    for name in secrets.catalogue():
        assert not set("\"'\\\n") & set(secrets.reference(name))


def test_a_class_reads_what_its_components_need_and_nothing_else() -> None:
    stack = inventory.load()
    for name, allowed in secrets.classes().items():
        roles = {c.name for c in stack.components.values() if allowed["group"] in c.groups}
        assert set(allowed["secrets"]) == {s.path for s in secrets.catalogue().values() if s.path in roles}
        paths_ = re.findall(
            r'^path "(.*)"',
            vault_setup.policy(name, "voip.local", "sip.local", {f"{name}-1": ["192.0.2.1"]}),
            re.MULTILINE,
        )
        assert [p for p in paths_ if p.startswith("secret/")] == [f"secret/data/{p}" for p in allowed["secrets"]]
        assert not [p for p in paths_ if "*" in p]


def test_a_machine_is_certified_as_itself_alone() -> None:
    machines = {"pbx-1": ["192.0.2.1"], "pbx-2": ["192.0.2.2", "192.0.2.3", "192.0.2.4"]}
    said = vault_setup.policy("pbx", "voip.local", "sip.local", machines)
    assert '"common_name" = ["pbx-1.voip.local", "pbx-2.voip.local"]' in said
    assert '"ip_sans" = ["", "192.0.2.3,192.0.2.4"]' in said
    assert "alt_names" not in said
    assert '"alt_names" = ["sip.local"]' in vault_setup.policy(
        "sip", "voip.local", "sip.local", {"sip-1": ["192.0.2.5"]}
    )
    assert "pki_int" not in vault_setup.policy(
        "pbx", "voip.local", "sip.local", {}
    )  # an empty list would allow everything


class _EmptyVault:
    """Empty; records all writes."""

    def __init__(self) -> None:
        self.written: dict[str, Any] = {}

    def kv(self, _path: str) -> dict[str, str]:
        return {}

    def find(self, _path: str) -> None:
        return None

    def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        if method == "GET":
            return {"data": {}}
        self.written[path] = body
        return {}


def test_proxies_alone_may_be_certified_as_the_sip_domain() -> None:
    empty = _EmptyVault()
    for _, work in vault_setup.ours(cast(Vault, empty), {}, "voip.local", "sip.local"):
        work()
    roles = {path.rpartition("/")[2]: body for path, body in empty.written.items() if "pki_int/roles/" in path}
    assert {name: (body["allowed_domains"], body["allow_bare_domains"]) for name, body in roles.items()} == {
        "kamailio-role": (["voip.local", "sip.local"], True),
        "asterisk-role": (["voip.local"], False),
    }


def test_the_age_of_what_files_keep_is_told(directory: Path) -> None:
    secrets.get("asterisk_ami_secret")
    told = {name: (place, age) for name, place, age in rotation.status()}
    assert told["asterisk_ami_secret"] == (str(directory / "asterisk_ami_secret"), "0 h 0 min old")
    assert told["asterisk_ari_password"][1] == "not made yet"


def test_ages_and_ends_of_what_vault_keeps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    soon = (datetime.now(UTC) + timedelta(days=29, hours=3, minutes=1)).isoformat().replace("+00:00", "123Z")
    old = (datetime.now(UTC) - timedelta(hours=5)).isoformat().replace("+00:00", "123Z")

    class Server:
        url = "https://192.0.2.1:8200"

        def find(self, path: str) -> dict[str, Any] | None:
            if path == "secret/metadata/asterisk":
                return {"data": {"updated_time": old}}
            return {"data": {"keys": ["a"]}} if "pbx-vm-role" in path else None

        def ask(self, _method: str, path: str, _body: object = None) -> dict[str, Any]:
            if path == "sys/seal-status":
                return {"version": "1.21.1", "sealed": False}
            return {"data": {"metadata": {"machine": "pbx-1"}, "expiration_time": soon}}

    monkeypatch.setattr(vault, "current", Server)
    monkeypatch.setenv("VOIP_SECRETS", "vault")
    settings.load.cache_clear()
    try:
        told = rotation.status()
    finally:
        monkeypatch.undo()
        settings.load.cache_clear()
    assert told[0] == ("Vault", "https://192.0.2.1:8200", "version 1.21.1, unsealed")
    assert ("asterisk_ami_secret", "secret/asterisk: ami_secret", "5 h 0 min old") in told
    assert ("postgresql_password_kamailio", "secret/kamailio: db_password", "not made yet") in told
    assert told[-1] == ("login of pbx-1", "AppRole pbx-vm-role", "ends in 29 d 3 h")
