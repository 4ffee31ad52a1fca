"""The event loop of graftd: epoll(7) on one thread, and a callback for each descriptor.

Only the loop's own thread adds and removes descriptors. modify() is a single epoll_ctl(2), so other threads may call
it, if they make sure that the descriptor is still open (graft/trap/listeners.py).
"""

import select
from collections.abc import Callable

from graft.log import log

Callback = Callable[[int], None]


class Loop:
    """A level-triggered loop that takes one event in each round.

    The kernel rotates its list of ready descriptors, so no descriptor starves another. With more than one event in a
    round, a callback could close a descriptor for which an event is left, and the event would go to another one that
    got the same number.
    """

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.callbacks: dict[int, Callback] = {}
        self.running = True

    def add(self, fd: int, callback: Callback, events: int = select.EPOLLIN) -> None:
        """Watch @fd for EPOLL* @events; @callback is called with those that came. Raises OSError: EEXIST, EPERM."""
        self.callbacks[fd] = callback
        self.epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Watch @fd for other EPOLL* @events; with 0 only EPOLLHUP and EPOLLERR are reported. Raises OSError."""
        self.epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Stop watching @fd. The caller does this before it closes @fd. Raises KeyError, OSError."""
        del self.callbacks[fd]
        self.epoll.unregister(fd)

    def run(self, tick: Callable[[], float]) -> None:
        """Run until `running` is false. @tick runs before each round and returns how many seconds that may wait.

        A callback's exception is logged and the loop goes on.
        """
        while self.running:
            for fd, events in self.epoll.poll(tick(), 1):
                callback = self.callbacks.get(fd)
                if callback:
                    try:
                        callback(events)
                    except Exception:  # the error of one connection or container must not end the others
                        log.exception("the callback of descriptor %d failed", fd)
