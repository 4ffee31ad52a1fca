"""Merge graft's traps into an OCI seccomp profile (runtime-spec config-linux.md, "Seccomp"). Pure: no I/O.

Goal. The runtime installs one filter, made from the profile in config.json. That filter has to notify graftd of the
calls that graft traps (seccomp_unotify(2)), and has to refuse everything that the profile refuses.

Facts about libseccomp. Rules of one filter have no precedence. Beside an unconditional ALLOW for a call, a
conditional NOTIFY is dropped silently. Of two rules that overlap, either may win.

What does not work, therefore, is to add NOTIFY rules to the profile as it is.

Solution. The rules of each trapped call are taken out of the profile and put back disjoint:

  1. The value space of each argument that decides is cut at the borders of graft's traps and of the profile's own
     conditions. The kernel reads these arguments as 32 bits. Each piece is covered by aligned ranges, and each range
     is one SCMP_CMP_MASKED_EQ.
  2. The profile's verdict is looked up for each piece. Where it is ALLOW (or LOG) and graft traps, it becomes NOTIFY.
     Every other verdict stays.

What is trapped, and where that differs from the filter of `graft run`, stands in graft/kernel/traps.py.

What still fails: a profile that masks an argument of a trapped call, one with more than CONDITIONS_MAX conditions on
such calls, one that comes to more than RULES_MAX rules, and one with a listener of its own. All are refused.
"""

import errno
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from graft.errors import Refused
from graft.kernel import traps
from graft.kernel.architecture import HERE
from graft.kernel.traps import PROFILE, TOP, Range
from graft.rules.tables import port_prefixes

ALLOW, NOTIFY, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_NOTIFY", "SCMP_ACT_ERRNO"
PERMISSIVE = (ALLOW, "SCMP_ACT_LOG")
ARCHITECTURES = HERE.seccomp
CONDITIONS_MAX = 200  # conditions multiply: each one cuts the pieces of the others
RULES_MAX = 600  # engines' profiles come to 250; libseccomp takes seconds for 1,000 rules, and minutes for 3,000
REMEMBERED = 16  # merged profiles; an engine gives most containers the same one, and merging takes 2 to 4 ms

Profile = dict[str, Any]


class Caught(NamedTuple):
    """The values of one argument that are trapped.

    @argument: its index, from 0. @ranges: values that are trapped whatever the other arguments are, first and last
    included. @inside: for a range of values, the trap on another argument that decides there. @mask: what is
    compared. @plain: the same without a mask, for a profile that has conditions on this argument.
    """

    argument: int
    ranges: tuple[Range, ...]
    inside: tuple[tuple[Range, "Caught"], ...] = ()
    mask: int = TOP
    plain: "Caught | None" = None


Cell = tuple[int, Range, int]  # a piece of the value space: the argument's index, its range, the mask


def _masked(condition: traps.Condition) -> Caught:
    """What is trapped inside another condition; by a mask, where that takes a tenth of the rules."""
    plain = Caught(condition.argument, condition.ranges)
    if condition != traps.OTHER_TYPES:
        return plain
    low = traps.OTHER_TYPE
    return Caught(low.argument, low.ranges, mask=low.mask, plain=plain)


REFUSED = {r.call: r.error for r in traps.REFUSED if PROFILE in r.forms}  # in all architectures
NATIVE = ARCHITECTURES[:1]  # the others' setsockopt() goes past the policy, and no rule is for one of them alone


def caught(rows: Sequence[traps.Trap]) -> Caught | None:
    """What traps one call, by its arguments; None for a call that is trapped whatever these are.

    All @rows test the same argument first, and at most one more.
    """
    if any(not row.conditions for row in rows):
        return None
    (argument,) = {row.conditions[0].argument for row in rows}
    assert all(c.mask == TOP and not c.upper for row in rows for c in row.conditions)
    ranges: tuple[Range, ...] = ()
    inside: tuple[tuple[Range, Caught], ...] = ()
    for row in rows:
        outer, *inner = row.conditions
        if not inner:
            ranges += outer.ranges
            continue
        (condition,) = inner
        inside += tuple((piece, _masked(condition)) for piece in outer.ranges)
    inside = tuple((piece, trap) for piece, trap in inside if piece not in ranges)  # what is trapped whole
    return Caught(argument, ranges, inside)


class Rule(NamedTuple):
    """One rule of the profile for one call: an action, its errno (None: the runtime's default), its conditions."""

    action: str
    error: int | None
    conditions: tuple[dict[str, Any], ...]


def merge(
    profile: Profile | None,
    *,
    listener: str,
    metadata: str,
    swap: bool = False,
    direct: bool = False,
    follows: bool = False,
) -> Profile:
    """Return a copy of @profile with graft's traps.

    @profile: `linux.seccomp` of config.json; None for a container without one (unconfined). @listener: the agent
    socket to which the runtime sends the notification descriptor, with @metadata. @swap: it also traps what
    `traps.Trap.when` calls "addresses". @direct: it is for a direct container, whose programs make their internet
    sockets themselves unless these follow sysctls (@follows); programs of another ABI are killed there.

    Raises Refused for a profile that has a listener of its own, or whose conditions cannot be separated from graft's.
    """
    merged = _merged(msgspec.json.encode(profile or {}), swap=swap, direct=direct, follows=follows)
    return {**merged, "listenerPath": listener, "listenerMetadata": metadata}


