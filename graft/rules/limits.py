"""How many sockets and ports a container may have at a time. Sockets of socket() count; those of accept() do not.

Ports are those of the host that the kernel chooses: of UDP sockets that send without a bind, of binds to port 0 of an
address of the host, of `dynamic` endpoints. All containers together may have half of the ephemeral ones, so that the
host's programs find one. TCP connections do not count, because many of them share one port, if their peers differ;
nor do ports of the private loopback.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from graft.errors import UsageError

MAX = 1 << 24
PORTS = 4096
HINT = "sockets=N, udp=N, ports=N, rate=N{k,m,g}bit"
UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}  # as tc(8) has them
RATE_MIN, RATE_MAX = 1000, (1 << 32) - 2  # bytes a second; SO_MAX_PACING_RATE of 32 bits, but for "none"


class Limits(NamedTuple):
    """The limits of one container. UDP sockets count in `sockets` as well. `rate` is of each TCP socket, 0: none."""

    sockets: int = 65536
    udp: int = 4096
    ports: int = PORTS
    rate: int = 0  # bytes a second

    def __str__(self) -> str:
        """As parse_limits() reads it. What is the default is not there, where earlier releases do not know it."""
        ports = f",ports={self.ports}" if self.ports != PORTS else ""
        rate = f",rate={rate_text(self.rate)}" if self.rate else ""
        return f"sockets={self.sockets},udp={self.udp}{ports}{rate}"

    def texts(self) -> Iterator[tuple[str, int, str]]:
        """The limits that are named (not 0): field, number, and how it is written."""
        for name, number in self._asdict().items():
            if number:
                yield name, number, f"{name}={rate_text(number)}" if name == "rate" else f"{name}={number}"

    def lowest(self, other: "Limits") -> "Limits":
        """The stricter of both, limit by limit."""
        rate = min(filter(None, (self.rate, other.rate)), default=0)
        return Limits(*map(min, self, other))._replace(rate=rate)

    def or_else(self, default: "Limits") -> "Limits":
        """These limits, with those of @default in place of what is not named (0)."""
        return Limits(*(mine or other for mine, other in zip(self, default, strict=True)))


def rate_text(rate: int) -> str:
    """How @rate, in bytes a second, is written: in the greatest unit of which it is a whole number."""
    bits = rate * 8
    unit = next(unit for unit in reversed(UNITS) if bits % UNITS[unit] == 0)
    return f"{bits // UNITS[unit]}{unit}"


UNLIMITED = Limits(0, 0, 0, 0)  # names none


def parse_limits(texts: Iterable[str], default: Limits) -> Limits:
    """Parse `sockets=N`, `udp=N`, `ports=N` and `rate=100mbit`, separated by commas or given one by one.

    The rest is as in @default. Raises UsageError.
    """
    limits = default
    for text in texts:
        for item in text.split(","):
            name, _, number = item.strip().partition("=")
            if name not in Limits._fields:
                raise UsageError(f"limit '{item}': unknown", hint=HINT)
            if name == "rate":
                limits = limits._replace(rate=_rate(item, number))
                continue
            if not (number.isascii() and number.isdigit()) or len(number) > 8 or not 1 <= int(number) <= MAX:
                raise UsageError(f"limit '{item}': not a number from 1 to {MAX}", hint=HINT)
            limits = limits._replace(**{name: int(number)})
    return limits


def _rate(item: str, text: str) -> int:
    """Parse a number with a unit of tc(8): bytes a second. Raises UsageError."""
    number = text.rstrip("bgikmt")
    unit = UNITS.get(text[len(number) :], 0)
    if not unit or not (number.isascii() and number.isdigit()) or len(number) > 12:
        raise UsageError(f"limit '{item}': not a rate", hint="a number and bit, kbit, mbit or gbit, like 100mbit")
    rate = int(number) * unit // 8
    if not RATE_MIN <= rate <= RATE_MAX:
        raise UsageError(f"limit '{item}': not from {RATE_MIN * 8 // 1000}kbit to {RATE_MAX * 8 // 10**9}gbit")
    return rate


def default_limits(environment: Mapping[str, str], configured: Limits) -> Limits:
    """The limits of a container that names none: GRAFT_LIMITS of @environment over @configured. Raises UsageError."""
    try:
        return parse_limits(filter(None, [environment.get("GRAFT_LIMITS")]), configured)
    except UsageError as error:
        raise UsageError(f"GRAFT_LIMITS: {error.message}", hint=error.hint) from None
