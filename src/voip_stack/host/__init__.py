"""What this computer can do: its architecture, its accelerator, its tools."""

from voip_stack.host.machine import Hardware
from voip_stack.host.platforms import Platform, current
from voip_stack.host.probe import accelerator, verdict

__all__ = ["Hardware", "Platform", "accelerator", "current", "hardware", "verdict"]


def hardware(kernel: str, initrd: str) -> Hardware:
    """The virtual computer for machines that boot `kernel` and `initrd`; may boot them once, to see what accelerates.

    Raises HostError when the accelerator that VOIP_ACCELERATOR names does not work here.
    """
    return current().hardware(accelerator(kernel, initrd))