@functools.lru_cache(REMEMBERED)
def _merged(encoded: bytes, *, swap: bool, direct: bool, follows: bool) -> Profile:
    """What `merge()` says of a profile as JSON, without listener and metadata. It is shared: nobody changes it."""
    profile: Profile = msgspec.json.decode(encoded)
    merged: Profile = profile or {"defaultAction": ALLOW}
    if merged.get("listenerPath") or any(r.get("action") == NOTIFY for r in merged.get("syscalls") or ()):
        raise Refused(
            "the container's seccomp profile has a listener of its own",
            hint="a process has at most one; run it without graft, or with another profile",
            code="EBUSY",
        )
    default = Rule(merged["defaultAction"], merged.get("defaultErrnoRet"), ())
    if direct or not profile:
        merged["architectures"] = list(NATIVE if direct else ARCHITECTURES)
    active = traps.active(PROFILE, addresses=swap, direct=direct, follows=follows)
    trapped = {name: caught(rows) for name, rows in active.items()}
    found = _take(merged, {*trapped, *REFUSED}, default)
    made = list(itertools.islice(_rules(trapped, found, default), RULES_MAX + 1))
    if len(made) > RULES_MAX:
        raise Refused(
            f"the container's seccomp profile comes to more than {RULES_MAX} rules with graft's traps",
            hint="it has conditions on arguments of socket calls and allows by default; avoid one of the two",
            code="E2BIG",
        )
    plain = {(default.action, default.error), (default.action, None)}
    merged["syscalls"] += [rule for rule in made if (rule["action"], rule.get("errnoRet")) not in plain]
    return merged


def _rules(
    trapped: dict[str, Caught | None], found: dict[str, list[Rule]], default: Rule
) -> Iterator[dict[str, Any]]:
    """Make the disjoint rules of all calls, as they are asked for: conditions on five arguments come to billions.

    REFUSED comes first: libseccomp adds each rule for socket() to i386's socketcall() as well, and they would clash.
    """
    for name, number in REFUSED.items():
        yield _emit(name, Rule(ERRNO, _unlike(number, default), ()), ())
    for name, trap in trapped.items():
        if trap is None:
            yield from _leaf(name, found[name], [], default, trapped=True)
        else:
            yield from _cut(name, trap, found[name], [], default)


def _unlike(number: int, default: Rule) -> int:
    """Return an errno that differs from the default's: runtimes drop a rule that equals the default action."""
    known = errno.EPERM if default.error is None else default.error
    return number if default.action != ERRNO or number != known else errno.EACCES


def _take(profile: Profile, names: set[str], default: Rule) -> dict[str, list[Rule]]:
    """Remove the rules of the calls @names from @profile, and return them by call.

    A rule that equals the default action is dropped, as runtimes drop it; so are those of a call that follow one
    without conditions, which decides.
    """
    found: dict[str, list[Rule]] = {name: [] for name in names}
    kept, conditions = [], 0
    for rule in profile.get("syscalls") or ():
        same = _same(Rule(rule["action"], rule.get("errnoRet"), ()), default)
        for name in names.intersection(rule["names"]):
            if same or (found[name] and not found[name][-1].conditions):
                continue
            conditions += len(rule.get("args") or ())
            if conditions > CONDITIONS_MAX:
                raise Refused(
                    "the container's seccomp profile has too many conditions on calls that graft traps",
                    hint=f"at most {CONDITIONS_MAX}",
                    code="E2BIG",
                )
            found[name] += _split(rule)
        rest = [name for name in rule["names"] if name not in names]
        if rest:
            kept.append({**rule, "names": rest})
    profile["syscalls"] = kept
    return found


def _same(rule: Rule, default: Rule) -> bool:
    errors = (errno.EPERM if r.error is None and r.action == ERRNO else r.error for r in (rule, default))
    return rule.action == default.action and len(set(errors)) == 1


def _split(rule: dict[str, Any]) -> list[Rule]:
    """Split a rule as runc and crun do: if an argument has two conditions, each condition is a rule of its own."""
    conditions = rule.get("args") or []
    indexes = [c["index"] for c in conditions]
    groups = [(c,) for c in conditions] if len(set(indexes)) < len(indexes) else [tuple(conditions)]
    return [Rule(rule["action"], rule.get("errnoRet"), group) for group in groups]


def _trapped(rule: Rule) -> Rule:
    return rule._replace(action=NOTIFY, error=None) if rule.action in PERMISSIVE else rule


