"""Tenants, tables and places: the values that a registry holds.

What tenants have in common is the registry's. The class Tenant says which thread may touch what.
"""

import contextlib
import errno
import os
import random
import socket
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from graft.errors import Refused
from graft.kernel import direct, linux
from graft.kernel.cgroup import cgroup_of
from graft.kernel.programs import TENANT
from graft.rules import slices, tables
from graft.rules.address import ANY6, PROTOCOL_NAME, Address
from graft.rules.endpoint import EgressRule, Endpoint, IngressRule
from graft.rules.endpoint_names import by_address
from graft.rules.limits import Limits
from graft.rules.own_address import Own
from graft.rules.policy import Policy, policy_of
from graft.rules.publication import Publication
from graft.rules.request import Request, parse_resolver
from graft.tenants.attachment import Attachment, Expected

OWNER_BASE = 0x70000000


SLICES = slices.SLICE_COUNT // slices.SLICE_GROUP - 1
CONTAINER, WRAPPER, API = "container", "wrapper", "api"


class Place(NamedTuple):
    """A host namespace that endpoints name. `fd` keeps it alive; `label` is what the user called it."""

    number: int
    inode: int
    fd: int
    label: str


class Table:
    """The endpoint table of one network namespace: `netns` is its inode, `cookie` its SO_NETNS_COOKIE.

    One of a user without root is of no namespace: `netns` is minus the uid, and `cookie` 0.
    """

    def __init__(self, netns: int, cookie: int, label: str) -> None:
        self.netns = netns
        self.cookie = cookie
        self.label = label  # what the user called the namespace: a path, a name, "pid N"
        self.endpoints: dict[str, Endpoint] = {}

    @property
    def of_user(self) -> bool:
        """Is it of a user without root, for all of their containers?"""
        return self.netns < 0


POD = "cri"  # the engine of pods (graft/engines/bundle.py)


class Member(NamedTuple):
    """A container of an engine, such as Docker or Podman."""

    engine: str
    name: str
    directory: str  # where Docker keeps its config.v2.json, which has the names; else empty


class Rules(NamedTuple):
    """A copy of a tenant's rules, its endpoint table and its engine's containers, to undo a change."""

    ingress: list[IngressRule]
    egress: list[EgressRule]
    publications: list[Publication]
    endpoints: dict[str, Endpoint]
    members: dict[str, Member]
    led: set[str]


def saved_as(key: str) -> dict[str, str]:
    """The metadata of a field of Tenant that has the name @key in state.json (format 4)."""
    return {"key": key}


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_ctime_ns


