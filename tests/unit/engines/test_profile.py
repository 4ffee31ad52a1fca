"""graft's traps in any profile: nothing is loosened, nothing breaks, and what is allowed is trapped."""

import copy
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graft.engines.profile import merge
from graft.errors import Refused
from graft.kernel.architecture import HERE
from tests.profiles import allow, profile
from tests.unit.engines.libseccomp import build, verdict

NUMBERS = {
    name: HERE.numbers[name]
    for name in ("socket", "connect", "sendto", "bind", "socketpair", "listen", "getsockname", "getpeername",
                 "setsockopt", "getsockopt", "ioctl", "io_uring_setup")
}  # fmt: skip
SOCKET, SETSOCKOPT = NUMBERS["socket"], NUMBERS["setsockopt"]
FLAGS = (0, 0x800, 0x80000, 0x80800)  # SOCK_NONBLOCK, SOCK_CLOEXEC
TUNSETIFF, PPPIOCNEWUNIT, PPPIOCATTACH, PPPIOCATTCHAN = 0x400454CA, 0xC004743E, 0x4004743D, 0x40047438
CALLS = [*NUMBERS, "socketcall", "read", "write", "close"]


def merged(profile, **options):
    return merge(profile, listener="/run/graft/agent.sock", metadata="{}", **options)


PODMAN = profile(
    allow([c for c in CALLS if c not in ("socket", "io_uring_setup")]),
    allow(["socket"], (0, "EQ", 16), (2, "EQ", 9), action="SCMP_ACT_ERRNO", error=22),
    allow(["socket"], (2, "NE", 9)),
    allow(["socket"], (0, "NE", 16)),
    allow(["socket"], (2, "NE", 9)),
    error=38,
)
PROFILES = {
    "unconfined": None,
    "docker": profile(allow(CALLS)),
    "docker without AF_VSOCK": profile(allow([c for c in CALLS if c != "socket"]), allow(["socket"], (0, "NE", 40))),
    "podman": PODMAN,
}


@pytest.mark.parametrize("name", PROFILES)
def test_engines_profiles(name):
    program = build(merged(PROFILES[name]))
    for family in (2, 10, 2 | 1 << 32):
        assert verdict(program, SOCKET, family, 1) == "NOTIFY"
    for family in (0, 1, 3, 11, 16, 17, 38, 45, 100, 1 << 31):
        assert verdict(program, SOCKET, family, 1) == "ALLOW"
    for family in (21, 34, 40, 42):  # what an engine refuses already, it goes on to refuse
        told = "ERRNO 1" if "VSOCK" in name and family == 40 else "NOTIFY"
        assert verdict(program, SOCKET, family, 1) == verdict(program, SOCKET, family, 5) == told
    assert verdict(program, SOCKET, 16, 3, 9) == ("ERRNO 22" if name == "podman" else "ALLOW")
    assert verdict(program, 50, 3, 1) == "NOTIFY"
    for request in (0x8908, 0x8913, 0x8946, 0x89FF, 0x8B01, 0x1_0000_8913):
        assert verdict(program, NUMBERS["ioctl"], 3, request) == "NOTIFY"
    for request in (0x5401, 0x5421, 0x8905, 0x8907, 0x8A00, 0x8C00, 0x80047601):
        assert verdict(program, NUMBERS["ioctl"], 3, request) == "ALLOW"
    for option in ((6, 1), (1, 2), (1, 9), (1, 15), (1, 20), (41, 26), (6, 13)):
        assert verdict(program, SETSOCKOPT, 3, *option) == "ALLOW"
    for option in ((1, 25), (1, 36), (0, 35), (41, 78), (6, 19)):
        assert verdict(program, SETSOCKOPT, 3, *option) == "NOTIFY"
    assert verdict(program, 49, 3) == verdict(program, NUMBERS["connect"], 3) == verdict(program, HERE.numbers["close"]) == "ALLOW"
    assert verdict(program, NUMBERS["io_uring_setup"]).startswith("ERRNO")


