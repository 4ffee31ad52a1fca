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
    if what in ("live", "hide"):
        from graft.commands import live

        error, _, path = command.partition(" ")
        raise live.not_entered(int(error)) if what == "live" else live.not_hidden(int(error), path)
    if what.isdigit():
        raise not_executed(command, OSError(int(what), os.strerror(int(what))))
    raise told(json.loads(reply)["error"])


def main() -> int:
    """Say why, and return the exit status. The argument is graftd's answer, or what csrc/front.c has in its place."""
    return guarded("graft", lambda: _raise(sys.argv[1]))
