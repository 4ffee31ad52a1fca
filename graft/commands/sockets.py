"""`graft sockets`: the open sockets of containers, with the processes that have them."""

import contextlib
import os
from collections import defaultdict
from typing import Any

import click

from graft.client import call
from graft.commands.options import CONTEXT, complete_container, json_option, print_json, say_rows

COLUMNS = ("CONTAINER", "PROTO", "STATE", "LOCAL", "PEER", "SENT", "RECEIVED", "IDLE", "PROCESS")
UNITS = ("", "K", "M", "G", "T", "P", "E")


@click.command(context_settings=CONTEXT)
@click.argument("name", required=False, shell_complete=complete_container)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the open TCP and UDP sockets of container NAME, or of all: what their programs asked for, and in
    parentheses the host's address where it is another one.

    \b
    graft sockets web
    graft sockets -j | jq '.[] | select(.state == "LISTEN") | .local'
    """
    sockets: list[dict[str, Any]] = call("sockets", start=False, name=name)
    holders = processes_by_socket({one["inode"] for one in sockets if one["inode"]})
    for one in sockets:
        one["processes"] = holders[one["inode"]]
    sockets = _named(sockets, name)
    sockets.sort(key=lambda one: (one["container"], one["protocol"], one["state"] != "LISTEN", one["local"]))
    if as_json:
        print_json(sockets)
        return
    say_rows([COLUMNS, *map(_row, sockets)])


def _named(sockets: list[dict[str, Any]], wanted: str | None) -> list[dict[str, Any]]:
    """Find the container of those of @sockets of which graftd does not know whose they are, by their processes."""
    if all(one["container"] for one in sockets):
        return sockets
    names = {each["netns"]: each["name"] for each in call("ps", start=False) if each["kind"] == "container"}
    for one in [one for one in sockets if not one["container"]]:
        for each in one["processes"]:
            with contextlib.suppress(OSError):
                found = names.get(os.stat(f"/proc/{each['pid']}/ns/net").st_ino, "")
                one["container"] = found if wanted in (None, found) else ""
    return [one for one in sockets if one["container"]]


def processes_by_socket(wanted: set[int]) -> dict[int, list[dict[str, Any]]]:
    """The processes that have each of the sockets, by the socket's inode; those alone that the caller may look at."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    if not wanted:
        return found
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            seen = set()
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    kind, _, inode = os.readlink(entry.path).partition(":[")
                    if kind == "socket" and int(inode[:-1]) in wanted:
                        seen.add(int(inode[:-1]))
            if seen:
                with open(f"/proc/{pid}/comm", errors="replace") as name:
                    command_ = name.read().rstrip("\n")
                for inode_ in seen:
                    found[inode_].append({"pid": int(pid), "command": command_})
    return found


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    holders = ",".join(f"{each['command']}[{each['pid']}]" for each in one["processes"]) or "-"
    stream = one["protocol"] == "tcp" and one["state"] != "LISTEN"
    return (
        one["container"],
        one["protocol"],
        one["state"],
        _both(one["local"], one["local_real"]),
        _both(one["peer"], one["peer_real"]) or "-",
        amount(one["bytes_sent"]) if stream else "-",
        amount(one["bytes_received"]) if stream else "-",
        f"{one['idle']:.1f}s" if stream else "-",
        holders,
    )


def _both(asked: str, real: str) -> str:
    return asked if asked == real else f"{asked} ({real})"


def amount(count: float) -> str:
    """A number of bytes in at most five characters: 999, 1.2K, 34M."""
    unit = 0
    while count >= 1000 and unit < len(UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f}{UNITS[unit]}" if unit == 0 or count >= 10 else f"{count:.1f}{UNITS[unit]}"
