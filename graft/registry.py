"""Tenants and endpoint tables: what graftd knows, kept equal to what the kernel has.

An endpoint table belongs to a network namespace, found by its inode. A tenant is a policy: of a container, one
for each namespace in which `graft run` or a runtime starts targets; of a wrapper, one for each `graft -i ...
-- CMD`, beside others in its namespace; of the programs of a namespace that use the Python API. They all
have the endpoints of their namespace's table. A place is a host namespace in which sockets are made: 0 is
graftd's own, the others are those that endpoints name. Every change goes through `apply`, which compiles the
tenant's rules and brings the kernel's tables from what they were to what they shall be: first what is new,
then the flags, then the removal of what is old, so that a bind in between meets either rule, never none.
The whole is written to state.json after each change; a graftd that starts reads it back.
"""

import json
import os
import random
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from graft import host, linux, policy, ports
from graft.bpf import OWN_TENANT, TENANT, Kernel, Stamper
from graft.endpoint import (
    ANY6,
    PROTOCOL_NAME,
    Address,
    EgressRule,
    Endpoint,
    EndpointWords,
    IngressRule,
    Publication,
    check_distinct,
    host_addresses,
    make_endpoint,
    published,
)
from graft.errors import Failure, GraftError, Refused
from graft.limits import Limits
from graft.log import log
from graft.network import Attachment
from graft.policy import Own

OWNER_BASE = 0x70000000
BLOCKS = policy.SLICE_SLOTS - 1
SCOPES, SCOPES_INSIDE = 40000, 256
CONTAINER, WRAPPER, API = "container", "wrapper", "api"


class Place(NamedTuple):
    """A host namespace that endpoints name."""

    number: int
    inode: int
    fd: int
    label: str


class Table:
    """The endpoint table of one network namespace."""

    def __init__(self, netns: int, cookie: int, label: str) -> None:
        self.netns = netns
        self.cookie = cookie
        self.label = label  # what the user called it: a path, a name, "pid N"
        self.endpoints: dict[str, Endpoint] = {}


class Member(NamedTuple):
    """A container of an engine."""

    engine: str
    name: str
    directory: str  # Docker's, where its names are


class Expected(NamedTuple):
    """A container that an engine is creating: its ports are taken while the creating process lives."""

    pidfd: int
    name: str
    where: tuple[int, int]  # namespace and cookie, (0, 0) if not known
    publications: list[Publication]
    owned: list[Own]
    shared: bool  # will its sockets share port numbers?
    until: float  # monotonic seconds

    def holds(self) -> bool:
        """Is it still to be expected?"""
        return linux.alive(self.pidfd) and time.monotonic() < self.until


class Rules(NamedTuple):
    """A tenant's rules and its table at one moment."""

    ingress: list[IngressRule]
    egress: list[EgressRule]
    publications: list[Publication]
    endpoints: dict[str, Endpoint]


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_ctime_ns


