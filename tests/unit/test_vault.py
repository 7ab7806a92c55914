"""Messages about a Vault that is away, sealed, or another; requests to one that answers."""

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from voip_stack import inventory, lab
from voip_stack.secrets import vault
from voip_stack.secrets.vault import Keys, Vault, VaultError

Answers = dict[str, tuple[int, Any]]


class _Lab:
    """Loopback."""

    def connect(self, address: str, port: int, timeout: float) -> socket.socket:
        return socket.create_connection((address, port), timeout)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answers], Vault]]:
    """server(answers): a Vault that answers "METHOD path" with (status, JSON or text)."""
    monkeypatch.setattr(lab, "current", _Lab)
    running: list[http.server.HTTPServer] = []

    def start(answers: Answers) -> Vault:
        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, body = answers[f"{self.command} {self.path.removeprefix('/v1/')}"]
                self.send_response(status)
                self.end_headers()
                self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

            do_GET = do_PUT = do_POST = answer  # noqa: N815  # http.server's names

            def log_message(self, *_: Any) -> None:
                """Log nothing."""

        running.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[0].serve_forever, daemon=True).start()
        return Vault("infra-1", "127.0.0.1", running[0].server_port, token="s.token")

    yield start
    for each in running:
        each.shutdown()
        each.server_close()


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    file = tmp_path / "infra-1.json"
    file.write_text(json.dumps({"unseal_keys_b64": ["one", "two"], "root_token": "s.root"}))
    return Keys.read(file)


@pytest.mark.parametrize(
    ("status", "body", "said", "hint"),
    [
        (503, {"errors": ["Vault is sealed"]}, "is sealed", "./voip vms.start infra-1"),
        (
            403,
            {"errors": ["1 error occurred:\n\t* permission denied\n\n"]},
            "refuses this token at",
            "the right one",
        ),
        (400, {"errors": ["no handler"]}, "secret/data/kamailio: no handler", ""),
        (200, "<html>", "does not answer as Vault does", "another server"),
        (500, {}, "HTTP 500", ""),
    ],
)
def test_a_refusal_says_where_and_what_next(
    server: Callable[[Answers], Vault], status: int, body: Any, said: str, hint: str
) -> None:
    there = server({"GET secret/data/kamailio": (status, body)})
    with pytest.raises(VaultError) as caught:
        there.kv("kamailio")
    assert f"Vault on infra-1 (127.0.0.1:{there.port})" in caught.value.message
    assert said in caught.value.message
    assert hint in caught.value.hint
    assert "s.token" not in f"{caught.value.message}{caught.value.hint}"


def test_nothing_there_is_no_error(server: Callable[[Answers], Vault]) -> None:
    assert server({"GET secret/data/kamailio": (404, {"errors": []})}).kv("kamailio") == {}


@pytest.mark.usefixtures("server")
def test_a_vault_that_is_away_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(VaultError, match=f"Vault on infra-1 .127.0.0.1:{port}. can't be reached: .*refused"):
            Vault("infra-1", "127.0.0.1", port).kv("kamailio")


def test_it_is_unsealed_by_the_first_key_that_does(server: Callable[[Answers], Vault], keys: Keys) -> None:
    sealed = {"sealed": True, "initialized": True}
    answers: Answers = {
        "GET sys/seal-status": (200, sealed),
        "PUT sys/unseal": (200, {"sealed": False}),
        "GET sys/health": (200, {}),
    }
    assert server(answers).unseal(keys, 0) is True


@pytest.mark.parametrize("state", [{"sealed": False, "initialized": True}, {"sealed": True, "initialized": False}])
def test_there_may_be_nothing_to_unseal(server: Callable[[Answers], Vault], keys: Keys, state: Any) -> None:
    answers: Answers = {"GET sys/seal-status": (200, state), "GET sys/health": (200, {})}
    assert server(answers).unseal(keys, 0) is False


def test_unsealed_is_when_it_serves(server: Callable[[Answers], Vault], keys: Keys) -> None:
    state = {"sealed": False, "initialized": True}
    waiting = {"errors": ["local node not active but active cluster node not found"]}
    with pytest.raises(VaultError, match="node not active"):
        server({"GET sys/seal-status": (200, state), "GET sys/health": (500, waiting)}).unseal(keys, 0)


@pytest.mark.parametrize("answer", [(200, {"sealed": True}), (400, {"errors": ["invalid key"]}), (500, {"errors": []})])
def test_keys_of_another_vault_are_named(server: Callable[[Answers], Vault], keys: Keys, answer: Any) -> None:
    there = server({"GET sys/seal-status": (200, {"sealed": True, "initialized": True}), "PUT sys/unseal": answer})
    with pytest.raises(VaultError, match=f"{keys.file} do not unseal Vault on infra-1"):
        there.unseal(keys, 0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"root_token": 1}'])
def test_a_broken_file_of_keys_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(VaultError, match="keys.json does not hold Vault's keys"):
        Keys.read(tmp_path / "keys.json")
    with pytest.raises(VaultError, match="are missing"):
        Keys.read(tmp_path / "none.json")


def test_after_a_start_what_keeps_a_vault_shut_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def unseal(machine: inventory.Machine, patience: float) -> bool:
        assert patience
        if told:
            raise VaultError(f"Vault on {machine.name} can't be reached", "wait")
        return True

    monkeypatch.setattr(vault, "unseal_machine", unseal)
    for _ in range(2):
        vault.reopen(inventory.load().machine("infra-1"), lambda _name, what: told.append(what))
    assert told == ["its Vault is unsealed", "Vault on infra-1 can't be reached: wait"]


def test_a_machine_without_keys_has_nothing_to_unseal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "keys_dir", lambda: tmp_path)
    assert vault.unseal_machine(inventory.load().machine("infra-1")) is False
