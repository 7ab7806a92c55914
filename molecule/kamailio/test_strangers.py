"""Attacks on the proxy, by strangers and by subscribers: what a user would notice if they worked."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from guests import Guest, Host, inventory_of

from voip_stack import inventory, settings
from voip_stack.calls.sip import Message
from voip_stack.calls.wire import SDP, Wire, digest
from voip_stack.deadline import Deadline
from voip_stack.inventory import Address

STACK = inventory.load()
DOMAIN = settings.load().sip_domain
INTERNAL = Address(inventory_of("kamailio-1")["internal_address"])
EXTERNAL = Address(inventory_of("kamailio-1")["external_address"])
PBX = Address(inventory_of("peer")["internal_address"])
COMPUTER = STACK.networks["internal"].computer  # pbx-2
ROUTE = f"Route: <sip:{EXTERNAL};lr>"


@pytest.fixture(scope="module", autouse=True)
def nothing_left(host: Host) -> Iterator[None]:
    """Other tests count bindings."""
    yield
    for number in ("1001", "1002"):
        host.run(f"kamcmd ul.rm location s:{number} || exit 1")


@pytest.fixture
def phone() -> Iterator[Wire]:
    """1001's."""
    with Wire(STACK.phones[4], proxy=EXTERNAL) as wire:
        yield wire


@pytest.fixture
def other() -> Iterator[Wire]:
    """At another address."""
    with Wire(STACK.phones[5], proxy=EXTERNAL) as wire:
        yield wire


@pytest.fixture
def pbx() -> Iterator[Wire]:
    """pbx-2, which calls."""
    with Wire(COMPUTER, proxy=INTERNAL, inside=True) as wire:
        yield wire


@pytest.fixture
def sessions(guest: Guest) -> Callable[[], int]:
    """How many calls RTPEngine holds."""
    url = f"http://{PBX}:2225/metrics"
    program = "import urllib.request as r; print(r.urlopen('%s').read().decode())"

    def count() -> int:
        text = guest("peer").check_output("python3 -c %s", program % url)
        return sum(int(n) for n in re.findall(r'^rtpengine_sessions\{type="own"\} (\d+)', text, re.MULTILINE))

    return count


def sdp(wire: Wire) -> str:
    return SDP.format(address=wire.address)


def register(wire: Wire, passwords: dict[str, str], number: str = "1001", **parts: Any) -> int:
    got = wire.authenticated(
        "REGISTER", f"sip:{DOMAIN}", number, passwords[number], DOMAIN, to=f"sip:{number}@{DOMAIN}", **parts
    )
    return got.status or 0


def call(wire: Wire, passwords: dict[str, str], to: str = "600", **parts: Any) -> Message:
    uri = f"sip:{to}@{DOMAIN}"
    return wire.authenticated("INVITE", uri, "1001", passwords["1001"], DOMAIN, **{"body": sdp(wire), **parts})


def within(
    answered: Message, wire: Wire, method: str, uri: str = "", routes: tuple[str, ...] = (), **parts: Any
) -> str:
    """A request of the caller in the dialog that `answered` (200) opened."""
    contact = answered.header("Contact").strip("<>")
    recorded = [
        line.partition(":")[2].strip() for line in answered.text.splitlines() if line.lower().startswith("record-route")
    ]
    return wire.request(
        method,
        uri or contact,
        answered.header("From").partition(";tag=")[0],
        DOMAIN,
        to=answered.header("To").partition(">")[0].lstrip("<"),
        tag=answered.header("From").partition(";tag=")[2],
        to_tag=answered.header("To").partition(";tag=")[2],
        call_id=answered.header("Call-ID"),
        headers=[f"Route: {route}" for route in (*reversed(recorded), *routes)],
        **{"cseq": 3, **parts},
    )


def hang_up(answered: Message, wire: Wire) -> None:
    assert answered.status == 200
    wire.send(within(answered, wire, "ACK", cseq=2))
    bye = wire.ask(within(answered, wire, "BYE", cseq=9))
    assert bye.status == 200


def invite(pbx: Wire, number: str = "1001", **parts: Any) -> str:
    return pbx.request("INVITE", f"sip:{number}@{DOMAIN}", "600", DOMAIN, body=sdp(pbx), **parts)


