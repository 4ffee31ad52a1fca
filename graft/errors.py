"""graft's errors: one class for each party that has to act.

Every error has a message of one line for the user and, if the user can do something, a hint. The exit statuses are
those of docker-run(1) and podman-run(1), with two of graft's own: 2 for a wrong command line, 1 for a refusal, 125
if graft itself failed, 126 and 127 for the command that was to run.
"""

import errno


class GraftError(Exception):
    """Base class. `code` is the name of an errno, such as "EADDRINUSE", or empty; graftd sends it to its clients."""

    exit_status = 125

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(GraftError):
    """The command line or a message does not follow the grammar. The user, or the client's author, corrects it."""

    exit_status = 2

    def __init__(self, message: str, *, hint: str = "", code: str = "EINVAL") -> None:
        super().__init__(message, hint=hint, code=code)


class Refused(GraftError):
    """The request is well formed, but not allowed, or not possible now: a port is in use, a name is unknown."""

    exit_status = 1


class Failure(GraftError):
    """graft could not do its work: the kernel lacks a feature, or graftd does not start. An administrator helps."""


class CommandNotFound(GraftError):
    """The command to run does not exist."""

    exit_status = 127


class CommandNotRunnable(GraftError):
    """The command to run exists, but cannot be executed."""

    exit_status = 126


CLASSES: dict[int, type[GraftError]] = {2: UsageError, 1: Refused, 125: Failure}


def from_oserror(what: str, error: OSError, *, hint: str = "") -> Failure:
    """A Failure from @error: @what names the operation and its object; the errno's text and name are kept."""
    number = error.errno or 0
    reason = error.strerror or str(error)
    return Failure(f"{what}: {reason}", hint=hint, code=errno.errorcode.get(number, ""))
