"""Phones outside register and call through the proxy to a stub of a PBX; what is not right is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import yaml
from guests import Guest, Host, inventory_of

from voip_stack import calls, inventory, paths, settings
from voip_stack.calls.phone import Phone
from voip_stack.calls.sipp import Leg, Refused
from voip_stack.deadline import Deadline
from voip_stack.errors import CallError
from voip_stack.inventory import Address

STACK = inventory.load()
ROLE = paths.ANSIBLE / "roles/kamailio"
DOMAIN = settings.load().sip_domain
INTERNAL = Address(inventory_of("kamailio-1")["internal_address"])
EXTERNAL = Address(inventory_of("kamailio-1")["external_address"])
COMPUTER = STACK.networks["internal"].computer
TRANSPORTS = pytest.mark.parametrize("transport", ["udp", "tcp"])
AND_TLS = pytest.mark.parametrize("transport", ["udp", "tcp", "tls"])


def refusal(leg: Leg) -> int:
    with leg, pytest.raises(Refused) as caught:
        leg.finish()
    return caught.value.status


@AND_TLS
def test_a_phone_registers_and_its_binding_is_in_the_database(
    phones: list[Phone], sql: Callable[[str], str], transport: str
) -> None:
    phone = dataclasses.replace(phones[0], transport=transport)
    phone.register()
    found = sql("SELECT contact, socket FROM location WHERE username = '1001'")
    assert f"sip:1001@{phone.address}:5060" in found
    assert f"{transport}:{EXTERNAL}:{5061 if transport == 'tls' else 5060}" in found
    phone.unregister()
    assert sql("SELECT count(*) FROM location WHERE username = '1001'") == "0"


@AND_TLS
def test_a_call_reaches_the_pbx_and_its_sound_comes_back(phones: list[Phone], transport: str) -> None:
    phone = dataclasses.replace(phones[0], transport=transport)
    with calls.Capture() as capture, phone.call("600", seconds=4) as leg:
        leg.finish()
    heard = capture.heard_by(phone)
    assert heard.tone_hz == pytest.approx(phone.tone_hz, abs=5)
    assert heard.level_dbm0 > -30


@TRANSPORTS
def test_a_wrong_password_gets_neither_a_binding_nor_a_call(phones: list[Phone], transport: str) -> None:
    # From an address of its own, and with few tries: it is not to be banned here.
    thief = dataclasses.replace(phones[1], password="wrong", transport=transport, address=STACK.phones[2])
    with pytest.raises(Refused) as caught:
        thief.register()
    assert caught.value.status == 401
    assert refusal(thief.call("600")) == 407


def test_an_unknown_account_gets_the_same_answer_as_a_wrong_password(phones: list[Phone]) -> None:
    with pytest.raises(Refused) as caught:
        dataclasses.replace(phones[1], number="1999", address=STACK.phones[2]).register()
    assert caught.value.status == 401


@TRANSPORTS
@pytest.mark.parametrize("to", ["alice@example.org", "600@192.0.2.7"])
def test_nobody_is_relayed_to_a_foreign_domain(phones: list[Phone], to: str, transport: str) -> None:
    phone = dataclasses.replace(phones[0], transport=transport, password="")  # refused before it is asked who it is
    assert refusal(phone.call(to)) == 403


def test_the_caller_is_who_authenticated(phones: list[Phone]) -> None:
    assert refusal(dataclasses.replace(phones[0], number="1002", login="1001").call("600")) == 403


def test_a_binding_that_is_too_short_is_made_longer(phones: list[Phone], host: Host) -> None:
    phones[0].register(expires=30)
    left = int(re.findall(r"Expires: (\d+)", host.check_output("kamcmd ul.dump"))[0])
    phones[0].unregister()
    assert 60 < left <= 90


def test_the_pbx_reaches_a_registered_phone(phones: list[Phone], trunk: Phone) -> None:
    """With sound both ways: the phone hears the caller's tone."""
    phones[1].register()
    with calls.Capture() as capture, phones[1].answer() as callee, trunk.call("1002", seconds=4) as caller:
        caller.finish()
        callee.finish()
    phones[1].unregister()
    assert capture.heard_by(phones[1]).tone_hz == pytest.approx(1570, abs=5)
    assert capture.heard_by(trunk).tone_hz == pytest.approx(phones[1].tone_hz, abs=5)


@pytest.mark.parametrize(("number", "status"), [("1002", 480), ("1777", 404)])
def test_the_pbx_learns_who_is_away_and_who_does_not_exist(trunk: Phone, number: str, status: int) -> None:
    assert refusal(trunk.call(number)) == status


def test_the_users_own_route_sees_a_call_of_who_has_authenticated_first(phones: list[Phone], trunk: Phone) -> None:
    assert refusal(phones[0].call("666")) == 604
    assert refusal(trunk.call("666")) == 604
    stranger = dataclasses.replace(phones[1], password="wrong", address=STACK.phones[2])
    assert refusal(stranger.call("666")) == 407


