"""Certificates by the provider `file`, and the certificate expressions for `vault agent`."""

import ipaddress
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from voip_stack import settings
from voip_stack.errors import VoipError
from voip_stack.secrets import certificates, vault
from voip_stack.secrets.vault_provider import VaultProvider

NAME, DOMAIN, ADDRESS = "sip-1.voip.local", "sip.local", "192.0.2.10"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Their directory; it does not exist yet."""
    monkeypatch.setenv("VOIP_SECRETS", "file")
    monkeypatch.setenv("VOIP_SECRETS_DIR", str(tmp_path / "secrets"))
    settings.load.cache_clear()
    yield tmp_path / "secrets" / "certificates"
    settings.load.cache_clear()


def test_it_is_of_its_names_and_of_a_ca_that_stays(directory: Path) -> None:
    made = certificates.get(NAME, [DOMAIN], [ADDRESS])
    there, ca = x509.load_pem_x509_certificates(made.encode())
    there.verify_directly_issued_by(ca)
    assert ca == x509.load_pem_x509_certificate(certificates.authority().encode())
    names = there.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME, DOMAIN]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(ADDRESS)]
    key = load_pem_private_key(made.encode(), password=None)
    assert key.public_key() == there.public_key()
    assert certificates.get(NAME, [DOMAIN], [ADDRESS]) == made
    assert {file.stat().st_mode & 0o777 for file in directory.glob("*.[pk]e*")} == {0o600}
    left = certificates.ends()[NAME] - datetime.now(UTC)
    assert timedelta(hours=2159) < left < timedelta(hours=2161)


@pytest.mark.usefixtures("directory")
def test_another_name_or_another_ca_makes_another() -> None:
    made = certificates.get(NAME, [DOMAIN])
    other = certificates.get(NAME, [DOMAIN], [ADDRESS])
    assert other != made
    (certificates.directory() / "ca.key").unlink()
    assert certificates.get(NAME, [DOMAIN], [ADDRESS]) != other


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize(("days", "same"), [(59, True), (61, False)])
def test_it_is_made_anew_at_two_thirds_of_its_life(monkeypatch: pytest.MonkeyPatch, days: int, same: bool) -> None:
    made = certificates.get(NAME)

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            assert tz is UTC
            return datetime.now(UTC) + timedelta(days=days)

    monkeypatch.setattr(certificates, "datetime", Later)
    assert (certificates.get(NAME) == made) == same


@pytest.mark.usefixtures("directory")
def test_a_file_that_holds_none_is_named() -> None:
    certificates.get(NAME)
    (certificates.directory() / f"{NAME}.pem").write_text("mine\n")
    with pytest.raises(VoipError, match=rf"{NAME}\.pem holds no certificate"):
        certificates.get(NAME)


def test_the_agent_asks_for_the_same_names() -> None:
    assert VaultProvider().certificate("kamailio-role", NAME, [DOMAIN], [ADDRESS]) == (
        "{{ with pkiCert `pki_int/issue/kamailio-role` `common_name=sip-1.voip.local` `alt_names=sip.local`"
        " `ip_sans=192.0.2.10` `ttl=2160h` }}{{ .Key }}\n{{ .Cert }}\n{{ .CA }}{{ end }}"
    )


@pytest.mark.usefixtures("directory")
def test_the_newest_of_our_machines_and_the_cas_are_listed_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(certificates, "_LIFE", timedelta(hours=9))
        first, other = certificates.get(NAME), certificates.get("theirs.example.com")
    (certificates.directory() / f"{NAME}.pem").unlink()
    second, ca = certificates.get(NAME), certificates.authority()
    kept = {"pki/cert/ca": ca, "pki_int/cert/2": second, "pki_int/cert/1": first, "pki_int/cert/3": other}

    class Server:
        def find(self, path: str) -> dict[str, Any] | None:
            if path == "pki_int/certs?list=true":
                return {"data": {"keys": ["2", "1", "3"]}}
            return {"data": {"certificate": kept[path]}} if path in kept else None

    monkeypatch.setattr(vault, "current", Server)
    found = VaultProvider().ends()
    assert set(found) == {NAME, "voip-stack CA of this computer"}
    assert found[NAME] == x509.load_pem_x509_certificate(second.encode()).not_valid_after_utc