def _cut(name: str, trap: Caught, rules: list[Rule], cells: list[Cell], default: Rule) -> Iterator[dict[str, Any]]:
    """Make rules for one call that are disjoint in the arguments of @trap and of the traps around it (@cells).

    @cells: the pieces that are fixed so far.
    """
    if trap.plain and any(c["index"] == trap.argument for rule in rules for c in rule.conditions):
        trap = trap.plain
    narrowed = dict(trap.inside)
    borders = {0}
    for first, last in (*trap.ranges, *narrowed):
        borders |= {first, last + 1}
    for rule in rules:
        for condition in rule.conditions:
            if condition["index"] == trap.argument:
                borders |= {condition["value"], condition["value"] + 1}
    edges = [*sorted(b for b in borders if b <= trap.mask), trap.mask + 1]
    for first, after in itertools.pairwise(edges):
        piece = (first, after - 1)
        here = [*cells, (trap.argument, piece, trap.mask)]
        inner = next((t for (low, high), t in narrowed.items() if low <= piece[0] and piece[1] <= high), None)
        if inner:
            yield from _cut(name, inner, rules, here, default)
            continue
        trapped = any(low <= piece[0] and piece[1] <= high for low, high in trap.ranges)
        yield from _leaf(name, rules, here, default, trapped=trapped)


def _leaf(
    name: str, rules: list[Rule], cells: list[Cell], default: Rule, *, trapped: bool
) -> Iterator[dict[str, Any]]:
    """Make rules for the part of a call's argument space that @cells select. @trapped: graft traps all of it."""
    surviving = _surviving(rules, cells, default)
    undecided = next((c["index"] for rule in surviving for c in rule.conditions), None)
    if trapped and undecided is not None and default.action in PERMISSIVE:
        # where no condition holds, the default ALLOW applies, and has to be trapped: cut at these conditions, too
        yield from _cut(name, Caught(undecided, ((0, TOP),)), rules, cells, default)
        return
    for rule in surviving:
        for masks in _product(cells):
            yield _emit(name, _trapped(rule) if trapped else rule, (*masks, *rule.conditions))


def _surviving(rules: list[Rule], cells: list[Cell], default: Rule) -> list[Rule]:
    """Return the @rules that can hold on @cells, each with its undecided conditions.

    A rule without any undecided condition wins alone. If no rule can hold, the result is @default.
    """
    left = []
    for rule in rules:
        open_conditions = []
        for condition in rule.conditions:
            piece = next((p for index, p, _ in cells if index == condition["index"]), None)
            held = _decide(condition, piece) if piece else None
            if held is False:
                break
            if held is None:
                open_conditions.append(condition)
        else:
            left.append(rule._replace(conditions=tuple(open_conditions)))
    return next(([rule] for rule in left if not rule.conditions), left or [default])


def _decide(condition: dict[str, Any], piece: Range) -> bool:
    """Return whether a condition holds on @piece, on all of which its answer is the same. Raises Refused for a mask.

    A mask that tests bits which vary within @piece has no single answer.
    """
    operator, value = condition["op"], condition["value"]
    first, last = piece
    if operator == "SCMP_CMP_MASKED_EQ":  # mask, datum
        datum = condition.get("valueTwo", 0)
        if first == last:
            return bool(first & value == datum)
        fixed = TOP ^ ((1 << (first ^ last).bit_length()) - 1)
        if value & ~fixed & TOP == 0:
            return bool(first & value == datum)
        raise Refused(
            f"the container's seccomp profile compares argument {condition['index']} by the mask {value:#x}",
            hint="graft traps that call by the same argument; list the values in the profile",
            code="EINVAL",
        )
    verdicts: dict[str, bool] = {
        "SCMP_CMP_EQ": first == value == last,
        "SCMP_CMP_NE": not first <= value <= last,
        "SCMP_CMP_LT": last < value,
        "SCMP_CMP_LE": last <= value,
        "SCMP_CMP_GE": first >= value,
        "SCMP_CMP_GT": first > value,
    }
    if operator not in verdicts:
        raise Refused(f"the container's seccomp profile has an unknown comparison '{operator}'", code="EINVAL")
    return verdicts[operator]


def _product(cells: list[Cell]) -> Iterator[tuple[dict[str, Any], ...]]:
    """Make one tuple of conditions for each combination of the aligned parts of the ranges in @cells."""
    return itertools.product(
        *(
            [
                {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
                for value, mask in aligned(*piece, whole)
            ]
            for index, piece, whole in cells
        )
    )


def aligned(first: int, last: int, whole: int = TOP) -> list[tuple[int, int]]:
    """Return the fewest pairs (value, mask) that cover @first to @last, both included, of the low bits in @whole."""
    width = whole.bit_length()
    return [(value, whole ^ (whole >> bits)) for value, bits in port_prefixes(first, last, width)]


def _emit(name: str, rule: Rule, conditions: Iterable[dict[str, Any]]) -> dict[str, Any]:
    emitted: dict[str, Any] = {"names": [name], "action": rule.action}
    if rule.error is not None:
        emitted["errnoRet"] = rule.error
    args = list(conditions)
    if args:
        emitted["args"] = args
    return emitted
