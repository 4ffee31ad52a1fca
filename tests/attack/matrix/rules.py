"""What each cell of the matrix may come to: rules by row, call and who, in place of a list of expectations.

The oracle is the same program in a plain namespace of its own, with the same privileges and no graft.
"""

import re
from collections.abc import Callable
from typing import Any

from tests.attack.matrix import calls

Outcome = str
Rule = Callable[[Outcome, Outcome], bool]

# Options by what they would reach: a device, a mark, a source, a route, a group, a firewall of the host's
FORBIDDEN = {
    1: {1, 25, 32, 33, 36, 62, 69, 70, 75, 82},
    0: {3, 4, 7, 15, 16, 17, 19, 32, *range(35, 49), 50, 51, *range(64, 2000)},
    41: {1, 6, 17, 20, 21, 27, 28, 32, 34, 35, 36, *range(42, 49), 50, 54, 55, 57, 59, 64, 65, 75, 76, 78, *range(79, 2000)},
    6: {19, 20, 21, 22, 29, 42}, 17: {100, 105},
}  # fmt: skip
FIREWALL = {0: set(range(64, 2000)), 41: {64, 65, 68, 69, *range(80, 2000)}}
# Answers that are numbers of the moment, of the machine or of the socket's netns: compared by length and needles alone
VARIES = {
    1: {3, 4, 7, 8, 17, 28, 38, 39, 47, 49, 55, 56, 57, 59, 71, 77, 78, 80, 83},
    0: {2, 14, 15, 24, 52}, 41: {16, 24, 26, 61, 78}, 6: {2, 11, 12, 13, 24, 25, 26, 28, 35, 43}, 270: {9},
}  # fmt: skip
NOBODY = {
    "EADDRNOTAVAIL", "ENETUNREACH", "EHOSTUNREACH", "ECONNREFUSED", "EPERM", "EACCES", "ENOPROTOOPT", "ENODEV", "EOPNOTSUPP", "ENOTTY",
    "EINVAL", "ENOENT", "EAFNOSUPPORT", "EISCONN", "EDESTADDRREQ", "EFAULT", "ENOTCONN", "EPIPE", "ENOMEM", "ENOSYS", "EAGAIN",
    "EMSGSIZE", "ENXIO", "EBADF", "ENOBUFS", "EPROTONOSUPPORT", "ENOTSUPP", "EBUSY", "EADDRINUSE", "EALREADY", "EPROTO", "EDOM",
}  # fmt: skip
# What docs/security.md has as a known gap, by row and by call and outcome. One that is not found any more fails.
GAPS = {
    "a mark by a control message": (". udp", r"the host: .*meta mark"),
    "a priority by a control message": (". udp", r"the host: .*meta priority"),
    "IPV6_FREEBIND of a disconnected socket": ("disconnected 6", r"set\(41, 78, "),
}  # fmt: skip
# of sockets that graft-sup makes
TRAP_ONLY = ("IPV6_FREEBIND of a disconnected socket",)
HOSTS = ("host", "hosts udp", "client", "second", "mapped host", "mapped hosts udp", "mapped client", "mapped second")


def gap_of(row: str, what: str) -> str:
    """The known gap that this is, "" for none. @what: a call and what came of it, or a change of the host."""
    return next((name for name, (rows, told) in GAPS.items() if re.search(rows, row) and re.search(told, what)), "")


def same(outcome: Outcome, oracle: Outcome) -> bool:
    """As without graft; a call that fails there may fail by graft's hand here."""
    return outcome == oracle or (outcome in ("EPERM", "ENOPROTOOPT") and oracle[:2] != "OK")


def succeeds_alike(outcome: Outcome, oracle: Outcome) -> bool:
    """As without graft, whatever the value is."""
    return same(outcome, oracle) or outcome[:2] == oracle[:2] == "OK"


def refused(outcome: Outcome, oracle: Outcome) -> bool:
    """Any errno."""
    return not outcome.startswith("OK")


def same_or_refused(outcome: Outcome, oracle: Outcome) -> bool:
    """As without graft, or a refusal."""
    return outcome == oracle or outcome in NOBODY


