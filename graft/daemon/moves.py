"""`graft endpoint move` and `graft rule move`: what a container holds becomes another's, while both run.

graft/tenants/leads.py says how. Here: who may hand over what, and when the giver may be ended. A connection that has
begun before the move is the giver's, and one that its program has not accepted yet would be reset with its listener.
So the answer waits until none is left.
"""

import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from typing import NamedTuple

from graft.daemon.admission import import_endpoints
from graft.daemon.connection import Later
from graft.daemon.tenancy import Tenancy
from graft.errors import Refused
from graft.kernel.listening import listens
from graft.kernel.open_sockets import HALF_OPEN, LISTENING, open_sockets
from graft.kernel.stamps import OWN_TENANT
from graft.process.lines import Lines, Then
from graft.rules.address import ANY4, ANY6, Address
from graft.rules.endpoint import Endpoint, IngressRule
from graft.rules.publication import Publication, published
from graft.rules.slices import in_slices
from graft.tenants import ports, publish
from graft.tenants.registry import Registry
from graft.tenants.tenant import CONTAINER, Tenant

PATIENCE = 3.0  # seconds for the giver to accept what waits
LOOK = 0.01
THREADS = 8
SPAN_MAX = 1024  # ports of a publication: each is looked at
TCP = (socket.IPPROTO_TCP,)
FOREIGN = -1  # a program that is no container's
Held = tuple[Endpoint, IngressRule]


class Pair(NamedTuple):
    """Who gives, and who gets."""

    source: Tenant
    target: Tenant


def check_pair(pair: Pair) -> None:
    """Raise Refused unless these are two containers."""
    for tenant in pair:
        if tenant.kind != CONTAINER:
            raise Refused(
                f"'{tenant.name}' is a wrapper, whose rules do not change", hint="name two containers", code="EINVAL"
            )
    if pair.source is pair.target:
        raise Refused(f"'{pair.source.name}' holds it already", hint="name two containers", code="EINVAL")


def endpoint_rules(pair: Pair, name: str) -> list[IngressRule]:
    """The ingress rules of the giver that name an endpoint. Raises Refused if it cannot be moved."""
    endpoint = pair.source.endpoints.get(name)
    rules = [rule for rule in pair.source.ingress if rule.endpoint == name]
    if not rules or endpoint is None:
        raise Refused(
            f"container '{pair.source.name}' does not hold endpoint '{name}'",
            hint=f"'graft rule show {pair.source.name}' lists what it holds",
            code="ENOENT",
        )
    if endpoint.published:
        raise Refused(f"endpoint '{name}' belongs to a publication", hint="graft rule move -p ...", code="EBUSY")
    wrong = ""
    if endpoint.address is None:
        wrong = f"is of type {endpoint.kind}: its clients find its server by a path"
    elif endpoint.place:
        wrong = "is in another network namespace than the host's"
    elif not endpoint.port:
        wrong = "is dynamic: each bind gets a port of its own"
    elif len({(rule.address, rule.first, rule.last) for rule in rules}) > 1 or rules[0].first != rules[0].last:
        wrong = f"stands for several ports of '{pair.source.name}', of which one has to be led"
    elif not any(socket.IPPROTO_TCP in rule.protocols for rule in rules):
        wrong = "is for UDP alone, whose sockets answer from the port that they are bound to"
    if wrong:
        raise Refused(f"endpoint '{name}' {wrong}", hint="'graft rule del', then 'graft rule add'", code="EOPNOTSUPP")
    other = pair.target.endpoints.get(name)
    if other and (other.address, other.port) != (endpoint.address, endpoint.port):
        raise Refused(
            f"container '{pair.target.name}' has another endpoint '{name}', {other.where}",
            hint=f"graft endpoint del {name} --netns {pair.target.name}",
            code="EEXIST",
        )
    return rules