@dataclass(eq=False, repr=False)
class Tenant:
    """A policy, and the processes under it.

    The fields that are declared here outlive a graftd: state.json has each of them, by its type
    (graft/tenants/state.py), under its name or what `saved_as` says. A new field needs a default, for files of an
    older release. What belongs to the running graftd alone is set in __post_init__.

    Which thread may touch what. No lock guards a tenant, the registry, or a table. Instead:

    Loop thread     the only one that changes the registry, tables, and tenants. Exceptions are below.
    Call threads    (trap/dispatch.py) read `id`, `netns`, `netns_fd`, `device`, `place`, `owner`, `ingress`,
                    `egress` and `endpoints`, and the registry's `scopes` and `places`. They write through
                    bound_path() and probe() alone, and set the registry's `saved` to false; the loop's next tick
                    then writes state.json. They never call save() or apply().
    Receivers       (trap/listeners.py: _receive_apart) only look `scopes` up, and `parent` of what they find.
    Interfaces'     (tenants/interfaces.py) get copies of addresses and names, and a descriptor of their own. They
    threads         read nothing here, and what has come of their work is written by the loop thread.
    Resolver's TCP  (engines/resolver.py) read a copy of the registry's `tenants`, and `attached`, `members`,
    threads         `name`, `given`, `asked`, `egress_host`, and what uses() reads. They write nothing here.

    So a reader may meet a change that is half done: each attribute by itself is consistent, two together need not
    be. Most decisions are the kernel's, by the BPF maps, where this cannot matter. A decision of a call thread
    (graft/trap/swap.py) may go by the rules from before the change. A tenant may be removed while a thread still
    answers a call of it: `netns_fd` is -1 then. An exception in a call thread becomes EIO for that one call.
    """

    id: int
    slice_number: int = field(metadata=saved_as("slot"))  # whose addresses stand for its private loopback
    name: str
    table: Table = field(metadata=saved_as("netns"))
    asked: Request = field(
        default_factory=Request
    )  # what its first process asked for; rules and addresses may have changed since
    ingress: list[IngressRule] = field(default_factory=list)
    egress: list[EgressRule] = field(default_factory=list)
    publications: list[Publication] = field(default_factory=list)
    led: set[str] = field(default_factory=set)  # endpoints that were moved to it: TCP is led to its listeners
    kind: str = CONTAINER
    wide: bool = False  # has its loopback further addresses? Not where an earlier graftd has begun it
    egress_host: bool = True
    strict: bool = False
    in_host_netns: bool = field(default=False, metadata=saved_as("home"))  # is it a wrapper in graftd's own netns?
    verbose: bool = False
    # does its filter trap the calls that the swap path needs (graft/trap/swap.py)?
    traps_addresses: bool = field(default=False, metadata=saved_as("swap"))
    place: int = 0  # the host namespace where its sockets are made
    parent: "Tenant | None" = None  # of a wrapper inside a container: the container, whose listener it uses
    scope: int = 0  # the number by which the processes of such a wrapper are known (graft/trap/nested.py); else 0
    uid: int = 0  # of the user who asked for it
    gid: int = 0  # of that user
    user: str = ""  # the name of that user, if it is a container by the user socket
    followers: set[int] = field(default_factory=set)  # processes that have its sockets by the API
    # unix sockets it has bound: dev, inode, ctime
    paths: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    trusted: bool = True  # did root of the host hand its listener over?
    cgroup: str = ""  # of a direct container: its cgroup's path below the root of cgroup2
    more_cgroups: list[str] = field(default_factory=list)  # those of further direct containers in its netns
    networked: bool = False  # has its engine said at `create` that it is on a network? Docker attaches it later
    netns_made: bool = False  # was its netns made for it, by graft or by its engine?
    resolvers: list[Address] = field(default_factory=list)  # of the host, on its loopback
    given: list[Own] = field(default_factory=list)  # addresses by --ip
    attached: list[Attachment] = field(default_factory=list)  # by an engine
    members: dict[str, Member] = field(default_factory=dict)  # an engine's containers in the namespace, by their ids
    argv: list[str] = field(default_factory=list)
    pid: int = 0
    started: float = field(default_factory=time.time)  # for `graft ps`
    limits: Limits = field(default_factory=Limits)
    heard: dict[str, str] = field(default_factory=dict)  # of which member each listener is, by the latter's number
    brought: dict[str, list[Publication]] = field(default_factory=dict)  # by members that joined: theirs alone
    no_netadmin: set[str] = field(default_factory=set)  # ids of members that may not have CAP_NET_ADMIN
    device: str = ""  # that graft has made in its netns (graft/kernel/nowhere.py); "lo": none can be made
    shown: dict[str, str] = field(default_factory=dict)  # the device of each address that graft has put there
    lost_listener: bool = False  # has it processes whose listener was lost? Then no hang-up tells of its end

    def __post_init__(self) -> None:
        self.netns = self.table.netns
        self.since = time.monotonic()  # when this graftd got to know it
        self.netns_fd = -1
        self.listeners: set[int] = set()
        self.installed = tables.NOTHING
        self.watched = False  # does somebody read what it is allowed?
        self._probes: dict[int, socket.socket] = {}

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        """The endpoints of its namespace's table, by name."""
        return self.table.endpoints

    @property
    def owner(self) -> int:
        """The uid that owns this tenant's sockets. Tenants with addresses of their own have one uid in common.

        The kernel lets sockets of one uid share a port number (SO_REUSEPORT, socket(7)). So a port that one tenant
        publishes on the wildcard and the same port at another tenant's own address can both be bound.
        """
        return OWNER_BASE + (0 if self.shares else self.slice_number)

    @property
    def maker(self) -> tuple[int, int]:
        """The uid and gid as which a firewall sees who makes its sockets (iptables-extensions(8), owner); 0: its own.

        A container by the user socket is its user's: what the administrator forbids that user holds for it.
        """
        return (self.uid, self.gid) if self.user else (0, 0)

    @property
    def shares(self) -> bool:
        """Do its sockets share port numbers with those of others? From the first one on: they keep their owner."""
        return self.networked or bool(self.owned)

    @property
    def owned(self) -> list[Own]:
        """The tenant's own addresses; wildcard binds go to the first one of a family."""
        return [*self.given, *(own for attachment in self.attached for own in attachment.addresses)]

    @property
    def cgroups(self) -> list[str]:
        """The cgroups of a direct container, and of those that have joined its netns; [] of any other."""
        return [self.cgroup, *self.more_cgroups] if self.cgroup else []

    @property
    def open_resolvers(self) -> list[Address]:
        """The resolvers on the host's loopback that it may ask for names: those of --resolver, else the host's own.

        The host's own are for containers whose connections leave as the host's, because a name can carry data out.
        """
        asked = [parse_resolver(text) for text in self.asked.resolver]
        return asked or (self.resolvers if self.egress_host else [])

    @property
    def policy(self) -> Policy | None:
        """What it is allowed to reach; None: everything that the egress rules say. A wrapper's is its container's."""
        asked = (self.parent or self).asked
        return policy_of(asked.allow, asked.learn)

    @property
    def asks_graft(self) -> bool:
        """Do its queries for names go to graftd's resolver, wherever it sends them?"""
        return bool(self.policy or self.asked.names)

    @property
    def tells_names(self) -> bool:
        """Are its programs told names by graftd's resolver: where they ask no other, or on an engine's network?"""
        return self.asks_graft or bool(self.attached)

    @property
    def rate(self) -> int:
        """How many bytes a second each of its TCP sockets may send, 0: any. A wrapper has its container's as well."""
        return self.limits.lowest(self.parent.limits).rate if self.parent else self.limits.rate

    @property
    def sysctls(self) -> tuple[str, ...]:
        """The sysctls that its sockets follow, as they were asked for. A wrapper's are its container's."""
        return (self.parent or self).asked.sysctl

    def uses(self, endpoint: Endpoint) -> bool:
        """May its programs bind to this endpoint of its table, or connect to it, by an address for its name?

        One that needs another socket than the program's is out of reach where the calls are not trapped.
        """
        reached = self.traps_addresses or (endpoint.address is not None and endpoint.place == self.place)
        return reached and (endpoint.serves or endpoint.leaves)

    def bound_path(self, path: str, found: os.stat_result) -> None:
        """Remember a unix socket that the tenant has bound at @path, to unlink it at the tenant's end.

        @found: what fstat(2) says of its file. From any thread.
        """
        self.paths[path] = _identity(found)

    def binds_file(self, found: os.stat_result) -> bool:
        """Has the tenant bound a unix socket to this file? From any thread."""
        return any(identity[:2] == _identity(found)[:2] for identity in list(self.paths.values()))

    def _remove_paths(self) -> None:
        for path, identity in list(self.paths.items()):  # a worker thread may add one
            directory, name = os.path.split(path)
            try:
                place = linux.open_directory(directory)  # the tenant may have put a link to another one in its place
            except OSError:
                continue
            with contextlib.suppress(OSError):  # it is gone
                found = os.stat(name, dir_fd=place, follow_symlinks=False)
                if _identity(found) == identity:  # ctime as well: file systems use an inode again at once
                    os.unlink(name, dir_fd=place)
            os.close(place)

    def note_uses(self) -> bool:
        """Note in the endpoints that a container has imported which of its rules name them. Did that change any?"""
        served, left = {rule.endpoint for rule in self.ingress}, {rule.endpoint for rule in self.egress}
        changed = False
        for name, endpoint in list(self.endpoints.items()):
            uses = name in served, name in left
            if endpoint.imported and (endpoint.ingress, endpoint.egress) != uses:
                self.endpoints[name] = endpoint._replace(ingress=uses[0], egress=uses[1])
                changed = True
        return changed

    def needs_swap(self) -> bool:
        """Does a rule name an endpoint that needs another socket than the one that socket() gives?"""
        return needs_swap(self.endpoints, self.place, self.ingress, self.egress)

    def probe(self, family: int) -> socket.socket:
        """A datagram socket in the tenant's own netns, for ioctl(2) about its devices. It stays the tenant's.

        From any thread. Raises OSError, also if the tenant has ended.
        """
        if family not in self._probes:
            with linux.inside_netns(self.netns_fd):
                self._probes[family] = socket.socket(family, socket.SOCK_DGRAM)
        return self._probes[family]

    def _asks_for_pods(self) -> bool:
        """Is it a pod without egress? The administrator says which resolvers these may ask."""
        return not self.egress_host and any(member.engine == POD for member in self.members.values())

    def compile(self, added: Container[Address], pods: Iterable[Address] = ()) -> tables.Tables:
        """The entries that the BPF maps shall have of this tenant.

        @added: the addresses that graft has put on lo. @pods: the resolvers that pods without egress may ask.
        """
        return tables.compile_tables(
            self.id,
            self.table.endpoints,
            self.ingress,
            self.egress,
            slice_number=self.slice_number,
            egress_host=self.egress_host,
            strict=self.strict,
            direct=bool(self.cgroup),
            home=self.in_host_netns,
            verbose=self.verbose,
            watched=self.watched,
            paced=bool(self.rate),
            resolvers=[*self.open_resolvers, *(pods if self._asks_for_pods() else ())],
            owned=self.owned,
            added=added,
            named=bool(self.attached),
            policy=self.policy,
            asks=self.asks_graft and not self.parent,
            led=self.led,
        )

    def value(self, flags: int) -> bytes:
        """Its value in the BPF map `tenants`, with the flags TENANT_*."""
        parent = self.parent.id if self.parent and self.parent.kind == CONTAINER else 0
        own4 = next((own.address.raw[12:] for own in self.owned if own.address.v4), bytes(4))
        own6 = next((own.address.raw for own in self.owned if not own.address.v4), ANY6)
        return TENANT.pack(self.table.cookie, self.slice_number, flags, parent, own4, own6)

    def rules(self) -> Rules:
        """A copy of what a change may touch, for `restore` if it fails half way."""
        return Rules(
            list(self.ingress),
            list(self.egress),
            list(self.publications),
            dict(self.table.endpoints),
            dict(self.members),
            set(self.led),
        )

    def restore(self, rules: Rules) -> None:
        """Undo changes that `apply` has not brought to the kernel."""
        self.ingress, self.egress, self.publications, self.table.endpoints, self.members, self.led = rules

    def close(self) -> None:
        """Close the descriptor of the namespace, and unlink the unix sockets that the tenant has bound."""
        self._remove_paths()
        for probe in self._probes.values():
            probe.close()
        self._probes.clear()
        if self.netns_fd >= 0:
            os.close(self.netns_fd)
            self.netns_fd = -1


