"""The seccomp program of a target, as data.

What it traps and why (docs/design.md, "Trap few calls"):

- socket() of AF_INET and AF_INET6, stream and datagram: its arguments are registers, so nothing in the
  target's memory can change between the check and the use. Raw sockets are left to the container's own
  namespace, because no cgroup hook sees what they send.
- listen(): without a bind before it no bind hook runs.
- ioctl() on network devices: no hook exists for it, and on a grafted socket it would read or change the
  host. 0x8901 to 0x8907 (owner, out-of-band mark, time stamps) concern the socket alone and are not trapped.
- io_uring_setup is refused, as Docker's profile does: its operations evade every seccomp trap.
- the i386 and x32 calling conventions: an i386 setsockopt() skips cgroup/setsockopt, so what 32-bit
  programs need for internet sockets is refused.

Never close, fcntl, write or sendmsg: container runtimes make them between installing the filter and
handing over the listener, and would hang. Argument tests read only the low 32 bits, as the kernel does for
these calls. Calls without a test stay in seccomp's always-allow bitmap.

The module is pure: `program()` returns struct sock_filter records (linux/filter.h).
"""

import errno
import struct

from graft import linux

LD_W_ABS = 0x20
JEQ_K = 0x15
JGE_K = 0x35
AND_K = 0x54
RET_K = 0x06

RET_ALLOW = 0x7FFF0000
RET_ERRNO = 0x00050000
RET_USER_NOTIF = 0x7FC00000
RET_KILL_PROCESS = 0x80000000

# struct seccomp_data (linux/seccomp.h), little endian
OFFSET_NR = 0
OFFSET_ARCH = 4
OFFSET_ARGS = 16

# i386 numbers (asm/unistd_32.h) by which a 32-bit program would reach an internet socket
I386_REFUSED = (102, 359, 361, 362, 363, 366, 425)  # socketcall socket bind connect listen setsockopt io_uring_setup

AF_INET = 2
AF_INET6 = 10
SOCK_STREAM = 1
SOCK_DGRAM = 2


class Assembler:
    """Classic BPF with labels; a jump goes forward, at most 255 instructions."""

    def __init__(self) -> None:
        self.code: list[tuple[int, str | None, str | None, int]] = []
        self.labels: dict[str, int] = {}

    def op(self, code: int, k: int, *, true: str | None = None, false: str | None = None) -> None:
        """Append an instruction; a missing target means the next one."""
        self.code.append((code, true, false, k))

    def label(self, name: str) -> None:
        """Name the place of the next instruction."""
        self.labels[name] = len(self.code)

    def assemble(self) -> bytes:
        """struct sock_filter records, 8 bytes each."""

        def distance(name: str | None, here: int) -> int:
            return 0 if name is None else self.labels[name] - here - 1

        return b"".join(
            struct.pack("=HBBI", code, distance(true, at), distance(false, at), k)
            for at, (code, true, false, k) in enumerate(self.code)
        )


def program() -> bytes:
    """The filter that every target gets."""
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
    a.op(JEQ_K, linux.NR_IO_URING_SETUP, true="eperm", false="allow")

    a.label("socket")
    a.op(LD_W_ABS, OFFSET_ARGS)
    a.op(JEQ_K, AF_INET, true="type")
    a.op(JEQ_K, AF_INET6, true="type", false="allow")
    a.label("type")
    a.op(LD_W_ABS, OFFSET_ARGS + 8)
    a.op(AND_K, 0xF)
    a.op(JEQ_K, SOCK_STREAM, true="notify")
    a.op(JEQ_K, SOCK_DGRAM, true="notify", false="allow")

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