def own(outcome: Outcome, oracle: Outcome) -> bool:
    """Its own namespace, or its own loopback, where the oracle has none."""
    return outcome == oracle or outcome in (*NOBODY, "EINPROGRESS") or outcome.startswith(("OK", "not made"))


def lone(outcome: Outcome, oracle: Outcome) -> bool:
    """Its own namespace, which has one device, or a refusal."""
    return "another" not in outcome


def anything(outcome: Outcome, oracle: Outcome) -> bool:
    """Whoever has the socket has what its owner gave; the host and the needles are looked at all the same."""
    return True


def rule_of(row: str, call: tuple[Any, ...], place: str) -> Rule | None:
    """The rule for a cell; None if there is none."""
    kind = row.split()[0]
    if kind == "native":
        if call[0] in ("set", "get") and call[2] in VARIES.get(call[1], ()):
            return succeeds_alike
        return same if call[0] != "ioctl" or call[1] in (*calls.OWN, *calls.QUESTIONS) else anything
    table = {
        "set": _set, "get": _get, "ioctl": _ioctl, "bind": _bind, "connect": _connect, "send": _connect, "names": _names,
        "listen": _names, "shutdown": _names, "disconnect": _names, "noted": _noted,
    }  # fmt: skip
    decide = table.get(call[0])
    return decide(kind, row, call, place) if decide else None


def _set(kind: str, row: str, call: tuple[Any, ...], place: str) -> Rule:
    _, level, number, value, length = call
    if kind == "unix":
        return anything  # a unix socket is in the container's own namespace
    if kind == "graft" and level in (0, 6, 17, 41):
        return own
    if level == calls.GRAFT:
        return anything if kind == "graft" else refused
    if level not in FORBIDDEN:
        return same_or_refused
    if number in FORBIDDEN.get(level, ()) and not any(value[:length]):
        return same_or_refused  # its default, which asks for nothing
    if number in FORBIDDEN.get(level, ()) or (level == 6 and number == 31 and value != b"tls"):
        return refused
    if level == 1 and number == 12 and int.from_bytes(value[:4], "little") > 6:
        return refused
    return succeeds_alike if number in VARIES.get(level, ()) else same


def _get(kind: str, row: str, call: tuple[Any, ...], place: str) -> Rule:
    _, level, number, _ = call
    if kind == "unix":
        return anything
    if level == calls.GRAFT:
        return anything if kind == "graft" else refused
    if kind == "graft":
        return own
    if number in FIREWALL.get(level, ()):
        return refused
    return succeeds_alike if number in VARIES.get(level, ()) else same


def _ioctl(kind: str, row: str, call: tuple[Any, ...], place: str) -> Rule:
    request, value = call[1], call[2]
    if place == "outside":
        return anything  # no trap is there; what a process may change of the host is its own privilege
    if request in calls.OWN:
        return own if kind in ("unix", "graft") else same
    if request in (0x8910, 0x894B, calls.GSKNS):
        return lone
    if request in calls.QUESTIONS:
        return same if value[:2] == b"lo" and kind != "unix" else same_or_refused
    return anything if kind == "unix" else refused  # a unix socket is in the container's own namespace


def _bind(kind: str, row: str, call: tuple[Any, ...], place: str) -> Rule:
    return own


def _connect(kind: str, row: str, call: tuple[Any, ...], place: str) -> Rule:
    elsewhere = call[1].partition(", ")[0] in HOSTS and call[0] == "connect"
    return refused if elsewhere and place != "host" and kind not in ("swapped", "unix", "graft") else own


def _names(kind: str, row: str, call: tuple[Any, ...], place: str) -> Rule:
    if kind in ("swapped", "unix", "graft"):
        return anything
    return same if call[0] in ("names", "shutdown") and kind not in ("disconnected",) else own


def _noted(kind: str, row: str, call: tuple[Any, ...], place: str) -> Rule:
    return anything  # who listens on the host is looked at


def reached(place: str, where: str, source: str) -> bool:
    """May a program of a container have been at the host's server @where, of witness.py, with this @source address?"""
    ours = ("10.77.0.1", "10.77.0.3")
    return place == "host" and source in ours and where in ("('0.0.0.0', 9100)", "('0.0.0.0', 9102)")