def check_use(tenant: Tenant, endpoint: Endpoint, *, leave: bool) -> None:
    """Raise Refused if a rule of @tenant may not name this endpoint of its table; @leave: it is an egress rule.

    A publication, and an endpoint that was imported for a container's ingress rule, say where a server may be bound:
    a connection from there would reach what the container may not, such as the host's loopback. One that was imported
    for an egress rule is no place for a server. What a container itself imports it is given by the rule.
    """
    gives = tenant.kind == CONTAINER and endpoint.imported
    if leave and not (endpoint.leaves or (gives and not endpoint.published)):
        raise Refused(
            f"endpoint '{endpoint.name}' is there to bind to, not to connect from",
            hint="name another one, or give the container an egress rule with it",
            code="EACCES",
        )
    if not leave and not (endpoint.serves or gives):
        raise Refused(
            f"endpoint '{endpoint.name}' is there to connect from, not to bind to",
            hint="name another one, or give the container an ingress rule with it",
            code="EACCES",
        )


def needs_swap(
    endpoints: Mapping[str, Endpoint],
    place: int,
    ingress: Iterable[IngressRule],
    egress: Iterable[EgressRule],
    *names: str,
) -> bool:
    """Does one of the rules (or @names) name an endpoint of type unix or local, or of another place than @place?"""
    wanted = [*(r.endpoint for r in ingress), *(r.endpoint for r in egress), *names]
    found = [endpoints[name] for name in wanted if name in endpoints]
    return any(e.address is None or e.place != place for e in found)


