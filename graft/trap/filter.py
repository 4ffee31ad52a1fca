"""The seccomp filter of a target (seccomp(2)), assembled to bytes.

What it traps and why (docs/design.md, "Trap few calls"):

- socket() of AF_INET and AF_INET6, stream and datagram, and of AF_GRAFT. Its arguments are registers, so nothing in
  the target's memory can change between the check and the use. Raw sockets are left to the container's own netns,
  because no cgroup hook sees what they send.
- listen(), because no bind hook runs for a socket that was never bound.
- ioctl() on network devices. No hook exists for it, and on a grafted socket it would read or change the host's
  devices. 0x8901 to 0x8907 (owner, out-of-band mark, time stamps) concern the socket alone and are not trapped.
- the calls of a program that uses AF_GRAFT: bind(), connect() and sendto() with an address of 18 bytes
  (sizeof(struct sockaddr_gr)), and options of level 254. Also, on the descriptors FAMILY_FIRST to FAMILY_LAST, where
  sockets of that family are put, getsockname(), getpeername() and all options. No register tells such a socket from
  another one, and a trap for every getsockname() would cost Go and Java one trap for each connection.
- with `swap`, for a container whose rules name endpoints of type unix or in another netns: bind(), connect(),
  getsockname(), getpeername(), options of the IP and TCP levels, and sendto() with an address.

What it refuses:

- io_uring_setup(), as Docker's profile does, because io_uring's operations evade every seccomp filter.
- x32 as a whole, and from i386 what 32-bit programs need for internet sockets, because an i386 setsockopt() skips the
  hook cgroup/setsockopt.

It never traps close, fcntl, write or sendmsg. A container runtime makes those calls after it has installed the filter
and before it has handed over the listener, so it would hang. Tests of arguments read only the low 32 bits, as the
kernel does for these calls. Calls without a test stay in seccomp's bitmap of calls that are always allowed.

The module is pure: `program()` returns struct sock_filter records (linux/filter.h).
"""

import errno

from graft.kernel import linux
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

# The i386 calls (asm/unistd_32.h) by which a 32-bit program would get at an internet socket: socketcall, socket,
# bind, connect, listen, getsockopt, setsockopt, io_uring_setup
I386_REFUSED = (102, 359, 361, 362, 363, 365, 366, 425)

# Below 1024, the usual soft limit of descriptors; above what all but programs with many connections use.
FAMILY_FIRST = 960
FAMILY_LAST = 1023
SOCKADDR_GR = 18
SWAPPED_LEVELS = (0, 6, 41)  # IPPROTO_IP, IPPROTO_TCP, IPPROTO_IPV6

AF_INET = 2
AF_INET6 = 10
SOCK_STREAM = 1
SOCK_DGRAM = 2


def program(*, swap: bool = False) -> bytes:
    """The filter of a target. @swap: some of its endpoints need another socket than the one that socket() gave."""
    a = Assembler()
    a.op(LD_W_ABS, OFFSET_ARCH)
    a.op(JEQ_K, linux.AUDIT_ARCH_X86_64, true="native")
    a.op(JEQ_K, linux.AUDIT_ARCH_I386, false="kill")
    a.op(LD_W_ABS, OFFSET_NR)
    for number in I386_REFUSED:
        a.op(JEQ_K, number, true="enosys")
    a.op(JEQ_K, 54, true="ioctl", false="allow")

    a.label("native")
    a.op(LD_W_ABS, OFFSET_NR)
    a.op(JGE_K, linux.X32_SYSCALL_BIT, true="enosys")
    a.op(JEQ_K, linux.NR_SOCKET, true="socket")
    a.op(JEQ_K, linux.NR_IOCTL, true="ioctl")
    a.op(JEQ_K, linux.NR_LISTEN, true="notify")
    for number in (linux.NR_BIND, linux.NR_CONNECT):
        a.op(JEQ_K, number, true="notify" if swap else "address")
    for number in (linux.NR_SETSOCKOPT, linux.NR_GETSOCKOPT):
        a.op(JEQ_K, number, true="option")
    a.op(JEQ_K, linux.NR_GETSOCKNAME, true="notify" if swap else "descriptor")
    if swap:
        a.op(JEQ_K, linux.NR_GETPEERNAME, true="notify")
    a.op(JEQ_K, linux.NR_SENDTO, true="send")
    a.op(JEQ_K, linux.NR_IO_URING_SETUP, true="eperm", false="allow")

    a.label("socket")
    a.op(LD_W_ABS, OFFSET_ARGS)
    a.op(JEQ_K, AF_INET, true="type")
    a.op(JEQ_K, AF_INET6, true="type")
    a.op(JEQ_K, linux.AF_GRAFT, true="type", false="allow")
    a.label("type")
    a.op(LD_W_ABS, OFFSET_ARGS + 8)
    a.op(AND_K, 0xF)
    a.op(JEQ_K, SOCK_STREAM, true="notify")
    a.op(JEQ_K, SOCK_DGRAM, true="notify", false="allow")

    a.label("send")
    if swap:
        a.op(LD_W_ABS, OFFSET_ARGS + 32)
        a.op(JEQ_K, 0, false="notify")
        a.op(LD_W_ABS, OFFSET_ARGS + 36)
        a.op(JEQ_K, 0, true="allow", false="notify")
    else:
        a.op(LD_W_ABS, OFFSET_ARGS + 40)
        a.op(JEQ_K, SOCKADDR_GR, true="notify", false="allow")

    if not swap:
        a.label("address")
        a.op(LD_W_ABS, OFFSET_ARGS + 16)
        a.op(JEQ_K, SOCKADDR_GR, true="notify", false="descriptor")

    a.label("option")
    a.op(LD_W_ABS, OFFSET_ARGS + 8)
    a.op(JEQ_K, linux.IPPROTO_GRAFT, true="notify")
    if swap:
        for level in SWAPPED_LEVELS:
            a.op(JEQ_K, level, true="notify")
    a.label("descriptor")
    a.op(LD_W_ABS, OFFSET_ARGS)
    a.op(JGE_K, FAMILY_LAST + 1, true="allow")
    a.op(JGE_K, FAMILY_FIRST, true="notify", false="allow")

    a.label("ioctl")
    a.op(LD_W_ABS, OFFSET_ARGS + 8)
    a.op(AND_K, 0xFF00)
    a.op(JEQ_K, 0x8900, true="device")
    a.op(JEQ_K, 0x8B00, true="notify", false="allow")  # wireless extensions
    a.label("device")
    a.op(LD_W_ABS, OFFSET_ARGS + 8)
    a.op(AND_K, 0xFF)
    a.op(JGE_K, 8, true="notify", false="allow")

    a.label("notify")
    a.op(RET_K, RET_USER_NOTIF)
    a.label("enosys")
    a.op(RET_K, RET_ERRNO | errno.ENOSYS)
    a.label("eperm")
    a.op(RET_K, RET_ERRNO | errno.EPERM)
    a.label("kill")
    a.op(RET_K, RET_KILL_PROCESS)
    a.label("allow")
    a.op(RET_K, RET_ALLOW)
    return a.assemble()
