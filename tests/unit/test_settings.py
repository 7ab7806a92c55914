from pathlib import Path

import pytest

from voip_stack import settings
from voip_stack.errors import SettingsError
from voip_stack.paths import REPOSITORY


def test_an_unknown_key_is_named_with_its_line_and_the_likely_one() -> None:
    with pytest.raises(SettingsError) as caught:
        settings.parse("# comment\nVOIP_ACELERATOR=kvm\n", {})
    assert ".env line 2" in caught.value.message
    assert "VOIP_ACELERATOR" in caught.value.message
    assert "VOIP_ACCELERATOR" in caught.value.hint


@pytest.mark.parametrize(
    "line",
    [
        "VOIP_PACKAGE_PROXY_PORT=70000",
        "VOIP_PACKAGE_PROXY_PORT=0",
        "VOIP_PACKAGE_PROXY_PORT=http",
        "VOIP_PACKAGE_PROXY_PORT=40000",
        "VOIP_ADVERTISED_ADDRESS=300.1.1.1",
        "VOIP_ACCELERATOR=xen",
        "VOIP_CACHE_DIR=relative/path",
        "VOIP_MITOGEN=maybe",
        "VOIP_EXTERNAL_BRIDGE=not an interface",
        "VOIP_LAB",
        "RTP_PORT_MIN=many",
        "RTP_PORT_MIN=1023",
        "RTP_PORT_MIN=20000",
        "RTP_PORT_MAX=65536",
        "RTP_PORT_MAX=9999",
        "SIP_DOMAIN=-sip.local",
        "SIP_DOMAIN=sip..local",
        "SIP_DOMAIN=sip_1.local",
        "SIP_DOMAIN=192.168.64.10",
        "SIP_DOMAIN=",
        f"SIP_DOMAIN={'a' * 59}.local",
    ],
)
def test_a_bad_value_is_named_with_its_line(line: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.parse(f"\n{line}\n", {})
    assert ".env line 2" in caught.value.message
    assert line in caught.value.message


def test_the_guides_keys_count_in_our_file_only() -> None:
    text = "SIP_DOMAIN=Sip.Example.org\nRTP_PORT_MIN=30000\nRTP_PORT_MAX=30999\n"
    chosen = settings.parse(text, {})
    assert (chosen.sip_domain, chosen.rtp_port_min, chosen.rtp_port_max) == ("sip.example.org", 30000, 30999)
    anybodys = dict(line.split("=") for line in text.splitlines()) | {"VAULT_ADDR": "https://vault.example.org"}
    assert settings.parse("", anybodys) == settings.parse("", {})


def test_all_of_the_guides_keys_that_say_nothing_are_named_at_once_with_what_says_it() -> None:
    env = "VAULT_ROLE_ID=x\n\nPOSTGRES_PORT=5432\nSIP_PROXY_HOST=192.168.64.10\nRTPENGINE_PORT=2223"
    with pytest.raises(SettingsError) as caught:
        settings.parse(env, {})
    said = caught.value.message.splitlines()
    assert [line.partition(": ")[0] for line in said] == [f".env line {n}" for n in (1, 3, 4, 5)]
    for line, words in zip(
        said, ["VAULT_ROLE_ID", "VOIP_DEVSTACK_ADDRESS", "development.yml", "rtpengine"], strict=True
    ):
        assert words in line


def test_the_environment_wins_over_the_file() -> None:
    chosen = settings.parse("VOIP_ACCELERATOR=kvm\n", {"VOIP_ACCELERATOR": "tcg", "HOME": "/nowhere"})
    assert chosen.accelerator == "tcg"


def test_a_mistake_in_the_environment_says_so() -> None:
    with pytest.raises(SettingsError, match="the environment: VOIP_LAB=moon"):
        settings.parse("", {"VOIP_LAB": "moon"})


def test_settings_survive_the_way_through_the_environment() -> None:
    chosen = settings.parse("VOIP_ACCELERATOR=tcg\nVOIP_MITOGEN=no\nVOIP_CACHE_DIR=/tmp/cache\n", {})
    assert settings.parse("", chosen.environment()) == chosen


def test_without_extra_packages_there_are_none_for_root_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    of_user = settings.parse("", {})
    assert of_user.extra_packages is None
    default = tmp_path / "voip-stack" / "packages"
    default.mkdir(parents=True)  # as root's own may be there
    assert settings.parse("", of_user.environment()).extra_packages is None
    assert settings.parse("", {}).extra_packages == default
    with pytest.raises(SettingsError, match="VOIP_EXTRA_PACKAGES=debs: must be an absolute path"):
        settings.parse("", {"VOIP_EXTRA_PACKAGES": "debs"})


def test_the_example_names_every_key_and_is_valid() -> None:
    text = (REPOSITORY / ".env.example").read_text()
    lines = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#VOIP_")]
    chosen = settings.parse("\n".join(lines), {})
    assert {line.split("=")[0] for line in lines} == set(chosen.environment())
    assert chosen.cache_dir == Path("/var/cache/voip-stack")
