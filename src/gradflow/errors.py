"""What gradflow raises when the fault is not its own: each message is one line for the user."""


class GradflowError(Exception):
    """Something the user can mend; the command line prints it as one line and exits 1."""


class SpecError(GradflowError, ValueError):
    """A value that no run can have. The message names the key, the value and what is allowed."""


class StoreError(GradflowError, OSError):
    """A runs directory, or a run in it, that cannot be read or written."""


class Busy(StoreError):
    """A run that another process is at work on."""
