"""What the supervisor decides for a trapped call. The same worker thread carries it out (trap/listeners.py)."""

from typing import NamedTuple

from graft.trap.caller import Caller
from graft.trap.epoll import Watch


class Proceed(NamedTuple):
    """Let the kernel run the call as it stands (SECCOMP_USER_NOTIF_FLAG_CONTINUE)."""


class Answer(NamedTuple):
    """The call returns @value, or fails with the errno @error if that is not 0."""

    value: int = 0
    error: int = 0


class Inject(NamedTuple):
    """The call returns a new descriptor of the target, a copy of @fd, which is closed then.

    @numbered: it shall have a number of AF_GRAFT's range, if one is safe (graft/trap/numbers.py); else the lowest
    free one.
    """

    fd: int
    cloexec: bool
    numbered: bool = False


class InjectPair(NamedTuple):
    """The call gives the target copies of both of @pair, which are closed then, and writes their numbers at @address.

    @caller: the thread that waits for it.
    """

    pair: tuple[int, int]
    cloexec: bool
    caller: Caller
    address: int


class Replace(NamedTuple):
    """Put copies of our socket @fd in the place of one of the target's, close @fd, and end the call with @then."""

    fd: int
    inode: int  # of the target's socket
    numbers: list[tuple[int, bool]]  # (descriptor, close-on-exec) of each place
    watches: list[Watch]
    then: "Proceed | Answer"


Action = Proceed | Answer | Inject | InjectPair | Replace
PROCEED = Proceed()
