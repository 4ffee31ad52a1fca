"""What is left to do for a `graft run`, read in graftd on behalf of graft-front (csrc/front.c).

The words are read by click and by graft/commands/run.py, as in the program in Python; they are root's own. What takes
another step in the caller's process than the common ones is refused here, and then that program does it: an option of
APART. Nothing here looks at a file, a user or the network: graftd's loop waits.
"""

import copy
import json
import os
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import click

from graft import __version__
from graft.client import run_directory
from graft.commands.launch import message_of
from graft.commands.run import command as run_command
from graft.commands.run import plan_of
from graft.errors import Refused
from graft.rules.request import DIRECT
from graft.trap import filter

APART = ("netns", "user", "policies", "ip", "force_ip", "sysctl", "learn")
HEAD = struct.Struct("=III")  # struct plan of csrc/front.c
MODE_DIRECT, MODE_ACCEL = 1, 2  # PLAN_*
PLAIN = re.compile(r"[\w/.+:@~-]+", re.ASCII)  # a run directory that csrc/front.c reads in an answer

_command = copy.copy(run_command)
_command.add_help_option = False  # which would print here
_command.params = [copy.copy(parameter) for parameter in run_command.params]
for _parameter in _command.params:
    if isinstance(_parameter.type, click.Path):
        _parameter.type = click.STRING  # which looks at no file


def plan(
    words: bytes,
    default_direct: str,
    configured_direct: bool,
    needs_traps: Callable[[Sequence[str], Sequence[str]], bool],
) -> bytes:
    """The plan of csrc/front.c for `graft run` with @words, separated by zero bytes.

    @default_direct: GRAFT_DIRECT of the caller. @configured_direct: what graft.toml says. @needs_traps: do these
    rules of ingress and egress need the traps of the swap path? It may raise GraftError. Raises Refused for what the
    program in Python has to do, also if it is to tell what is wrong.
    """
    argv = [os.fsdecode(word) for word in words.split(b"\0")]
    try:
        parameters: dict[str, Any] = _command.make_context("run", list(argv)).params
    except (click.ClickException, click.exceptions.Exit):
        raise _apart() from None
    if any(parameters[name] for name in APART) or default_direct not in ("", "off", DIRECT):
        raise _apart()
    default = default_direct == DIRECT or (not default_direct and configured_direct)
    if default and not (parameters["no_direct"] or parameters["accel"]):
        parameters["direct"] = DIRECT
    if not parameters["direct"]:
        parameters["no_direct"] = True  # or plan_of() would ask what the default is here
    made = plan_of(**parameters)
    direct = bool(made.request.direct)
    if direct and not PLAIN.fullmatch(run_directory()):
        raise _apart()
    request = made.request
    traps = bool(request.ingress or request.egress) and needs_traps(request.ingress, request.egress)
    program = filter.program(swap=traps, direct=direct)
    message = {"op": "run", "version": __version__, **message_of(made, traps_addresses=traps)}
    text = json.dumps(message, ensure_ascii=False).encode(errors="replace") + b"\n"
    modes = direct * MODE_DIRECT | made.accel * MODE_ACCEL
    return HEAD.pack(len(argv) - len(made.argv), len(program), modes) + program + text


def _apart() -> Refused:
    return Refused("the program in Python does this", code="EOPNOTSUPP")
