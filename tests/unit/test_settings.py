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
    ],
)
def test_a_bad_value_is_named_with_its_line(line: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.parse(f"\n{line}\n", {})
    assert ".env line 2" in caught.value.message
    assert line in caught.value.message


def test_the_environment_wins_over_the_file() -> None:
    chosen = settings.parse("VOIP_ACCELERATOR=kvm\n", {"VOIP_ACCELERATOR": "tcg", "HOME": "/nowhere"})
    assert chosen.accelerator == "tcg"


def test_a_mistake_in_the_environment_says_so() -> None:
    with pytest.raises(SettingsError, match="the environment: VOIP_LAB=moon"):
        settings.parse("", {"VOIP_LAB": "moon"})


def test_settings_survive_the_way_through_the_environment() -> None:
    chosen = settings.parse("VOIP_ACCELERATOR=tcg\nVOIP_MITOGEN=no\nVOIP_CACHE_DIR=/tmp/cache\n", {})
    assert settings.parse("", chosen.environment()) == chosen


def test_the_example_names_every_key_and_is_valid() -> None:
    text = (REPOSITORY / ".env.example").read_text()
    lines = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#VOIP_")]
    chosen = settings.parse("\n".join(lines), {})
    assert {line.split("=")[0] for line in lines} == set(chosen.environment())
    assert chosen.cache_dir == Path("/var/cache/voip-stack")
