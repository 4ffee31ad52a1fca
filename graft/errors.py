"""What can go wrong, by who has to act on it.

Every error carries one line for the user and, where there is something to do, a hint. The exit status is
the one that docker and podman use: 2 the command line, 1 a refusal, 125 graft itself, 126 and 127 the
command that was to run.
"""

import errno


class GraftError(Exception):
    """Base class. `code` is the errno name that travels in a reply ("EADDRINUSE")."""

    exit_status = 125

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(GraftError):
    """The command line or a message does not follow the grammar: correct it."""

    exit_status = 2

    def __init__(self, message: str, *, hint: str = "", code: str = "EINVAL") -> None:
        super().__init__(message, hint=hint, code=code)


class Refused(GraftError):
    """Well formed, but not allowed or not possible now: a port in use, an unknown name, no permission."""

    exit_status = 1


class Failure(GraftError):
    """graft could not do its work: a missing kernel feature, a daemon that does not start."""


class CommandNotFound(GraftError):
    """The command to run does not exist."""

    exit_status = 127


class CommandNotRunnable(GraftError):
    """The command to run exists and cannot be executed."""

    exit_status = 126


CLASSES: dict[int, type[GraftError]] = {2: UsageError, 1: Refused, 125: Failure}


def from_oserror(what: str, error: OSError, *, hint: str = "") -> Failure:
    """Name the operation and the object, keep the errno."""
    number = error.errno or 0
    reason = error.strerror or str(error)
    return Failure(f"{what}: {reason}", hint=hint, code=errno.errorcode.get(number, ""))
