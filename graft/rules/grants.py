"""users.toml: what containers of ordinary users may have, by user and by group.

The grammar is in man/graft.toml.5.md, "USERS". Without the file, and for whoever it does not name, a container may do
what an ordinary program of its user could: bind the host's ports from net.ipv4.ip_unprivileged_port_start on, and
connect as the host does. Values only: nothing here looks a user up.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from graft import toml
from graft.errors import Refused, UsageError
from graft.rules.address import PROTOCOL_NAME, Address, Prefix, parse_ports, parse_prefix
from graft.rules.configuration import configuration_path
from graft.rules.endpoint import parse_name
from graft.rules.limits import UNLIMITED, Limits, parse_limits
from graft.rules.publication import Publication
from graft.rules.request import EGRESS_DEFAULTS

UNPRIVILEGED = "unprivileged"  # instead of ports: those that the user could bind
IPPROTO = {name: number for number, name in PROTOCOL_NAME.items()}
COUNT_MAX = 4096


class Ports(NamedTuple):
    """Ports of the host in a row, from `first` to `last`; `first` 0: those that any program may bind."""

    first: int
    last: int
    protocols: tuple[int, ...]

    def cover(self, port: int, protocol: int, unprivileged: int) -> bool:
        """Is @port among them? @unprivileged: the first port that any program may bind."""
        return protocol in self.protocols and (self.first or unprivileged) <= port <= self.last


class Grants(NamedTuple):
    """What the containers of one user may have, together where it is a number of them. The names are the keys."""

    ports: tuple[Ports, ...] = (Ports(0, 65535, tuple(PROTOCOL_NAME)),)
    egress: str = "host"  # or "none": then its containers connect by granted endpoints alone
    containers: int = 64
    slices: int = 64  # private loopbacks: containers, wrappers, users of the API
    limits: Limits = UNLIMITED  # of each container; 0: graftd's limit
    addresses: tuple[Prefix, ...] = ()  # of --ip
    endpoints: tuple[str, ...] = ()  # of the host, by name

    def document(self) -> dict[str, Any]:
        """The grants in JSON, for `graft doctor`."""
        return {
            "ports": [ports_text(ports) for ports in self.ports],
            "egress": self.egress,
            "containers": self.containers,
            "slices": self.slices,
            "limits": {name: most for name, most in self.limits._asdict().items() if most},
            "addresses": [str(prefix) for prefix in self.addresses],
            "endpoints": list(self.endpoints),
        }


class Users(NamedTuple):
    """The values of users.toml: of each user and group the keys that the file has."""

    default: dict[str, Any]
    users: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, Any]]
    text: str = ""  # of the file

    def of(self, user: str, groups: Collection[str]) -> Grants:
        """The grants of a user: what is said of @user, else of the first group of the file among @groups.

        A key that is not said there is the default's.
        """
        group = next((values for name, values in self.groups.items() if name in groups), {})
        return Grants(**{**self.default, **self.users.get(user, group)})


NOBODY = Users({}, {}, {})  # names nobody, so that the defaults hold
NOTHING: dict[str, Any] = {"ports": (), "egress": "none", "containers": 0, "slices": 0}
CLOSED = Users(NOTHING, {}, {})  # what it says is not known, so that nobody gets anything


class _Named(dict[str, toml.Schema]):
    """A schema of tables of any names, which are all alike."""

    def __init__(self, schema: toml.Schema) -> None:
        super().__init__()
        self.schema = schema

    def get(self, _name: str, _default: Any = None) -> toml.Schema:
        """The schema of each table."""
        return self.schema


def ports_text(ports: Ports) -> str:
    """The ports as they are written."""
    where = UNPRIVILEGED if not ports.first else str(ports.first)
    where = where if ports.last in (ports.first, 65535) else f"{where}-{ports.last}"
    where = f"{ports.first}-{ports.last}" if ports.first and ports.last != ports.first else where
    return where if len(ports.protocols) > 1 else f"{where}/{PROTOCOL_NAME[ports.protocols[0]]}"


def _parse_ports(value: Any) -> Ports:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UsageError(f"{toml.shown(value)} is not a port", hint=f'like 80, "8000-8999/tcp" or "{UNPRIVILEGED}"')
    where, slash, protocol = (value if isinstance(value, str) else toml.shown(value)).partition("/")
    if slash and protocol not in IPPROTO:
        raise UsageError(f"'{protocol}' is not a protocol", hint="tcp or udp")
    protocols = (IPPROTO[protocol],) if slash else tuple(PROTOCOL_NAME)
    if where == UNPRIVILEGED:
        return Ports(0, 65535, protocols)
    return Ports(*parse_ports(where, least=1), protocols)


def _parse_limits(value: Any) -> Limits:
    return parse_limits((toml.text(value),), UNLIMITED)


def _parse_prefix(value: Any) -> Prefix:
    return parse_prefix(toml.text(value))


def _parse_endpoint(value: Any) -> str:
    return parse_name(toml.text(value))


GRANTS: toml.Schema = {
    "ports": toml.each(_parse_ports),
    "egress": toml.one_of(*EGRESS_DEFAULTS),
    "containers": toml.number(0, COUNT_MAX),
    "slices": toml.number(0, COUNT_MAX),
    "limits": _parse_limits,
    "addresses": toml.each(_parse_prefix),
    "endpoints": toml.each(_parse_endpoint),
}
SCHEMA: toml.Schema = {"default": GRANTS, "users": _Named(GRANTS), "groups": _Named(GRANTS)}


def users_path() -> Path:
    """Where the grants are: users.toml, beside the configuration."""
    return configuration_path().with_name("users.toml")


def read_users(opened: toml.Opened | None = None) -> Users:
    """The grants in the file at users_path(); the defaults if there is none.

    @opened: as toml.read() has it. Raises Failure, which names the file, the line and the key.
    """
    try:
        return parse_users(toml.text_of(users_path(), opened))
    except FileNotFoundError:
        return NOBODY


def parse_users(text: str) -> Users:
    """The grants in the @text of users.toml. Raises Failure, as read_users()."""
    return NOBODY._replace(**toml.parse(users_path(), text, SCHEMA), text=text)


def check_ports(grants: Grants, what: str, ports: Iterable[tuple[int, int]], unprivileged: int) -> None:
    """Raise Refused (EACCES) unless all @ports, as (protocol, port), are granted. @what: as errors name the request.

    @unprivileged: the first port that any program may bind.
    """
    for protocol, port in ports:
        if any(granted.cover(port, protocol, unprivileged) for granted in grants.ports):
            continue
        low = port < unprivileged
        why = f"is below {unprivileged}, where root alone binds" if low else "is not granted to you"
        raise Refused(
            f"{what}: port {port}/{PROTOCOL_NAME[protocol]} {why}",
            hint=f"{f'use one from {unprivileged} on, or ' if low else ''}root may grant it: {users_path()}",
            code="EACCES",
        )


def check_publication(grants: Grants, publication: Publication, unprivileged: int) -> None:
    """Raise Refused (EACCES) for a host port of @publication that is not granted."""
    at, last, protocol = publication.host_first, publication.host_first + publication.span - 1, publication.protocol
    while at <= last:  # range by range: graftd's loop waits
        ends = [granted.last for granted in grants.ports if granted.cover(at, protocol, unprivileged)]
        if not ends:
            check_ports(grants, f"-p {publication}", [(protocol, at)], unprivileged)
        at = max(ends) + 1


def check_limits(most: Limits, asked: Limits) -> None:
    """Raise Refused (EACCES) for a limit that is named and above what each container of the user may have."""
    allowed = {name: (number, text) for name, number, text in most.texts()}
    for name, number, text in asked.texts():
        if name in allowed and number > allowed[name][0]:
            raise Refused(
                f"limit {text}: at most {allowed[name][1]} is granted to you",
                hint=f"root may grant more: {users_path()}",
                code="EACCES",
            )


def check_address(grants: Grants, address: Address) -> None:
    """Raise Refused (EACCES) for an address of --ip that is not granted."""
    if not any(prefix.covers(address) for prefix in grants.addresses):
        raise Refused(f"--ip {address}: not granted to you", hint=f"root may grant it: {users_path()}", code="EACCES")
