"""The seccomp program, run by an interpreter of classic BPF on recorded seccomp_data."""

import errno
import struct

import pytest

from graft.kernel import linux
from graft.kernel.architecture import ARCHITECTURES, HERE
from graft.kernel.cbpf import (
    AND_K,
    JEQ_K,
    JGE_K,
    LD_W_ABS,
    RET_ALLOW,
    RET_ERRNO,
    RET_K,
    RET_KILL_PROCESS,
    RET_USER_NOTIF,
)
from graft.trap import filter as seccomp

ALLOW, NOTIFY, KILL = RET_ALLOW, RET_USER_NOTIF, RET_KILL_PROCESS
ENOSYS, EPERM = RET_ERRNO | errno.ENOSYS, RET_ERRNO | errno.EPERM
NATIVE, COMPAT = HERE.audit, HERE.compat.audit
TO, OPTIONS = (linux.NR_CONNECT, linux.NR_BIND), (linux.NR_SETSOCKOPT, linux.NR_GETSOCKOPT)
OTHERS = tuple(HERE.numbers[name] for name in ("accept4", "close", "sendmsg"))


def interpret(program: bytes, data: bytes) -> int:
    """bpf(4), the instructions that seccomp allows."""
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator, at = 0, 0
    while True:
        op, true, false, k = code[at]
        at += 1
        if op == LD_W_ABS:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif op == AND_K:
            accumulator &= k
        elif op == JEQ_K:
            at += true if accumulator == k else false
        elif op == JGE_K:
            at += true if accumulator >= k else false
        elif op == RET_K:
            return int(k)
        else:
            raise AssertionError(f"instruction {op:#x}")


def verdict(nr, *args, arch=NATIVE, swap=False):
    values = [*args, 0, 0, 0, 0, 0, 0][:6]
    return interpret(seccomp.program(swap=swap), struct.pack("=iIQ6Q", nr, arch, 0x400000, *values))


def signed(value):
    return value - (1 << 32) if value >= 1 << 31 else value


@pytest.mark.parametrize("family", [2, 10, 4, 0x1_0000_0002, 0xFFFF_FFFF_0000_000A])
@pytest.mark.parametrize("kind", [1, 2, 1 | 0o2000000, 2 | 0o4000, 0xDEAD_0000_0000_0001])
def test_internet_sockets_are_trapped(family, kind):
    assert verdict(linux.NR_SOCKET, family, kind, 0) == NOTIFY


@pytest.mark.parametrize("family", [21, 34, 40, 42, 43, 0x1_0000_0028])
@pytest.mark.parametrize("kind", [1, 2, 3, 5])
def test_families_without_namespaces_are_trapped(family, kind):
    assert verdict(linux.NR_SOCKET, family, kind, 0) == NOTIFY


@pytest.mark.parametrize("family", [1, 16, 17, 0, 5, 38, 29, 39, 41, 44, 0x2_0000_0001])
def test_other_families_are_not(family):
    assert verdict(linux.NR_SOCKET, family, 1, 0) == ALLOW


@pytest.mark.parametrize("kind", [3, 4, 5, 6, 10, 3 | 0o2000000])
def test_raw_sockets_are_not(kind):
    assert verdict(linux.NR_SOCKET, 2, kind, 1) == ALLOW


@pytest.mark.parametrize("nr", [0, 1, *TO, *OPTIONS, *OTHERS, 435])
def test_common_calls_pass(nr):
    assert verdict(nr, 5, 6, 7) == ALLOW


@pytest.mark.parametrize("request_", [0x8912, 0x8913, 0x894C, 0x89F0, 0x8946, 0x8B01, 0x8BFF, 0x1_0000_8912])
def test_device_ioctls_are_trapped(request_):
    assert verdict(linux.NR_IOCTL, 3, request_) == NOTIFY


@pytest.mark.parametrize("request_", [0x5421, 0x541B, 0x8901, 0x8905, 0x8906, 0x80108906, 0x5452, 0x8000])
def test_socket_ioctls_are_not(request_):
    assert verdict(linux.NR_IOCTL, 3, request_) == ALLOW


