"""How a command ends: its exit status, and one sentence with what to do where it cannot go on. Prints nothing."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of every command."""

    COMPLETED = 0
    FAILED = 1
    """The job ended without a result."""
    REFUSED = 2
    """The command could not do its work: wrong usage, a wrong request, a server or a file that is not there."""
    CANCELLED = 3
    """The job was cancelled."""
    TIMED_OUT = 4
    """The job had not ended when the time was over; it goes on."""
    INTERRUPTED = 130
    """Ctrl-C."""


class CliError(Exception):
    """A command cannot go on. `str(error)` is the sentence for a person; `hint` says what to do."""

    def __init__(self, message: str, hint: str, status: Exit = Exit.REFUSED) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status
