"""Tenants and endpoint tables: graftd's state, and the BPF maps that are kept equal to it.

Theory of operation

An endpoint table belongs to one network namespace, which is found by its inode. The kernel uses inodes again, so
the table also has the namespace's cookie (SO_NETNS_COOKIE), which is unique until the next boot.

A tenant is a policy and the processes under it. There are three kinds, and all of them use the endpoint table of
their namespace:

    container   one for each namespace in which `graft run` or an OCI runtime starts targets
    wrapper     one for each `graft -i ... -e ... -- CMD`; several may be in one namespace
    api         one for the programs of a namespace that ask for sockets by the agent socket

A place is a host namespace in which sockets are made. Place 0 is graftd's own; the others are those that endpoints
name.

`apply` brings a change of rules to the kernel. It compiles the tenant's rules, and writes the difference in this
order: new and changed entries, then the tenant's flags, then the deletion of old entries. So a bind(2) in between
meets the old rule or the new one, and never none. After each change the registry is written to state.json, which
the next graftd reads.

What still fails: a map may be full (ENOSPC). Then `apply` undoes what it has written and raises, and the caller
restores the tenant. state.json may be impossible to write. Then `saved` is false, and graftd tries again each second.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.errors import Failure, GraftError, Refused
from graft.kernel import linux
from graft.kernel.addresses import add_address, ephemeral_ports, has_ipv6, marked_addresses, remove_address
from graft.kernel.netns import netns_alive, netns_cookie_of, open_netns
from graft.kernel.programs import Kernel
from graft.kernel.stamps import OWN_TENANT
from graft.log import log
from graft.rules import match
from graft.rules.address import Address
from graft.rules.endpoint import (
    EgressRule,
    Endpoint,
    EndpointWords,
    IngressRule,
    check_distinct,
    make_endpoint,
    parse_path,
)
from graft.rules.slices import SLICE_GROUP, dynamic_address
from graft.rules.sysctl import private_ports
from graft.rules.tables import KEY_SIZES, NOTHING, OWNER
from graft.tenants.leads import Leads
from graft.tenants.state import VERSION, dump, restore
from graft.tenants.tenant import CONTAINER, SLICES, Known, Place, Table, Tenant, check_use, needs_swap

SCOPES, SCOPES_INSIDE = 40000, 256


class Registry(Known):
    """All tables and tenants of one graftd. Only the loop's thread may call its methods (see `Tenant`)."""

    def __init__(self, kernel: Kernel, state: Path) -> None:
        self.kernel = kernel
        self.leads = Leads(kernel.maps)
        self.state = state
        self.home = linux.netns_inode()
        self.ipv6 = has_ipv6()
        self.pod_resolvers: tuple[Address, ...] = ()  # whom pods with egress `none` may ask for names
        self.ephemeral = ephemeral_ports()  # of the host, as they were when graftd began
        self.watches_all = False  # does somebody read what every tenant is allowed?
        self.outward: dict[bool, Address] = {}  # from where the host sends, by family (True: IPv4)
        super().__init__()

    # -- look up --

    def by_netns(self, netns: int) -> Tenant | None:
        """The container of the namespace with inode @netns, or None."""
        return next((t for t in self.tenants.values() if t.netns == netns and t.kind == CONTAINER), None)

    def of_netns(self, netns: int) -> list[Tenant]:
        """All tenants of the namespace with inode @netns: the container, wrappers, users of the API."""
        return [t for t in self.tenants.values() if t.netns == netns]

    def by_container(self, number: str) -> Tenant | None:
        """The tenant that an engine's container belongs to, by the engine's id of it, or None."""
        return next((t for t in self.tenants.values() if number in t.members), None)

    def by_name(self, name: str) -> Tenant | None:
        """The tenant of this name, or None; names are unique."""
        return next((t for t in self.tenants.values() if t.name == name), None)

    def table(self, fd: int, label: str) -> Table:
        """The table of the namespace @fd; an empty one is made if there is none. Raises OSError.

        A new namespace may have the inode of one that has ended. The cookie tells them apart, so that it does not
        get the other's endpoints.
        """
        netns, cookie = os.fstat(fd).st_ino, netns_cookie_of(fd)
        found = self.tables.get(netns)
        if found is None or found.cookie != cookie:
            found = self.tables[netns] = Table(netns, cookie, label)
        return found

    def forget_dead(self) -> None:
        """Drop the tables of namespaces that have ended."""
        dead = [
            table
            for table in self.tables.values()
            if not (table.of_user or self.of_netns(table.netns) or netns_alive(table.netns, table.label))
        ]
        for table in dead:
            del self.tables[table.netns]
        if dead:
            self.save()

    # -- tenants --

    def admit(self, table: Table, name: str, argv: Sequence[str]) -> Tenant:
        """A new tenant without rules, which `install` then makes known.

        Raises Refused if the name is in use (EEXIST), or every slice of the private loopback is (ENOSPC).
        """
        if self.by_name(name):
            raise Refused(f"a container named '{name}' is running", hint="choose another --name", code="EEXIST")
        slice_number = self._free_slice()
        tenant = Tenant(self.next_id, slice_number, name, table, wide=True)
        tenant.argv, tenant.watched = list(argv), self.watches_all
        self.next_id += 1
        return tenant

    def _free_slice(self) -> int:
        """A free slice of the private loopback: in turn, so that a new container meets no TIME_WAIT of an old one."""
        used = {t.slice_number // SLICE_GROUP for t in self.tenants.values()}
        last = self.next_slice // SLICE_GROUP
        for n in range(last, last + SLICES):
            group = n % SLICES + 1
            if group not in used:
                self.next_slice = group * SLICE_GROUP
                return self.next_slice
        raise Refused(f"{SLICES} containers are running", code="ENOSPC")

    def install(self, tenant: Tenant) -> None:
        """Make an admitted tenant known to the kernel. If that raises, the tenant is removed again."""
        self.tenants[tenant.id] = tenant
        try:
            self.apply(tenant)
        except BaseException:
            self.remove(tenant)
            raise

    def remove(self, tenant: Tenant) -> None:
        """Remove a tenant, its inner wrappers, and its published endpoints. What sockets it has left are refused."""
        for index, (name, _) in enumerate(KEY_SIZES):
            for key in tenant.installed.maps()[index]:
                self.kernel.maps[name].delete(key)
        self.kernel.maps["tenants"].delete(tenant.id.to_bytes(4, "little"))
        self.kernel.forget(tenant.id)
        self.tenants.pop(tenant.id, None)
        self.leads.write(self.tenants.values())
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
        """Mark an address as graftd's own in the map `holders`, so that no tenant gets its traffic."""
        self.kernel.maps["holders"].update(address.raw, OWNER.pack(OWN_TENANT, 0, 0, 0))

    def release(self, address: Address) -> None:
        """Undo reserve()."""
        self.kernel.maps["holders"].delete(address.raw)

    def add_address(self, address: Address) -> None:
        """Put an address on the host's stack, unless it is there. Raises Failure."""
        if add_address(address):
            self.added.add(address)
            self.save()

    def remove_address(self, address: Address) -> None:
        """Remove an address from the host's stack, if graft has put it there."""
        if address in self.added:
            self.added.discard(address)
            remove_address(address)
            self.save()

    def sweep(self) -> list[Address]:
        """Remove the addresses that a graftd has put on the host's stack, and that nobody here has.

        A graftd that is killed, or whose state is lost, leaves them there. Returns them. Raises Failure.
        """
        owned = [*(t.given for t in self.tenants.values()), *(a.addresses for a in self.attachments.values())]
        kept = {own.address for each in owned for own in each}
        kept |= {a.resolver for a in self.attachments.values() if a.resolver}
        kept |= {dynamic_address(tenant.slice_number) for tenant in self.tenants.values() if tenant.cgroup}
        there = self.added | set(marked_addresses())
        left = sorted(there - kept)
        for address in left:
            remove_address(address)
        self.added = there & kept
        return left

    def forget_empty(self, table: Table) -> None:
        """Drop a table that has no endpoint and no tenant."""
        if not table.endpoints and not self.of_netns(table.netns):
            self.tables.pop(table.netns, None)

    def inner(self, tenant: Tenant) -> list[Tenant]:
        """The wrappers inside a tenant that use its listener, and end with it."""
        return [t for t in self.tenants.values() if t.parent is tenant and t.scope]

    def take_scope(self, tenant: Tenant) -> None:
        """Give a wrapper inside a container the number that marks its processes (trap/nested.py). Raises Refused."""
        if tenant.parent and len(self.inner(tenant.parent)) >= SCOPES_INSIDE:
            raise Refused(f"{SCOPES_INSIDE} wrappers run in this container", code="ENOSPC")
        free = (n for n in range(self.next_id, self.next_id + SCOPES) if n % SCOPES + 1 not in self.scopes)
        number = next(free, None)
        if number is None:
            raise Refused(f"{SCOPES} wrappers run inside containers", code="ENOSPC")
        tenant.scope = number % SCOPES + 1
        self.scopes[tenant.scope] = tenant

    def apply(self, tenant: Tenant) -> None:
        """Bring the BPF maps to the tenant's rules, and save.

        Raises OSError, ENOSPC if a map is full; then the maps are as before.
        """
        changed = tenant.kind == CONTAINER and tenant.note_uses()
        self.leads.write(self.tenants.values())  # first: what is moved goes to the one or to the other
        tables = tenant.compile(self.added, self.pod_resolvers)
        maps = self.kernel.maps
        named = [(tables.maps()[i], tenant.installed.maps()[i], name) for i, (name, _) in enumerate(KEY_SIZES)]
        written: list[tuple[str, bytes]] = []
        try:
            for new, old, name in named:
                for key, value in new.items():
                    if old.get(key) != value:
                        maps[name].update(key, value)
                        written.append((name, key))
        except OSError:  # ENOSPC: undo, so that half a policy is never in force
            for _, old, name in named:
                for key in (k for n, k in written if n == name):
                    if key in old:
                        maps[name].update(key, old[key])
                    else:
                        maps[name].delete(key)
            raise
        if tenant.installed is NOTHING:
            limits = tenant.limits._replace(rate=tenant.rate)
            self.kernel.limit(tenant.id, limits, private_ports(tenant.sysctls, self.ephemeral))
            if tenant.wide:
                self.kernel.widen(tenant.id)
        maps["tenants"].update(tenant.id.to_bytes(4, "little"), tenant.value(tables.flags))
        for new, old, name in named:
            for key in old.keys() - new.keys():
                maps[name].delete(key)
        tenant.installed = tables
        for other in self.of_netns(tenant.netns) if changed else ():  # wrappers inside use the same endpoints
            if other is not tenant:
                self.apply(other)
        self.save()

    def reconcile(self) -> None:
        """After a restart, make the BPF maps equal to the registry: delete entries of no tenant, write the others."""
        for tenant in self.tenants.values():
            if tenant.kind == CONTAINER:
                tenant.note_uses()
        self.leads.write(self.tenants.values())
        wanted = [tenant.compile(self.added, self.pod_resolvers) for tenant in self.tenants.values()]
        for index, (name, key_size) in enumerate(KEY_SIZES):
            keep = {key for tables in wanted for key in tables.maps()[index]}
            for key in set(self.kernel.maps[name].keys(key_size)) - keep:
                self.kernel.maps[name].delete(key)
        used = (int.from_bytes(key, "little") + 1 for key in self.kernel.maps["tenants"].keys(4))
        self.next_id = max([self.next_id, *used])  # never give out a lost tenant's id
        known = {tenant.to_bytes(4, "little") for tenant in self.tenants}
        for key in list(self.kernel.maps["tenants"].keys(4)):
            if key not in known:
                self.kernel.maps["tenants"].delete(key)
                self.kernel.forget(int.from_bytes(key, "little"))
        for tenant in self.tenants.values():
            tenant.installed = NOTHING
            self.apply(tenant)

    # -- rules --

    def add_rules(self, tenant: Tenant, ingress: Iterable[IngressRule], egress: Iterable[EgressRule]) -> None:
        """Append rules after checking all of them; `apply` brings them to the kernel. Raises Refused, UsageError."""
        ingress, egress = list(ingress), list(egress)
        rules: list[IngressRule | EgressRule] = [*ingress, *egress]
        for rule in rules:
            match.check_rule(rule, tenant.table.endpoints)
        for rule in rules:
            check_use(tenant, tenant.endpoints[rule.endpoint], leave=isinstance(rule, EgressRule))
        check_distinct([*tenant.ingress, *ingress], [*tenant.egress, *egress])
        if needs_swap(tenant.endpoints, tenant.place, ingress, egress) and not tenant.traps_addresses:
            rule = next(r for r in rules if needs_swap(tenant.endpoints, tenant.place, [], [], r.endpoint))
            raise Refused(
                f"rule '{rule}': endpoint '{rule.endpoint}' is of type unix or in another namespace, and container "
                f"'{tenant.name}' was started without such endpoints",
                hint="give the rule to 'graft run' when it starts",
                code="EOPNOTSUPP",
            )
        tenant.ingress += ingress
        tenant.egress += egress

    def delete_rules(self, tenant: Tenant, ingress: Iterable[IngressRule], egress: Iterable[EgressRule]) -> None:
        """Remove rules. Raises Refused if one does not exist; then nothing has changed."""
        ingress, egress = list(ingress), list(egress)
        for rule in (*ingress, *egress):
            if rule not in tenant.ingress and rule not in tenant.egress:
                raise Refused(f"rule '{rule}' does not exist", hint="'graft rule show' lists them", code="ENOENT")
        tenant.ingress = [rule for rule in tenant.ingress if rule not in ingress]
        tenant.egress = [rule for rule in tenant.egress if rule not in egress]

    # -- endpoints --

    def add_endpoints(
        self, table: Table, wanted: Sequence[tuple[str, EndpointWords, int]], *, look: bool = True
    ) -> list[Endpoint]:
        """`graft endpoint add`: @wanted has names, words and places. All are added or none. @look: at their paths.

        Raises UsageError, Refused for a name in use (EEXIST) and a directory that is not there (ENOENT)."""
        added: dict[str, Endpoint] = {}
        for name, words, place in wanted:
            if words.path and look:  # links are followed now: a container may change them later (trap/swap.py)
                directory, last = os.path.split(words.path)
                words = words._replace(path=parse_path(os.path.join(os.path.realpath(directory), last)))
            endpoint = make_endpoint(
                name, words, place, self._local_path(table, name) if words.type == "local" else ""
            )
            if name in table.endpoints or name in added:
                raise Refused(
                    f"endpoint '{name}' exists in this namespace",
                    hint=f"delete it first: graft endpoint del {name}",
                    code="EEXIST",
                )
            if endpoint.path and look and not os.path.isdir(os.path.dirname(endpoint.path)):
                raise Refused(
                    f"endpoint '{name}': there is no directory '{os.path.dirname(endpoint.path)}'",
                    hint="create it first; the path is the host's",
                    code="ENOENT",
                )
            added[name] = endpoint if look else endpoint._replace(by_user=True)
        table.endpoints.update(added)
        self._table_changed(table)
        return list(added.values())

    def _local_path(self, table: Table, name: str) -> str:
        """The path of a `local` endpoint's unix socket. Mode 711: other users cannot list the directory."""
        directory = self.state.parent / "local"
        directory.mkdir(mode=0o711, exist_ok=True)
        return str(directory.resolve() / f"{table.netns}-{name}.sock")

    def delete_endpoints(self, table: Table, names: Sequence[str]) -> None:
        """`graft endpoint del`: all of them or none. No new bind or connect goes through them; open sockets stay.

        Raises Refused for an unknown name (ENOENT), and for an endpoint of a publication (EBUSY).
        """
        for name in names:
            if name not in table.endpoints or names.count(name) > 1:
                raise Refused(
                    f"endpoint '{name}' does not exist in this namespace",
                    hint="'graft endpoint show' lists them",
                    code="ENOENT",
                )
            if table.endpoints[name].published:
                raise Refused(
                    f"endpoint '{name}' belongs to a publication",
                    hint="remove that with 'graft rule del -p ...'",
                    code="EBUSY",
                )
        for name in names:
            del table.endpoints[name]
        self.forget_empty(table)
        self._table_changed(table)

    def home_endpoints(self) -> Mapping[str, Endpoint]:
        """The endpoints of graftd's own netns, by name."""
        table = self.tables.get(self.home)
        return table.endpoints if table else {}

    def _table_changed(self, table: Table) -> None:
        tenants = self.of_netns(table.netns)
        for tenant in tenants:
            self.apply(tenant)
        if not tenants:
            self.save()

    def place(self, fd: int, label: str) -> int:
        """The number of the host namespace @fd. A new one is kept alive by a copy of @fd, and called @label."""
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
        """Remove the places that no endpoint or tenant names any more, and return them; the caller closes them."""
        used = {e.place for table in self.tables.values() for e in table.endpoints.values()}
        used |= {tenant.place for tenant in self.tenants.values()}
        return [self.places.pop(number) for number in set(self.places) - used]

    # -- state --

    def save(self) -> None:
        """Write state.json: a new file, then rename(2), so that a reader never sees half of it.

        If that fails, it is logged, and `saved` is false.
        """
        try:
            self._write()
            self.saved = True
        except OSError as error:
            log.error("cannot write %s: %s; trying again", self.state, error.strerror)
            self.saved = False

    def _write(self) -> None:
        temporary = self.state.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC  # O_EXCL follows no symbolic link
        with open(temporary, "w", opener=lambda path, _flags: os.open(path, flags, 0o600)) as file:
            file.write(json.dumps(dump(self)))
        temporary.rename(self.state)

    def load(self) -> None:
        """Read state.json; the tenants have no descriptors yet. An absent file is an empty state.

        A file that cannot be read is moved aside, and the state is empty. Raises Failure for one of another version.
        """
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
            log.error("%s is unreadable (%s): moved to %s; its contents are lost", self.state, error, aside.name)
            self.state.rename(aside)
            self.begin()
            return
        raise Failure(
            f"{self.state} is of another version of graft",
            hint=f"end its containers with the graftd that wrote it, or remove {self.state}",
        )

    def restore_places(self, kept: dict[int, int]) -> list[str]:
        """After `load`, open the host namespaces of endpoints again; @kept are the store's descriptors by number.

        A namespace that the store did not keep is looked up by the label that the user gave. If it is not found,
        its endpoints are dropped. Returns the names of those.
        """
        for number, (inode, label) in self.lost_places.items():
            fd = kept.get(number, -1)
            if fd < 0:
                try:
                    fd, _ = open_netns(label)
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
