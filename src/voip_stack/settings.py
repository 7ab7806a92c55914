"""Settings: `.env` in the repository, overruled by the environment. Every key is checked; nothing is guessed."""

from __future__ import annotations

import difflib
import functools
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from platformdirs import user_cache_path, user_config_path, user_data_path

from voip_stack import paths
from voip_stack.errors import SettingsError

PREFIX = "VOIP_"


@dataclass(frozen=True)
class Settings:
    """What the user chose. The key of a field in `.env` is its name in capitals after VOIP_."""

    cache_dir: Path
    secrets_dir: Path
    devstack_token_file: Path  # what a devstack-core lets in with all rights
    accelerator: str = "auto"  # auto, kvm, hvf, tcg
    lab: str = "auto"  # auto, namespace, libvirt, vmnet
    libvirt_uri: str = "qemu:///system"  # of a libvirtd that already runs
    external_bridge: str = ""  # a bridge of the computer's LAN in place of the external network
    secrets: str = "vault"  # who keeps them: vault, file
    infra: str = "embedded"  # who gives PostgreSQL, RabbitMQ and Vault: infra-1 (embedded), or the user's devstack
    devstack_address: str = ""  # where machines and this computer reach a devstack-core; empty: this computer
    devstack_bind: bool = False  # its Vault sees the machines' own addresses, and binds logins to them
    sip_domain: str = "sip.local"  # of subscribers, and their digest realm
    rtp_port_min: int = 10000  # of RTPEngine, towards phones and PBX, and of Asterisk
    rtp_port_max: int = 20000
    advertised_address: str = ""  # what phones are told in place of the external addresses (behind NAT)
    debian_mirror: str = ""  # empty: the one that mmdebstrap knows
    apt_ignore_expired: bool = False  # accept a package index whose date has passed
    extra_packages: Path | None = None  # the user's own .debs; None: there are none
    package_proxy_port: int = 3143
    mitogen: bool = True
    boot_timeout: int = 0  # seconds for a machine to be ready; 0: by accelerator
    slowness: float = 0.0  # how many times slower than a fast computer time-outs are to expect this one; 0: measured

    def environment(self) -> dict[str, str]:
        """The settings as environment variables, for Ansible."""
        texts = {True: "yes", False: "no", None: ""}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            f"{PREFIX}{k.upper()}": texts[v] if v is None or isinstance(v, bool) else str(v) for k, v in values.items()
        }


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text

    return parse


def _path(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _path_or_none(text: str) -> Path | None:
    return _path(text) if text else None


def _address(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text)) if text else ""
    except ValueError:
        raise ValueError("must be an IPv4 address") from None


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise ValueError("must be a port from 1 to 65535")
    return int(text)


def _proxy_port(text: str) -> int:
    port = _port(text)
    if port > 32767:
        raise ValueError("must be at most 32767: above, the kernel gives ports to anybody's outgoing connections")
    return port


def _rtp_port(text: str) -> int:
    port = _port(text)
    if port < 1024:
        raise ValueError("must be at least 1024: below, ports are root's")
    return port


def _seconds(text: str) -> int:
    if not text.isdigit():
        raise ValueError("must be a whole number of seconds")
    return int(text)


def _factor(text: str) -> float:
    if not re.fullmatch(r"\d{1,3}(\.\d+)?", text):
        raise ValueError("must be a number, such as 4 or 2.5")
    return float(text)


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("must be yes or no")
    return text == "yes"


def _url(text: str) -> str:
    if text and not re.fullmatch(r"https?://\S+", text):
        raise ValueError("must be an http:// or https:// address")
    return text


def _domain(text: str) -> str:
    """A host name (RFC 1123, 2.1) in small letters; Kamailio's tables have 64 characters for it."""
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    if not re.fullmatch(rf"(?=.{{1,64}}$)({label}\.)*(?![0-9.]+$){label}", text.lower()):
        raise ValueError("must be a host name of at most 64 characters, such as sip.local")
    return text.lower()


