"""The decisions of the kernel's tables that graftd has to take itself. Pure."""

from collections.abc import Iterable, Mapping

from graft.errors import Refused
from graft.rules.address import ANY4, Address
from graft.rules.endpoint import EgressRule, Endpoint, IngressRule


def check_rule(rule: IngressRule | EgressRule, endpoints: Mapping[str, Endpoint]) -> None:
    """Raise Refused for a rule with an unknown endpoint (ENOENT), or one of another family (EAFNOSUPPORT)."""
    endpoint = endpoints.get(rule.endpoint)
    if endpoint is None:
        raise Refused(
            f"rule '{rule}' names an unknown endpoint '{rule.endpoint}'",
            hint="add it with 'graft endpoint add'",
            code="ENOENT",
        )
    wanted = rule.address if isinstance(rule, IngressRule) else rule.prefix
    if endpoint.address and wanted.v4 != endpoint.address.v4:
        raise Refused(
            f"rule '{rule}' is {wanted.kind}, endpoint '{endpoint.name}' is {endpoint.kind}",
            hint="use an endpoint of the rule's family",
            code="EAFNOSUPPORT",
        )


def match_ingress(
    rules: Iterable[IngressRule], endpoints: Mapping[str, Endpoint], protocol: int, address: Address, port: int
) -> Endpoint | None:
    """The endpoint that a bind goes to: that of the first rule that matches. None: none does, or it is not there."""
    rule = ingress_rule(rules, protocol, address, port)
    endpoint = endpoints.get(rule.endpoint) if rule else None
    return endpoint if endpoint and endpoint.serves else None


def ingress_rule(rules: Iterable[IngressRule], protocol: int, address: Address, port: int) -> IngressRule | None:
    """The first rule that matches a bind to @port of @address; None: none does."""
    for rule in rules:
        if rule.address == address and rule.first <= port <= rule.last and protocol in rule.protocols:
            return rule
    return None


def destination(address: Address) -> Address:
    """Where a connection to @address goes: the kernel takes 0.0.0.0 and :: for the loopback address."""
    if not address.any:
        return address
    return Address(ANY4[:12] + bytes((127, 0, 0, 1)) if address.v4 else (1).to_bytes(16, "big"))


def match_egress(
    rules: Iterable[EgressRule], endpoints: Mapping[str, Endpoint], destination: Address
) -> Endpoint | None:
    """The endpoint that a connection leaves from: that of the longest prefix that matches.

    None: no rule does, or its endpoint is not there.
    """
    best = egress_rule(rules, destination)
    endpoint = endpoints.get(best.endpoint) if best else None
    return endpoint if endpoint and endpoint.leaves else None


def egress_rule(rules: Iterable[EgressRule], destination: Address) -> EgressRule | None:
    """The rule with the longest prefix that matches a connection to @destination; None: none does."""
    best: EgressRule | None = None
    for rule in rules:
        bits = rule.length + (96 if rule.prefix.v4 else 0)
        difference = int.from_bytes(rule.prefix.raw, "big") ^ int.from_bytes(destination.raw, "big")
        if (
            rule.prefix.v4 == destination.v4
            and not difference >> (128 - bits)
            and (best is None or rule.length > best.length)
        ):
            best = rule
    return best
