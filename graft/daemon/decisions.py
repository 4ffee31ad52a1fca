"""A reported call as a document: who asked for what, what became of it, and by which rule.

The kernel half reports addresses. Which rule decided is looked up here, in what the tenant has now.
"""

import errno
import os
from typing import Any, NamedTuple

from graft.kernel.denials import ALLOWED, Event
from graft.rules import match
from graft.rules.address import ANY4, PROTOCOL_NAME, Address
from graft.rules.endpoint_names import SUFFIX, endpoint_at, label_of
from graft.tenants.tenant import Tenant


class Decided(NamedTuple):
    """By which rule, as text, and through which endpoint; from where it leaves, "" if as the host's own does."""

    rule: str
    endpoint: str = ""
    source: str = ""


def decision_document(event: Event, tenant: Tenant | None, holders: dict[bytes, str]) -> dict[str, Any]:
    """An allowed or refused call in JSON. @tenant: whose it is, None if nobody's. @holders: containers by address."""
    allowed = event.reason == ALLOWED
    asked, real = Address(event.address), Address(event.real)
    named = endpoint_at(tenant.endpoints, asked) if tenant else None
    decided = _decided(event, tenant, asked) if allowed and tenant else Decided("" if allowed else event.reason)
    if allowed and named:
        decided = Decided("name", named.name if event.op in ("bind", "listen") else "")
    known = event.pid and event.pid != os.getpid()  # graftd binds what listens without a bind, and it says no more
    document = {
        "time": event.when,
        "container": tenant.name if tenant else "",
        "id": event.tenant,
        "command": event.comm if known else "",
        "pid": event.pid if known else 0,
        "op": event.op,
        "protocol": PROTOCOL_NAME.get(event.protocol, ""),
        "asked": asked.with_port(event.port),
        "name": (f"{label_of(named)}.{SUFFIX}" if named else holders.get(asked.raw, ""))
        if event.op in ("connect", "send")
        else "",
        "became": real.with_port(event.real_port or "dynamic") if allowed else "",
        "verdict": "allowed" if allowed else "refused",
        "errno": "" if allowed else errno.errorcode.get(event.error, str(event.error)),
        **decided._asdict(),
    }
    if event.op == "setsockopt":
        document["asked"] = f"level {event.port >> 16} option {event.port & 0xFFFF}"
    elif event.op == "socket":
        document["asked"] = ""
    return document


def _decided(event: Event, tenant: Tenant, asked: Address) -> Decided:
    if event.op in ("bind", "listen"):
        return _bound(event, tenant, asked)
    destination = match.destination(asked)
    if destination.loopback:
        return Decided("loopback")
    rule = match.egress_rule(tenant.egress, destination)
    if rule:
        endpoint = tenant.endpoints.get(rule.endpoint)
        return Decided(f"egress {rule}", rule.endpoint, endpoint.where if endpoint else "")
    own = [one for one in tenant.owned if one.address.v4 == destination.v4]
    if own:
        return Decided("egress host" if tenant.egress_host else "its network", source=str(own[0].address))
    return Decided("egress host" if tenant.egress_host else "")


def _bound(event: Event, tenant: Tenant, asked: Address) -> Decided:
    rules = tenant.ingress
    found = match.ingress_rule(rules, event.protocol, asked, event.port)
    if found is None and not asked.loopback:  # what is published is so at each address, and [::] takes IPv4 as well
        wildcard = Address(ANY4 if asked.v4 else bytes(16))
        found = match.ingress_rule(rules, event.protocol, wildcard, event.port)
        found = found or match.ingress_rule(rules, event.protocol, Address(ANY4), event.port)
    endpoint = tenant.endpoints.get(found.endpoint) if found else None
    if found and endpoint and endpoint.published:
        publication = next(
            (
                p
                for p in tenant.publications
                if p.protocol == event.protocol and p.first <= event.port < p.first + p.span
            ),
            "",
        )
        return Decided(f"publish {publication}", found.endpoint)
    if found:
        return Decided(f"ingress {found}", found.endpoint)
    if asked.loopback:
        return Decided("loopback")
    return Decided("its own address" if any(own.address.v4 == asked.v4 for own in tenant.owned) else "private")
