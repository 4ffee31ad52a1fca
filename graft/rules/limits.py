"""How many sockets and ports a container may have at a time. Sockets of socket() count; those of accept() do not.

Ports are those of the host that the kernel chooses: of UDP sockets that send without a bind, of binds to port 0 of an
address of the host, of `dynamic` endpoints. All containers together may have half of the ephemeral ones, so that the
host's programs find one. TCP connections do not count, because many of them share one port, if their peers differ;
nor do ports of the private loopback.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from graft.errors import UsageError

MAX = 1 << 24
PORTS = 4096
HINT = "sockets=N, udp=N, ports=N"


class Limits(NamedTuple):
    """The limits of one container. UDP sockets count in `sockets` as well."""

    sockets: int = 65536
    udp: int = 4096
    ports: int = PORTS

    def __str__(self) -> str:
        """As parse_limits() reads it. `ports` is not there if it is the default: earlier releases do not know it."""
        ports = f",ports={self.ports}" if self.ports != PORTS else ""
        return f"sockets={self.sockets},udp={self.udp}{ports}"

    def lowest(self, other: "Limits") -> "Limits":
        """The stricter of both, limit by limit."""
        return Limits(*map(min, self, other))

    def or_else(self, default: "Limits") -> "Limits":
        """These limits, with those of @default in place of what is not named (0)."""
        return Limits(*(mine or other for mine, other in zip(self, default, strict=True)))


UNLIMITED = Limits(0, 0, 0)  # names none


def parse_limits(texts: Iterable[str], default: Limits) -> Limits:
    """Parse `sockets=N`, `udp=N` and `ports=N`, separated by commas or given one by one; the rest is as in @default.

    Raises UsageError.
    """
    limits = default
    for text in texts:
        for item in text.split(","):
            name, _, number = item.strip().partition("=")
            if name not in Limits._fields:
                raise UsageError(f"limit '{item}': unknown", hint=HINT)
            if not (number.isascii() and number.isdigit()) or len(number) > 8 or not 1 <= int(number) <= MAX:
                raise UsageError(f"limit '{item}': not a number from 1 to {MAX}", hint=HINT)
            limits = limits._replace(**{name: int(number)})
    return limits


def default_limits(environment: Mapping[str, str]) -> Limits:
    """The limits of a container that names none: GRAFT_LIMITS of @environment. Raises UsageError."""
    try:
        return parse_limits(filter(None, [environment.get("GRAFT_LIMITS")]), Limits())
    except UsageError as error:
        raise UsageError(f"GRAFT_LIMITS: {error.message}", hint=error.hint) from None
