"""Ids that are delegated to users: the lines of /etc/subuid and /etc/subgid (subuid(5)), OWNER:FIRST:COUNT."""

from pathlib import Path
from typing import NamedTuple


class Delegated(NamedTuple):
    """`size` ids from `first` on, which `owner`, a name or a number, may use in user namespaces."""

    first: int
    size: int
    owner: str

    def has(self, number: int) -> bool:
        """Is the id @number among them?"""
        return self.first <= number < self.first + self.size


def read_delegated(path: str) -> list[Delegated]:
    """The lines of the file at @path that are well-formed, in order; none if it cannot be read."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
    words = [line.split(":") for line in lines]
    return [Delegated(int(w[1]), int(w[2]), w[0]) for w in words if len(w) == 3 and w[1].isdigit() and w[2].isdigit()]