def reply(request: Message, status: str, *headers: str, body: str = "") -> str:
    """What a phone says to `request`."""
    kept = [
        line
        for line in request.text.splitlines()
        if line.split(":")[0] in ("Via", "From", "Call-ID", "CSeq", "Record-Route")
    ]
    to = f"To: {request.header('To')}" + ("" if ";tag=" in request.header("To") else ";tag=callee")
    text = [f"SIP/2.0 {status}", *kept, to, *headers, *(["Content-Type: application/sdp"] if body else [])]
    return "\n".join([*text, f"Content-Length: {len(body) + body.count(chr(10))}", "", body])


# Who one is


@pytest.mark.parametrize("method", ["REGISTER", "INVITE"])
def test_nobody_gets_or_makes_anothers_calls_by_naming_him_in_further_credentials(
    phone: Wire, passwords: dict[str, str], sql: Callable[[str], str], method: str
) -> None:
    name = "Authorization" if method == "REGISTER" else "Proxy-Authorization"
    uri = f"sip:{DOMAIN}" if method == "REGISTER" else f"sip:600@{DOMAIN}"
    dummy = 'Proxy-Authorization: Digest username="1002", realm="elsewhere", nonce="x", uri="x", response="x"'
    parts: dict[str, Any] = {
        "to": f"sip:1002@{DOMAIN}" if method == "REGISTER" else "",
        "call_id": secrets.token_hex(8),
        "tag": "1",
    }
    body = "" if method == "REGISTER" else sdp(phone)
    asked = phone.ask(phone.request(method, uri, "1002", DOMAIN, body=body, **parts))
    mine = digest(asked, method, uri, "1001", passwords["1001"])
    assert mine.startswith(name)
    got = phone.ask(phone.request(method, uri, "1002", DOMAIN, cseq=2, headers=[dummy, mine], body=body, **parts))
    assert got.status in (400, 403)
    assert sql(f"SELECT count(*) FROM location WHERE username = '1002' AND contact LIKE '%{phone.here}%'") == "0"


def test_a_number_with_a_hidden_end_is_no_number(phone: Wire, passwords: dict[str, str]) -> None:
    got = call(phone, passwords, "600%00x")
    assert got.status in (400, 404)


@pytest.mark.parametrize("name", [DOMAIN, "kamailio-1.voip.local"])
def test_a_phone_that_names_the_machine_as_its_domain_registers(
    phone: Wire, passwords: dict[str, str], name: str
) -> None:
    got = phone.authenticated("REGISTER", f"sip:{name}", "1001", passwords["1001"], name, to=f"sip:1001@{name}")
    assert got.status == 200


def test_a_hidden_caller_is_let_through_and_the_pbx_knows_who_it_is(phone: Wire, passwords: dict[str, str]) -> None:
    hidden = '"Anonymous" <sip:anonymous@anonymous.invalid>'
    got = call(phone, passwords, sender=hidden, headers=["Privacy: id"])
    hang_up(got, phone)
    assert f"sip:1001@{DOMAIN}" in got.header("P-Asserted-Identity")


def test_a_phone_does_not_say_by_itself_who_calls_or_who_forwards(phone: Wire, passwords: dict[str, str]) -> None:
    forged = [f"P-Asserted-Identity: <sip:1002@{DOMAIN}>", f"Remote-Party-ID: <sip:1002@{DOMAIN}>", "X-Account: 1002"]
    got = call(phone, passwords, headers=forged)
    hang_up(got, phone)
    assert "1002" not in got.text
    assert f"sip:1001@{DOMAIN}" in got.header("P-Asserted-Identity")


FLAWS = {
    "no nc": {"nc": ""},
    "no cnonce": {"cnonce": ""},
    "no uri": {"uri": ""},
    "no response": {"response": ""},
    "SHA-256": {"algorithm": "SHA-256"},
    "another nonce": {"nonce": "made-up"},
}


@pytest.mark.parametrize("method", ["REGISTER", "INVITE"])
@pytest.mark.parametrize("flaw", FLAWS)
def test_who_writes_bad_credentials_is_told_so_and_not_that_the_server_is_down(
    phone: Wire, passwords: dict[str, str], flaw: str, method: str
) -> None:
    uri = f"sip:{DOMAIN}" if method == "REGISTER" else f"sip:600@{DOMAIN}"
    to = f"sip:1001@{DOMAIN}" if method == "REGISTER" else uri
    asked = phone.ask(phone.request(method, uri, "1001", DOMAIN, to=to))
    bad = digest(asked, method, uri, "1001", passwords["1001"], flaws=FLAWS[flaw])
    got = phone.ask(phone.request(method, uri, "1001", DOMAIN, to=to, headers=[bad]))
    assert got.status in (400, 401, 407)