def test_a_route_that_kamailio_refuses_is_not_put_in_place(host: Host) -> None:
    """The check of the role, as Ansible calls it."""
    tasks = yaml.safe_load((ROLE / "tasks/configure.yml").read_text())
    (check,) = (t["ansible.builtin.copy"]["validate"] for t in tasks if t["name"] == "Add the user's own routes")
    for text, good in (("route[LOCAL] { exit; }", True), ("route[LOCAL] { no_such_function(); }", False)):
        host.check_output("printf '%%s\\n' %s > /run/local.cfg", text)
        command = check.replace("%s", "/run/local.cfg")
        assert (host.run(f"{command} || exit 1").rc == 0) == good  # kamailio's 255 is ssh's for no connection


def test_nothing_is_left_of_the_calls(host: Host) -> None:
    gone = Deadline(15)
    assert gone.until(lambda: "all: 0" in host.check_output("kamcmd dlg.stats_active"), every=1)


def test_who_guesses_is_banned_for_that_account_and_let_in_again(phones: list[Phone]) -> None:
    guesser = dataclasses.replace(phones[1], password="wrong", address=STACK.phones[3])
    for _ in range(4):
        with pytest.raises(Refused):
            guesser.register()
    right = dataclasses.replace(phones[1], address=STACK.phones[3])
    with pytest.raises(Refused):
        right.register()
    phones[0].register()  # from another address nobody notices
    phones[0].unregister()

    def let_in() -> bool:
        try:
            right.register()
        except Refused:
            return False
        return True

    assert Deadline(60).until(let_in, every=5)
    right.unregister()


@pytest.mark.outage
def test_no_pbx_means_503_and_a_pbx_that_comes_back_gets_calls(guest: Guest, host: Host, phones: list[Phone]) -> None:
    guest("peer").check_output("systemctl stop stub-pbx")
    try:
        assert refusal(phones[0].call("600")) == 503
    finally:
        guest("peer").check_output("systemctl start stub-pbx")
    assert Deadline(60).until(lambda: "FLAGS: A" in host.check_output("kamcmd dispatcher.list"), every=2)
    with phones[0].call("600", seconds=1) as leg:
        leg.finish()


@pytest.mark.outage
def test_without_the_database_nobody_new_is_let_in_and_the_others_go_on(
    guest: Guest, phones: list[Phone], trunk: Phone
) -> None:
    phones[0].register()
    with phones[1].call("600", seconds=25) as going_on:
        going_on.wait_for("answered")
        guest("peer").check_output("systemctl stop postgresql@17-main")
        try:
            with pytest.raises(Refused) as refused:
                phones[0].register()
            assert (refused.value.status, refused.value.response.header("Retry-After")) == (503, "10")
            assert refusal(phones[0].call("600")) == 503
            with phones[0].answer() as callee, trunk.call("1001", seconds=1) as leg:
                leg.finish()
                callee.finish()
        finally:
            guest("peer").check_output("systemctl start postgresql@17-main")
        going_on.finish()
    phones[0].register()
    phones[0].unregister()


@pytest.mark.outage
def test_a_killed_proxy_knows_its_phones_again(host: Host, phones: list[Phone]) -> None:
    """Bindings are read from PostgreSQL at start; systemd starts what died."""
    phones[0].register()
    host.check_output("systemctl kill --signal=SIGKILL kamailio.service")
    back = Deadline(90)
    # kamcmd ends with 255 while nobody listens, which testinfra takes for a failure of ssh.
    assert back.until(lambda: "1001" in host.run("kamcmd ul.dump brief || exit 1").stdout, every=2)
    phones[0].unregister()


def test_a_new_certificate_is_taken_without_a_restart_and_one_of_a_foreign_ca_is_refused_by_the_phone(
    host: Host, phones: list[Phone]
) -> None:
    phone = dataclasses.replace(phones[0], transport="tls")
    pid = host.check_output("systemctl show --value --property MainPID kamailio")
    reload, pem = "kamcmd tls.reload", "/etc/kamailio/certificate.pem"
    foreign = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={DOMAIN} -addext"
    host.check_output(f"cp -a {pem} /root/certificate.pem")
    try:
        host.check_output(f"{foreign} subjectAltName=DNS:{DOMAIN} -keyout /root/key.pem -out /root/cert.pem")
        host.check_output(f"cat /root/key.pem /root/cert.pem >{pem} && {reload}")
        with pytest.raises(CallError) as refused:
            phone.register()
        assert "certificate verify failed" in refused.value.details
    finally:
        host.check_output(f"cp -a /root/certificate.pem {pem} && {reload}")
    phone.register()
    phone.unregister()
    assert host.check_output("systemctl show --value --property MainPID kamailio") == pid
