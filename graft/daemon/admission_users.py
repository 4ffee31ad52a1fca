"""Admission of the containers of users without root, by the user socket (graft/daemon/users.py).

A user's container is in a netns of a user namespace that the user has made. It has what users.toml grants
(graft/rules/grants.py), and no more than a program of the user could have without graft where nothing is granted.
Its name is the user's own: NAME@USER for everybody else.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from graft.errors import Refused
from graft.rules import grants
from graft.rules.address import parse_address
from graft.rules.endpoint import EgressRule, Endpoint, EndpointWords, IngressRule, parse_endpoint_port
from graft.rules.grants import Grants, users_path
from graft.rules.publication import Publication
from graft.rules.request import Parsed
from graft.tenants.accounts import Account, unprivileged_port, user_table
from graft.tenants.registry import Registry
from graft.tenants.tenant import CONTAINER, Tenant

AT = "@"
RULES_MAX = 512  # of one container, or endpoints of one table: graftd's loop waits while they are checked
SETTINGS_MAX = 32768  # characters of an engine's labels or annotations


class User(NamedTuple):
    """Who gives orders, and what their containers may have."""

    account: Account
    grants: Grants

    def owns(self, tenant: Tenant) -> bool:
        """Is it a container of theirs?"""
        return bool(tenant.user) and tenant.uid == self.account.uid

    def full_name(self, name: str) -> str:
        """The name by which others know the user's container @name."""
        return f"{name}{AT}{self.account.name}"

    def own_name(self, name: str) -> str:
        """The name by which the user knows a container of theirs."""
        return name.removesuffix(f"{AT}{self.account.name}")

    def own_words(self, message: str) -> str:
        """@message, with the names by which the user knows their containers."""
        return message.replace(f"{AT}{self.account.name}'", "'")

    def own_view(self, document: dict[str, Any]) -> dict[str, Any]:
        """@document, about a container of theirs, with the name that the user knows."""
        return {key: self.own_name(v) if key in ("container", "name", "ended") else v for key, v in document.items()}


def check_share(reg: Registry, user: User) -> None:
    """Raise Refused (ENOSPC) if the user may have no further container."""
    theirs = [t for t in reg.tenants.values() if t.uid == user.account.uid and not t.trusted]
    containers = sum(t.kind == CONTAINER for t in theirs)
    granted = user.grants
    for have, most, what in (
        (containers, granted.containers, "containers"),
        (len(theirs), granted.slices, "private loopbacks"),
    ):
        if not most:
            raise Refused(f"you may have no {what}", hint=f"root may grant some: {users_path()}", code="ENOSPC")
        if have >= most:
            raise Refused(
                f"you have {have} {what}, of {most} that are granted to you",
                hint=f"end one, or root may grant more: {users_path()}",
                code="ENOSPC",
            )


def check_count(count: int, what: str = "rules") -> None:
    """Raise Refused (ENOSPC) for more than a user may have. To be called before any of them is parsed."""
    if count > RULES_MAX:
        raise Refused(f"{count} {what} are too many", hint=f"at most {RULES_MAX} without root", code="ENOSPC")


def count_rules(tenant: Tenant) -> int:
    """How many rules and publications it has; a publication is one, though two rules stand for it."""
    published = {name for name, endpoint in tenant.endpoints.items() if endpoint.published}
    own = [rule for rule in tenant.ingress if rule.endpoint not in published]
    return len(tenant.publications) + len(own) + len(tenant.egress)


def check_asked(reg: Registry, user: User, asked: Parsed) -> None:
    """Raise Refused if a user asks for what is not granted to them."""
    if asked.direct:
        raise Refused("only root may start a direct container", hint="omit --direct", code="EPERM")
    if asked.egress_default == "host" and user.grants.egress != "host":
        raise Refused("egress host is not granted to you", hint=f"root may grant it: {users_path()}", code="EACCES")
    for own in asked.ip:
        grants.check_address(user.grants, own.address)
    check_rules(reg, user, asked.publish, asked.egress)


def check_rules(reg: Registry, user: User, publications: Iterable[Publication], egress: Iterable[EgressRule]) -> None:
    """Raise Refused (EACCES) for a publication, or a way out, that is not granted."""
    low = unprivileged_port()
    for publication in publications:
        grants.check_publication(user.grants, publication, low)
        if publication.address in reg.added:
            raise Refused(
                f"-p {publication}: {publication.address} is the address of a container",
                hint="use one of the host's",
                code="EACCES",
            )
    for rule in egress:
        if user.grants.egress != "host" and rule.endpoint not in user.grants.endpoints:
            raise Refused(
                f"-e {rule}: endpoint '{rule.endpoint}' is not granted to you",
                hint=f"root may grant it: {users_path()}",
                code="EACCES",
            )


def check_own_endpoints(
    reg: Registry,
    user: User,
    endpoints: Mapping[str, Endpoint],
    ingress: Iterable[IngressRule],
    egress: Iterable[EgressRule],
) -> None:
    """Raise Refused (EACCES) for a rule by an endpoint that a user has added, and could not add now.

    Also for one of the host's that is not granted, which `graft endpoint show` lists all the same. What is granted
    may have become less since, and a name that is granted may be one that the user took before.
    """
    rules: list[IngressRule | EgressRule] = [*ingress, *egress]
    for rule in rules:
        endpoint = endpoints.get(rule.endpoint)
        if endpoint is None and rule.endpoint in reg.home_endpoints():
            raise Refused(
                f"rule '{rule}': endpoint '{rule.endpoint}' is one of the host's, and not granted to you",
                hint=f"root may grant it: {users_path()}",
                code="EACCES",
            )
        if endpoint is None or not endpoint.by_user:
            continue
        if isinstance(rule, EgressRule) and user.grants.egress != "host":
            raise Refused(
                f"-e {rule}: endpoint '{rule.endpoint}' is one of yours, which is no way out for you",
                hint=f"delete it; root may grant one of the host's: {users_path()}",
                code="EACCES",
            )
        if endpoint.address in reg.added:
            raise Refused(
                f"endpoint '{rule.endpoint}': {endpoint.address} is the address of a container",
                hint="use one of the host's",
                code="EACCES",
            )
        _check_port(user, rule.endpoint, endpoint.port)


def _check_port(user: User, name: str, port: int) -> None:
    if port:
        ports = [(protocol, port) for protocol in grants.IPPROTO.values()]
        grants.check_ports(user.grants, f"endpoint '{name}'", ports, unprivileged_port())


def check_endpoint(reg: Registry, user: User, name: str, words: EndpointWords) -> None:
    """Raise Refused for an endpoint that a user may not have, and UsageError for a port that is none."""
    if words.netns:
        raise Refused(f"endpoint '{name}': only root may name a network namespace", hint="omit netns", code="EPERM")
    if name in user.grants.endpoints:
        raise Refused(
            f"endpoint '{name}' is one of the host's, granted to you", hint="use another name", code="EEXIST"
        )
    if words.addr and parse_address(words.addr, kind=words.type) in reg.added:
        raise Refused(
            f"endpoint '{name}': {words.addr} is the address of a container",
            hint="use one of the host's",
            code="EACCES",
        )
    _check_port(user, name, parse_endpoint_port(words.port) if words.port else 0)


def known_endpoints(reg: Registry, user: User) -> Mapping[str, Endpoint]:
    """The endpoints that rules of a user's containers may name: the host's that are granted, and their own."""
    home = reg.home_endpoints()
    granted = {name: home[name] for name in user.grants.endpoints if name in home}
    table = user_table(reg, user.account.uid)
    reg.forget_empty(table)
    return {**table.endpoints, **granted}
