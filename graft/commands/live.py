"""What the process of a container does to what it sees: by csrc/live.c, as in graft-front."""

import ctypes
import os
from pathlib import Path

from graft.errors import Failure, from_oserror

LIVE = Path(__file__).parents[1] / "graft-live.so"
NO_POLICY, NO_CGROUP2 = -1, -2  # LIVE_*


def enter(home: int, netns: int, procfs: str) -> None:
    """Go to the netns @home, the host's; @netns is the container's. Both descriptors are closed.

    @procfs: the link that graftd keeps for /proc/net. Raises Failure.
    """
    error = _library().live_in_host(home, netns, os.fsencode(procfs))
    if error:
        raise not_entered(error)


def hide_name_services(*, as_user: bool) -> None:
    """Hide the host's name services, past which the C library asks no nameserver. @as_user: without root.

    Raises Failure.
    """
    which = ctypes.c_char_p()
    error = _library().hide_name_services(as_user, ctypes.byref(which))
    if error:
        raise not_hidden(error, os.fsdecode(which.value or b""))


def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(LIVE))
    except OSError:
        raise Failure(f"{LIVE} is not built", hint="run 'make build'", code="ENOENT") from None


def not_entered(error: int) -> Failure:
    """Why live_in_host() has returned @error."""
    if error == NO_POLICY:
        return Failure(
            "the policy does not hold in this container's cgroup",
            hint="see graftd's log; without --direct it needs no cgroup of its own",
            code="EPERM",
        )
    if error == NO_CGROUP2:
        from graft.kernel.cgroup import no_cgroup2

        return no_cgroup2()
    return from_oserror(
        "live in the host's network namespace", OSError(error, os.strerror(error)), hint="omit --direct"
    )


def not_hidden(error: int, path: str) -> Failure:
    """Why hide_name_services() has returned @error for @path."""
    return from_oserror(f"hide {path}, which tells names beside graft's resolver", OSError(error, os.strerror(error)))
