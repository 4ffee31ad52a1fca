"""Endpoints and publications that were moved to a container while it ran: the map `led`, and the ports themselves.

Theory of operation

Goal: blue serves at a port of the host's, and green takes over without a connection that is refused.

Facts: a program of sk_lookup may give a connection that begins to any listener (Documentation/bpf/prog_sk_lookup.rst
of the kernel). What has begun is found by an entry of its own, and stays with the listener that it began with.

Solution: green's server listens where a container's server does, privately. A move writes one entry of the map, which
the kernel exchanges as a whole: a connection finds blue or green, and never nobody. The entry stays, so that nothing
of green's is ever bound at the port, and blue may keep it or close it. A move back writes the entry again.

Once blue has closed its listener nothing is bound at the port. Another program could bind it, and would hear nothing.
So graftd binds it then, with a listener to which nothing is led (hold()).

What still fails: SYN cookies, which the kernel sends while somebody floods blue, are known to blue alone. Who answers
one after the move is reset.
"""

import contextlib
import socket
from collections.abc import Iterable, Iterator, Mapping

from graft.kernel.maps import Map
from graft.kernel.stamps import OWN_TENANT, Stamper
from graft.rules.address import Address
from graft.rules.endpoint import Endpoint
from graft.rules.publication import overlap
from graft.rules.tables import LED, LED_FIXED_BITS, LED_KEY, compile_led
from graft.tenants.tenant import Tenant

HELD_MAX = 64  # ports of one entry that graftd holds: each takes it a descriptor
HELD_ALL = 512
WORD = 64  # bits of an entry of `led_ports`
Port = tuple[Address, int]


class Leads:
    """The map, kept equal to what the tenants have. Only the loop's thread may call its methods."""

    def __init__(self, maps: Mapping[str, Map]) -> None:
        self._maps = maps
        self._written: dict[bytes, bytes] | None = None  # None: nobody has looked yet
        self._words: dict[int, int] = {}  # of `led_ports`, those that are not 0
        self.held: dict[Port, socket.socket] = {}

    def write(self, tenants: Iterable[Tenant]) -> None:
        """Bring the map to what the tenants have. Raises OSError, ENOSPC if it is full; then it is as before."""
        before = self._known()
        wanted: dict[bytes, bytes] = {}
        for tenant in tenants:
            if tenant.led:
                tenant.led &= {rule.endpoint for rule in tenant.ingress}
                for key, value in compile_led(tenant.id, tenant.ingress, tenant.endpoints, tenant.led).items():
                    wanted.setdefault(key, value)
        if wanted == before:
            return
        self._write_bits({*wanted, *before})
        try:
            for key, value in wanted.items():
                if before.get(key) != value:
                    self._maps["led"].update(key, value)
        except OSError:
            for key in wanted:
                if key in before:
                    self._maps["led"].update(key, before[key])
                else:
                    self._maps["led"].delete(key)
            self._write_bits(before)
            raise
        for port in self.held.keys() - _ports(wanted):
            self.held.pop(port).close()  # before anything could be led to it
        for key in before.keys() - wanted.keys():
            self._maps["led"].delete(key)
        self._write_bits(wanted)
        self._written = wanted

    def of(self, endpoint: Endpoint) -> set[int]:
        """The numbers of the tenants that an endpoint's ports are led to."""
        found = set()
        for key, value in self._known().items():
            length, raw, first = LED_KEY.unpack(key)
            span, port = 1 << LED_FIXED_BITS + 16 - length, int.from_bytes(first, "big")
            if endpoint.address == Address(raw) and overlap(port, span, endpoint.port, endpoint.span):
                found.add(int(LED.unpack(value)[0]))
        return found

    def hold(self) -> None:
        """Bind the ports at which the last listener is closed. To be called now and then."""
        if not self._written:
            return
        for address, port in sorted(_ports(self._written) - self.held.keys(), key=str)[: HELD_ALL - len(self.held)]:
            with contextlib.suppress(OSError):  # it is in use: who moved from there still has it, or its connections
                self.held[address, port] = self._bind(address, port)

    def _known(self) -> dict[bytes, bytes]:
        if self._written is None:  # of the graftd before this one
            led, bits = self._maps["led"], self._maps["led_ports"]
            self._written = {key: led.get(key) or b"" for key in list(led.keys(LED_KEY.size))}
            words = ((key, bits.get(key) or b"") for key in bits.keys(4))
            self._words = {_number(key): _number(value) for key, value in words if _number(value)}
        return self._written

    def _write_bits(self, keys: Iterable[bytes]) -> None:
        words: dict[int, int] = {}
        for _, port in _ports(keys, most=1 << 16):
            words[port // WORD] = words.get(port // WORD, 0) | 1 << port % WORD
        for word in words.keys() | self._words.keys():
            if words.get(word) != self._words.get(word):
                bits = words.get(word, 0).to_bytes(8, "little")
                self._maps["led_ports"].update(word.to_bytes(4, "little"), bits)
        self._words = words

    def _bind(self, address: Address, port: int) -> socket.socket:
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(socket.AF_INET if address.v4 else socket.AF_INET6))
            Stamper(self._maps["stamps"]).stamp(sock.fileno(), OWN_TENANT, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # beside connections of those before
            if not address.v4:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((str(address), port))
            sock.listen(1)  # with SO_REUSEADDR, others could bind a port beside one that does not listen
            undo.pop_all()
        return sock


def _ports(keys: Iterable[bytes], most: int = HELD_MAX) -> set[Port]:
    """The addresses and ports of entries, of each at the most @most."""
    return set(_each(keys, most))


def _each(keys: Iterable[bytes], most: int) -> Iterator[Port]:
    for key in keys:
        length, raw, first = LED_KEY.unpack(key)
        for n in range(min(1 << LED_FIXED_BITS + 16 - length, most)):
            yield Address(raw), int.from_bytes(first, "big") + n


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "little")
