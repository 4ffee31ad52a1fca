"""How much of what carries connections inside netns a container may have, so that none closes the way of the others.

A container has a share for sure, whatever the others do: SURE connections, and SURE_RATE new ones a second. Beyond it
all have COMMON connections and COMMON_RATE together, and one of them EACH and EACH_RATE at most. Values only: nothing
here opens or reads anything.
"""

from graft.process.bucket import Bucket

EACH, SURE = 256, 16  # connections of one container
COMMON = 2048  # of all, beyond what each has for sure
# New connections a second, and at once. Each costs graftd's loop half a millisecond.
EACH_RATE, EACH_BURST = 200.0, 256.0
SURE_RATE, SURE_BURST = 5.0, 16.0
COMMON_RATE, COMMON_BURST = 500.0, 1024.0
START_PRICE = 20.0  # of a graft-relay that is started, in connections


class Common:
    """What all containers have together, beyond what each has for sure."""

    def __init__(self) -> None:
        self.bucket = Bucket(COMMON_RATE, COMMON_BURST)
        self.beyond = 0  # connections


class Share:
    """What one container has, and may have."""

    def __init__(self, common: Common) -> None:
        self.common = common
        self.open = 0
        self._each = Bucket(EACH_RATE, EACH_BURST)
        self._sure = Bucket(SURE_RATE, SURE_BURST)

    def count(self, connections: int) -> None:
        """It has so many connections now."""
        self.common.beyond += max(connections - SURE, 0) - max(self.open - SURE, 0)
        self.open = connections

    def may(self, now: float) -> bool:
        """May it have one more at @now, monotonic seconds?"""
        if self.open >= EACH or (self.open >= SURE and self.common.beyond >= COMMON):
            return False
        if self._each.level(now) < 1:
            return False
        return self._sure.level(now) >= 1 or self.common.bucket.level(now) >= 1

    def take(self, now: float, price: float = 1.0) -> None:
        """Count a new connection at @now, or what costs as much as @price of them, against the rates."""
        self._each.level(now)
        self._each.take(price)
        payer = self._sure if self._sure.level(now) >= 1 else self.common.bucket
        payer.level(now)
        payer.take(price)
