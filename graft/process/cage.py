"""The privileges that graftd and its keeper drop when they start, in named stages. What they execute inherits that.

hide() is what does not outlive execve(2), so each of them does it anew, as its first step. A process that is not
dumpable cannot be traced, and neither its memory nor its descriptors be read, by anybody without CAP_SYS_PTRACE
(ptrace(2)). A saved gid that is another than the real one keeps a process of the same uid and gid from changing its
limits: prlimit(2) compares all six ids, and asks for nothing else.

Under systemd the unit (contrib/systemd/graftd.service) drops the same and more, before graftd's first line runs.
"""

import errno
import os
from collections.abc import Callable

from graft.kernel import linux
from graft.kernel.architecture import HERE
from graft.kernel.cbpf import JEQ_K, LD_W_ABS, OFFSET_ARCH, OFFSET_NR, RET_ALLOW, RET_ERRNO, RET_K, Assembler
from graft.log import log

NOBODYS = 0x6FFFFFFF  # a uid and a gid that nobody has; tenants' sockets have the uids above
ENTERED = "GRAFT_CAGE"  # set in the environment of a process that has gone through the stages

# capabilities(7), linux/capability.h
CAPABILITIES = {
    "CHOWN": 0,  # give sockets to their tenant's uid, unix endpoints to the target's user
    "DAC_OVERRIDE": 1,  # reach the paths of unix endpoints, /proc/PID/mem of a target, and Docker's files
    "FOWNER": 3,  # take a stale socket of a user's out of a sticky directory
    "KILL": 5,  # end an engine's container that is refused after its start
    "SETGID": 6,  # connect to a unix endpoint as the target's user
    "SETUID": 7,
    "NET_BIND_SERVICE": 10,  # bind a published port, to see if it is free
    "NET_ADMIN": 12,  # containers' own addresses, the route of the IPv6 slices
    "NET_RAW": 13,  # raw and packet sockets of direct containers, in the containers' own netns
    "SYS_PTRACE": 19,  # read a target's memory, descriptors, namespaces
    "SYS_ADMIN": 21,  # setns(2), bpffs
    "SYS_NICE": 23,  # read the timer slack of a target, which marks wrappers inside a container
    "SYS_RESOURCE": 24,  # RLIMIT_NOFILE
    "PERFMON": 38,  # BPF programs that read the kernel's structures
    "BPF": 39,
}

REFUSED = (
    "uselib", "personality", "modify_ldt", "vhangup", "pivot_root", "chroot", "ptrace", "perf_event_open",
    "userfaultfd", "lookup_dcookie", "process_madvise", "init_module", "finit_module", "delete_module", "kexec_load",
    "kexec_file_load", "reboot", "swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "syslog", "settimeofday",
    "clock_settime", "adjtimex", "clock_adjtime", "sethostname", "setdomainname", "iopl", "ioperm", "add_key",
    "request_key", "keyctl", "open_by_handle_at", "io_uring_setup", "io_uring_enter", "io_uring_register",
    "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr",
)  # fmt: skip


def hide() -> None:
    """Keep other processes of this uid from tracing this one and from changing its limits. No core is dumped.

    What the kernel refuses is logged and skipped.
    """
    import resource

    steps: tuple[Callable[[], None], ...] = (
        linux.not_dumpable,
        lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        lambda: os.setresgid(-1, -1, NOBODYS),
    )
    for step in steps:
        try:
            step()
        except OSError as error:
            log.warning("cannot be kept from other processes of this uid: %s", error)


def drop_capabilities() -> None:
    """Reduce the bounding set and this thread's sets to CAPABILITIES, for children as well. Raises OSError."""
    for number in range(64):
        if number not in CAPABILITIES.values() and linux.in_bounding_set(number):
            linux.drop_from_bounding_set(number)
    linux.keep_capabilities(CAPABILITIES.values())


def program() -> bytes:
    """The seccomp filter: the calls in REFUSED, and all calls of another ABI, fail with EPERM."""
    a = Assembler()
    a.op(LD_W_ABS, OFFSET_ARCH)
    a.op(JEQ_K, HERE.audit, false="refused")
    a.op(LD_W_ABS, OFFSET_NR)
    for name in REFUSED:
        if name in HERE.numbers:
            a.op(JEQ_K, HERE.numbers[name], true="refused")
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
    """Go through the stages, unless a parent process has. A stage that the kernel refuses is logged and skipped."""
    if ENTERED in os.environ:
        return
    for name, stage in STAGES:
        try:
            stage()
        except OSError as error:
            log.warning("cannot drop privileges (%s): %s", name, error)
    os.environ[ENTERED] = "1"
