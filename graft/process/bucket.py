"""A rate: how much may be taken of what comes again with time."""


class Bucket:
    """Tokens that come again at a rate (@rate a second), up to @most."""

    def __init__(self, rate: float, most: float) -> None:
        self.rate = rate
        self.most = most
        self._level = most
        self._at = 0.0

    def level(self, now: float) -> float:
        """How many tokens there are at @now, monotonic seconds; less than 0 after a debt."""
        self._level = min(self.most, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level

    def take(self, price: float) -> None:
        """Take tokens, whether they are there or not. level() tells before."""
        self._level -= price
