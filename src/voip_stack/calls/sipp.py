"""One run of SIPp as a phone: a scenario, its events, and its end."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from voip_stack import inventory, lab, settings
from voip_stack.calls import audio, tunnel
from voip_stack.calls.sip import Message, Traced, parse_trace
from voip_stack.deadline import Deadline
from voip_stack.errors import CallError, HostError
from voip_stack.inventory import Address
from voip_stack.lab.base import privileged

SCENARIOS = Path(__file__).with_name("scenarios")
_GRACE = 30  # seconds that SIPp gets besides the phases with a length that we choose
_SIP_PORT, _TLS_PORT, _TUNNEL_PORT = 5060, 5061, 15061
_DEFAULT_PATIENCE = 75.0  # longer than an INVITE may ring (60 s in the scenarios)


class Refused(CallError):  # noqa: N818  # it names an event; a test may expect it
    """The far end's final response is no success; `response` is that message, `status` its code."""

    def __init__(self, message: str, response: Message) -> None:
        super().__init__(message)
        self.response = response
        self.status = response.status or 0


class Leg:
    """A running scenario. Leave it as a context manager, or call finish() or stop(): then nothing of it is left.

    Events are the scenario's own log lines: registered, ringing, answered, held, resumed, cancelled, refused.
    """

    def __init__(
        self,
        who: str,
        scenario: str,
        goal: str,
        *,
        proxy: Address | str,
        address: Address | str,
        sip_port: int,
        media_port: int,
        transport: str = "udp",
        ca: str = "",
        inside: bool = False,
        fields: Sequence[str],
        traces: Path,
        keys: Mapping[str, object],
        phase: float = 0.0,
        talk: float = 0.0,
        tone_hz: int,
        lifetime: float,
        count: int = 1,
        at_once: int = 1,
        quiet: bool = False,
    ) -> None:
        """Start SIPp. `phase` and `talk` are the scenario's pauses and its talk (-d, -recv_timeout), in seconds.

        The scenario runs `count` times, `at_once` at a time, and each run logs its events. With TLS the proxy's
        certificate must be for the SIP domain and from `ca` (PEM).

        Raises HostError when SIPp is not installed, CallError when it does not start.
        """
        if not shutil.which("sipp"):
            raise HostError("sipp is missing", "./voip doctor --fix")
        self.who, self.scenario, self.goal, self.proxy = who, scenario, goal, str(proxy)
        traces.mkdir(parents=True, exist_ok=True)
        self.directory = Path(
            tempfile.mkdtemp(prefix=f"{time.strftime('%H%M%S')}-{who.replace(' ', '-')}-{scenario}-", dir=traces)
        )
        (self.directory / "tone.al").write_bytes(audio.tone(tone_hz))
        self._home = lab.current().inside if inside else lab.current().outside
        self._tunnel: subprocess.Popen[str] | None = None
        to = f"{proxy}:{_SIP_PORT}"
        if transport == "tls":
            (self.directory / "ca.pem").write_text(ca)
            self._open_tunnel(str(address))
            to = f"{address}:{_TUNNEL_PORT}"
        # Credentials are passed in a file, not as arguments: any user of the computer can read arguments.
        (self.directory / "fields.csv").write_text("SEQUENTIAL\n" + ";".join(fields) + "\n")
        argv = [
            "sipp",
            to,
            "-sf",
            str(SCENARIOS / f"{scenario}.xml"),
            "-inf",
            "fields.csv",
            "-m",
            str(count),
        ]
        argv += ["-l", str(at_once), "-r", str(at_once)] if count > 1 else []
        argv += [
            "-i",
            str(address),
            "-p",
            str(sip_port),
            "-mi",
            str(address),
            "-mp",
            str(media_port),
            "-aa",
            "-nostdin",
        ]
        argv += ["-trace_msg", "-message_file", "messages.log", "-trace_err", "-error_file", "errors.log"]
        argv += ["-trace_logs", "-log_file", "events.log", "-timeout", f"{int(lifetime + _GRACE)}", "-timeout_error"]
        argv += ["-d", str(int(phase * 1000))]
        argv += ["-recv_timeout", str(int(talk * 1000))] if talk else []
        argv += ["-set", "quiet", "1"] if quiet else []
        argv += [word for key, value in keys.items() for word in ("-key", key, str(value))]
        argv += ["-t", {"udp": "u1", "tcp": "t1", "tls": "t1"}[transport]]
        self._deadline = Deadline(lifetime + _GRACE + 5)
        self._local = (str(address), sip_port)
        with (self.directory / "screen.log").open("wb") as screen:
            self._process = subprocess.Popen(
                self._home(*argv),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _open_tunnel(self, address: str) -> None:
        """Tunnel SIPp's TCP to the proxy through TLS."""
        ends = [address, str(_TUNNEL_PORT), self.proxy, str(_TLS_PORT)]
        with (self.directory / "tunnel.log").open("w") as log:
            self._tunnel = subprocess.Popen(
                self._home(sys.executable, tunnel.__file__, *ends, settings.load().sip_domain, "ca.pem"),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        if not Deadline(10).until(lambda: tunnel.LISTENS in self._read("tunnel.log"), every=0.05):
            self._end(self._tunnel)
            raise CallError(f"{self.who}: no TLS tunnel", "", self._read("tunnel.log"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def returncode(self) -> int | None:
        """SIPp's exit code: 0 success, 1 a call failed, 97 and more errors (sipp -h). None while it runs."""
        return self._process.poll()

    @property
    def events(self) -> list[str]:
        return self._read("events.log").splitlines()

    @property
    def messages(self) -> list[Traced]:
        return parse_trace(self._read("messages.log"))

    @property
    def response(self) -> Message | None:
        """The last response to the scenario's main request: its final one, if any came."""
        if not self.messages:
            return None
        method = self.messages[0].message.method
        received = [m.message for m in self.messages if not m.sent and m.message.status is not None]
        return next((m for m in reversed(received) if m.method == method), None)

    def _read(self, name: str) -> str:
        path = self.directory / name
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, event: str, timeout: float = _DEFAULT_PATIENCE) -> None:
        """Return once the scenario has logged `event`.

        Raises Refused or CallError when the scenario ends without it, or after `timeout` seconds.
        """
        if not Deadline(timeout).until(lambda: event in self.events or self.returncode is not None, every=0.05):
            raise CallError(f"{self.who}: not {event} within {timeout:.0f} s", "", self._evidence())
        if event not in self.events:
            raise self._failure(event)

    def wait_until_listening(self, timeout: float = 10) -> None:
        """Return once SIPp has its SIP socket, so that a call can come. Raises CallError."""
        address, port = self._local
        needle = f"{bytes(reversed(Address(address).packed)).hex().upper()}:{port:04X}"

        def listens() -> bool:
            # Under sudo the process is a child in the phones' namespace: check there.
            shown = subprocess.run(
                self._home("cat", "/proc/net/udp"), capture_output=True, text=True, timeout=10, check=False
            )
            return needle in shown.stdout or self.returncode is not None

        if not Deadline(timeout).until(listens, every=0.05) or self.returncode is not None:
            raise self._failure("listening")

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the scenario's end, with any result. Raises CallError when it does not end."""
        try:
            self._process.wait(self._deadline.left if timeout is None else timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            raise CallError(f"{self.who}: {self.scenario} did not end in time", "", self._evidence()) from None
        self.stop()

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the scenario's end. Raises Refused or CallError when the scenario failed."""
        self.wait(timeout)
        if self.goal not in self.events or self.returncode != 0:
            raise self._failure(self.goal)

    def stop(self) -> None:
        """End SIPp if it still runs."""
        self._end(self._process)
        if self._tunnel:
            self._end(self._tunnel)
        # The only file that contains a password.
        (self.directory / "fields.csv").unlink(missing_ok=True)

    @staticmethod
    def _end(process: subprocess.Popen[Any]) -> None:
        if process.poll() is not None:
            return
        try:
            process.terminate()
        except PermissionError:  # it runs under sudo
            subprocess.run(privileged("kill", str(process.pid)), timeout=10, check=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        if process.poll() is None:
            process.kill()
            process.wait(5)

    def _failure(self, event: str) -> CallError:
        """The reason why the scenario did not reach `event`."""
        first = self.messages[0] if self.messages else None
        if first is None or not first.sent:
            what = "no INVITE came" if first is None and self.scenario.startswith("uas") else f"not {event}"
            return CallError(f"{self.who}: {what}", "", self._evidence())
        method, response = first.message.method, self.response
        if response is None or response.status is None:
            return CallError(f"{self.who} -> {self._far}: no answer to {method}", "", self._evidence())
        if response.status < 200:
            return CallError(
                f"{self.who} -> {self._far}: {method} got only {response.reason}, no final answer", "", self._evidence()
            )
        if response.status >= 300:
            return Refused(f"{self.who} -> {self._far}: {response.reason} to {method}", response)
        return CallError(f"{self.who}: {self.scenario} failed after {response.reason}", "", self._evidence())

    @property
    def _far(self) -> str:
        stack = inventory.load()
        return next(
            (m.name for m in stack.machines.values() if self.proxy in map(str, m.addresses.values())), self.proxy
        )

    def _evidence(self) -> str:
        """SIPp's errors and the end of its trace."""
        errors = [line[:200] for line in self._read("errors.log").splitlines()[-5:]]
        errors += [line[:200] for line in self._read("tunnel.log").splitlines() if line != tunnel.LISTENS][-2:]
        screen = [] if errors or self.messages else self._read("screen.log").splitlines()[-5:]
        flow = [f"  {'->' if m.sent else '<-'} {m.message.start_line}" for m in self.messages[-12:]]
        return "\n".join([f"--- {self.who}, {self.scenario} ({self.directory})", *flow, *errors, *screen])