class Tenant:
    """A policy, and the targets that it holds for."""

    def __init__(self, number: int, slot: int, name: str, table: Table) -> None:
        self.id = number
        self.slot = slot
        self.name = name
        self.table = table
        self.netns = table.netns
        self.ingress: list[IngressRule] = []
        self.egress: list[EgressRule] = []
        self.publications: list[Publication] = []
        self.kind = CONTAINER
        self.egress_host = True
        self.strict = False
        self.home = False  # a wrapper in graftd's own netns
        self.verbose = False
        self.swap = False  # does its filter trap what the swap path needs?
        self.place = 0  # where its sockets are made
        self.parent: Tenant | None = None  # a wrapper inside a container has no listener of its own,
        self.scope = 0  # but a number by which its processes are known
        self.uid = 0  # of who asked for it
        self.followers: set[int] = set()  # processes that have its sockets by the API
        self.paths: dict[str, tuple[int, int, int]] = {}  # unix sockets that it has bound: device, inode, change time
        self.trusted = True  # did root of the host hand its listener over?
        self.resolvers: list[Address] = []
        self.given: list[Own] = []  # by --ip
        self.attached: list[Attachment] = []  # by an engine
        self.members: dict[str, Member] = {}  # an engine's containers that share the namespace, by their ids
        self.argv: list[str] = []
        self.pid = 0
        self.started = time.time()  # to be shown
        self.since = time.monotonic()  # that this graftd knows it
        self.limits = Limits()
        self.netns_fd = -1
        self.listeners: set[int] = set()
        self.installed = policy.NOTHING
        self._probes: dict[int, socket.socket] = {}

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        """The endpoint table of its namespace."""
        return self.table.endpoints

    @property
    def owner(self) -> int:
        """The uid that owns this tenant's sockets; those with an address of their own share one, and port numbers."""
        return OWNER_BASE + (0 if self.owned else self.slot)

    @property
    def owned(self) -> list[Own]:
        """The addresses of its own; wildcard binds go to the first of a family."""
        return [*self.given, *(own for attachment in self.attached for own in attachment.addresses)]

    def bound_path(self, path: str) -> None:
        """Remember a unix socket that it has bound, to remove it at the end."""
        found = os.lstat(path)
        self.paths[path] = _identity(found)

    def binds_path(self, path: str) -> bool:
        """Has it bound this unix socket?"""
        return path in self.paths

    def _remove_paths(self) -> None:
        for path, identity in self.paths.items():
            try:
                found = os.lstat(path)
                if _identity(found) == identity:  # inodes are used again at once
                    os.unlink(path)
            except OSError:
                continue  # gone, or its directory is

    def needs_swap(self) -> bool:
        """Does a rule name an endpoint that takes another socket than socket() gives?"""
        return needs_swap(self.endpoints, self.place, self.ingress, self.egress)

    def probe(self, family: int) -> socket.socket:
        """A datagram socket in the tenant's own netns, to ask about its devices."""
        if family not in self._probes:
            with linux.inside_netns(self.netns_fd):
                self._probes[family] = socket.socket(family, socket.SOCK_DGRAM)
        return self._probes[family]

    def compile(self) -> policy.Tables:
        """What the kernel shall have of this tenant."""
        return policy.compile_tables(
            self.id,
            self.table.endpoints,
            self.ingress,
            self.egress,
            egress_host=self.egress_host,
            strict=self.strict,
            home=self.home,
            verbose=self.verbose,
            resolvers=self.resolvers,
            owned=self.owned,
            named=bool(self.attached),
        )

    def rules(self) -> Rules:
        """What `restore` takes back, should a change fail half way."""
        return Rules(list(self.ingress), list(self.egress), list(self.publications), dict(self.table.endpoints))

    def restore(self, rules: Rules) -> None:
        """Undo changes that the kernel has not seen yet."""
        self.ingress, self.egress, self.publications, self.table.endpoints = rules

    def close(self) -> None:
        """Let go of the namespace, and of the unix sockets."""
        self._remove_paths()
        for probe in self._probes.values():
            probe.close()
        self._probes.clear()
        if self.netns_fd >= 0:
            os.close(self.netns_fd)
            self.netns_fd = -1


