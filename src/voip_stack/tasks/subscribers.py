"""SIP subscribers: who may register and call, numbers 1000 to 2999."""

import sys

from invoke.context import Context
from invoke.tasks import task

from voip_stack import inventory, settings, subscribers, ui
from voip_stack.subscribers import Subscriber

_STDIN = "read the password from standard input, don't generate one"
_PIN_STDIN = "read the PIN from standard input, don't generate one"


def _given(from_stdin: bool) -> str | None:
    return sys.stdin.readline().rstrip("\n") or None if from_stdin else None


def _show(subscriber: Subscriber, given: bool) -> None:
    domain = settings.load().sip_domain
    proxies = ", ".join(str(m.external) for m in inventory.load().group("sip_proxies") if m.external)
    ui.say(f"user      {subscriber.number}\ndomain    {domain}\nproxy     {proxies} (port 5060, UDP or TCP)")
    if not given:
        ui.say(f"password  {subscriber.password}   (shown only now)")
    if subscriber.pin:
        ui.say(f"voicemail *97, PIN {subscriber.pin}   (shown only now)")


@task(help={"number": "1000 to 2999", "password-stdin": _STDIN})
def add(_c: Context, number: str, password_stdin: bool = False) -> None:
    """Add a subscriber with a voicemail box, and print the settings for a phone."""
    _show(subscribers.add(number, _given(password_stdin)), password_stdin)


@task(help={"number": "1000 to 2999", "password-stdin": _STDIN})
def passwd(_c: Context, number: str, password_stdin: bool = False) -> None:
    """Give a subscriber a new password."""
    _show(subscribers.passwd(number, _given(password_stdin)), password_stdin)


@task(help={"number": "1000 to 2999", "pin-stdin": _PIN_STDIN})
def pin(_c: Context, number: str, pin_stdin: bool = False) -> None:
    """Give a subscriber's voicemail box a new PIN."""
    changed = subscribers.set_pin(number, _given(pin_stdin))
    ui.say(f"voicemail *97, PIN {'as given' if pin_stdin else f'{changed.pin}   (shown only now)'}")


@task(help={"number": "1000 to 2999"})
def remove(_c: Context, number: str) -> None:
    """Remove a subscriber, its registrations and its voicemail box."""
    subscribers.remove(number)
    ui.say(f"{number} is removed")


@task(name="list", help={"json": "print JSON"})
def list_(_c: Context, json: bool = False) -> None:
    """The subscribers."""
    found = [s.number for s in subscribers.list_()]
    if json:
        ui.as_json(found)
    else:
        ui.table(["number"], [(n,) for n in found])