def test_a_listener_gets_nothing_from_credentials_that_were_used(phone: Wire, passwords: dict[str, str]) -> None:
    """From the caller's own address: neither the same call again nor one to another number."""
    uri = f"sip:600@{DOMAIN}"
    asked = phone.ask(phone.request("INVITE", uri, "1001", DOMAIN, body=sdp(phone)))
    used = digest(asked, "INVITE", uri, "1001", passwords["1001"])
    hang_up(phone.ask(phone.request("INVITE", uri, "1001", DOMAIN, headers=[used], body=sdp(phone))), phone)
    for number in ("600", "601"):
        again = phone.request("INVITE", f"sip:{number}@{DOMAIN}", "1001", DOMAIN, headers=[used], body=sdp(phone))
        got = phone.ask(again)
        assert got.status == 407, number


# Where calls go


CONTACTS = {
    "the PBX": f"sip:1001@{PBX}:5060",
    "PostgreSQL": f"sip:1001@{PBX}:5432;transport=tcp",
    "ourselves": f"sip:1001@{EXTERNAL}:5060",
    "ourselves inside": f"sip:1001@{INTERNAL}:5060",
    "loopback": "sip:1001@127.0.0.1:5060",
    "broadcast": "sip:1001@255.255.255.255:5060",
    "multicast": "sip:1001@224.0.1.75:5060",
    "nowhere": "sip:1001@0.0.0.0:5060",
    "a third party": f"sip:1001@{STACK.phones[5]}:5060",
}


@pytest.mark.parametrize("where", CONTACTS)
def test_a_phone_is_called_where_it_is_whatever_its_contact_names(
    phone: Wire, pbx: Wire, passwords: dict[str, str], where: str
) -> None:
    assert register(phone, passwords, contact=f"Contact: <{CONTACTS[where]}>") == 200
    pbx.send(invite(pbx))
    rung = phone.receive(3)
    assert register(phone, passwords, contact="Contact: *", headers=["Expires: 0"]) == 200
    assert rung.start_line.startswith("INVITE")


def test_a_phone_does_not_say_by_itself_where_its_contact_was_received_from(
    phone: Wire, other: Wire, passwords: dict[str, str]
) -> None:
    contact = f'Contact: <sip:1001@{phone.here}>;received="sip:{other.here}"'
    assert register(phone, passwords, contact=contact) == 400


@pytest.mark.parametrize("times", [1, 2])
def test_a_phone_that_forges_an_alias_has_nobody_else_called_or_hung_up_on(
    phone: Wire, other: Wire, pbx: Wire, passwords: dict[str, str], times: int
) -> None:
    """As the callee; as the caller it is refused."""
    alias = f";alias={other.address}~{other.port}~1"
    forged = f"Contact: <sip:1001@{phone.here};transport=udp{alias * times}>"
    assert call(phone, passwords, contact=forged).status == 400
    assert register(phone, passwords) == 200
    pbx.send(invite(pbx))
    rung = phone.receive(3)
    phone.send(reply(rung, "200 OK", forged, body=sdp(phone)))
    answered = pbx.receive(1)
    while answered.text and answered.status != 200:
        answered = pbx.receive(1)
    if answered.text:
        pbx.send(within(answered, pbx, "BYE"))
    assert other.receive(2).text == ""
    phone.send(reply(rung, "486 Busy Here"))
    assert register(phone, passwords, contact="Contact: *", headers=["Expires: 0"]) == 200


@pytest.mark.parametrize(
    "contact",
    [
        "Contact: *\nContact: <sip:1001@192.0.2.1>",
        "Contact: *, <sip:1001@192.0.2.1>",
        "Contact: <sip:1001@192.0.2.1>, *",
    ],
)
def test_all_bindings_and_one_more_is_a_contradiction(phone: Wire, passwords: dict[str, str], contact: str) -> None:
    assert register(phone, passwords, contact=contact, headers=["Expires: 0"]) == 400


def test_a_made_up_dialog_gets_no_media_and_not_to_the_pbx(phone: Wire, sessions: Callable[[], int]) -> None:
    before = sessions()
    for _ in range(20):
        made_up = phone.request(
            "INVITE", f"sip:{PBX}:5060", "1001", DOMAIN, to_tag="x", headers=[ROUTE], body=sdp(phone)
        )
        got = phone.ask(made_up)
        assert got.status in (403, 404, 481)
    assert sessions() == before


