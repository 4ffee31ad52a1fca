"""The rows of the matrix, and which container has which. A row is written "KIND FAMILY TYPE STATE" (sockets.py)."""

from itertools import product

from tests.attack.matrix.sockets import STATES

OPTIONS, FEW = ("set", "get", "ioctl"), ("set few", "get few", "ioctl")
USE = ("bind", "connect", "send", "names")
MADE = [f"socket {family} {what} {state}" for family, what in product("46", STATES) for state in STATES[what]]
FRESH = [row for row in MADE if row.endswith("fresh")]
ACCEPTED = [f"{kind} {family} tcp connected" for kind in ("accepted", "disconnected") for family in "46"]
GIVEN = [f"neighbour {row}" for row in ("4 tcp fresh", "6 tcp listening", "6 udp fresh", "4 udp connected")]
GIVEN += [f"host {row}" for row in ("4 tcp fresh", "6 udp fresh", "4 udp connected")]
NATIVE = [
    f"native {what} fresh" for what in ("4 raw", "6 raw", "4 icmp", "6 icmp", "4 packet", "4 netlink", "4 stream", "4 dgram", "4 pair")
]  # fmt: skip
AWAY = ["swapped 4 tcp connected", "unix 4 tcp connected"]
FAMILY = [f"graft 4 {what} {state}" for what in STATES for state in ("fresh", "named")] + ["graft 4 tcp leaving"]
PASSED = [row.replace("socket", "passed", 1) for row in FRESH]


# What a container is for (laboratory.py has its options), and its rows
CONTAINERS = {
    "none": [*MADE, *ACCEPTED, "dup 4 tcp fresh", "dup 6 udp fresh", *GIVEN, *NATIVE],
    "host": [*MADE, *ACCEPTED],
    "graftd": FRESH,  # a wrapper is inside: graft-sup leaves socket() to graftd
    "accel": FRESH,
    "away": [*AWAY, *FAMILY],
    "outside": PASSED,  # a program beside the container "none" of its profile, which has its sockets
}
# In a direct container the programs make their sockets themselves. No wrapper and no --accel goes with it; the rows of
# these containers are those of "none" as well.
TRAP_ONLY = ("graftd", "accel")


def groups(row: str, place: str) -> tuple[str, ...]:
    """The columns that a row has in a container."""
    kind, family, _, state = row.split()
    noted = ("noted",) if family == "6" and state == "fresh" and kind in ("socket", "passed") else ()
    if kind == "native":
        return (*FEW, "names")
    if place == "none" and (kind == "accepted" or (kind == "socket" and state == "fresh")):
        return (*OPTIONS, *USE, *noted)
    if place == "host":
        return (*USE, *noted) if state in ("fresh", "connected") else ()
    if place == "away":  # graftd decides on each of these
        return ("set some", "get some", "ioctl", *USE)
    if place == "outside":
        return ("set few", "get few", *USE, *noted)
    if kind == "host":
        return ("ioctl",)  # for all else it is a socket of the host's, which the host has given away
    return (*FEW, *USE, *noted)


ROWS = list(dict.fromkeys(row for rows in CONTAINERS.values() for row in rows))
