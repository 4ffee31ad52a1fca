"""What graftd and its keeper give up when they start, in named stages. Whatever they execute inherits it.

Under systemd the unit says the same and more (contrib/systemd/graftd.service), for before graftd's first line.
"""

import errno
import os
from collections.abc import Callable

from graft import linux
from graft.filter import JEQ_K, LD_W_ABS, OFFSET_ARCH, OFFSET_NR, RET_ALLOW, RET_ERRNO, RET_K, Assembler
from graft.log import log

ENTERED = "GRAFT_CAGE"  # in the environment of whoever is inside

# capabilities(7), linux/capability.h
CAPABILITIES = {
    "CHOWN": 0,  # sockets belong to their tenant's uid, unix endpoints to the target's
    "DAC_OVERRIDE": 1,  # the paths of unix endpoints, Docker's files
    "DAC_READ_SEARCH": 2,
    "FOWNER": 3,
    "KILL": 5,  # an engine's container that is refused late
    "SETGID": 6,  # a unix endpoint is connected to as the target's user
    "SETUID": 7,
    "NET_BIND_SERVICE": 10,  # is a published port free?
    "NET_ADMIN": 12,  # own addresses, the route of the IPv6 slices
    "SYS_PTRACE": 19,  # a target's memory, descriptors, namespaces
    "SYS_ADMIN": 21,  # setns(2), bpffs
    "SYS_NICE": 23,  # the timer slack of a target, which tells nested wrappers apart
    "SYS_RESOURCE": 24,  # RLIMIT_NOFILE
    "PERFMON": 38,
    "BPF": 39,
}

# asm/unistd_64.h
REFUSED = {
    "uselib": 134, "personality": 135, "modify_ldt": 154, "vhangup": 153, "pivot_root": 155, "chroot": 161,
    "ptrace": 101, "perf_event_open": 298, "userfaultfd": 323, "lookup_dcookie": 212, "process_madvise": 440,
    "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320,
    "reboot": 169, "swapon": 167, "swapoff": 168, "acct": 163, "quotactl": 179, "quotactl_fd": 443, "syslog": 103,
    "settimeofday": 164, "clock_settime": 227, "adjtimex": 159, "clock_adjtime": 305,
    "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173,
    "add_key": 248, "request_key": 249, "keyctl": 250, "open_by_handle_at": 304,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "mount_setattr": 442,
}  # fmt: skip


def drop_capabilities() -> None:
    """Take all but CAPABILITIES out of the bounding set; execve(2) takes the rest from the children as well."""
    for number in range(64):
        if number not in CAPABILITIES.values() and linux.in_bounding_set(number):
            linux.drop_from_bounding_set(number)
    linux.keep_capabilities(CAPABILITIES.values())


def program() -> bytes:
    """The filter: REFUSED fail with EPERM, and so does every call of another ABI."""
    a = Assembler()
    a.op(LD_W_ABS, OFFSET_ARCH)
    a.op(JEQ_K, linux.AUDIT_ARCH_X86_64, false="refused")
    a.op(LD_W_ABS, OFFSET_NR)
    for number in REFUSED.values():
        a.op(JEQ_K, number, true="refused")
    a.op(RET_K, RET_ALLOW)
    a.label("refused")
    a.op(RET_K, RET_ERRNO | errno.EPERM)
    return a.assemble()


STAGES: tuple[tuple[str, Callable[[], None]], ...] = (
    ("capabilities", drop_capabilities),
    ("no new privileges", linux.no_new_privs),
    ("system calls", lambda: linux.seccomp_filter(program())),
)


def enter() -> None:
    """Go through the stages, unless a parent has; one that the kernel refuses is told and left out."""
    if ENTERED in os.environ:
        return
    for name, stage in STAGES:
        try:
            stage()
        except OSError as error:
            log.warning("the cage is open, %s: %s", name, error)
    os.environ[ENTERED] = "1"
