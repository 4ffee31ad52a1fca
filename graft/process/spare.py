"""Descriptors that graftd keeps free, so that orders are heard when containers have taken all others.

What serves an order takes two or three for a moment. A container that starts takes more, for as long as it runs, so
none starts while these are lent.
"""

import os

SPARE = 8
FOR_AN_ORDER = 4  # the pidfd of who gives it, and what is read of them in /proc


class Spare:
    """Up to SPARE descriptors that can be given up. For the loop's thread."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self.refill()

    @property
    def whole(self) -> bool:
        """Are all of them there?"""
        return len(self._held) == SPARE

    def lend(self) -> bool:
        """Give all of them up; False if none was left."""
        held, self._held = self._held, []
        for fd in held:
            os.close(fd)
        return bool(held)

    def make_room(self) -> None:
        """Give all of them up if fewer others are free than an order takes."""
        free: list[int] = []
        try:
            free.extend(os.dup(0) for _ in range(FOR_AN_ORDER))
        except OSError:
            self.lend()
        for fd in free:
            os.close(fd)

    def refill(self) -> None:
        """Take back what is free."""
        while len(self._held) < SPARE:
            try:
                self._held.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                return
