"""Publications (`-p`): their grammar, and the endpoints and rules that they stand for. Pure."""

from collections.abc import Iterable
from typing import NamedTuple

from graft.errors import UsageError
from graft.rules.address import ANY4, ANY6, IPPROTO, PROTOCOL_NAME, Address, parse_address, parse_ports
from graft.rules.endpoint import NAME_MAX, Endpoint, IngressRule


class Publication(NamedTuple):
    """`-p`: `span` ports of the container from `first` on, at as many of the host from `host_first` on."""

    address: Address | None  # None: every address of the host, both families
    host_first: int
    first: int
    span: int
    protocol: int

    def __str__(self) -> str:
        def ports(start: int) -> str:
            return str(start) if self.span == 1 else f"{start}-{start + self.span - 1}"

        host = self.address.with_port(ports(self.host_first)) if self.address else ports(self.host_first)
        return f"{host}:{ports(self.first)}/{PROTOCOL_NAME[self.protocol]}"


def parse_publication(text: str) -> Publication:
    """Parse [HADDR:]HPORT[-HPORT]:PORT[-PORT][/tcp|/udp]. Raises UsageError."""
    form = "the form is [HADDR:]HPORT:PORT[/tcp|/udp], like 8080:80 or 192.0.2.1:53:53/udp"
    where, slash, protocol = text.partition("/")
    if slash and protocol not in IPPROTO:
        raise UsageError(f"publication '{text}': '{protocol}' is not a protocol", hint="tcp or udp")
    rest, colon, inner = where.rpartition(":")
    if not colon or not rest or rest.endswith("]"):
        raise UsageError(f"publication '{text}' names one port", hint=form)
    host, colon, outer = rest.rpartition(":")
    if not colon:
        host, outer = "", rest
    if not outer or not inner:
        raise UsageError(f"publication '{text}' lacks a port", hint=form)
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise UsageError(f"publication '{text}': an IPv6 address needs brackets", hint=f"[{host}]:{outer}:{inner}")
    host_first, host_last = parse_ports(outer, least=1)
    first, last = parse_ports(inner, least=1)
    if host_last - host_first != last - first:
        raise UsageError(f"publication '{text}': the two ranges differ in length", hint=form)
    address = parse_address(host) if host else None
    return Publication(address, host_first, first, last - first + 1, IPPROTO[protocol or "tcp"])


def append(publication: Publication, found: list[Publication]) -> None:
    """Append @publication to @found, or make it a part of the last one there, whose ports it follows."""
    last = found[-1] if found else None
    if last and publication == last._replace(
        host_first=last.host_first + last.span, first=last.first + last.span, span=publication.span
    ):
        found[-1] = last._replace(span=last.span + publication.span)
    else:
        found.append(publication)


def fold(publications: Iterable[Publication]) -> list[Publication]:
    """Make one publication of those whose ports follow each other, at one address and of one protocol.

    Engines name each port of a range by itself. What follows nothing stays where it was in the order.
    """
    given = list(publications)
    order = {one._replace(span=0): place for place, one in reversed(list(enumerate(given)))}
    found: list[Publication] = []
    for one in sorted(given, key=lambda p: (p.protocol, p.address.raw if p.address else b"", p.host_first, p.first)):
        append(one, found)
    return sorted(found, key=lambda one: order[one._replace(span=0)])


def overlap(first: int, span: int, other_first: int, other_span: int) -> bool:
    """Have two ranges of ports one in common?"""
    return other_first < first + span and first < other_first + other_span


def host_addresses(publication: Publication, *, ipv6: bool = True) -> list[Address]:
    """The host addresses of a publication. Without HADDR: 0.0.0.0, and [::] if the host has IPv6."""
    if publication.address is not None:
        return [publication.address]
    return [Address(ANY4), Address(ANY6)] if ipv6 else [Address(ANY4)]


def published(publication: Publication, taken: set[str], *, ipv6: bool) -> list[tuple[Endpoint, IngressRule]]:
    """The endpoints and ingress rules that one `-p` stands for, one pair for each address of host_addresses().

    The endpoints' names differ from those in @taken, and are added to it.
    """
    made = []
    for address in host_addresses(publication, ipv6=ipv6):
        base = f"{PROTOCOL_NAME[publication.protocol]}{'' if address.v4 else '6'}-{publication.host_first}"
        name, n = base, 1
        while name in taken:
            n += 1
            name = f"{base[: NAME_MAX - 1 - len(str(n))]}.{n}"
        taken.add(name)
        endpoint = Endpoint(name, address, publication.host_first, publication.span, published=True)
        wildcard = Address(ANY4 if address.v4 else ANY6)
        last = publication.first + publication.span - 1
        made.append((endpoint, IngressRule(wildcard, publication.first, last, name, (publication.protocol,))))
    return made
