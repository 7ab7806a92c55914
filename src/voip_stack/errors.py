"""The errors a user can cause or fix. Everything else is a bug and may show a traceback."""


class VoipError(Exception):
    """A problem the user can act on.

    `message` names the faulty thing; `hint` is the next step, as a command if there is one; `details` are lines of
    evidence (a console's end, a daemon's journal) printed between the two. A command that ends with it has the exit
    status `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", details: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details


class SettingsError(VoipError):
    """`.env` or the environment has an invalid value."""


class InventoryError(VoipError):
    """The inventory is wrong, or lacks a name."""


class HostError(VoipError):
    """This computer lacks something: a tool, memory, disk, an accelerator, libvirtd."""


class LabError(VoipError):
    """The lab's network could not be made, entered or removed."""


class ImageError(VoipError):
    """A base tree, a baked image or a disk could not be made."""


class PackageError(VoipError):
    """A package could not be built or served."""


class UnavailableError(PackageError):
    """A package that cannot be had on this computer, however often one tries."""

    exit_code = 3


class VmError(VoipError):
    """A virtual machine could not be made, started, reached or removed."""


class ProvisionError(VoipError):
    """A playbook failed."""


class CallError(VoipError):
    """A call went wrong; `details` hold its ladder."""