def _interface(text: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", text):
        raise ValueError("must be the name of a network interface")
    return text


_PARSERS: dict[str, Callable[[str], object]] = {
    "cache_dir": _path,
    "secrets_dir": _path,
    "accelerator": _choice("auto", "kvm", "hvf", "tcg"),
    "lab": _choice("auto", "namespace", "libvirt", "vmnet"),
    "libvirt_uri": str,
    "external_bridge": _interface,
    "secrets": _choice("vault", "file"),
    "infra": _choice("embedded", "devstack"),
    "devstack_address": _address,
    "devstack_token_file": _path,
    "devstack_bind": _yes,
    "sip_domain": _domain,
    "rtp_port_min": _rtp_port,
    "rtp_port_max": _rtp_port,
    "advertised_address": _address,
    "debian_mirror": _url,
    "apt_ignore_expired": _yes,
    "extra_packages": _path_or_none,
    "package_proxy_port": _proxy_port,
    "mitogen": _yes,
    "boot_timeout": _seconds,
    "slowness": _factor,
}


# Without VOIP_, too, in .env; in an environment these may be anybody's.
_ALIASES = ("INFRA", "SIP_DOMAIN", "RTP_PORT_MIN", "RTP_PORT_MAX")

# Keys of the developer guide that say nothing here, and what says it.
_DEVSTACK = "services are on infra-1, or with VOIP_INFRA=devstack at VOIP_DEVSTACK_ADDRESS, at a devstack-core's ports"
_LOGIN = "each machine gets a login of its own (docs/secrets.md)"
_INVENTORY = "ansible/inventory/development.yml has the machines' addresses"
_ELSEWHERE = {
    "VAULT_ADDR": _DEVSTACK,
    "VAULT_ROLE_ID": _LOGIN,
    "VAULT_SECRET_ID": _LOGIN,
    "POSTGRES_HOST": _DEVSTACK,
    "POSTGRES_PORT": _DEVSTACK,
    "REDIS_HOST": _DEVSTACK,
    "REDIS_PORT": _DEVSTACK,
    "SIP_PROXY_HOST": _INVENTORY,
    "RTPENGINE_HOST": _INVENTORY,
    "RTPENGINE_PORT": "ansible/roles/rtpengine/component.yml has its ports",
}


def parse(env_file: str, environment: Mapping[str, str], name: str = ".env") -> Settings:
    """Settings from the text of a `.env` file and an environment, which wins.

    Raises SettingsError, naming the line, the key and what it should be.
    """
    extra = user_data_path("voip-stack") / "packages"
    values: dict[str, object] = {
        "cache_dir": user_cache_path("voip-stack"),
        "secrets_dir": user_config_path("voip-stack") / "secrets",
        "devstack_token_file": Path("~/.config/vault/root-token").expanduser(),
        # Decided once, and passed to whoever builds for us as root, whose data directory is another.
        "extra_packages": extra if extra.is_dir() else None,
    }
    keys = [f"{PREFIX}{f.upper()}" for f in _PARSERS]
    found: list[tuple[str, str, str]] = []
    ends = ("", "", "")  # the last that said where RTP's ports begin or end
    for number, line in enumerate(env_file.splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key, equals, value = text.partition("=")
        where = f"{name} line {number}"
        if not equals:
            raise SettingsError(f"{where}: {text!r} is not KEY=VALUE", "see .env.example")
        found.append((where, key.strip(), value.strip().strip("\"'")))
    if idle := [f"{where}: {key}: {_ELSEWHERE[key]}" for where, key, _ in found if key in _ELSEWHERE]:
        raise SettingsError("\n".join(idle), "remove what says nothing here")
    found += [("the environment", k, v) for k, v in sorted(environment.items()) if k in keys]
    for where, key, value in found:
        if key not in keys and key not in _ALIASES:
            close = difflib.get_close_matches(key, keys, 1)
            hint = f"did you mean {close[0]}?" if close else "the keys are in .env.example"
            raise SettingsError(f"{where}: unknown key {key}", hint)
        field = key.removeprefix(PREFIX).lower()
        try:
            values[field] = _PARSERS[field](value)
        except ValueError as error:
            raise SettingsError(f"{where}: {key}={value}: {error}", "see .env.example") from None
        if field.startswith("rtp_port"):
            ends = (where, key, value)
    conf = Settings(**values)  # type: ignore[arg-type]
    if conf.rtp_port_min >= conf.rtp_port_max:
        where, key, value = ends
        raise SettingsError(
            f"{where}: {key}={value}: RTP would have the ports {conf.rtp_port_min} to {conf.rtp_port_max}",
            "VOIP_RTP_PORT_MIN must be below VOIP_RTP_PORT_MAX",
        )
    return conf


@functools.cache
def load() -> Settings:
    """The settings of this run. Raises SettingsError."""
    env_file = paths.REPOSITORY / ".env"
    text = env_file.read_text() if env_file.exists() else ""
    return parse(text, os.environ)
