"""What differs by design, each with an identifier that docs/differences.md explains.

A rule is asked about the first call of a sequence that differs. What follows is not compared: the sockets are in different
states. A rule that no sequence of the test needs, or that the document does not explain, fails the test.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.system.differential.compare import Difference
from tests.system.differential.sequences import Call

Where = list[Any]
CONNECTS = ("connect", "begin")
NO_WAY = ("EADDRNOTAVAIL", "ENETUNREACH")


@dataclass
class State:
    """A socket before the call that differs, by what the host has answered."""

    family: str = ""
    kind: str = ""
    bound: Where | None = None
    accepted: bool = False
    listens: bool = False
    shut: bool = False  # while it listened
    connected: list[Where] = field(default_factory=list)
    refused: list[Where] = field(default_factory=list)
    sent: list[Where] = field(default_factory=list)
    undone: int = 0  # disconnects
    options: list[tuple[int, int]] = field(default_factory=list)


def address(where: Where | None) -> str:
    """The address of a destination, without ::ffff:."""
    return str(where[1]).removeprefix("::ffff:") if where else ""


def loops(where: Where | None) -> bool:
    """Is it on the loopback?"""
    return address(where).startswith("127.") or address(where) == "::1"


def is_any(where: Where | None) -> bool:
    """Is it the wildcard?"""
    return address(where) in ("0.0.0.0", "::")


def flat(calls: list[Call], answers: list[str]) -> Iterator[tuple[Call, str]]:
    """The calls, those of a child among them; a child's answers are not taken apart."""
    for call, answer in zip(calls, answers, strict=True):
        if call[0] == "fork":
            yield from flat(call[1], ["?"] * len(call[1]))
        else:
            yield call, answer


def states(calls: list[Call], answers: list[str]) -> dict[int, State]:
    """The sockets after these calls."""
    all_of: dict[int, State] = {}
    for call, answer in flat(calls, answers):
        what, *rest = call
        if what == "socket":
            all_of[rest[0]] = State(rest[1], rest[2])
            continue
        if not rest or rest[0] not in all_of:
            continue
        sock = all_of[rest[0]]
        if what == "bind" and answer in ("0", "?"):
            sock.bound = rest[1]
        elif what in CONNECTS and rest[1][0] == "UNSPEC":
            sock.undone += 1
        elif what in CONNECTS:
            (sock.connected if answer in ("0", "?") else sock.refused).append(rest[1])
        elif what == "send" and len(rest) > 2:
            sock.sent.append(rest[2])
        elif what == "listen":
            sock.listens = True
        elif what == "shutdown":
            sock.shut = sock.shut or sock.listens
        elif what in ("dup", "hand"):
            all_of[rest[1]] = sock
        elif what == "accept":
            all_of[rest[1]] = State(sock.family, sock.kind, accepted=True)
        elif what == "set":
            sock.options.append((rest[1], rest[2]))
    return all_of


class Case:
    """A difference, taken apart for the rules."""

    def __init__(self, found: Difference) -> None:
        self.variant = found.variant
        calls, hosts, grafts = found.calls[: found.at], found.host[: found.at], [found.graft[found.at]]
        last, answers = [found.call], [found.host[found.at]]
        if found.call[0] == "fork":  # the child's calls are calls like others
            last, answers, grafts = found.call[1], answers[0].split(", "), grafts[0].split(", ")
        at = next((n for n, (one, other) in enumerate(zip(answers, grafts, strict=False)) if one != other), 0)
        call, self.host, self.graft = last[at], answers[at], grafts[at]
        self.call = call
        self.sockets = states(calls + last[:at], hosts + answers[:at])
        self.what = call[0]
        self.sock = self.sockets.get(call[1], State()) if len(call) > 1 and isinstance(call[1], int) else State()
        place = {"connect": 2, "begin": 2, "bind": 2, "send": 3}.get(self.what, 99)
        self.to: Where | None = call[place] if len(call) > place else None

    def of_call(self) -> list[State]:
        """The socket of the call, the one whose port it names, and whoever could have sent what it receives."""
        port = self.to[2] if self.to else None
        target = [self.sockets.get(int(port[1:]), State())] if isinstance(port, str) else []
        return [self.sock, *target, *(other for other in self.sockets.values() if self.what == "recv" and other.kind == "DGRAM")]


def refused_option(case: Case) -> bool:
    return (case.what == "set" and case.graft in ("EPERM", "ENOENT")) or (case.what == "get" and case.graft == "EPERM")


def bind_unspec(case: Case) -> bool:
    return case.what == "bind" and case.to is not None and case.to[0] == "UNSPEC" and case.graft == "EAFNOSUPPORT"


def own_dual(case: Case) -> bool:
    dual = case.variant == "ip" and (case.sock.family, case.sock.kind, address(case.sock.bound)) == ("INET6", "DGRAM", "::")
    beyond = address(case.to).startswith(("out", "own")) or is_any(case.to)
    return dual and beyond and case.graft in NO_WAY


