"""What the supervisor answers to a trapped call. The daemon carries it out."""

from typing import NamedTuple

from graft.target import Watch


class Proceed(NamedTuple):
    """Let the call run in the target."""


class Answer(NamedTuple):
    """Return a value, or fail with an errno."""

    value: int = 0
    error: int = 0


class Inject(NamedTuple):
    """Return a new descriptor, at @number if that is free to use: ours is closed."""

    fd: int
    cloexec: bool
    number: int | None = None


class Replace(NamedTuple):
    """Put our socket in the place of one of the target's, then do @then: ours is closed."""

    fd: int
    numbers: list[tuple[int, bool]]  # where, and close-on-exec
    watches: list[Watch]
    then: "Proceed | Answer"


Action = Proceed | Answer | Inject | Replace
PROCEED = Proceed()
