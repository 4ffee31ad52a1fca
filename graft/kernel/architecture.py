"""What differs by the machine's architecture: numbers of system calls, a structure, and the other ABIs of its kernel.

This is the one place for such numbers; `linux` has the native ones as NR_*. A unit test compares the tables with the
kernel's headers and with libseccomp. An architecture that is not here gets numbers that no kernel has, so that every
call by number fails with ENOSYS; `graft doctor` names it.

The module is pure, and `graft run` pays for its import.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

NONE = 0xFFFFFFFF  # a number that no call has


class Compat(NamedTuple):
    """The 32-bit ABI of an architecture. @name: as docs have it. @audit: its AUDIT_ARCH_* (linux/audit.h).

    @numbers: of the calls that graft traps or refuses there, by name.
    """

    name: str
    audit: int
    numbers: Mapping[str, int]


class Architecture(NamedTuple):
    """One that graft runs on. @machine: as uname(2) has it. @audit: its AUDIT_ARCH_*. @numbers: of calls, by name.

    @x32: the first number of another ABI that has the same AUDIT_ARCH_*; 0: there is none. @seccomp: the names of all
    its ABIs in OCI's config-linux.md, the native one first. @epoll_event: struct epoll_event as the module struct has
    it, events and data; x86_64 alone packs it (EPOLL_PACKED in linux/eventpoll.h).
    """

    machine: str
    audit: int
    numbers: Mapping[str, int]
    compat: Compat
    x32: int
    seccomp: tuple[str, ...]
    epoll_event: str = "=I4xQ"


# asm/unistd_64.h of x86, and asm-generic/unistd.h, which arm64 has; 0: arm64 has no such call. From 424 on all
# architectures have the same.
_X86_64_AARCH64 = {
    "accept4": (288, 242), "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171), "bind": (49, 200),
    "bpf": (321, 280), "capget": (125, 90), "capset": (126, 91), "chroot": (161, 51), "clock_adjtime": (305, 266),
    "clock_settime": (227, 112), "close": (3, 57), "connect": (42, 203), "delete_module": (176, 106),
    "finit_module": (313, 273), "getpeername": (52, 205), "getsockname": (51, 204), "getsockopt": (55, 209),
    "init_module": (175, 105), "ioctl": (16, 29), "ioperm": (173, 0), "iopl": (172, 0), "kexec_file_load": (320, 294),
    "kexec_load": (246, 104), "keyctl": (250, 219), "listen": (50, 201), "lookup_dcookie": (212, 18),
    "modify_ldt": (154, 0), "open_by_handle_at": (304, 265), "perf_event_open": (298, 241), "personality": (135, 92),
    "pivot_root": (155, 41), "ptrace": (101, 117), "quotactl": (179, 60), "reboot": (169, 142),
    "request_key": (249, 218), "seccomp": (317, 277), "sendmsg": (46, 211), "sendto": (44, 206),
    "setdomainname": (171, 162), "setfsgid": (123, 152), "setfsuid": (122, 151), "setgroups": (116, 159),
    "sethostname": (170, 161), "setresgid": (119, 149), "setresuid": (117, 147), "setsockopt": (54, 208),
    "settimeofday": (164, 170), "socket": (41, 198), "socketpair": (53, 199), "swapoff": (168, 225),
    "swapon": (167, 224), "syslog": (103, 116), "uselib": (134, 0), "userfaultfd": (323, 282), "vhangup": (153, 58),
}  # fmt: skip
_ALL = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "openat2": 437, "pidfd_getfd": 438,
    "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443,
}  # fmt: skip

X86_64 = Architecture(
    "x86_64",
    0xC000003E,
    {name: numbers[0] for name, numbers in _X86_64_AARCH64.items()} | _ALL,
    Compat(
        "i386",
        0x40000003,
        {
            "ioctl": 54, "socketcall": 102, "socket": 359, "socketpair": 360, "bind": 361, "connect": 362,
            "listen": 363, "getsockopt": 365, "setsockopt": 366, "io_uring_setup": 425,
        },
    ),
    0x40000000,
    ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "=IQ",
)  # fmt: skip
AARCH64 = Architecture(
    "aarch64",
    0xC00000B7,
    {name: numbers[1] for name, numbers in _X86_64_AARCH64.items() if numbers[1]} | _ALL,
    Compat(
        "arm",
        0x40000028,
        {
            "ioctl": 54, "socket": 281, "bind": 282, "connect": 283, "listen": 284, "socketpair": 288,
            "setsockopt": 294, "getsockopt": 295, "io_uring_setup": 425,
        },
    ),
    0,
    ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
)  # fmt: skip
ARCHITECTURES = (X86_64, AARCH64)


def of(machine: str) -> Architecture:
    """The architecture with this name of uname(2); for one that graft does not know, one without any call."""
    unknown = Architecture(machine, 0, dict.fromkeys(X86_64.numbers, NONE), Compat("", 0, {}), 0, ())
    return next((known for known in ARCHITECTURES if known.machine == machine), unknown)


HERE = of(os.uname().machine)
