"""`graft ps`: a table of the running containers."""

import json
import shlex
import time
from typing import Any

import click

from graft.client import call, run_directory
from graft.commands.options import CONTEXT, json_option, print_json, say_rows
from graft.errors import Failure
from graft.text import listed, plain

COLUMNS = ("NAME", "PID", "STATUS", "ADDRESS", "PORTS", "ENDPOINTS", "COMMAND")
COMMAND_WIDTH = 40


@click.command(context_settings=CONTEXT)
@json_option
def command(as_json: bool) -> None:
    """List running containers.

    \b
    graft ps
    graft ps -j | jq -r '.[].name'
    """
    try:
        containers: list[dict[str, Any]] = call("ps", start=False)
    except Failure as error:
        if error.code != "ECONNREFUSED":
            raise
        containers = []
        _check_none_is_left()
    if as_json:
        print_json(containers)
        return
    say_rows([COLUMNS, *map(_row, containers)])


def _check_none_is_left() -> None:
    """Raise Failure if graftd's state file says that it supervised containers when it ended.

    Without graftd no container runs, unless graftd was stopped by force, or killed together with its keeper.
    """
    try:
        with open(f"{run_directory()}/state.json") as state:
            left = json.load(state)["tenants"]
    except (OSError, ValueError, KeyError):
        return
    if left:
        names = listed([t["name"] for t in left])
        raise Failure(f"graftd is not running; it was supervising {len(left)}: {names}", hint="start it: graftd")


def _row(c: dict[str, Any]) -> tuple[str, ...]:
    line = " ".join(shlex.join(c["command"]).split()) or "-"
    line = plain(line)
    if len(line) > COMMAND_WIDTH:
        line = line[: COMMAND_WIDTH - 3] + "..."
    status = f"{c['status']} {_ago(time.time() - c['started'])}{', direct' if c.get('cgroup') else ''}"
    lists = (",".join(c[key]) or "-" for key in ("addresses", "publish", "named_endpoints"))
    return (*map(plain, (c["name"], str(c["pid"]), status, *lists)), line)


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"
