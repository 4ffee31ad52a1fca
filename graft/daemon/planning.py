"""What graft-front asks: what is left to do for a `graft run` (csrc/front.c)."""

import os
from collections.abc import Callable

from graft import protocol
from graft.errors import Refused, UsageError

Planner = Callable[[bytes, str, bool], bytes]  # graft/commands/plan.py, plan(); this wing does not import commands


def plan_document(planner: Planner | None, request: protocol.Plan, *, direct: bool) -> dict[str, str]:
    """The answer to @request. @direct: graft.toml says that containers are. Raises GraftError: the program in Python
    has to do it.
    """
    if not planner:
        raise Refused("this graftd makes no plans", hint="graftd --replace", code="EOPNOTSUPP")
    try:
        words, default = bytes.fromhex(request.words), bytes.fromhex(request.direct)
    except ValueError:
        raise UsageError("the words are not in hex") from None
    return {"plan": planner(words, os.fsdecode(default), direct).hex()}  # csrc/front.c looks for it at this place