@pytest.mark.parametrize("name", PROFILES)
def test_a_direct_containers_profile(name):
    """TCP and UDP are the program's; every other socket is trapped, and what would make a device of the host's."""
    program = build(merged(PROFILES[name], direct=True))
    for family in (2, 10, 2 | 1 << 32):
        for flags in FLAGS:
            assert [verdict(program, SOCKET, family, kind | flags) for kind in (1, 2)] == ["ALLOW"] * 2
            others = [verdict(program, SOCKET, family, kind | flags) for kind in (0, *range(3, 16))]
            assert others == ["NOTIFY"] * 14
        assert verdict(program, SOCKET, family, 3 | 1 << 32) == "NOTIFY"
        assert verdict(program, SOCKET, family, 1, 262) == verdict(program, SOCKET, family, 2, 1) == "ALLOW"
    for family in (0, 1, 3, 4, 9, 11, 16, 17, 21, 38, 40, 45, 100, 1 << 31, 1 | 1 << 32):
        told = "ERRNO 1" if "VSOCK" in name and family == 40 else "NOTIFY"
        assert {verdict(program, SOCKET, family, kind | flags) for kind in range(1, 6) for flags in FLAGS} == {told}
    assert verdict(program, SOCKET, 16, 3, 9) == ("ERRNO 22" if name == "podman" else "NOTIFY")
    for call in ("socketpair", "bind", "listen"):
        assert {verdict(program, NUMBERS[call], family, 1, 0) for family in (0, 1, 2, 77)} == {"NOTIFY"}
    for request in (TUNSETIFF, PPPIOCNEWUNIT, PPPIOCATTACH, PPPIOCATTCHAN, 0x8913, TUNSETIFF | 1 << 32):
        assert verdict(program, NUMBERS["ioctl"], 3, request) == "NOTIFY"
    assert verdict(program, NUMBERS["ioctl"], 3, 0x5421) == verdict(program, NUMBERS["connect"], 3) == verdict(program, HERE.numbers["close"]) == "ALLOW"
    assert verdict(program, NUMBERS["io_uring_setup"]).startswith("ERRNO")
    for number in (*HERE.compat.numbers.values(), 3, 20):
        assert verdict(program, number, 2, 1, arch=HERE.compat.audit) == "KILL"
    for number in (SOCKET, 0, 541) if HERE.x32 else ():  # setsockopt is 541 there
        assert verdict(program, number | HERE.x32, 2, 1) == "KILL"


def test_where_sockets_follow_sysctls_all_are_trapped():
    program = build(merged(PODMAN, direct=True, follows=True))
    for family in (1, 2, 10, 16):
        assert {verdict(program, SOCKET, family, kind | flags) for kind in range(6) for flags in FLAGS} == {"NOTIFY"}


def test_a_direct_containers_profile_is_small():
    """libseccomp needs time for each rule, and the kernel for each comparison at socket()."""
    assert len(merged(PODMAN, direct=True)["syscalls"]) < 400


@pytest.mark.parametrize("name", PROFILES)
def test_32_bit_programs_get_no_grafted_socket(name):
    program = build(merged(PROFILES[name]))
    arch, numbers = HERE.compat.audit, HERE.compat.numbers
    assert verdict(program, numbers["socket"], 2, 1, arch=arch) == "NOTIFY"  # which graftd refuses
    for call in (1, 14) if "socketcall" in numbers else ():  # SYS_SOCKET, SYS_SETSOCKOPT
        assert verdict(program, numbers["socketcall"], call, arch=arch).startswith("ERRNO")
    assert verdict(program, numbers["setsockopt"], 3, 1, 25, arch=arch) == "NOTIFY"


def test_what_was_refused_stays_refused():
    program = build(merged(profile(allow(["socket"], (0, "EQ", 1)), allow(["read", "ioctl"]))))
    assert [verdict(program, SOCKET, f, 1) for f in (1, 2, 10, 16)] == ["ALLOW", "ERRNO 1", "ERRNO 1", "ERRNO 1"]
    assert verdict(program, 50) == "ERRNO 1"
    killed = allow(["socket"], (1, "EQ", 3), action="SCMP_ACT_KILL")
    program = build(merged(profile(killed, default="SCMP_ACT_ALLOW")))
    assert [verdict(program, SOCKET, 2, kind) for kind in (1, 2, 3)] == ["NOTIFY", "NOTIFY", "KILL"]
    tiocsti = allow(["ioctl"], (1, "EQ", 0x5412), action="SCMP_ACT_ERRNO", error=1)
    program = build(merged(profile(tiocsti, default="SCMP_ACT_ALLOW")))
    assert [verdict(program, 16, 0, r) for r in (0x5412, 0x5413, 0x8913)] == ["ERRNO 1", "ALLOW", "NOTIFY"]


def test_with_endpoints_elsewhere_more_is_trapped():
    program = build(merged(PROFILES["docker"], swap=True))
    for call in ("bind", "connect", "getsockname", "getpeername", "setsockopt", "getsockopt"):
        assert verdict(program, NUMBERS[call], 3, 1, 1) == "NOTIFY"
    assert verdict(program, 44, 3, 1, 1, 0, 0) == "ALLOW"
    assert verdict(program, 44, 3, 1, 1, 0, 0x7FFF12345678) == "NOTIFY"


def test_the_profile_is_not_changed():
    before = copy.deepcopy(PODMAN)
    made = merged(PODMAN)
    assert before == PODMAN
    assert (made["listenerPath"], made["listenerMetadata"]) == ("/run/graft/agent.sock", "{}")


