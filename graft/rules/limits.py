"""How many sockets a container may have open at a time. Sockets of socket() count; those of accept() do not.

UDP has a lower limit, because each bound UDP socket takes one of the host's ports: 14,000 sockets of one container
would take half of the ephemeral ones. Many TCP connections share one port, if their peers differ.
"""

from collections.abc import Iterable
from typing import NamedTuple

from graft.errors import UsageError

MAX = 1 << 24


class Limits(NamedTuple):
    """The limits of one container. UDP sockets count in `sockets` as well."""

    sockets: int = 65536
    udp: int = 4096

    def __str__(self) -> str:
        return f"sockets={self.sockets},udp={self.udp}"

    def lowest(self, other: "Limits") -> "Limits":
        """The stricter of both, limit by limit."""
        return Limits(min(self.sockets, other.sockets), min(self.udp, other.udp))

    def or_else(self, default: "Limits") -> "Limits":
        """These limits, with those of @default in place of what is not named (0)."""
        return Limits(self.sockets or default.sockets, self.udp or default.udp)


UNLIMITED = Limits(0, 0)  # names none


def parse_limits(texts: Iterable[str], default: Limits) -> Limits:
    """Parse `sockets=N` and `udp=N`, separated by commas or given one by one; the rest is as in @default.

    Raises UsageError.
    """
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
