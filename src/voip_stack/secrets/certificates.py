"""Certificates of daemons, from this computer's own CA: the provider `file`."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from voip_stack import files, inventory, settings
from voip_stack.errors import VoipError
from voip_stack.secrets.store import CERTIFICATE_HOURS

_LIFE = timedelta(hours=CERTIFICATE_HOURS)
_CA_LIFE = timedelta(days=3650)


def directory() -> Path:
    """The directory of ca.pem, ca.key, and one file per name."""
    return settings.load().secrets_dir / "certificates"


def get(name: str, others: Sequence[str] = (), addresses: Sequence[str] = ()) -> str:
    """PEM: the key, the certificate for `name`, `others` and `addresses`, and the CA's certificate.

    The certificate is renewed after two thirds of its life, or when its names change; RFC 5922 defines the names of a
    SIP server's certificate.

    Raises VoipError.
    """
    file = directory() / f"{name}.pem"
    with _alone():
        alternatives = x509.SubjectAlternativeName(
            [
                *(x509.DNSName(n) for n in (name, *others)),
                *(x509.IPAddress(ipaddress.ip_address(a)) for a in addresses),
            ]
        )
        ca, ca_key = _ca()
        if not file.exists() or not _good(file, ca, alternatives):
            key = ec.generate_private_key(ec.SECP256R1())
            made = (
                _builder(name, _LIFE)
                .issuer_name(ca.subject)
                .public_key(key.public_key())
                .add_extension(alternatives, critical=False)
                .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
                .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
                .sign(ca_key, hashes.SHA256())
            )
            files.write(file, _pem(key) + _pem(made) + _pem(ca))
        return file.read_text().strip()


def authority() -> str:
    """PEM of the CA. Raises VoipError."""
    with _alone():
        return _pem(_ca()[0])


def ends() -> dict[str, datetime]:
    """The expiry of our machines' certificates and of the CA, by common name. Raises VoipError."""
    stack = inventory.load()
    names = ["ca", *(f"{machine}.{stack.domain}" for machine in stack.machines)]
    there = (file for name in names if (file := directory() / f"{name}.pem").exists())
    return {_name(made): made.not_valid_after_utc for made in map(_read, there)}


def described(pem: str) -> tuple[str, datetime]:
    """The common name and the expiry of a certificate."""
    made = x509.load_pem_x509_certificate(pem.encode())
    return _name(made), made.not_valid_after_utc


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Lock the CA and its certificates: Ansible asks for each machine in a separate process."""
    directory().mkdir(parents=True, exist_ok=True, mode=0o700)
    with files.locked(directory() / ".lock"):
        yield


def _name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _read(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except ValueError:
        raise VoipError(f"{file} holds no certificate", f"rm {file}; ./voip provision makes another") from None


def _good(file: Path, ca: x509.Certificate, alternatives: x509.SubjectAlternativeName) -> bool:
    there = _read(file)
    left = there.not_valid_after_utc - datetime.now(UTC)
    if left <= _LIFE / 3 or _pem(ca) not in file.read_text():
        return False
    return there.extensions.get_extension_for_class(x509.SubjectAlternativeName).value == alternatives


def _ca() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The CA, made when it is missing or about to expire."""
    file, key_file = directory() / "ca.pem", directory() / "ca.key"
    if file.exists() and key_file.exists():
        ca = _read(file)
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        if isinstance(key, ec.EllipticCurvePrivateKey) and ca.not_valid_after_utc - datetime.now(UTC) > _LIFE:
            return ca, key
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder("voip-stack CA of this computer", _CA_LIFE)
    ca = (
        builder.issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "voip-stack CA of this computer")]))
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    files.write(key_file, _pem(key))
    files.write(file, _pem(ca))
    return ca, key


def _builder(name: str, life: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # a machine's clock may be behind
        .not_valid_after(now + life)
    )


def _pem(what: x509.Certificate | ec.EllipticCurvePrivateKey) -> str:
    if isinstance(what, x509.Certificate):
        return what.public_bytes(serialization.Encoding.PEM).decode()
    form = serialization.PrivateFormat.PKCS8
    return what.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
