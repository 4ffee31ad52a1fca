"""The seccomp filter of a target (seccomp(2)), assembled from graft/kernel/traps.py, where the reasons are.

Tests of arguments read 32 bits, as the kernel does for int parameters. The module is pure: `program()` returns struct
sock_filter records (linux/filter.h).
"""

from collections.abc import Iterable

from graft.kernel import traps
from graft.kernel.architecture import HERE
from graft.kernel.cbpf import (
    AND_K,
    JEQ_K,
    JGE_K,
    LD_W_ABS,
    OFFSET_ARCH,
    OFFSET_ARGS,
    OFFSET_NR,
    RET_ALLOW,
    RET_ERRNO,
    RET_K,
    RET_KILL_PROCESS,
    RET_USER_NOTIF,
    Assembler,
)
from graft.kernel.traps import FILTER, TOP, Condition

Ways = tuple[tuple[Condition, ...], ...]  # a call is trapped if all conditions of one way hold
ALWAYS: tuple[Condition, ...] = ()


def program(*, swap: bool = False, direct: bool = False, follows: bool = False) -> bytes:
    """The filter of a target. @swap: it also traps what `traps.Trap.when` calls "addresses". @direct, @follows: as
    traps.active() has them.
    """
    calls = {call.name: call for call in traps.CALLS}
    ways = {
        name: _ways(rows)
        for name, rows in traps.active(FILTER, addresses=swap, direct=direct, follows=follows).items()
    }
    blocks = _blocks(ways.values())
    refused = [r for r in traps.REFUSED if FILTER in r.forms and r.known() and (direct or not r.direct)]
    a = Assembler()
    a.op(LD_W_ABS, OFFSET_ARCH)
    a.op(JEQ_K, HERE.audit, true="native")
    a.op(JEQ_K, HERE.compat.audit, false=_refusals(refused, "other")[None])
    a.op(LD_W_ABS, OFFSET_NR)
    known = {HERE.compat.numbers[name]: blocks[way] for name, way in ways.items() if calls[name].compat}
    _numbers(a, [*_refusals(refused, "compat").items(), *known.items()])
    a.label("native")
    a.op(LD_W_ABS, OFFSET_NR)
    if HERE.x32:
        a.op(JGE_K, HERE.x32, true=_refusals(refused, "x32")[None])
    native = {calls[name].number: blocks[way] for name, way in ways.items()}
    _numbers(a, [*native.items(), *_refusals(refused, "native").items()])
    for way, label in blocks.items():
        if way and ALWAYS not in way:
            _block(a, label, way[0], blocks[way[1:]])
    a.label("notify")
    a.op(RET_K, RET_USER_NOTIF)
    for error in dict.fromkeys(refusal.error for refusal in refused):
        a.label(_verdict(error))
        a.op(RET_K, RET_ERRNO | error if error else RET_KILL_PROCESS)
    a.label("allow")
    a.op(RET_K, RET_ALLOW)
    return a.assemble()


def _verdict(error: int) -> str:
    return f"errno {error}" if error else "kill"


def _refusals(refused: Iterable[traps.Refusal], abi: str) -> dict[int | None, str]:
    """The labels to which the refused calls of an ABI lead, by number; None: all of its calls."""
    return {refusal.number(): _verdict(refusal.error) for refusal in refused if refusal.abi == abi}


def _numbers(a: Assembler, labels: Iterable[tuple[int | None, str]]) -> None:
    """Jump to the label of the call whose number is loaded; without one, allow it."""
    *before, last = [(number, label) for number, label in labels if number is not None]
    for number, label in before:
        a.op(JEQ_K, number, true=label)
    a.op(JEQ_K, last[0], true=last[1], false="allow")


def _ways(rows: Iterable[traps.Trap]) -> Ways:
    """What traps a call. Neighbours that test the same bits of one argument become one way, which loads them once."""
    ways: list[tuple[Condition, ...]] = []
    for row in rows:
        before = ways[-1] if ways else ALWAYS
        if len(before) == len(row.conditions) == 1:
            old, new = before[0], row.conditions[0]
            if (old.argument, old.mask, old.upper) == (new.argument, new.mask, new.upper):
                ways[-1] = (old._replace(ranges=old.ranges + new.ranges),)
                continue
        ways.append(row.conditions)
    return (ALWAYS,) if ALWAYS in ways else tuple(ways)


def _blocks(all_ways: Iterable[Ways]) -> dict[Ways, str]:
    """The labels of the pieces of code that try one way after another, in an order in which all jumps go forward.

    Calls that end with the same ways share the code of these.
    """
    tails = dict.fromkeys(ways[at:] for ways in all_ways for at in range(len(ways)))
    ordered = sorted(tails, key=len, reverse=True)
    labels = {ways: "notify" if ALWAYS in ways else f"ways {at}" for at, ways in enumerate(ordered)}
    return labels | {(): "allow"}


def _block(a: Assembler, label: str, conditions: tuple[Condition, ...], otherwise: str) -> None:
    """Notify if all @conditions hold, else go to @otherwise."""
    for at, condition in enumerate(conditions):
        a.label(f"{label}, {at}" if at else label)
        _test(a, condition, f"{label}, {at + 1}" if at + 1 < len(conditions) else "notify", otherwise)


def _test(a: Assembler, condition: Condition, yes: str, no: str) -> None:
    a.op(LD_W_ABS, OFFSET_ARGS + 8 * condition.argument + (4 if condition.upper else 0))
    if condition.mask != TOP:
        a.op(AND_K, condition.mask)
    ranges = condition.ranges
    if all(first == last for first, last in ranges):
        for value, _ in ranges[:-1]:
            a.op(JEQ_K, value, true=yes)
        a.op(JEQ_K, ranges[-1][0], true=yes, false=no)
        return
    borders: list[tuple[int, str]] = []  # each with where a value below it leads that is not below the one before
    for first, last in ranges:
        borders += [(first, no)] if first else []
        borders += [(last + 1, yes)] if last < TOP else []
    above = yes if ranges[-1][1] == TOP else no
    for at, (border, below) in enumerate(borders):
        a.op(JGE_K, border, true=above if at + 1 == len(borders) else None, false=below)