class Moves:
    """Carries moves out. For the loop's thread."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.registry: Registry = tenancy.registry
        self._lines = Lines(tenancy.loop, THREADS, lambda: None)
        self._numbers = count()  # of moves, none of which waits for another

    def endpoint(self, pair: Pair, name: str, rules: list[IngressRule]) -> Later:
        """Give the rules of endpoint_rules() to the target. Raises Refused, OSError."""
        source, target = pair
        endpoint = source.endpoints[name]
        held = [(endpoint, rule) for rule in rules]
        self._check_servers(pair, held)
        self._check_reached(source, held)

        def change() -> None:
            import_endpoints(target, [name], {name: endpoint})
            self.registry.add_rules(target, [rule for rule in rules if rule not in target.ingress], [])
            self.registry.delete_rules(source, rules, [])
            source.led.discard(name)
            target.led.add(name)

        self._switch(pair, change)
        return self._drained(source, held)

    def publications(self, pair: Pair, publications: list[Publication]) -> Later:
        """Give publications of the source to the target. Raises Refused, OSError."""
        source, target = pair
        taken, accepted = set(target.endpoints), list(target.publications)
        made: list[Held] = []
        for publication in publications:
            if publication not in source.publications:
                raise publish.not_published(publication, source)
            if publication.protocol != socket.IPPROTO_TCP:
                raise Refused(
                    f"-p {publication}: a UDP socket answers from the port that it is bound to, so that no other can "
                    "stand in",
                    hint="end its server, then 'graft rule del' and 'graft rule add'",
                    code="EOPNOTSUPP",
                )
            pairs = published(publication, taken, ipv6=self.registry.ipv6)
            ports.check_inside(publication, [e.address for e, _ in pairs if e.address], accepted)
            made += pairs
            accepted.append(publication)
        self._check_servers(pair, made)
        self._check_reached(source, made)

        def change() -> None:
            for publication in publications:
                publish.unpublish(source, publication)
            for endpoint, rule in made:
                target.endpoints[endpoint.name] = endpoint
                target.ingress.append(rule)
                target.led.add(endpoint.name)
            target.publications += publications

        self._switch(pair, change)
        for attachment in source.attached:  # its engine would publish them again, and take them back from nobody
            attachment.publications = [p for p in attachment.publications if p not in publications]
        self.registry.save()
        return self._drained(source, made)

    def _check_servers(self, pair: Pair, held: Iterable[Held]) -> None:
        """Raise Refused (EAGAIN) if the target has no server where the source has one."""
        for endpoint, rule in held:
            if endpoint.span > SPAN_MAX:
                raise Refused(
                    f"{endpoint.span} ports are too many to move", hint=f"at most {SPAN_MAX}", code="EOPNOTSUPP"
                )
            for port in range(rule.first, rule.first + endpoint.span):
                if self._serves(pair.source, rule.address, port) and not self._serves(
                    pair.target, rule.address, port
                ):
                    raise Refused(
                        f"container '{pair.target.name}' has no server at {rule.address.with_port(port)}, where "
                        f"'{pair.source.name}' has one",
                        hint="start it first, or give --wait SECONDS",
                        code="EAGAIN",
                    )

    def _serves(self, tenant: Tenant, address: Address, port: int) -> bool:
        wildcard = Address(ANY4 if address.v4 else ANY6)
        return any(listens(self.registry.kernel.maps, tenant.id, at, port) for at in {address, wildcard})

    def _check_reached(self, source: Tenant, held: Iterable[Held]) -> None:
        """Raise Refused if what arrives is not the source's: its rules may name an endpoint that another one has."""
        stamps = self.registry.kernel.maps["stamps"].fd
        for endpoint, _ in held:
            assert endpoint.address
            address, led = endpoint.address, self.registry.leads.of(endpoint)
            if led - {source.id}:
                raise self._not_its(source, endpoint, endpoint.port, min(led - {source.id}))
            if led and not address.any:
                continue  # graftd has the port, or who gave it
            at: defaultdict[int, dict[bytes, set[int]]] = defaultdict(lambda: defaultdict(set))  # by port and address
            only = endpoint.port if endpoint.span == 1 else 0
            for one in open_sockets(stamps, protocols=TCP, states=LISTENING, port=only):
                if 0 <= one.local[1] - endpoint.port < endpoint.span:
                    at[one.local[1]][one.local[0]].add(one.stamp.tenant if one.stamp else FOREIGN)
            for port, bound in at.items():
                if address.any:  # those at one address would be led past, too
                    places = [raw for raw in bound if raw == ANY6 or self._is_hosts(address, raw)]
                else:
                    places = [raw for raw in bound if raw in (address.raw, ANY4 if address.v4 else ANY6, ANY6)]
                others = set().union(*(bound[raw] for raw in places)) - {source.id, OWN_TENANT}
                if led:  # a container that gave the port may be bound there still
                    others &= {FOREIGN}
                if others:
                    raise self._not_its(source, endpoint, port, min(others))

    def _is_hosts(self, wildcard: Address, raw: bytes) -> bool:
        """Is it an address of the host's, of that family, and no container's own?"""
        address = Address(raw)
        return address.v4 == wildcard.v4 and not in_slices(address) and address not in self.registry.added

    def _not_its(self, source: Tenant, endpoint: Endpoint, port: int, number: int) -> Refused:
        assert endpoint.address
        other = self.registry.tenants.get(number)
        named = f"container '{other.name}'" if other else "another program"
        return Refused(
            f"container '{source.name}' does not serve at {endpoint.address.with_port(port)}: {named} does",
            hint="'graft sockets' lists who listens where",
            code="EADDRINUSE",
        )

    def _switch(self, pair: Pair, change: Callable[[], None]) -> None:
        """Make a change to both, and bring it to the kernel, or neither."""
        before = [tenant.rules() for tenant in pair]
        try:
            change()
            self.registry.apply(pair.target)  # this is the moment: Leads.write()
            self.registry.apply(pair.source)
        except BaseException:
            for tenant, rules in zip(pair, before, strict=True):
                tenant.restore(rules)
            for tenant in pair:
                self.registry.apply(tenant)
            raise

    def _drained(self, source: Tenant, held: Iterable[Held]) -> Later:
        """The answer, which comes when nobody waits for the source any more."""
        answer = Later({"waiting": 0})
        asked = {(rule.address.raw, rule.first + n) for endpoint, rule in held for n in range(endpoint.span)}
        real = {endpoint.port + n for endpoint, _ in held for n in range(endpoint.span)}
        job = partial(_drain, self.registry.kernel.maps["stamps"].fd, source.id, asked, real, answer)
        self._lines.push(next(self._numbers), lambda: job)
        return answer


def _drain(stamps: int, tenant: int, asked: set[tuple[bytes, int]], real: set[int], answer: Later) -> Then:
    """Wait, in a thread, until no connection waits in the queues of @tenant's listeners at @asked.

    Nor may one be half done at the host's ports @real: which of them are the tenant's is not told, so it is all that
    are there at first. Those become one that waits, so they are asked for before.
    """
    until = time.monotonic() + PATIENCE
    half: set[tuple[tuple[bytes, int], tuple[bytes, int]]] | None = None
    while True:
        now = {
            (one.local, one.peer)
            for one in open_sockets(stamps, protocols=TCP, states=HALF_OPEN)
            if one.local[1] in real
        }
        half = now if half is None else half & now
        queued = sum(
            one.queued[0]
            for one in open_sockets(stamps, protocols=TCP, states=LISTENING)
            if one.stamp and one.stamp.tenant == tenant and one.stamp.local in asked
        )
        if not queued and not half:
            break
        if time.monotonic() > until:
            answer.answer["waiting"] = queued + len(half)
            break
        time.sleep(LOOK)
    return lambda: answer.send()  # the connection sets it, when it has the answer
