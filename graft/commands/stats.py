"""`graft stats`: what containers have carried and been refused so far."""

from typing import Any

import click

from graft.client import call
from graft.commands.options import CONTEXT, complete_container, json_option, print_json, say_rows
from graft.commands.sockets import amount
from graft.errors import Refused

COLUMNS = (
    "CONTAINER",
    "SOCKETS",
    "OPEN IN/OUT",
    "CONNECTIONS IN/OUT",
    "RECEIVED",
    "SENT",
    "UDP RECEIVED/SENT",
    "LIMIT",
    "REFUSED",
    "CALLS",
    "PER CALL",
)


@click.command(context_settings=CONTEXT)
@click.argument("name", required=False, shell_complete=complete_container)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """Print what container NAME, or each, has done since its start: sockets, TCP connections in and out, bytes,
    refusals, and the calls that graft has answered for it. `graftd --metrics` has the same for Prometheus.

    \b
    graft stats
    graft stats web
    graft stats -j | jq '.[] | {name, sent, received}'
    """
    found: list[dict[str, Any]] = call("stats", start=False)
    if name is not None:
        found = [one for one in found if one["name"] == name]
        if not found:
            raise Refused(f"no container named '{name}'", hint="'graft ps' lists them", code="ENOENT")
    if as_json:
        print_json(found)
        return
    say_rows([COLUMNS, *map(_row, found)])


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    calls = one["trapped_calls"]
    return (
        one["name"],
        str(one["sockets"]),
        f"{one['open_in']}/{one['open_out']}",
        f"{one['accepted']}/{one['connected']}",
        amount(one["received"]),
        amount(one["sent"]),
        f"{amount(one['udp']['bytes_received'])}/{amount(one['udp']['bytes_sent'])}"
        if any(one["udp"].values())
        else "-",
        f"{amount(one['rate'])}/s" if one["rate"] else "-",
        str(sum(each["count"] for each in one["refused"])),
        str(calls),
        f"{one['trapped_call_seconds'] / calls * 1e6:.0f} us" if calls else "-",
    )
