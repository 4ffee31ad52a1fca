"""How long trapped calls took, by container: the counts of a histogram. graft-sup counts its own in the journal."""

from collections.abc import Iterable

SUP_SPENT = 9  # csrc/sup.h
SUP_SPENT_FIRST = 10_000  # ns
BOUNDS = tuple((SUP_SPENT_FIRST << n) / 1e9 for n in range(SUP_SPENT - 1))  # seconds; the last count is of all beyond


class Spent:
    """Counts of calls by how long they took, and the nanoseconds of all together."""

    def __init__(self) -> None:
        self.counts = [0] * SUP_SPENT
        self.ns = 0

    @property
    def calls(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def note(self, ns: int) -> None:
        """Count a call that took @ns nanoseconds."""
        self.counts[min((ns // SUP_SPENT_FIRST).bit_length(), SUP_SPENT - 1)] += 1
        self.ns += ns

    def add(self, counts: Iterable[int], ns: int) -> None:
        """Add what somebody else has counted."""
        self.counts = [mine + other for mine, other in zip(self.counts, counts, strict=True)]
        self.ns += ns