def common_place(endpoints: Mapping[str, Endpoint], names: Iterable[str]) -> int:
    """The place where a wrapper's sockets are made: that of all endpoints in @names, or 0 if they differ."""
    places = {endpoints[n].place for n in names if n in endpoints and endpoints[n].address}
    return places.pop() if len(places) == 1 else 0


def endpoint_document(endpoint: Endpoint) -> dict[str, Any]:
    """An endpoint in JSON, as `graft endpoint show -j` prints it."""
    document: dict[str, Any] = {"name": endpoint.name, "type": endpoint.kind}
    if endpoint.address:
        document["addr"] = str(endpoint.address)
        document["port"] = endpoint.port if endpoint.port and endpoint.span == 1 else endpoint.port_text
    else:
        document["path"] = endpoint.path
    if endpoint.netns:
        document["netns"] = endpoint.netns
    if endpoint.filed:
        document["filed"] = True
    return {**document, "span": endpoint.span, "published": endpoint.published}


def table_documents(endpoints: Mapping[str, Endpoint], name: str | None = None) -> list[dict[str, Any]]:
    """The endpoints of a table in JSON, sorted by name, or the one called @name.

    With `name_addr`, the address that stands for an endpoint's name, where it has one.
    """
    named = {endpoint.name: str(address) for address, endpoint in by_address(endpoints).items()}
    shown = sorted((e for e in endpoints.values() if name in (None, e.name)), key=lambda e: e.name)
    return [endpoint_document(e) | ({"name_addr": named[e.name]} if e.name in named else {}) for e in shown]