def test_a_call_leads_to_the_pbx_and_from_there_nowhere_else(phone: Wire, passwords: dict[str, str]) -> None:
    """With the call's own Route, to other ports, another protocol, a name, another proxy behind."""
    answered = call(phone, passwords)
    assert answered.status == 200
    targets = [f"sip:{PBX}:{port}" for port in ("9", "22", "5038;transport=tcp", "5060;transport=tcp")]
    for target in [*targets, f"sip:{INTERNAL}:5060", "sip:localhost:5060", f"sip:{STACK.phones[5]}:5060"]:
        got = phone.ask(within(answered, phone, "INFO", target))
        assert got.status in (403, 481), target
    got = phone.ask(within(answered, phone, "INFO", routes=(f"<sip:{STACK.phones[5]};lr>",)))
    assert got.status in (403, 481)
    hang_up(answered, phone)


def test_media_of_a_call_that_is_over_does_not_come_back(
    phone: Wire, passwords: dict[str, str], sessions: Callable[[], int]
) -> None:
    before = sessions()
    answered = call(phone, passwords)
    assert sessions() == before + 1
    hang_up(answered, phone)
    phone.ask(within(answered, phone, "INVITE", cseq=10, body=sdp(phone)), 10)
    assert Deadline(10).until(lambda: sessions() == before, every=1)


@pytest.mark.parametrize("status", ["200 OK", "302 Moved Temporarily"])
def test_a_reply_that_nobody_asked_for_is_sent_to_nobody(phone: Wire, other: Wire, status: str) -> None:
    phone.send(
        f"SIP/2.0 {status}\nVia: SIP/2.0/UDP {EXTERNAL}:5060;branch=z9hG4bKforged\n"
        f"Via: SIP/2.0/UDP {other.here};branch=z9hG4bKforged\nFrom: <sip:a@{DOMAIN}>;tag=1\n"
        f"To: <sip:b@{DOMAIN}>;tag=2\n"
        "Call-ID: forged\nCSeq: 1 INVITE\nContent-Length: 0\n\n"
    )
    assert other.receive(2).text == ""


def test_a_call_that_rings_is_cancelled_by_its_caller_only(
    phone: Wire, other: Wire, pbx: Wire, passwords: dict[str, str]
) -> None:
    assert register(phone, passwords) == 200
    parts: dict[str, Any] = {"branch": secrets.token_hex(8), "call_id": secrets.token_hex(8), "tag": "1"}
    pbx.send(invite(pbx, **parts))
    rung = phone.receive(3)
    phone.send(reply(rung, "180 Ringing", f"Contact: <sip:1001@{phone.here}>"))
    cancel = pbx.request("CANCEL", f"sip:1001@{DOMAIN}", "600", DOMAIN, **parts)
    other.send(cancel)
    assert phone.receive(2).text == ""
    pbx.send(cancel)
    stopped = phone.receive(3)
    assert stopped.start_line.startswith("CANCEL")
    phone.send(reply(stopped, "200 OK"))
    phone.send(reply(rung, "487 Request Terminated"))


def test_an_account_makes_four_calls_at_a_time_and_a_loop_ends_there(passwords: dict[str, str]) -> None:
    with Wire(STACK.phones[6], proxy=EXTERNAL) as wire:
        calls = [call(wire, passwords) for _ in range(5)]
        assert [got.status for got in calls] == [200] * 4 + [403]
        for answered in calls[:4]:
            hang_up(answered, wire)
        hang_up(call(wire, passwords), wire)


# What does not stop the others


def test_an_sdp_that_cannot_be_read_is_refused_as_such(phone: Wire, passwords: dict[str, str]) -> None:
    got = call(phone, passwords, body="v=0\nnonsense\n")
    assert got.status in (400, 488)


def test_who_guesses_behind_a_shared_address_locks_himself_out_and_not_the_office(passwords: dict[str, str]) -> None:
    with Wire(STACK.phones[7], proxy=EXTERNAL) as office:
        assert register(office, passwords, "1002") == 200
        for number in range(20):
            guessed = f"19{number:02}"
            office.authenticated("REGISTER", f"sip:{DOMAIN}", guessed, "wrong", DOMAIN, to=f"sip:{guessed}@{DOMAIN}")
        assert register(office, passwords, "1002") == 200
        assert register(office, passwords) == 0
        assert Deadline(60).until(lambda: register(office, passwords) == 200, every=5)