def test_listen_and_io_uring():
    assert verdict(linux.NR_LISTEN, 3, 128) == NOTIFY
    assert verdict(linux.NR_IO_URING_SETUP) == EPERM


def test_other_conventions():
    other = next(one for one in ARCHITECTURES if one is not HERE)
    if HERE.x32:
        assert verdict(signed(HERE.x32 | linux.NR_SOCKET), 2, 1) == ENOSYS
        assert verdict(HERE.x32) == ENOSYS
    compat = dict(HERE.compat.numbers)
    assert verdict(compat.pop("ioctl"), 3, 0x8912, arch=COMPAT) == NOTIFY
    del compat["socketpair"]  # of direct containers
    for number in compat.values():
        assert verdict(number, 2, 1, arch=COMPAT) == ENOSYS
    assert verdict(4, arch=COMPAT) == ALLOW  # write
    assert verdict(other.numbers["socket"], 2, 1, arch=other.audit) == KILL


@pytest.mark.parametrize("swap", [False, True])
def test_the_family_is_known_by_length_level_and_number(swap):
    for nr in TO:
        assert verdict(nr, 5, 0x7F00, 18, swap=swap) == NOTIFY
    assert verdict(linux.NR_SENDTO, 5, 0x7F00, 9, 0, 0x7F00, 18, swap=swap) == NOTIFY
    for nr in OPTIONS:
        assert verdict(nr, 5, 254, 1, swap=swap) == NOTIFY
    for nr in (*TO, linux.NR_GETSOCKNAME, *OPTIONS):
        assert verdict(nr, 960, 1, 2, swap=swap) == NOTIFY
        assert verdict(nr, 1023, 1, 2, swap=swap) == NOTIFY


def test_what_costs_programs_of_other_families_nothing():
    for nr in TO:
        for length in (0, 16, 28, 110):
            assert verdict(nr, 5, 0x7F00, length) == ALLOW
    assert verdict(linux.NR_SENDTO, 5, 0x7F00, 9, 0, 0x7F00, 16) == ALLOW
    for nr in (linux.NR_GETSOCKNAME, *OPTIONS):
        for number in (0, 5, 959, 1024, 5000, 0xFFFFFFFF):
            assert verdict(nr, number, 6, 1) == ALLOW
    for nr in (*OTHERS, linux.NR_GETPEERNAME):
        assert verdict(nr, 960, 1, 2) == ALLOW


def test_swap_traps_addresses_names_and_tcps_options():
    for nr in TO:
        assert verdict(nr, 5, 0x7F00, 16, swap=True) == NOTIFY
    for nr in (linux.NR_GETSOCKNAME, linux.NR_GETPEERNAME):
        assert verdict(nr, 5, 0x7F00, swap=True) == NOTIFY
    for nr in OPTIONS:
        for level, expected in ((0, NOTIFY), (6, NOTIFY), (41, NOTIFY), (1, ALLOW), (270, ALLOW)):
            assert verdict(nr, 5, level, 1, swap=True) == expected
    assert verdict(linux.NR_SENDTO, 5, 0x7F00, 9, 0, 0, 0, swap=True) == ALLOW, "a send without an address"
    assert verdict(linux.NR_SENDTO, 5, 0x7F00, 9, 0, 0x7F00, 16, swap=True) == NOTIFY
    assert verdict(linux.NR_SENDTO, 5, 0x7F00, 9, 0, 0x1_0000_0000, 16, swap=True) == NOTIFY, "its low half alone is 0"
    for nr in OTHERS:
        assert verdict(nr, 5, 6, 7, swap=True) == ALLOW


@pytest.mark.parametrize("swap", [False, True])
def test_every_jump_stays_inside(swap):
    code = list(struct.iter_unpack("=HBBI", seccomp.program(swap=swap)))
    for at, (op, true, false, _) in enumerate(code):
        if op in (JEQ_K, JGE_K):
            assert at + 1 + max(true, false) < len(code)
    assert code[-1][0] == RET_K
    assert len(code) < 100
