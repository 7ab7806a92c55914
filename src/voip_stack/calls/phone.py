"""A phone outside: registers, calls, answers. SIPp does the signalling and the audio."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from voip_stack import inventory, settings
from voip_stack.calls.sipp import Leg
from voip_stack.errors import InventoryError
from voip_stack.inventory import Address

# Neither is the other's harmonic, both lie in the telephone band (300 to 3400 Hz), neither is a DTMF frequency.
TONES_HZ = (440, 1020, 1570)


def proxy_address(name: str = "") -> Address:
    """The address of the SIP proxy `name` on the external network; the first when empty. Raises InventoryError."""
    proxies = {m.name: m.external for m in inventory.load().group("sip_proxies") if m.external}
    if not proxies:
        raise InventoryError(
            "no machine of the group sip_proxies has an external_address",
            "add one in ansible/inventory/development.yml",
        )
    if name and name not in proxies:
        raise InventoryError(f"{name} is no SIP proxy that phones reach", f"name one of: {', '.join(proxies)}")
    return proxies[name or next(iter(proxies))]


def traces() -> Path:
    """The directory of traces, unless a run names another."""
    return settings.load().cache_dir / "logs" / "calls"


@dataclass(frozen=True)
class Phone:
    """A SIP account and the address of its phone. It runs one scenario at a time, since its ports are its own.

    `login` is the digest user if that is not the number; `tone_hz` is the tone it sends into a call; `name` is used in
    messages; SIPp's traces of each scenario go to a directory in `traces`. A phone without a password expects to be
    known by its address. `inside`: the phone is at this computer's own address of the internal network, like a proxy.
    """

    number: str
    password: str = field(repr=False)
    address: Address
    tone_hz: int = TONES_HZ[0]
    login: str = ""
    name: str = ""
    traces: Path = field(default_factory=traces)
    proxy: Address = field(default_factory=proxy_address)
    sip_port: int = 5060
    media_port: int = 6000
    transport: str = "udp"  # or tcp; or tls, for requests that the phone itself sends
    ca: str = ""  # PEM of the CA that it trusts for TLS
    inside: bool = False

    @property
    def media_ports(self) -> range:
        """The ports for RTP: SIPp takes the first free one."""
        return range(self.media_port, self.media_port + 10)

    def register(self, expires: int = 600) -> None:
        """Bind the number to this phone for `expires` seconds. Raises Refused, CallError."""
        self._run("register", "registered", keys={"expires": expires}, lifetime=70).finish()

    def unregister(self) -> None:
        """Remove this phone's binding. Raises Refused, CallError."""
        self.register(expires=0)

    def call(self, to: str, seconds: float = 10, count: int = 1, at_once: int = 1) -> Leg:
        """Call `to` (a number, or user@domain); hang up `seconds` after the answer, unless the far end hangs up before.

        Makes `count` calls, `at_once` at a time. Events of each call: ringing, answered. The leg's finish() raises
        Refused when the call is not answered; wait() leaves that to the events.
        """
        scenario = "uac_call" if self.password else "uac_trunk"
        lifetime = 130 + seconds * count
        return self._run(scenario, "answered", to=to, talk=seconds, lifetime=lifetime, count=count, at_once=at_once)

    def stay(self, to: str, seconds: float, count: int = 1) -> Leg:
        """Keep `count` calls to `to` up at once until the far end hangs up, for `seconds` at the most.

        The phone suppresses silence: it sends its tone for a second every 20 s. Events of each call: ringing, answered,
        silent each time.
        """
        lifetime = 130 + seconds
        return self._run("uac_call", "answered", to=to, lifetime=lifetime, count=count, at_once=count, quiet=True)

    def dial(self, to: str, digits: str, seconds: float = 10) -> Leg:
        """Like call(), without a tone, sending `digits` as RFC 4733 events 1.5 s after the answer."""
        return self._run("uac_dtmf", "answered", to=to, digits=digits, talk=seconds, lifetime=135 + seconds)

    def hold(self, to: str, seconds: float = 4) -> Leg:
        """Call `to`, talk, hold, talk for `seconds` each, hang up. Events: answered, held, resumed."""
        return self._run("uac_hold", "resumed", to=to, phase=seconds, lifetime=160 + 3 * seconds)

    def cancel(self, to: str, seconds: float = 1) -> Leg:
        """Call `to` and give up `seconds` after its first ring. Events: ringing, cancelled."""
        return self._run("uac_cancel", "cancelled", to=to, phase=seconds, lifetime=130 + seconds)

    def answer(self, ring: float = 1, seconds: float = 300) -> Leg:
        """Answer the next call after `ring` seconds; hang up `seconds` later, unless the caller hangs up before.

        Events: ringing, answered, held. Returns when the phone listens.
        """
        return self._listen("uas_answer", "answered", phase=ring, talk=seconds, lifetime=240 + ring + seconds)

    def busy(self) -> Leg:
        """Answer the next call with 486 Busy Here. Event: refused."""
        return self._listen("uas_busy", "refused", lifetime=120)

    def forward(self, to: str) -> Leg:
        """Answer the next call with 302 to `to`. Event: forwarded."""
        return self._listen("uas_forward", "forwarded", lifetime=120, to=to)

    def ring(self) -> Leg:
        """Let the next call ring and never answer. Events: ringing, cancelled."""
        return self._listen("uas_ring", "cancelled", lifetime=240)

    def _listen(
        self,
        scenario: str,
        goal: str,
        phase: float = 0,
        talk: float = 0,
        lifetime: float = 0,
        to: str = "",
    ) -> Leg:
        leg = self._run(scenario, goal, to=to, phase=phase, talk=talk, lifetime=lifetime)
        try:
            leg.wait_until_listening()
        except BaseException:
            leg.stop()
            raise
        return leg

    def _run(
        self,
        scenario: str,
        goal: str,
        *,
        lifetime: float,
        to: str = "",
        digits: str = "",
        phase: float = 0,
        talk: float = 0,
        keys: dict[str, object] | None = None,
        count: int = 1,
        at_once: int = 1,
        quiet: bool = False,
    ) -> Leg:
        domain = settings.load().sip_domain
        credentials = f"[authentication username={self.login or self.number} password={self.password}]"
        return Leg(
            self.name or self.number,
            scenario,
            goal,
            proxy=self.proxy,
            address=self.address,
            sip_port=self.sip_port,
            media_port=self.media_port,
            transport=self.transport,
            ca=self.ca,
            inside=self.inside,
            fields=[self.number, credentials, to if "@" in to else f"{to}@{domain}", digits],
            traces=self.traces,
            keys={"domain": domain, **(keys or {})},
            phase=phase,
            talk=talk,
            tone_hz=self.tone_hz,
            lifetime=lifetime,
            count=count,
            at_once=at_once,
            quiet=quiet,
        )