def test_a_phone_with_a_wrong_password_is_banned_alone(phone: Wire, passwords: dict[str, str]) -> None:
    for _ in range(40):
        phone.authenticated("REGISTER", f"sip:{DOMAIN}", "1001", "wrong", DOMAIN, to=f"sip:1001@{DOMAIN}")
    assert register(phone, passwords) == 401
    assert register(phone, passwords, "1002") == 200
    assert Deadline(60).until(lambda: register(phone, passwords) == 200, every=5)


def test_a_flood_in_the_name_of_an_address_does_not_silence_who_is_there(
    phone: Wire, passwords: dict[str, str]
) -> None:
    assert register(phone, passwords) == 200
    with Wire(STACK.phones[4], proxy=EXTERNAL) as forger:
        for number in range(400):
            forger.send(forger.request("OPTIONS", f"sip:{DOMAIN}", f"x{number}", DOMAIN))
    assert Deadline(15).until(lambda: register(phone, passwords) == 200, every=1)


def test_a_restarted_phone_rings_once(phone: Wire, passwords: dict[str, str], sql: Callable[[str], str]) -> None:
    """It may come with another Contact; what was at its address and port before is gone."""
    for name in ("before", "after"):
        assert register(phone, passwords, contact=f"Contact: <sip:{name}@{phone.here}>") == 200
    bound = sql(f"SELECT contact FROM location WHERE username = '1001' AND received LIKE '%{phone.here}%'")
    assert bound == f"sip:after@{phone.here}"


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_a_phone_that_is_restarted_often_is_never_turned_away(passwords: dict[str, str], transport: str) -> None:
    for _ in range(12):
        with Wire(STACK.phones[6], proxy=EXTERNAL, transport=transport) as wire:
            assert register(wire, passwords, "1002") == 200
    with Wire(STACK.phones[6], proxy=EXTERNAL) as wire:
        assert register(wire, passwords, "1002", contact="Contact: *", headers=["Expires: 0"]) == 200


@pytest.mark.parametrize(("transport", "port"), [("tcp", 5060), ("tls", 5061)])
def test_a_stranger_who_falls_silent_is_disconnected_and_a_phone_is_not(
    passwords: dict[str, str], transport: str, port: int
) -> None:
    with (
        Wire(STACK.phones[6], proxy=EXTERNAL, proxy_port=port, transport=transport) as silent,
        Wire(STACK.phones[6], proxy=EXTERNAL, proxy_port=port, transport=transport) as known,
    ):
        assert register(known, passwords, "1002") == 200
        assert silent.ask(silent.request("OPTIONS", f"sip:{DOMAIN}", "x", DOMAIN)).status == 200
        assert silent.closed_within(60)
        assert not known.closed_within(1)


@pytest.mark.outage
def test_a_phone_hangs_up_a_call_that_was_up_before_the_proxy_was_restarted(
    host: Host, phone: Wire, passwords: dict[str, str]
) -> None:
    answered = call(phone, passwords)
    assert answered.status == 200
    host.check_output("systemctl restart kamailio.service")
    assert Deadline(60).until(lambda: phone.ask(within(answered, phone, "BYE")).status == 200, every=1)


@pytest.mark.outage
def test_with_a_frozen_database_a_call_ends_at_once_and_a_new_one_is_refused_soon(
    guest: Guest, phone: Wire, other: Wire, passwords: dict[str, str]
) -> None:
    answered = call(phone, passwords)
    assert answered.status == 200
    phone.send(within(answered, phone, "ACK", cseq=2))
    frozen = guest("peer")
    asked = other.ask(other.request("REGISTER", f"sip:{DOMAIN}", "1002", DOMAIN, to=f"sip:1002@{DOMAIN}"))
    frozen.check_output("systemctl kill --signal=SIGSTOP postgresql@17-main")
    try:
        for nc in range(1, 25):
            credentials = digest(asked, "REGISTER", f"sip:{DOMAIN}", "1002", passwords["1002"], nc)
            other.send(
                other.request(
                    "REGISTER", f"sip:{DOMAIN}", "1002", DOMAIN, to=f"sip:1002@{DOMAIN}", headers=[credentials]
                )
            )
        begin = time.monotonic()
        bye = phone.ask(within(answered, phone, "BYE"), 20)
        ended = time.monotonic() - begin
        assert bye.status == 200
        assert ended < 1
        begin = time.monotonic()
        refused = call(phone, passwords, timeout=20)
        assert (refused.status, refused.header("Retry-After")) == (503, "10")
        assert time.monotonic() - begin < 3
    finally:
        frozen.check_output("systemctl kill --signal=SIGCONT postgresql@17-main")
    assert Deadline(30).until(lambda: register(phone, passwords) == 200, every=1)