@pytest.mark.parametrize(
    "own",
    [
        {"listenerPath": "/run/other.sock"},
        {"syscalls": [allow(["mknod"], action="SCMP_ACT_NOTIFY")]},
    ],
)
def test_another_listener_is_refused(own):
    with pytest.raises(Refused, match="has a listener of its own"):
        merged(profile() | own)


def test_a_mask_across_a_trap_is_refused():
    odd = {"index": 0, "value": 8, "valueTwo": 8, "op": "SCMP_CMP_MASKED_EQ"}
    with pytest.raises(Refused, match="compares argument 0 by the mask 0x8"):
        merged(profile({"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [odd]}))


def test_what_libseccomp_would_not_end_with_is_refused():
    odd = allow(["setsockopt"], (0, "LE", 10), action="SCMP_ACT_KILL")
    with pytest.raises(Refused, match="comes to more than 600 rules with graft's traps"):
        merged(profile(odd, default="SCMP_ACT_ALLOW"))


def test_conditions_that_multiply_are_refused_at_once():
    """A user's engine sends a profile of the user's choice, and graftd's loop merges it."""
    odd = [allow(["listen"], (argument, "EQ", 2 * n + 1), action="SCMP_ACT_KILL") for argument in range(5) for n in range(40)]
    began = time.process_time()
    with pytest.raises(Refused, match="comes to more than 600 rules with graft's traps"):
        merged(profile(*odd, default="SCMP_ACT_ALLOW"))
    with pytest.raises(Refused, match="too many conditions on calls that graft traps"):
        merged(profile(*odd * 500, default="SCMP_ACT_ALLOW"))
    assert time.process_time() - began < 5


def test_rules_behind_one_that_decides():
    one, others = allow(["socket"]), [allow(["socket"], (0, "EQ", n), action="SCMP_ACT_KILL") for n in range(10000)]
    began = time.process_time()
    assert merged(profile(one, *others, *[one] * 10000)) == merged(profile(one))
    assert time.process_time() - began < 5


VALUES = {0: (0, 1, 2, 3, 4, 10, 16, 40), 1: (0, 1, 2, 3, 41, 0x5412, 0x8913), 2: (0, 1, 6, 9, 25)}
conditions = st.sampled_from([(i, v) for i, values in VALUES.items() for v in values]).flatmap(
    lambda iv: st.tuples(st.just(iv[0]), st.sampled_from(("EQ", "NE", "LT", "LE", "GE", "GT")), st.just(iv[1]))
)


@st.composite
def rules(draw):
    names = draw(st.lists(st.sampled_from([*NUMBERS, "read", "write"]), min_size=1, max_size=3, unique=True))
    args = draw(st.lists(conditions, max_size=2, unique_by=lambda c: c[0]))
    action = draw(st.sampled_from(("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL")))
    return allow(names, *args, action=action, error=draw(st.sampled_from((13, 22))) if "ERRNO" in action else None)


calls = st.tuples(
    st.sampled_from([*NUMBERS.values(), 0, 1]),
    st.sampled_from(VALUES[0]),
    st.sampled_from((*VALUES[1], 0x8901, 0x89A0, 6, 0)),
    st.sampled_from(VALUES[2]),
    st.sampled_from((0, 1)),
    st.sampled_from((0, 1)),
)


def allowed_of_sockets(family, kind, direct):
    """What socket() may come to where the profile allows it."""
    if not direct:
        return ("NOTIFY" if family in (2, 4, 10, 21, 34, 40, 42) else "ALLOW",)
    if family not in (2, 10) or kind & 0xF not in (1, 2):
        return ("NOTIFY",)
    return ("ALLOW",) if kind & ~0xF in FLAGS else ("ALLOW", "NOTIFY")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.lists(rules(), max_size=3),
    st.sampled_from(("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO")),
    st.lists(calls, min_size=20),
    st.booleans(),
)
def test_any_profile(made, default, tried, direct):
    """A call has its old verdict, or, where that was ALLOW, NOTIFY; io_uring, and what no rule can express, aside."""
    before = profile(*made, default=default)
    try:
        old = build(before)
        after = merged(before, direct=direct)
    except (OSError, Refused):
        assume(False)
    new = build(after)
    for number, *args in tried:
        was, now = verdict(old, number, *args), verdict(new, number, *args)
        if number == NUMBERS["io_uring_setup"]:
            assert now != "ALLOW"
        elif was == "ALLOW" and number == NUMBERS["socket"]:
            assert now in allowed_of_sockets(args[0], args[1], direct)
        elif was == "ALLOW":
            assert now in ("ALLOW", "NOTIFY")
        else:
            assert now == was
