"""What `graft endpoint move` and `graft rule move` share."""

import time
from typing import Any

import click

from graft.client import call
from graft.commands.options import Command, Seconds, complete_container
from graft.errors import Refused

RETRY = 0.05  # seconds


def move_options(function: Command) -> Command:
    """Add the options --from, --to and --wait to a command."""
    for decorate in (
        click.option(
            "--wait",
            "seconds",
            type=Seconds(0, 86400),
            default=0.0,
            metavar="SECONDS",
            help="Wait so long for the server of --to to listen.",
        ),
        click.option(
            "--to",
            "target",
            required=True,
            metavar="CONTAINER",
            shell_complete=complete_container,
            help="The container that gets it.",
        ),
        click.option(
            "--from",
            "source",
            required=True,
            metavar="CONTAINER",
            shell_complete=complete_container,
            help="The container that has it.",
        ),
    ):
        function = decorate(function)
    return function


def hand_over(op: str, source: str, target: str, seconds: float, **what: Any) -> None:
    """Ask graftd for a move, again for @seconds while the target does not listen.

    Raises GraftError, and Refused where all is done, but the source may not be ended yet.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            done = call(op, start=False, source=source, target=target, **what)
            break
        except Refused as error:
            if error.code != "EAGAIN" or time.monotonic() > until:
                raise
        time.sleep(RETRY)
    if done["waiting"]:
        waiting = "connection waits" if done["waiting"] == 1 else "connections wait"
        raise Refused(
            f"it is handed over, but {done['waiting']} {waiting} for '{source}' to accept",
            hint=f"'graft sockets {source}' shows what is open",
            code="EBUSY",
        )
