"""graft/kernel/traps.py: the filter does what the table says, the supervisor has its handlers, the document its text."""

import itertools
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from graft.engines.profile import REFUSED, caught
from graft.kernel import linux, traps
from graft.kernel.architecture import ARCHITECTURES, HERE, X86_64
from graft.kernel.cbpf import LD_W_ABS, OFFSET_ARGS, RET_ALLOW, RET_ERRNO, RET_KILL_PROCESS, RET_USER_NOTIF
from graft.trap import filter as seccomp
from graft.trap.supervisor import FAMILY_TRAPS, Supervisor
from tests.unit.trap.test_filter import interpret

ROOT = Path(__file__).parent.parent.parent.parent
NATIVE, COMPAT = HERE.audit, HERE.compat.audit
OTHER = next(one.audit for one in ARCHITECTURES if one is not HERE)
X32 = X86_64.x32
MODES = [
    {"name": "trap", "direct": False, "follows": False},
    {"name": "direct", "direct": True, "follows": False},
    {"name": "follows", "direct": True, "follows": True},
]
all_modes = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["name"])
BY_NUMBER = {call.number: call.name for call in traps.CALLS}


def expected(arch, number, args, *, addresses, mode):
    """What the table says of a call, read row by row."""
    abi = {NATIVE: "native", COMPAT: "compat"}.get(arch, "other")
    if arch == NATIVE and HERE.x32 and number & 0xFFFFFFFF >= HERE.x32:
        abi = "x32"
    for refusal in traps.REFUSED:
        if (refusal.direct and not mode["direct"]) or not refusal.known():
            continue
        if traps.FILTER in refusal.forms and refusal.abi == abi and refusal.number() in (None, number):
            return RET_ERRNO | refusal.error if refusal.error else RET_KILL_PROCESS
    now = ("always", "addresses" if addresses else "otherwise")
    name = traps.trapped(arch, number)
    rows = [t for t in traps.TRAPS if t.call == name and traps.FILTER in t.forms and t.when in now]
    modes = {"trap": {None, False}, "direct": {None, True}, "follows": {None, True, False}}[mode["name"]]
    rows = [row for row in rows if row.direct in modes]
    return RET_USER_NOTIF if any(row.holds(args) for row in rows) else RET_ALLOW


def borders(call, argument):
    """The values of an argument at which a row of a call changes its mind, and their neighbours, in both halves."""
    found = {0, 1, 1 << 31, traps.TOP, 1 << 32, 0xFFFFFFFF_00000000}
    for row in traps.TRAPS:
        for condition in row.conditions if row.call == call else ():
            if condition.argument == argument:
                for edge in itertools.chain(*condition.ranges):
                    found |= {edge - 1, edge, edge + 1, edge | 0xDEAD0000, edge | 1 << 40}
    return [value & 0xFFFFFFFF_FFFFFFFF for value in found]


def arguments(call):
    """All combinations of these for two arguments, with the others at random."""
    chance = random.Random(call)
    values = [borders(call, at) for at in range(6)]
    for one, two in itertools.combinations(range(6), 2):
        for first, second in itertools.product(values[one], values[two]):
            args = [chance.choice(v) for v in values]
            args[one], args[two] = first, second
            yield tuple(args)


def made(mode, *, swap):
    return seccomp.program(swap=swap, direct=mode["direct"], follows=mode["follows"])


@all_modes
@pytest.mark.parametrize("addresses", [False, True])
@pytest.mark.parametrize("call", traps.CALLS, ids=lambda call: call.name)
def test_the_filter_does_what_the_table_says(call, addresses, mode):
    program = made(mode, swap=addresses)
    numbers = [(NATIVE, call.number), (COMPAT, call.number)]
    numbers += [(COMPAT, HERE.compat.numbers[call.name])] if call.compat else []
    for args in itertools.islice(arguments(call.name), 2000):
        for arch, number in numbers:
            verdict = interpret(program, struct.pack("=iIQ6Q", number, arch, 0, *args))
            assert verdict == expected(arch, number, args, addresses=addresses, mode=mode), (arch, number, args)


@all_modes
@pytest.mark.parametrize("addresses", [False, True])
def test_every_number_in_every_architecture(addresses, mode):
    program = made(mode, swap=addresses)
    numbers = [*range(480), X32, X32 | 41, 0x3FFFFFFF, 0xFFFFFFFF]
    for arch, number, args in itertools.product((NATIVE, COMPAT, OTHER), numbers, ((0,) * 6, (0xFFFFFFFF,) * 6)):
        verdict = interpret(program, struct.pack("=IIQ6Q", number, arch, 0, *args))
        assert verdict == expected(arch, number, args, addresses=addresses, mode=mode), (arch, number)


@all_modes
@pytest.mark.parametrize("addresses", [False, True])
def test_calls_without_a_trap_look_at_no_argument(addresses, mode):
    """Otherwise they would leave the kernel's bitmap of calls that are always allowed."""
    program = made(mode, swap=addresses)
    head = struct.pack("=Q", 0)
    for number in set(range(480)) - set(BY_NUMBER):
        # without the arguments, a look at one is an error of the interpreter
        interpret(program, struct.pack("=iI", number, NATIVE) + head)
    assert any(code == LD_W_ABS and k >= OFFSET_ARGS for code, _, _, k in struct.iter_unpack("=HBBI", program))


def test_each_row_is_of_a_call_and_each_call_has_a_row():
    assert {trap.call for trap in traps.TRAPS} == {call.name for call in traps.CALLS}
    assert len(BY_NUMBER) == len(traps.CALLS)
    assert all(trap.forms and trap.why for trap in traps.TRAPS)


@all_modes
@pytest.mark.parametrize("addresses", [False, True])
def test_a_profile_can_express_its_rows(addresses, mode):
    active = traps.active(traps.PROFILE, addresses=addresses, direct=mode["direct"])
    for rows in active.values():
        caught(rows)
    assert not set(active) & set(REFUSED)


def test_each_call_has_a_handler_and_each_handler_a_call():
    anything: Any = MagicMock()
    supervisor = Supervisor(anything, anything, anything, anything, anything)
    assert set(supervisor.handlers) == {call.name for call in traps.CALLS}
    assert set(FAMILY_TRAPS) == {call.name for call in traps.CALLS}


def test_other_conventions_have_no_handler():
    compat = HERE.compat.numbers
    assert traps.trapped(NATIVE, linux.NR_SOCKET) == "socket"
    assert traps.trapped(COMPAT, compat["ioctl"]) == "ioctl"
    others = ((COMPAT, compat["socket"]), (COMPAT, compat["setsockopt"]), (NATIVE, X32 | linux.NR_SOCKET), (NATIVE, 1))
    for arch, number in (*others, (OTHER, linux.NR_SOCKET)):
        assert traps.trapped(arch, number) == ""


def test_the_document_has_the_table():
    script = ROOT / "scripts/traps.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    begin, end = "<!-- printed by scripts/traps.py -->\n", "<!-- end of what scripts/traps.py prints -->\n"
    text = (ROOT / "docs/security.md").read_text()
    assert text.partition(begin)[2].partition(end)[0] == printed, f"run {os.path.relpath(script)} --write"
