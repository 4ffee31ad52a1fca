"""`graft -v`: one line for each bind and connect of a wrapper's programs, sent to the `graft` that waits for it."""

import errno
from collections import OrderedDict

from graft.daemon.connection import Connection
from graft.kernel.denials import ALLOWED, CONVERTED, Event
from graft.rules import match
from graft.rules.address import Address
from graft.rules.endpoint import Endpoint
from graft.rules.endpoint_names import endpoint_at
from graft.tenants.tenant import Tenant

REMEMBERED = 256  # destinations of datagrams: only the first datagram to each is reported


class Teller:
    """One verbose tenant, and the connection that gets its lines."""

    def __init__(self, tenant: Tenant, connection: Connection) -> None:
        self.tenant = tenant
        self.connection = connection
        self.sent: OrderedDict[str, None] = OrderedDict()

    def tell(self, event: Event) -> None:
        """Send the line for a conversion or a refusal; a datagram's only once for each destination.

        What is allowed says less than its conversion: it is for who reads `graft log`.
        """
        if event.reason == ALLOWED:
            return
        line = self.describe(event)
        if event.op == "send":
            if line in self.sent:
                return
            self.sent[line] = None
            if len(self.sent) > REMEMBERED:
                self.sent.popitem(last=False)
        self.connection.tell(line)

    def describe(self, event: Event) -> str:
        """The line, without a newline: "curl: connect 192.0.2.1:80 from ep-out (198.51.100.7:dynamic)"."""
        asked = Address(event.address)
        if event.op == "setsockopt":
            return (
                f"{event.comm}: setsockopt level {event.port >> 16} option {event.port & 0xFFFF} refused: "
                f"{event.reason} ({errno.errorcode.get(event.error, event.error)})"
            )
        what = f"{event.comm}: {event.op} {asked.with_port(event.port)}"
        if event.reason != CONVERTED:
            return f"{what} refused: {event.reason} ({errno.errorcode.get(event.error, event.error)})"
        real = Address(event.real).with_port(event.real_port or "dynamic")
        endpoint = self._endpoint(event, asked)
        name = endpoint.name if endpoint else "?"
        return f"{what} -> {name} ({real})" if event.op == "bind" else f"{what} from {name} ({real})"

    def _endpoint(self, event: Event, asked: Address) -> Endpoint | None:
        tenant = self.tenant
        named = endpoint_at(tenant.endpoints, asked)
        if named and event.op == "bind":
            return named
        if named and named.address:  # the rule is that for the endpoint's address
            asked = named.address
        if event.op == "bind":
            found = match.match_ingress(tenant.ingress, tenant.endpoints, event.protocol, asked, event.port)
            if found is None and asked.raw == bytes(16):
                any4 = Address(bytes(10) + b"\xff\xff" + bytes(4))
                found = match.match_ingress(tenant.ingress, tenant.endpoints, event.protocol, any4, event.port)
            return found
        return match.match_egress(tenant.egress, tenant.endpoints, match.destination(asked))
