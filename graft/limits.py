"""How many sockets a container may have: those that socket() gave it and that are open; accepted ones do not count.

Half of the host's ephemeral UDP ports would be gone with 14,000 sockets of one container; a TCP port is shared by
connections to different peers.
"""

from collections.abc import Iterable
from typing import NamedTuple

from graft.errors import UsageError

MAX = 1 << 24


class Limits(NamedTuple):
    """Of one container; `udp` is a part of `sockets`."""

    sockets: int = 65536
    udp: int = 4096

    def __str__(self) -> str:
        return f"sockets={self.sockets},udp={self.udp}"

    def lowest(self, other: "Limits") -> "Limits":
        """The stricter of each."""
        return Limits(min(self.sockets, other.sockets), min(self.udp, other.udp))


def parse_limits(texts: Iterable[str], default: Limits) -> Limits:
    """`sockets=N`, `udp=N`, separated by commas or given one by one. Raises UsageError."""
    limits = default
    for text in texts:
        for item in text.split(","):
            name, _, number = item.strip().partition("=")
            if name not in Limits._fields:
                raise UsageError(f"limit '{item}': unknown", hint="sockets=N, udp=N")
            if not (number.isascii() and number.isdigit()) or len(number) > 8 or not 1 <= int(number) <= MAX:
                raise UsageError(f"limit '{item}': not a number from 1 to {MAX}", hint="sockets=N, udp=N")
            limits = limits._replace(**{name: int(number)})
    return limits
