"""graft/kernel/architecture.py: its numbers are those of the kernel's headers and of libseccomp, and nobody has others."""

import ctypes
import os
import re
import select
import struct
from pathlib import Path

import pytest

from graft.kernel.architecture import AARCH64, ARCHITECTURES, HERE, NONE, X86_64, of
from tests.conftest import lack
from tests.unit.engines.libseccomp import ARCHITECTURES as AUDIT

ROOT = Path(__file__).parents[3]
INCLUDE = Path("/usr/include")
HEADERS = {
    "x86_64": (X86_64.numbers, INCLUDE / "x86_64-linux-gnu/asm/unistd_64.h"),
    "i386": (X86_64.compat.numbers, INCLUDE / "x86_64-linux-gnu/asm/unistd_32.h"),
    "aarch64": (AARCH64.numbers, INCLUDE / "asm-generic/unistd.h"),
}


def numbers_of(header):
    """Numbers by name, as the header says; one that is defined by another name has that one's."""
    text = header.read_text()
    found = dict(re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)\b", text, re.MULTILINE))
    return {name: int(number) for name, number in found.items()}


@pytest.mark.parametrize("name", HEADERS)
def test_the_numbers_are_those_of_the_headers(name):
    table, header = HEADERS[name]
    if not header.exists():
        if name == HERE.machine:
            lack(f"{header} is not there (make setup-check)")
        pytest.skip("a header of another architecture")
    told = numbers_of(header)
    assert len(told) > 200
    assert {call: told.get(call) for call in table} == dict(table)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.machine)
def test_the_numbers_are_those_of_libseccomp(architecture):
    library = ctypes.CDLL("libseccomp.so.2")
    native, compat, *_ = architecture.seccomp
    for token, audit, table in (
        (native, architecture.audit, architecture.numbers),
        (compat, architecture.compat.audit, architecture.compat.numbers),
    ):
        assert AUDIT[token] == audit
        resolve = library.seccomp_syscall_resolve_name_arch
        told = {name: resolve(ctypes.c_uint32(audit), name.encode()) for name in table}
        # of i386 it thinks of the socket calls as parts of socketcall(), with numbers below 0
        assert {name: number for name, number in told.items() if number >= 0}.items() <= table.items()
        assert audit == X86_64.compat.audit or told == dict(table)


def test_epoll_reads_the_structure():
    libc = ctypes.CDLL(None, use_errno=True)
    reads, writes = os.pipe()
    with select.epoll() as epoll:
        event = struct.pack(HERE.epoll_event, select.EPOLLOUT, 0x12345)
        assert libc.epoll_ctl(epoll.fileno(), 1, writes, event) == 0  # EPOLL_CTL_ADD
        assert epoll.poll(0) == [(0x12345, select.EPOLLOUT)]  # Python has the data for a descriptor
    os.close(reads)
    os.close(writes)


def test_a_call_that_one_architecture_lacks():
    for name in set(X86_64.numbers) - set(AARCH64.numbers):
        assert name in ("uselib", "modify_ldt", "iopl", "ioperm")
    assert set(AARCH64.numbers) < set(X86_64.numbers)


def test_this_machine():
    assert HERE.machine == os.uname().machine
    assert NONE not in HERE.numbers.values()


def test_an_unknown_machine_has_no_call():
    assert set(of("riscv64").numbers.values()) == {NONE}
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    assert libc.syscall(ctypes.c_uint(NONE)) == -1
    assert os.strerror(ctypes.get_errno()) == os.strerror(38)  # ENOSYS


def test_nobody_else_has_numbers_of_an_architecture():
    """A number of a call, or an AUDIT_ARCH_*, in another file would be right on one architecture alone."""
    pattern = re.compile(r"AUDIT_ARCH_(X86_64|I386|AARCH64|ARM)\b|\bNR_[A-Z0-9_]+(, NR_[A-Z0-9_]+)* = \(?\d")
    files = [*(ROOT / "graft").rglob("*.py"), *(ROOT / "csrc").glob("*.[ch]"), *(ROOT / "graft").rglob("*.c")]
    found = {path.name for path in files if pattern.search(path.read_text())}
    assert found == {"architecture.h"}
