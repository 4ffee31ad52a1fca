"""How the process of `graft run --direct` comes to live in the host's netns: by csrc/live.c, as in graft-front."""

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
    try:
        error = ctypes.CDLL(str(LIVE)).live_in_host(home, netns, os.fsencode(procfs))
    except OSError:
        raise Failure(f"--direct: {LIVE} is not built", hint="run 'make build'", code="ENOENT") from None
    if error:
        raise not_entered(error)


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
