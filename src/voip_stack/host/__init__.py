"""What this computer can do: its architecture, its accelerator, its tools."""

from voip_stack.host import speed
from voip_stack.host.machine import Hardware
from voip_stack.host.platforms import Platform, current
from voip_stack.host.probe import accelerator, verdict

__all__ = ["Hardware", "Platform", "accelerator", "current", "emulates", "hardware", "patience", "verdict"]

_EMULATION = 10  # times that a guest takes without hardware virtualization, at the worst


def hardware(kernel: str, initrd: str) -> Hardware:
    """The virtual computer for machines that boot `kernel` and `initrd`; may boot them once, to see what accelerates.

    Raises HostError when the accelerator that VOIP_ACCELERATOR names does not work here.
    """
    return current().hardware(accelerator(kernel, initrd))


def emulates() -> bool:
    """Whether guests run without hardware virtualization, as far as it is known."""
    return verdict() in (None, "tcg")


def patience(seconds: float) -> float:
    """A time-out for a guest: `seconds` with hardware virtualization on a fast computer."""
    return speed.patient(seconds * (_EMULATION if emulates() else 1))
