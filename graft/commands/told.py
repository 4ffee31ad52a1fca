"""What graft-front says when a container does not start: it has no words of its own (csrc/front.c)."""

import json
import os
import sys
from typing import NoReturn

from graft.client import REPLY_TIMEOUT, run_directory, told
from graft.commands.launch import not_executed
from graft.commands.options import guarded
from graft.errors import Failure


def _raise(reply: str) -> NoReturn:
    what, _, command = reply.partition(" ")
    if reply == "gone":
        raise Failure("graftd closed the connection", hint=f"see {run_directory()}/graftd.log", code="EPIPE")
    if reply == "late":
        raise Failure(f"graftd did not answer within {REPLY_TIMEOUT:.0f} s", code="ETIMEDOUT")
    if reply == "unhidden":
        raise Failure("the host's name services cannot be hidden", hint="mount(2) of /dev/null", code="EPERM")
    if what == "live":
        from graft.commands.live_direct import not_entered

        raise not_entered(int(command))
    if what.isdigit():
        raise not_executed(command, OSError(int(what), os.strerror(int(what))))
    raise told(json.loads(reply)["error"])


def main() -> int:
    """Say why, and return the exit status. The argument is graftd's answer, or what csrc/front.c has in its place."""
    return guarded("graft", lambda: _raise(sys.argv[1]))
