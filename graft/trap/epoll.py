"""epoll registrations of a target: found, and made again for another socket."""

import contextlib
import ctypes
import os
import socket
import struct
from typing import NamedTuple

from graft.kernel import linux
from graft.kernel.architecture import HERE
from graft.trap.target import apart, borrow_fd

EPOLL_CTL_ADD = 1


class Watch(NamedTuple):
    """A registration in one of the target's epoll instances (proc(5), /proc/PID/fdinfo).

    `epoll` is the number of the instance, `number` that of the watched descriptor, `events` and `data` are those of
    struct epoll_event.
    """

    epoll: int
    number: int
    events: int
    data: int


def watches(pid: int, inode: int) -> list[Watch]:
    """The registrations of the socket with this inode in the target's epoll instances. Raises OSError."""
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if os.readlink(entry.path) != "anon_inode:[eventpoll]":
                continue
            with open(f"/proc/{pid}/fdinfo/{entry.name}") as info:
                for line in info:
                    words = line.replace(":", " ").split()
                    if words[:1] != ["tfd"]:
                        continue
                    told = dict(zip(words[::2], words[1::2], strict=False))
                    if int(told["ino"], 16) == inode:
                        watch = Watch(
                            int(entry.name), int(told["tfd"]), int(told["events"], 16), int(told["data"], 16)
                        )
                        found.append(watch)
    return found


def watch_again(pid: int, sock: socket.socket, registrations: list[Watch]) -> None:
    """Register @sock in the target's epoll instances where another socket was watched, with the same data.

    epoll(7) identifies an entry by its file and by the number that the file had in the caller's descriptor table. So
    this runs in a thread with a table of its own, in which @sock is put at the number that it has in the target.
    Raises OSError.
    """

    def work() -> None:
        linux.unshare(linux.CLONE_FILES)
        import fcntl

        top = max(watch.number for watch in registrations) + 1
        for watch in registrations:
            epoll = borrow_fd(pid, watch.epoll)
            high = fcntl.fcntl(epoll, fcntl.F_DUPFD_CLOEXEC, top)
            mine = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, top)
            os.dup2(mine, watch.number, inheritable=False)
            event = ctypes.create_string_buffer(struct.pack(HERE.epoll_event, watch.events & 0xFFFFFFFF, watch.data))
            if linux.libc.epoll_ctl(high, EPOLL_CTL_ADD, watch.number, event) < 0:
                raise linux.oserror("epoll_ctl")

    if registrations:
        apart(work)