def rule_documents(tenant: Tenant) -> dict[str, Any]:
    """A tenant's rules in JSON, as `graft rule show -j` prints them.

    `moved` are the endpoints that were moved to it while it ran. `allow` is its list of destinations, if it has one.
    `dangling` are names of endpoints that rules name and that are not there, by whatever they were deleted.
    """
    named = {rule.endpoint for rule in tenant.ingress} | {rule.endpoint for rule in tenant.egress}
    return {
        "publish": [str(p) for p in tenant.publications],
        "ingress": [{"rule": str(r), "protocols": [PROTOCOL_NAME[p] for p in r.protocols]} for r in tenant.ingress],
        "egress": [str(r) for r in tenant.egress],
        "dangling": sorted(named - tenant.table.endpoints.keys()),
        "moved": sorted(tenant.led),
        "egress_default": "host" if tenant.egress_host else "none",
        "strict": tenant.strict,
        **({"allow": list(tenant.asked.allow)} if tenant.asked.allow else {}),
    }


class Known:
    """What a graftd knows and the next one has to know: state.json has all of it but what is only expected or due."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Know nothing."""
        self.tables: dict[int, Table] = {}
        self.tenants: dict[int, Tenant] = {}
        self.places: dict[int, Place] = {}
        self.scopes: dict[int, Tenant] = {}
        self.attachments: dict[str, Attachment] = {}
        self.expected: dict[str, Expected] = {}
        self.moved: set[Tenant] = set()  # whose addresses tenants/interfaces.py is to look at: they have changed
        self.added: set[Address] = set()  # addresses that graft has put on lo
        self.users_file: str | None = None  # the text of users.toml that is in force; None: not known
        self.networks: list[str] = []  # the kernel knows an engine's network by its index here, counted from 1
        self.pools: dict[str, tuple[str, list[str]]] = {}  # of Docker's IPAM: the range, and what is taken, by prefix
        self.lost_places: dict[int, tuple[int, str]] = {}
        self.saved = True
        self.next_id = 1
        self.next_slice = slices.SLICE_GROUP * random.randrange(SLICES)  # noqa: S311 - spreads, protects nothing

    def direct_of(self, pid: int) -> Tenant | None:
        """The direct container that a process is in, by its cgroup; None if it is in none. From any thread.

        Raises OSError if it has ended.
        """
        containers = [tenant for tenant in list(self.tenants.values()) if tenant.cgroup]
        try:
            cgroup = cgroup_of(pid) if containers else ""
        except ProcessLookupError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        return next((t for t in containers if any(direct.contains(outer, cgroup) for outer in t.cgroups)), None)

    def netns_of(self, pid: int) -> int:
        """The inode of the netns that a process is known by: that of its direct container, else its own.

        Raises OSError if it has ended.
        """
        inside = self.direct_of(pid)
        return inside.netns if inside else linux.netns_inode(pid)
