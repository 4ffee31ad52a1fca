"""What graft-front asks: what is left to do for a `graft run` (csrc/front.c)."""

import os
from collections.abc import Callable, Sequence

from graft import protocol
from graft.errors import Refused, UsageError

NeedsTraps = Callable[[Sequence[str], Sequence[str]], bool]
# graft/commands/plan.py, plan(); this wing does not import commands
Planner = Callable[[bytes, str, bool, NeedsTraps], bytes]


def plan_document(
    planner: Planner | None, request: protocol.Plan, *, direct: bool, needs_traps: NeedsTraps
) -> dict[str, str]:
    """The answer to @request. @direct: graft.toml says that containers are. @needs_traps: do rules of ingress and
    egress need the traps of the swap path? Raises GraftError: the program in Python has to do it.
    """
    if not planner:
        raise Refused("this graftd makes no plans", hint="graftd --replace", code="EOPNOTSUPP")
    try:
        words, default = bytes.fromhex(request.words), bytes.fromhex(request.direct)
    except ValueError:
        raise UsageError("the words are not in hex") from None
    return {
        "plan": planner(words, os.fsdecode(default), direct, needs_traps).hex()
    }  # csrc/front.c looks for it at this place
