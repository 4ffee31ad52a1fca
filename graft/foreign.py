"""Closing descriptors that others sent: it may wait, and must not wait in the loop.

The last close of a TCP socket waits as long as its SO_LINGER says (socket(7)), and that of a file may wait for
whoever serves its file system.
"""

import contextlib
import os
import threading

LISTENER = "anon_inode:seccomp notify"


def is_listener(fd: int) -> bool:
    """Is it a seccomp listener, whatever its sender says?"""
    return os.readlink(f"/proc/self/fd/{fd}") == LISTENER


def close_foreign(fd: int) -> None:
    """Close a descriptor that a peer sent; the close of anything but a listener happens in a thread of its own."""
    if is_listener(fd):
        os.close(fd)
    else:
        threading.Thread(target=_close, args=(fd,), daemon=True).start()


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
