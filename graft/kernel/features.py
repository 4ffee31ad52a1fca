"""What graft uses of newer kernels: each thing with the first Linux that has it, and a probe that tries it.

REQUIRED is what the BPF programs and every container need. What else a kernel before 6.1 lacks for the programs, its
verifier says. OPTIONAL is what graft does without, at the price named.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

from graft.errors import Failure
from graft.kernel import linux
from graft.rules.sysctl import IP_LOCAL_PORT_RANGE

BPF_PROG_TYPE_CGROUP_SOCK_ADDR = 18
PIDFD_THREAD = os.O_EXCL  # linux/pidfd.h


class Feature(NamedTuple):
    """@linux: the first release that has it. @why: what it is for. @there: is it? Raises OSError, Failure."""

    name: str
    linux: str
    why: str
    there: Callable[[], bool]


def _helper(number: int) -> Callable[[], bool]:
    """A probe for a helper function of BPF programs, by its number (linux/bpf.h)."""

    def there() -> bool:
        try:
            library = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError:
            raise Failure("libbpf.so.1 is not installed", hint="apt-get install libbpf1") from None
        found: int = library.libbpf_probe_bpf_helper(BPF_PROG_TYPE_CGROUP_SOCK_ADDR, number, None)
        if found < 0:
            raise OSError(-found, os.strerror(-found))
        return found == 1

    return there


def _option(level: int, number: int, size: int, family: int = socket.AF_INET) -> Callable[[], bool]:
    """A probe for a socket option, by reading it."""

    def there() -> bool:
        one, other = socket.socketpair() if family == socket.AF_UNIX else (socket.socket(family), None)
        try:
            value = one.getsockopt(level, number, size)
            if number == linux.SO_PEERPIDFD:
                os.close(int.from_bytes(value, "little"))
        except OSError as error:
            if error.errno not in (errno.ENOPROTOOPT, errno.EINVAL):
                raise
            return False
        finally:
            one.close()
            if other:
                other.close()
        return True

    return there


def _call(name: str) -> Callable[[], bool]:
    """A probe for a system call: without an argument it fails, otherwise than by ENOSYS."""
    return lambda: linux.libc.syscall(linux.NUMBERS[name], -1, 0, -1, 0, 0) >= 0 or ctypes.get_errno() != errno.ENOSYS


def _thread_pidfd() -> bool:
    """A pidfd of a thread that is no leader (pidfd_open(2))."""
    answer: list[bool] = []

    def ask() -> None:
        try:
            os.close(os.pidfd_open(threading.get_native_id(), PIDFD_THREAD))
        except OSError:
            answer.append(False)
        else:
            answer.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return answer == [True]


def _procmap_query() -> bool:
    query = bytearray(linux.PROCMAP_QUERY_SIZE)
    struct.pack_into(
        "=QQQ", query, 0, linux.PROCMAP_QUERY_SIZE, 0, ctypes.addressof(ctypes.c_char.from_buffer(query))
    )
    with open("/proc/self/maps", "rb") as maps, contextlib.suppress(OSError):
        fcntl.ioctl(maps, linux.PROCMAP_QUERY, query)
        return True
    return False


REQUIRED = (
    Feature("bpf_get_current_task_btf()", "5.11", "who is inside a direct container", _helper(158)),
    Feature("mount_setattr()", "5.12", "what is mounted for a direct container is read-only", _call("mount_setattr")),
    Feature("SO_NETNS_COOKIE", "5.14", "whose a netns is", _option(socket.SOL_SOCKET, linux.SO_NETNS_COOKIE, 8)),
    Feature("bpf_loop()", "5.17", "a packet's headers, and the addresses of a list", _helper(181)),
    Feature("bpf_set_retval()", "5.18", "a refused call has an errno of its own", _helper(187)),
    Feature("bpf_skc_to_mptcp_sock()", "5.19", "the policy of an MPTCP connection's parts", _helper(196)),
)
OPTIONAL = (
    Feature(
        "IP_LOCAL_PORT_RANGE",
        "6.3",
        "containers leave the host's programs a share of the ephemeral ports",
        _option(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, 4),
    ),
    Feature(
        "SO_PEERPIDFD",
        "6.5",
        "a peer is held while it connects, not from the accept on",
        _option(socket.SOL_SOCKET, linux.SO_PEERPIDFD, 4, socket.AF_UNIX),
    ),
    Feature("PIDFD_THREAD", "6.9", "threads with a table of descriptors of their own", _thread_pidfd),
    Feature("PROCMAP_QUERY", "6.11", "one question for the mapping at an address, not all lines", _procmap_query),
)


def lacking(features: tuple[Feature, ...]) -> list[Feature]:
    """Those of @features that this kernel does not have. Raises OSError, Failure."""
    return [feature for feature in features if not feature.there()]
