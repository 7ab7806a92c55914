"""The inputs of a proof, and the message for a damaged proven.yml."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from voip_stack import packages, paths
from voip_stack.errors import VoipError
from voip_stack.roletest import proven, runner
from voip_stack.roletest.proven import Proof

GOOD = Proof("0123456789abcdef", "2026-11-30T09:30Z", 12, 120, "tcg", "redis-server 5:8.0.2-3")
LINE = "redis: {digest: 0123456789abcdef, date: 2026-11-30T09:30Z, tests: 12, seconds: 120, accelerator: tcg}"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of all possible inputs of a digest."""
    for part in ("ansible", "molecule", ".config", "libvirt", "requirements", "src", "docs"):
        shutil.copytree(paths.REPOSITORY / part, tmp_path / part, symlinks=True)
    shutil.copy(paths.REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def stale_after(repository: Path, file: str, old: str, new: str) -> set[str]:
    """The scenarios whose digest changes when `old` in `file` becomes `new`."""
    before = {name: proven.digest_of(name, repository) for name in runner.scenarios()}
    text = (repository / file).read_text()
    assert old in text
    (repository / file).write_text(text.replace(old, new))
    return {name for name, digest in before.items() if proven.digest_of(name, repository) != digest}


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("ansible/roles/kamailio/templates/kamailio.cfg.j2", "route", "rout", {"kamailio"}),
        ("ansible/roles/redis/tasks/main.yml", "name:", "name :", {"redis", "rtpengine"}),  # also as a peer
        ("ansible/roles/vault_client/tasks/main.yml", "name:", "name :", {
            "vault_client", "kamailio", "asterisk", "cdr", "rtpengine"}),  # included by these
        ("molecule/common/hosts.yml", "20", "21", {"common"}),
        ("ansible/roles/redis/README.md", "redis", "Redis", set()),
        ("molecule/redis/mutants.yml", "name", "nam", set()),
        ("src/voip_stack/vms/lifecycle.py", "import", "import ", {"common", "vault_server"}),  # the small ones, for all
        ("src/voip_stack/cdr.py", "import", "import ", set()),
        ("ansible/inventory/group_vars/all/infra.yml", "infra_name:", "infra_name: # ", {
            "asterisk", "cdr", "rtpengine", "kamailio", "vault_client"}),  # those that name it, or what names it
        ("ansible/roles/redis/component.yml", "6379", "6380", {
            "redis", "rtpengine", "kamailio", "network_config"}),  # who listens, who connects, and the firewall of both
        ("ansible/roles/redis/component.yml", "away: a", "away: no", set()),
        ("ansible/roles/cdr/component.yml", "connections: 5", "connections: 6", {
            "postgresql", "asterisk", "cdr", "kamailio"}),  # who makes its database, also where it is a peer
        ("docs/cdr-event.schema.json", "{", "{ ", {"cdr", "postgresql"}),  # which their tests read
        ("ansible/inventory/development.yml", "2048", "3072", set()),
    ],
)  # fmt: skip
def test_what_makes_a_scenario_stale(repository: Path, file: str, old: str, new: str, stale: set[str]) -> None:
    assert stale_after(repository, file, old, new) == stale


@pytest.mark.parametrize(
    "file",
    [
        "molecule/conftest.py",
        "molecule/shared/converge.yml",
        ".config/molecule/config.yml",
        "ansible/tasks/packages.yml",
    ],
)
def test_what_all_share_makes_all_stale(repository: Path, file: str) -> None:
    text = (repository / file).read_text()
    assert stale_after(repository, file, text, text + "\n# changed\n") == set(runner.scenarios())


def test_another_version_in_the_lock_makes_all_stale_and_another_hash_none(repository: Path) -> None:
    assert stale_after(repository, "requirements/dev.txt", "--hash=sha256:0", "--hash=sha256:1") == set()
    assert stale_after(repository, "requirements/dev.txt", "ansible-core==", "ansible-core==9.") == set(
        runner.scenarios()
    )


def test_a_recipe_counts_for_who_installs_its_package_on_every_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    names = runner.scenarios()
    before = {name: proven.digest_of(name) for name in names}
    monkeypatch.setattr(packages, "decided", lambda name: f"another {name}")
    changed = {name for name in names if proven.digest_of(name) != before[name]}
    assert changed == {"asterisk", "cdr", "kamailio", "rtpengine", "vault_client", "vault_server"}


def test_a_proof_that_was_written_is_read_again_and_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "proven.yml"
    proven.record("redis", GOOD, file)
    proven.record("common", Proof("f" * 16, "2026-11-29T10:00Z", 3, 60, "kvm"), file)
    assert proven.load(file)["redis"] == GOOD
    assert list(proven.load(file)) == ["common", "redis"]
    assert str(GOOD) == "2026-11-30, 12 tests, redis-server 5:8.0.2-3"
    assert proven.stale(["redis"], proven.load(file)) == ["redis"]


def test_a_digest_of_digits_alone_stays_text(tmp_path: Path) -> None:
    proof = Proof("1234567890123456", "2026-11-29T10:00Z", 3, 60, "kvm")
    proven.record("common", proof, tmp_path / "proven.yml")
    assert proven.load(tmp_path / "proven.yml") == {"common": proof}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{LINE}\n<<<<<<< HEAD\n", "line 3: is no line of the runner's"),
        (f"{LINE}\n{LINE}\n", "line 3: redis stands there twice"),
        (LINE.replace("redis", "radis"), "line 2: there is no scenario radis"),
        (LINE.replace("tests", "test"), "unknown: test, missing: tests"),
        (LINE.replace("0123456789abcdef", "abc"), "digest: 'abc' is none"),
        (LINE.replace("2026-11-30T09:30Z", "yesterday"), "date: 'yesterday' is none"),
        (LINE.replace("2026-11-30", "2999-11-30"), "is still to come"),
        (LINE.replace("tests: 12", "tests: 0"), "tests: 0 is no count"),
        (LINE.replace("seconds: 120", "seconds: two"), "seconds: 'two' is no count"),
        (LINE.replace("{digest: 0123456789abcdef", "{digest: [0"), "line 2: "),
    ],
)
def test_a_damaged_file_is_refused_by_line_and_not_written_over(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "proven.yml"
    file.write_text(f"---\n{text}")
    with pytest.raises(VoipError) as caught:
        proven.record("common", GOOD, file)
    assert said in caught.value.message
    assert file.read_text() == f"---\n{text}"


def test_the_file_of_this_checkout_is_good() -> None:
    assert set(proven.load()) <= set(runner.scenarios())


def test_stale_ones_come_first_then_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "digest_of", lambda name: "0" * 16 if name == "cdr" else GOOD.digest)
    dates = {"redis": "2026-11-28", "common": "2026-11-30", "cdr": "2026-11-30", "rabbitmq": "2026-11-29"}
    proofs = {n: Proof(GOOD.digest, f"{d}T10:00Z", 1, 1, "tcg") for n, d in dates.items()}
    names = ["asterisk", "cdr", "common", "redis", "rabbitmq"]
    assert runner.by_evidence(names, proofs) == ["asterisk", "cdr", "common", "rabbitmq", "redis"]