def from_loopback6(case: Case) -> bool:
    return address(case.sock.bound) == "::1" and case.graft in NO_WAY


def own_from_loopback(case: Case) -> bool:
    local = loops(case.sock.bound) or any(loops(where) or is_any(where) for where in case.sock.connected)
    return local and address(case.to).startswith("own") and case.graft in ("EINVAL", "ECONNREFUSED", *NO_WAY)


def own_autobind(case: Case) -> bool:
    return case.variant == "ip" and case.sock.kind == "DGRAM" and case.sock.bound is None and case.graft == "EADDRNOTAVAIL"


def refused_connection(case: Case) -> bool:
    if case.what == "peer":  # it has connected to the port of such a socket
        ports = [where[2] for where in case.sock.connected if isinstance(where[2], str)]
        return any(case.sockets.get(int(port[1:]), State()).refused for port in ports)
    if not case.sock.refused:
        return False
    if case.what in CONNECTS:
        return case.host in ("ECONNABORTED", "nobody answers")
    return case.what == "name" or (case.sock.kind == "STREAM" and case.what in ("recv", "send", "listen", "bind", "shutdown"))


def listener(case: Case) -> bool:
    return case.what == "recv" and case.sock.listens and (case.host, case.graft) == ("ENOTCONN", "EAGAIN")


def shut_listener(case: Case) -> bool:
    chosen = case.sock.bound is None or case.sock.bound[2] == 0
    return case.sock.shut and chosen and case.what in ("bind", "name", "listen", *CONNECTS)


def port_zero(case: Case) -> bool:
    if case.sock.kind != "DGRAM" or not case.sock.connected:
        return False
    return (case.what == "peer" and case.host == "ENOTCONN") or (case.what == "send" and case.host == "EINVAL" and case.graft.isdigit())


def two_places(case: Case) -> bool:
    return case.what == "bind" and case.sock.kind == "DGRAM" and (case.host, case.graft) == ("EADDRINUSE", "0")


def disconnected(case: Case) -> bool:
    if case.what == "bind" and "EADDRINUSE" in (case.host, case.graft):
        return any(one.undone for one in case.sockets.values())
    return any(one.undone for one in case.of_call())


def second_destination(case: Case) -> bool:
    here = 1 if case.to else 0
    if case.what not in ("name", "peer", "recv", "send", *CONNECTS):
        return False
    return any(len(one.connected) + len(one.refused) + len(one.sent) + here > 1 for one in case.of_call())


def dual_stack(case: Case) -> bool:
    if case.what == "hear":
        return any(address(one.bound) == "::" for one in case.sockets.values())
    if case.what == "recv" and case.host == "EAGAIN":  # IPv4's is found at ::1
        asked = [where for one in case.of_call() for where in (*one.connected, *one.sent)]
        return any(address(where) in ("::1", "::") for where in asked)
    if case.what == "accept" and "[::ffff:127.0.0.1]" in case.graft:  # from a socket on [::] that has asked for ::1
        return any(address(one.bound) == "::" and one.connected for one in case.sockets.values())
    return case.sock.family == "INET6" and address(case.sock.bound) == "::" and case.what != "bind"


def unbound_datagrams(case: Case) -> bool:
    bound = case.sock.bound
    hears = case.sock.kind == "DGRAM" and (bound is None or (is_any(bound) and bound[2] == 0))
    return case.what == "recv" and hears and case.host[0] == "'" and case.graft == "EAGAIN"


def unpublished(case: Case) -> bool:
    here = address(case.to).startswith("own") and isinstance(case.to[2], str) if case.to else False
    return case.variant == "published" and here and (case.host, case.graft) == ("0", "ECONNREFUSED")


def own_source(case: Case) -> bool:
    told = (case.host, case.graft)
    loop = any("[::1]" in text or "127.0.0.1" in text for text in told)
    return case.variant == "ip" and case.what in ("recv", "accept", "peer") and any("own" in text for text in told) and loop


def self_connect(case: Case) -> bool:
    bound = case.sock.bound
    return case.what in CONNECTS and is_any(bound) and (case.host, case.graft) == ("0", "ECONNREFUSED")


# In this order: the first one that holds explains the difference
RULES: dict[str, Callable[[Case], bool]] = {
    "refused-option": refused_option,
    "bind-unspec": bind_unspec,
    "refused-connection": refused_connection,
    "listener": listener,
    "shut-listener": shut_listener,
    "two-places": two_places,
    "disconnected": disconnected,
    "from-loopback6": from_loopback6,
    "own-from-loopback": own_from_loopback,
    "own-dual": own_dual,
    "own-autobind": own_autobind,
    "dual-stack": dual_stack,
    "unbound-datagrams": unbound_datagrams,
    "unpublished": unpublished,
    "own-source": own_source,
    "self-connect": self_connect,
    "port-zero": port_zero,
    "second-destination": second_destination,
}


def rule_of(found: Difference) -> str:
    """The first rule that holds; "" if none does."""
    case = Case(found)
    return next((name for name, holds in RULES.items() if holds(case)), "")