class Registry:
    """All tables and tenants of one graftd."""

    def __init__(self, kernel: Kernel, state: Path) -> None:
        self.kernel = kernel
        self.state = state
        self.home = linux.netns_inode()
        self.ipv6 = host.has_ipv6()
        self._begin()

    def _begin(self) -> None:
        self.tables: dict[int, Table] = {}
        self.tenants: dict[int, Tenant] = {}
        self.places: dict[int, Place] = {}
        self.scopes: dict[int, Tenant] = {}
        self.attachments: dict[str, Attachment] = {}
        self.expected: dict[str, Expected] = {}
        self.added: set[Address] = set()  # what graft has put on lo
        self.networks: list[str] = []  # an engine's network is known to the kernel by its place here, from 1
        self.lost_places: dict[int, tuple[int, str]] = {}
        self.saved = True
        self.next_id = 1
        self.next_slot = random.randrange(BLOCKS)  # noqa: S311 - spreads, protects nothing

    # -- look up --

    def by_netns(self, netns: int) -> Tenant | None:
        """The container of a namespace."""
        return next((t for t in self.tenants.values() if t.netns == netns and t.kind == CONTAINER), None)

    def of_netns(self, netns: int) -> list[Tenant]:
        """All tenants of a namespace: the container, wrappers, users of the API."""
        return [t for t in self.tenants.values() if t.netns == netns]

    def by_container(self, number: str) -> Tenant | None:
        """The tenant that an engine's container belongs to, by the engine's id."""
        return next((t for t in self.tenants.values() if number in t.members), None)

    def by_name(self, name: str) -> Tenant | None:
        """A tenant by its name."""
        return next((t for t in self.tenants.values() if t.name == name), None)

    def table(self, fd: int, label: str) -> Table:
        """The table of the namespace @fd, made if need be.

        A namespace may have the inode of one that has ended; that one's endpoints are not its own.
        """
        netns, cookie = os.fstat(fd).st_ino, host.netns_cookie_of(fd)
        found = self.tables.get(netns)
        if found is None or found.cookie != cookie:
            found = self.tables[netns] = Table(netns, cookie, label)
        return found

    def forget_dead(self) -> None:
        """Drop the tables of namespaces that have ended."""
        dead = [
            table
            for table in self.tables.values()
            if not self.of_netns(table.netns) and not host.netns_alive(table.netns, table.label)
        ]
        for table in dead:
            del self.tables[table.netns]
        if dead:
            self.save()

    # -- tenants --

    def admit(self, table: Table, name: str, argv: Sequence[str]) -> Tenant:
        """A new tenant without rules. Raises Refused if the name is taken or all blocks are."""
        if self.by_name(name):
            raise Refused(f"a container named '{name}' is running", hint="choose another --name", code="EEXIST")
        slot = self._free_slot()
        tenant = Tenant(self.next_id, slot, name, table)
        tenant.argv = list(argv)
        self.next_id += 1
        return tenant

    def _free_slot(self) -> int:
        """Blocks are used in turn, so that a new container meets no TIME_WAIT of the one before."""
        used = {t.slot for t in self.tenants.values()}
        for n in range(self.next_slot, self.next_slot + BLOCKS):
            slot = n % BLOCKS + 1
            if slot not in used:
                self.next_slot = slot
                return slot
        raise Refused(f"{BLOCKS} containers are running", code="ENOSPC")

    def install(self, tenant: Tenant) -> None:
        """Make an admitted tenant known to the kernel."""
        self.tenants[tenant.id] = tenant
        try:
            self.apply(tenant)
        except BaseException:
            self.remove(tenant)
            raise

    def remove(self, tenant: Tenant) -> None:
        """Take a tenant and its published endpoints away; its sockets, if any are left, are refused."""
        for index, (name, _) in enumerate(policy.KEY_SIZES):
            for key in tenant.installed.maps()[index]:
                self.kernel.maps[name].delete(key)
        self.kernel.maps["tenants"].delete(tenant.id.to_bytes(4, "little"))
        self.kernel.forget(tenant.id)
        self.tenants.pop(tenant.id, None)
        self.scopes.pop(tenant.scope, None)
        tenant.close()
        for own in tenant.given:
            self.remove_address(own.address)
        for inner in self.inner(tenant):
            self.remove(inner)
        if tenant.kind == CONTAINER:
            table = tenant.table
            table.endpoints = {n: e for n, e in table.endpoints.items() if not e.published and not e.imported}
        self.forget_empty(tenant.table)
        self.save()

    def reserve(self, address: Address) -> None:
        """Let an address be graftd's own: the kernel leads to nobody else there."""
        self.kernel.maps["addresses"].update(address.raw, policy.OWNER.pack(OWN_TENANT, 0))

    def release(self, address: Address) -> None:
        """Undo reserve()."""
        self.kernel.maps["addresses"].delete(address.raw)

    def add_address(self, address: Address) -> None:
        """Put an address on the host's stack, unless it is there. Raises Failure."""
        if host.add_address(address):
            self.added.add(address)
            self.save()

    def remove_address(self, address: Address) -> None:
        """Take an address away that graft has put there."""
        if address in self.added:
            self.added.discard(address)
            host.remove_address(address)
            self.save()

    def forget_empty(self, table: Table) -> None:
        """Drop a table that says nothing and that no tenant has."""
        if not table.endpoints and not self.of_netns(table.netns):
            self.tables.pop(table.netns, None)

    def inner(self, tenant: Tenant) -> list[Tenant]:
        """The wrappers inside a container that have no listener of their own, and end with it."""
        return [t for t in self.tenants.values() if t.parent is tenant and t.scope]

    def take_scope(self, tenant: Tenant) -> None:
        """Give a wrapper inside a container the number that its processes will carry."""
        if tenant.parent and len(self.inner(tenant.parent)) >= SCOPES_INSIDE:
            raise Refused(f"{SCOPES_INSIDE} wrappers run in this container", code="ENOSPC")
        free = (n for n in range(self.next_id, self.next_id + SCOPES) if n % SCOPES + 1 not in self.scopes)
        number = next(free, None)
        if number is None:
            raise Refused(f"{SCOPES} wrappers run inside containers", code="ENOSPC")
        tenant.scope = number % SCOPES + 1
        self.scopes[tenant.scope] = tenant

    def apply(self, tenant: Tenant) -> None:
        """Bring the kernel's tables to the tenant's rules, and save."""
        tables = tenant.compile()
        maps = self.kernel.maps
        named = [(tables.maps()[i], tenant.installed.maps()[i], name) for i, (name, _) in enumerate(policy.KEY_SIZES)]
        written: list[tuple[str, bytes]] = []
        try:
            for new, old, name in named:
                for key, value in new.items():
                    if old.get(key) != value:
                        maps[name].update(key, value)
                        written.append((name, key))
        except OSError:  # ENOSPC: what did not fit whole is not there at all
            for _, old, name in named:
                for key in (k for n, k in written if n == name):
                    if key in old:
                        maps[name].update(key, old[key])
                    else:
                        maps[name].delete(key)
            raise
        parent = tenant.parent.id if tenant.parent and tenant.parent.kind == CONTAINER else 0
        own4 = next((own.address.raw[12:] for own in tenant.owned if own.address.v4), bytes(4))
        own6 = next((own.address.raw for own in tenant.owned if not own.address.v4), ANY6)
        value = TENANT.pack(tenant.table.cookie, tenant.slot, tables.flags, parent, own4, own6)
        if tenant.installed is policy.NOTHING:
            self.kernel.limit(tenant.id, tenant.limits)
        maps["tenants"].update(tenant.id.to_bytes(4, "little"), value)
        for new, old, name in named:
            for key in old.keys() - new.keys():
                maps[name].delete(key)
        tenant.installed = tables
        self.save()

    def reconcile(self) -> None:
        """After a restart: delete from the kernel what no tenant accounts for, and put the rest there."""
        wanted = [tenant.compile() for tenant in self.tenants.values()]
        for index, (name, key_size) in enumerate(policy.KEY_SIZES):
            keep = {key for tables in wanted for key in tables.maps()[index]}
            for key in list(self.kernel.maps[name].keys(key_size)):
                if key not in keep:
                    self.kernel.maps[name].delete(key)
        used = [int.from_bytes(key, "little") for key in self.kernel.maps["tenants"].keys(4)]
        self.next_id = max([self.next_id, *(number + 1 for number in used)])  # a lost tenant's sockets are nobody's
        known = {tenant.to_bytes(4, "little") for tenant in self.tenants}
        for key in list(self.kernel.maps["tenants"].keys(4)):
            if key not in known:
                self.kernel.maps["tenants"].delete(key)
                self.kernel.forget(int.from_bytes(key, "little"))
        for tenant in self.tenants.values():
            tenant.installed = policy.NOTHING
            self.apply(tenant)

    # -- rules --

    def publish(self, tenant: Tenant, publications: Iterable[Publication]) -> None:
        """Add `-p` publications to a tenant's table and rules. Raises Refused; then nothing has changed."""
        taken = set(tenant.table.endpoints)
        made: list[tuple[Endpoint, IngressRule]] = []
        accepted: list[Publication] = []
        for publication in publications:
            pairs = published(publication, taken, ipv6=self.ipv6)
            addresses = [endpoint.address for endpoint, _ in pairs if endpoint.address]
            ports.check_conflicts(publication, addresses, [*tenant.publications, *accepted], tenant.name)
            ports.check_inside(publication, addresses, [*tenant.publications, *accepted])
            self.check_free(
                publication, addresses, where=(tenant.netns, tenant.table.cookie), shared=bool(tenant.owned)
            )
            made += pairs
            accepted.append(publication)
        for endpoint, rule in made:
            tenant.table.endpoints[endpoint.name] = endpoint
            tenant.ingress.append(rule)
        tenant.publications += accepted

    def _label(self, attachment: Attachment) -> str:
        """What to call whose attachment it is."""
        tenant = next((t for t in self.tenants.values() if attachment in t.attached), None)
        return tenant.name if tenant else next(iter(attachment.names), attachment.key)

    def check_free(
        self, publication: Publication, addresses: list[Address], *, where: tuple[int, int], shared: bool
    ) -> None:
        """Raise Refused, naming the holder, unless a container in the namespace @where may publish this.

        @shared: it has an address of its own, so that its sockets share port numbers with others that have one.
        """
        for other in self.tenants.values():
            if (other.netns, other.table.cookie) != where:
                ports.check_conflicts(publication, addresses, other.publications, other.name)
        for attachment in self.attachments.values():
            if not attachment.in_netns(*where):
                ports.check_conflicts(publication, addresses, attachment.publications, self._label(attachment))

        for expected in self.expected.values():
            if expected.holds() and (expected.where == (0, 0) or expected.where != where):
                ports.check_conflicts(publication, addresses, expected.publications, expected.name)

        def own(probe: socket.socket) -> None:
            Stamper(self.kernel.maps["stamps"]).stamp(probe.fileno(), OWN_TENANT, 0)
            if shared:
                os.fchown(probe.fileno(), OWNER_BASE, -1)
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

        ports.check_publication(publication, addresses, own)

    def unpublish(self, tenant: Tenant, publication: Publication) -> None:
        """Take a publication back; what is bound through it stays open."""
        if publication not in tenant.publications:
            raise Refused(f"-p {publication} is not published by '{tenant.name}'", code="ENOENT")
        tenant.publications.remove(publication)
        last = publication.first + publication.span - 1
        addresses = host_addresses(publication)
        gone = [
            rule
            for rule in tenant.ingress
            if (rule.first, rule.last, rule.protocols) == (publication.first, last, (publication.protocol,))
            and (endpoint := tenant.table.endpoints.get(rule.endpoint)) is not None
            and endpoint.published
            and endpoint.port == publication.host_first
            and endpoint.address in addresses
        ]
        for rule in gone:
            tenant.ingress.remove(rule)
            del tenant.table.endpoints[rule.endpoint]

    def add_rules(self, tenant: Tenant, ingress: Iterable[IngressRule], egress: Iterable[EgressRule]) -> None:
        """Append rules after checking all of them."""
        ingress, egress = list(ingress), list(egress)
        rules: list[IngressRule | EgressRule] = [*ingress, *egress]
        for rule in rules:
            policy.check_rule(rule, tenant.table.endpoints)
        for each in egress:
            self.check_leaving(tenant, tenant.endpoints[each.endpoint])
        check_distinct([*tenant.ingress, *ingress], [*tenant.egress, *egress])
        if needs_swap(tenant.endpoints, tenant.place, ingress, egress) and not tenant.swap:
            rule = next(r for r in rules if needs_swap(tenant.endpoints, tenant.place, [], [], r.endpoint))
            raise Refused(
                f"rule '{rule}': endpoint '{rule.endpoint}' is of type unix or in another namespace, and container "
                f"'{tenant.name}' was started without such endpoints",
                hint="give the rule to 'graft run' when it starts",
                code="EOPNOTSUPP",
            )
        tenant.ingress += ingress
        tenant.egress += egress

    def check_leaving(self, tenant: Tenant, endpoint: Endpoint) -> None:
        """Raise Refused unless a program may connect through, or to, this endpoint of its table.

        A publication, and an endpoint that came into the container's table for an ingress rule, name where a server
        may be bound; to leave from there would reach what the container may not, the host's loopback for one.
        """
        container = tenant if tenant.kind == CONTAINER else self.by_netns(tenant.netns)
        allowed = {rule.endpoint for rule in container.egress} if container else set()
        if endpoint.published or (endpoint.imported and container is not tenant and endpoint.name not in allowed):
            raise Refused(
                f"endpoint '{endpoint.name}' is there to bind to, not to connect from",
                hint="name another one, or give the container an egress rule with it",
                code="EACCES",
            )

    def delete_rules(self, tenant: Tenant, ingress: Iterable[IngressRule], egress: Iterable[EgressRule]) -> None:
        """Remove rules; all of them must exist."""
        ingress, egress = list(ingress), list(egress)
        for rule in (*ingress, *egress):
            if rule not in tenant.ingress and rule not in tenant.egress:
                raise Refused(f"rule '{rule}' does not exist", hint="'graft rule show' lists them", code="ENOENT")
        tenant.ingress = [rule for rule in tenant.ingress if rule not in ingress]
        tenant.egress = [rule for rule in tenant.egress if rule not in egress]

    # -- endpoints --

    def add_endpoints(self, table: Table, wanted: Sequence[tuple[str, EndpointWords, int]]) -> list[Endpoint]:
        """`graft endpoint add`: names, words and places; all of them or none.

        Raises UsageError for the grammar, Refused for a name in use (EEXIST) or a directory that is not
        there (ENOENT).
        """
        added: dict[str, Endpoint] = {}
        for name, words, place in wanted:
            endpoint = make_endpoint(
                name, words, place, self._local_path(table, name) if words.type == "local" else ""
            )
            if name in table.endpoints or name in added:
                raise Refused(
                    f"endpoint '{name}' exists in this namespace",
                    hint=f"delete it first: graft endpoint del {name}",
                    code="EEXIST",
                )
            if endpoint.path and not os.path.isdir(os.path.dirname(endpoint.path)):
                raise Refused(
                    f"endpoint '{name}': there is no directory '{os.path.dirname(endpoint.path)}'",
                    hint="make it first; the path is the host's",
                    code="ENOENT",
                )
            added[name] = endpoint
        table.endpoints.update(added)
        self._table_changed(table)
        return list(added.values())

    def _local_path(self, table: Table, name: str) -> str:
        """Where an endpoint of type local meets: whoever may not list the directory has to know the name."""
        directory = self.state.parent / "local"
        directory.mkdir(mode=0o711, exist_ok=True)
        return str(directory / f"{table.netns}-{name}.sock")

    def delete_endpoints(self, table: Table, names: Sequence[str]) -> None:
        """`graft endpoint del`, all of them or none: no new bind or connect through it; open sockets stay."""
        for name in names:
            if name not in table.endpoints or names.count(name) > 1:
                raise Refused(f"endpoint '{name}' does not exist in this namespace", code="ENOENT")
            if table.endpoints[name].published:
                raise Refused(
                    f"endpoint '{name}' belongs to a publication",
                    hint="take that back with 'graft rule del -p ...'",
                    code="EBUSY",
                )
        for name in names:
            del table.endpoints[name]
        self.forget_empty(table)
        self._table_changed(table)

    def home_endpoints(self) -> Mapping[str, Endpoint]:
        """The table of graftd's own netns."""
        table = self.tables.get(self.home)
        return table.endpoints if table else {}

    def _table_changed(self, table: Table) -> None:
        tenants = self.of_netns(table.netns)
        for tenant in tenants:
            self.apply(tenant)
        if not tenants:
            self.save()

    def place(self, fd: int, label: str) -> int:
        """The number of a host namespace, which is kept by a copy of @fd if it is a new one."""
        inode = os.fstat(fd).st_ino
        if inode == self.home:
            return 0
        for place in self.places.values():
            if place.inode == inode:
                return place.number
        number = max(self.places, default=0) + 1
        self.places[number] = Place(number, inode, os.dup(fd), label)
        return number

    def unused_places(self) -> list[Place]:
        """Take out the namespaces that no endpoint names any more; the caller closes them."""
        used = {e.place for table in self.tables.values() for e in table.endpoints.values()}
        used |= {tenant.place for tenant in self.tenants.values()}
        return [self.places.pop(number) for number in set(self.places) - used]

    # -- state --

    def save(self) -> None:
        """Write state.json whole, then rename it into place; where that fails, `saved` is false and tells."""
        try:
            self._write()
            self.saved = True
        except OSError as error:
            log.error("cannot write %s: %s; trying again", self.state, error.strerror)
            self.saved = False

    def _write(self) -> None:
        from graft.state import dump  # it knows this module's classes

        temporary = self.state.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC  # through nobody's link
        with open(temporary, "w", opener=lambda path, _flags: os.open(path, flags, 0o600)) as file:
            file.write(json.dumps(dump(self)))
        temporary.rename(self.state)

    def load(self) -> None:
        """Read state.json back; tenants come without descriptors. An absent file is an empty state."""
        from graft.state import VERSION, restore

        try:
            document: dict[str, Any] = json.loads(self.state.read_text())
            version = document["version"]
            if version == VERSION:
                restore(self, document)
                return
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, GraftError) as error:
            aside = self.state.with_suffix(".unreadable")
            log.error("%s is unreadable (%s): moved to %s; what it told is lost", self.state, error, aside.name)
            self.state.rename(aside)
            self._begin()
            return
        raise Failure(
            f"{self.state} is of another version of graft",
            hint=f"end its containers with the graftd that wrote it, or remove {self.state}",
        )

    def restore_places(self, kept: dict[int, int]) -> list[str]:
        """After `load`: @kept are descriptors by number, from the store. Names of endpoints that are lost.

        Where nobody kept a namespace it is found again by what the user called it, or its endpoints go.
        """
        for number, (inode, label) in self.lost_places.items():
            fd = kept.get(number, -1)
            if fd < 0:
                try:
                    fd, _ = host.open_netns(label)
                except Refused:
                    continue
            if os.fstat(fd).st_ino == inode:
                self.places[number] = Place(number, inode, fd, label)
            else:
                os.close(fd)
        lost = []
        for table in self.tables.values():
            for endpoint in list(table.endpoints.values()):
                if endpoint.place and endpoint.place not in self.places:
                    del table.endpoints[endpoint.name]
                    lost.append(endpoint.name)
        return lost


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
    """Where a wrapper's sockets are best made: at the endpoints that its rules name, if they are in one place."""
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
    return {**document, "span": endpoint.span, "published": endpoint.published}


def rule_documents(tenant: Tenant) -> dict[str, Any]:
    """A tenant's rules in JSON."""
    return {
        "publish": [str(p) for p in tenant.publications],
        "ingress": [{"rule": str(r), "protocols": [PROTOCOL_NAME[p] for p in r.protocols]} for r in tenant.ingress],
        "egress": [str(r) for r in tenant.egress],
        "egress_default": "host" if tenant.egress_host else "none",
        "strict": tenant.strict,
    }
