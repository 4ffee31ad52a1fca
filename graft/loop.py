"""The event loop of graftd: descriptors and what to call when they are ready. One thread, epoll(7)."""

import select
from collections.abc import Callable

from graft.log import log

Callback = Callable[[int], None]


class Loop:
    """Level-triggered, one event a round: the kernel turns its ready list, so none starves another, and no
    event can be left over for a descriptor number that a callback has closed and another has taken.
    """

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.callbacks: dict[int, Callback] = {}
        self.running = True

    def add(self, fd: int, callback: Callback, events: int = select.EPOLLIN) -> None:
        """Watch @fd; @callback gets the events."""
        self.callbacks[fd] = callback
        self.epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Change the events of @fd."""
        self.epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Stop watching; before @fd is closed."""
        del self.callbacks[fd]
        self.epoll.unregister(fd)

    def run(self, tick: Callable[[], float]) -> None:
        """Until `running` is false. @tick runs between rounds and says how many seconds the next may wait."""
        while self.running:
            for fd, events in self.epoll.poll(tick(), 1):
                callback = self.callbacks.get(fd)
                if callback:
                    try:
                        callback(events)
                    except Exception:  # one connection's or container's trouble is not the others'
                        log.exception("descriptor %d", fd)
