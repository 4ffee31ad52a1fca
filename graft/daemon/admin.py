"""The admin socket (graftd.sock): requests of `graft`, graft-cni, graft-runtime, and the OCI hook.

A connection carries one request, or `hello` and then one request. Each class of graft/protocol.py has a method of
its name here, which gets the request and its descriptors and returns the value of "ok". A method that returns owns
the descriptors; if it raises, the connection closes them. All of this runs in the loop's thread.

Requests that change something are refused while state.json cannot be written, because the change would not survive
a restart of graftd.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from graft import protocol
from graft.daemon import moves
from graft.daemon.admin_engines import EngineOrders
from graft.daemon.admission import admit_target, import_endpoints
from graft.daemon.connection import Connection, Later
from graft.daemon.documents import event_document, label, live_pid, slice_of, status_document
from graft.daemon.files import Files
from graft.daemon.open_sockets import Owned, socket_document
from graft.daemon.pages import Pages
from graft.daemon.planning import Planner, plan_document
from graft.daemon.requests import (
    WITH_DESCRIPTORS,
    Given,
    check_version,
    method_of,
    must_be_saved,
    parse_given,
    viewer,
)
from graft.daemon.stats import Stats
from graft.daemon.tenancy import Tenancy
from graft.engines.resolver import Resolver
from graft.errors import Failure, Refused, UsageError
from graft.kernel import foreign
from graft.kernel.denials import Event
from graft.kernel.netns import is_pid, open_netns
from graft.rules.address import Address
from graft.rules.endpoint import (
    Endpoint,
    EndpointWords,
    endpoint_names,
    parse_egress,
    parse_endpoint_words,
    parse_ingress,
)
from graft.rules.endpoint_names import names_need_swap
from graft.rules.publication import parse_publication
from graft.tenants import attachments, endpoint_file, publish
from graft.tenants.peers import refuse_contained
from graft.tenants.tenant import (
    CONTAINER,
    Table,
    Tenant,
    endpoint_document,
    needs_swap,
    rule_documents,
    table_documents,
)
from graft.text import listed

Reply = dict[str, Any] | list[Any] | Later


class Admin:
    """Answers admin requests, with the registry of a Daemon."""

    def __init__(self, tenancy: Tenancy, resolver: Resolver, files: Files, pages: Pages, *, managed: bool) -> None:
        self.tenancy = tenancy
        self.files = files  # of the administrator
        self.pages = pages
        self.moves = moves.Moves(tenancy)
        self.engines = EngineOrders(tenancy, resolver)
        self.managed = managed  # does a service manager keep this graftd?
        self.replacing = False  # is the next graftd about to start?
        self.planner: Planner | None = None

    @staticmethod
    def whole(text: bytes) -> bool:
        """Is it a whole request?"""
        return text.endswith(b"\n")

    def serve(self, connection: Connection, line: bytes, fds: list[int]) -> Reply:
        """Carry out one request: @line is its JSON, the result is the value of "ok".

        Raises GraftError, for instance Refused (EPROTO) for a client of another version.
        """
        connection.peer.check()
        if not connection.vetted:  # `graft run` is judged as it was before it entered
            refuse_contained(self.tenancy.registry, connection.peer, "the admin socket")
        request = protocol.decode_request(line)
        check_version(request)
        if isinstance(request, protocol.Hello):
            connection.vetted = True
            return self._hello(connection, request)
        connection.vetted = connection.vetted and isinstance(request, protocol.Plan)  # Run is to follow
        return self._carry_out(connection, request, fds)

    def _carry_out(self, connection: Connection, request: protocol.AnyRequest, fds: list[int]) -> Reply:
        if fds and not isinstance(request, WITH_DESCRIPTORS):
            raise UsageError("this request has no descriptors")
        changes, state = must_be_saved(request), self.tenancy.registry.state
        if changes:
            self._saved(f"nothing was changed: {state} cannot be written")
        self.tenancy.calls.reap()
        reply: Reply = self._order(request)(connection, request, fds)
        if changes:
            self._saved(f"done, but {state} cannot be written: a restart of graftd would undo it")
        return reply

    def _order(self, request: protocol.AnyRequest) -> Callable[..., Reply]:
        """The method that carries out this kind of request: of this class, or of EngineOrders."""
        name = method_of(type(request).__name__)
        method: Callable[..., Reply] = getattr(self, name, None) or getattr(self.engines, name)
        return method

    def _saved(self, otherwise: str) -> None:
        registry = self.tenancy.registry
        if not registry.saved:
            registry.save()
        if not registry.saved:
            raise Failure(otherwise, hint="make room there", code="ENOSPC")

    def _hello(self, connection: Connection, request: protocol.Hello) -> Reply:
        if not (request.ingress or request.egress or request.names or request.netns):
            return {}
        ingress = [parse_ingress(r) for r in request.ingress]
        egress = [parse_egress(r) for r in request.egress]
        own: Mapping[str, Endpoint] = {}
        names = request.names
        if request.netns:
            registry = self.tenancy.registry
            table = self._table(connection, request.netns)
            own = table.endpoints
            there = registry.by_netns(table.netns)
            names |= bool(there and there.traps_addresses and there.tells_names)
            registry.forget_empty(table)
        known = {**self._known(connection), **own}
        return {"swap": needs_swap(known, 0, ingress, egress) or (names and names_need_swap(own, 0))}

    def _known(self, _connection: Connection) -> Mapping[str, Endpoint]:
        """The endpoints that rules may name and a container's own table lacks."""
        return self.tenancy.registry.home_endpoints()

    # -- running --

    def run(self, connection: Connection, request: protocol.Run, fds: list[int]) -> Reply:
        """`graft run`: a target hands over its listener. Its netns is the peer's own, or comes with a direct one.

        Raises GraftError.
        """
        if len(fds) != (2 if request.request.direct else 1):
            raise UsageError("a run request carries the seccomp listener, of a direct container its netns as well")
        netns_fd = fds[1] if request.request.direct else None
        if netns_fd is not None and self.tenancy.is_hosts(os.fstat(netns_fd).st_ino):
            raise Refused(
                "a direct container needs a network namespace of its own", hint="omit --netns", code="EINVAL"
            )
        tenant = admit_target(
            self.tenancy, connection.pid, connection.uid, fds[0], request, trusted=True, netns_fd=netns_fd
        )
        if netns_fd is not None:
            os.close(netns_fd)
        return self._started(connection, tenant)

    def _started(self, connection: Connection, tenant: Tenant) -> Reply:
        """The answer for a container that begins, when it has its addresses."""
        procfs = self.tenancy.direct.procfs(tenant)
        told = {"name": tenant.name, "id": tenant.id, "names": tenant.asks_graft}
        answer = Later(self._view(connection, {**told, "procfs": procfs}))
        waits = self.tenancy.interfaces.when_there(tenant, lambda: answer.send())  # which gets there by returning it
        return answer if waits else answer.answer

    # -- what the peer may see: root everything --

    def _sees(self, _connection: Connection, _tenant: Tenant | None) -> bool:
        """May the peer see this tenant, or what is of one that graftd does not know?"""
        return True

    def _view(self, _connection: Connection, document: dict[str, Any]) -> dict[str, Any]:
        """A document about a tenant, as the peer knows it."""
        return document

    # -- endpoints --

    def endpoint_add(self, connection: Connection, request: protocol.EndpointAdd, fds: list[int]) -> Reply:
        """`graft endpoint add`: all of them or none. Returns them in JSON."""
        table = self._table(connection, request.netns)
        try:
            wanted = []
            for new in request.endpoints:
                words = parse_endpoint_words(new.words)
                self._check_endpoint(connection, new.name, words)
                place = 0
                if words.netns:
                    if not 0 <= new.netns < len(fds):
                        raise UsageError(f"endpoint '{new.name}': its netns did not come with the request")
                    place = self._place(fds[new.netns], words.netns)
                wanted.append((new.name, words, place))
            added = self._add_endpoints(connection, table, wanted)
        finally:
            self.tenancy.registry.forget_empty(table)
            self.tenancy.keep_places()
        for fd in fds:
            os.close(fd)
        return [endpoint_document(e) for e in added]

    def _check_endpoint(self, connection: Connection, name: str, words: EndpointWords) -> None:
        """Raise Refused for an endpoint that the peer may not add."""

    def _add_endpoints(
        self, _connection: Connection, table: Table, wanted: list[tuple[str, EndpointWords, int]]
    ) -> list[Endpoint]:
        return self.tenancy.registry.add_endpoints(table, wanted)

    def _place(self, fd: int, label: str) -> int:
        try:
            foreign.check_netns(fd)
        except OSError:
            raise UsageError(f"netns '{label}' is not a network namespace") from None
        return self.tenancy.registry.place(fd, label)

    def endpoint_del(self, connection: Connection, request: protocol.EndpointDel, _fds: list[int]) -> Reply:
        """`graft endpoint del`: all of them or none."""
        table = self._table(connection, request.netns)
        try:
            endpoint_file.check_deletion(table, request.names)
            self.tenancy.registry.delete_endpoints(table, request.names)
        finally:
            self.tenancy.registry.forget_empty(table)
            self.tenancy.keep_places()
        return {}

    def endpoint_show(self, connection: Connection, request: protocol.EndpointShow, _fds: list[int]) -> Reply:
        """`graft endpoint show`: the endpoints of a namespace in JSON, sorted by name."""
        table = self._table(connection, request.netns)
        self.tenancy.registry.forget_empty(table)
        if request.name is not None and request.name not in table.endpoints:
            raise Refused(f"endpoint '{request.name}' does not exist in this namespace", code="ENOENT")
        return table_documents(table.endpoints, request.name)

    # -- rules --

    def rule_add(self, connection: Connection, request: protocol.RuleAdd, _fds: list[int]) -> Reply:
        """`graft rule add`: all of them or none."""
        tenant = self._tenant(connection, request.netns)
        publications, ingress, egress = given = parse_given(request)
        self._check_rules(connection, tenant, given)
        if publications and tenant.kind != CONTAINER:
            raise Refused(f"'{tenant.name}' is a wrapper, which publishes nothing", hint="give it -i", code="EINVAL")
        before = tenant.rules()
        try:
            if tenant.kind == CONTAINER:
                import_endpoints(tenant, endpoint_names(ingress, egress), self._known(connection))
            self.tenancy.registry.add_rules(tenant, ingress, egress)
            publish.publish(self.tenancy.registry, tenant, publications, viewer(connection))
            self.tenancy.registry.apply(tenant)
        except BaseException:
            tenant.restore(before)
            raise
        return {}

    def _check_rules(self, connection: Connection, tenant: Tenant, given: Given) -> None:
        """Raise Refused for rules that the peer may not give a container."""

    def rule_del(self, connection: Connection, request: protocol.RuleDel, _fds: list[int]) -> Reply:
        """`graft rule del`: all of them or none."""
        tenant = self._tenant(connection, request.netns)
        publications, ingress, egress = parse_given(request)
        before = tenant.rules()
        try:
            self.tenancy.registry.delete_rules(tenant, ingress, egress)
            for publication in publications:
                publish.unpublish(tenant, publication)
            self.tenancy.registry.apply(tenant)
        except BaseException:
            tenant.restore(before)
            raise
        return {}

    def rule_show(self, connection: Connection, request: protocol.RuleShow, _fds: list[int]) -> Reply:
        """`graft rule show`: the tenant's rules in JSON."""
        return rule_documents(self._tenant(connection, request.netns))

    def endpoint_move(self, connection: Connection, request: protocol.EndpointMove, _fds: list[int]) -> Reply:
        """`graft endpoint move`."""
        pair = self._pair(connection, request)
        return self.moves.endpoint(pair, request.name, moves.endpoint_rules(pair, request.name))

    def rule_move(self, connection: Connection, request: protocol.RuleMove, _fds: list[int]) -> Reply:
        """`graft rule move`: all of the publications or none."""
        pair = self._pair(connection, request)
        return self.moves.publications(pair, [parse_publication(p) for p in request.publish])

    def _pair(self, connection: Connection, request: protocol.EndpointMove | protocol.RuleMove) -> moves.Pair:
        pair = moves.Pair(self._tenant(connection, request.source), self._tenant(connection, request.target))
        moves.check_pair(pair)
        return pair

    # -- looking --

    def ps(self, _connection: Connection, _request: protocol.Ps, _fds: list[int]) -> Reply:
        """`graft ps`: a summary of each tenant."""
        return [self._summary(t) for t in self.tenancy.registry.tenants.values()]

    def inspect(self, connection: Connection, request: protocol.Inspect, _fds: list[int]) -> Reply:
        """`graft inspect`: all that graftd knows of one tenant, with the kernel's counters and its last refusals."""
        tenant = self._named(connection, request.name)
        self.tenancy.kernel.reports.drain()
        counters = self.tenancy.kernel.counters(tenant.id)
        return {
            **self._view(connection, self._summary(tenant)),
            "asked": tenant.asked.given(),
            "loopback": {
                "ipv4": f"{Address(slice_of(tenant, v4=True))}/{24 if tenant.wide else 27}",
                "ipv6": f"{Address(slice_of(tenant, v4=False))}/96",
            },
            "uid": tenant.owner,
            "inside": tenant.shown,
            "endpoints": [endpoint_document(e) for e in tenant.table.endpoints.values()],
            "rules": rule_documents(tenant),
            "resolvers": [str(r) for r in tenant.open_resolvers],
            "limits": {
                name: {"used": used, "max": most}
                for name, used, most in zip(
                    tenant.limits._fields, self.tenancy.kernel.used(tenant.id), tenant.limits, strict=True
                )
                if name != "rate"
            },
            "rate": tenant.rate,
            "refused": [
                {"op": op, "reason": reason, "count": count} for (op, reason), count in sorted(counters.items())
            ],
            "unreported": self.tenancy.kernel.reports.dropped(tenant.id),
            "last_refused": [self._event(tenant, event) for event in self.tenancy.denials.get(tenant.id, ())],
            "policy": self.tenancy.resolver.allowance.document(tenant),
        }

    def learnt(self, _connection: Connection, request: protocol.Learnt, _fds: list[int]) -> Reply:
        """`graft run --learn`: what a container that learns has reached, or one that has lately ended."""
        self.tenancy.kernel.reports.drain()
        found = self.tenancy.resolver.allowance.learnt(request.name)
        if found is None:
            raise Refused(f"no container named '{request.name}' learns", hint="graft run --learn", code="ENOENT")
        return found

    def _event(self, tenant: Tenant, event: Event) -> dict[str, Any]:
        name = self.tenancy.resolver.allowance.name_of(tenant, Address(event.address))
        return {**event_document(event), **({"name": name} if name else {})}

    def log(self, connection: Connection, request: protocol.Log, _fds: list[int]) -> Reply:
        """`graft log`: what was refused last. Then a line for each call, if the client goes on reading."""
        tenant = self._named(connection, request.name) if request.name is not None else None
        self.tenancy.kernel.reports.drain()
        if request.follow:
            self.tenancy.readers.add(connection, tenant, every=request.every)
        return [self._view(connection, d) for d in self.tenancy.last_refused(tenant, partial(self._sees, connection))]

    def sockets(self, connection: Connection, request: protocol.Sockets, _fds: list[int]) -> Reply:
        """`graft sockets`: the open sockets of a container and the wrappers inside it, or of all."""
        wanted = self._named(connection, request.name) if request.name is not None else None
        tenants = self.tenancy.registry.tenants
        answer = Later([])

        def then(found: list[Owned]) -> None:
            for one in found:
                tenant = tenants.get(one.tenant)
                if self._sees(connection, tenant) and (tenant is None or wanted in (None, tenant, tenant.parent)):
                    shown = socket_document(one, tenant.name if tenant else "")
                    answer.answer.append(self._view(connection, shown))
            answer.send()

        self.tenancy.open_sockets.ask(then)
        return answer

    def stats_all(self, connection: Connection, _request: protocol.StatsAll, _fds: list[int]) -> Reply:
        """`graft stats`: the numbers of each tenant."""
        answer = Later([])

        def then(found: list[Stats]) -> None:
            tenants = self.tenancy.registry.tenants
            theirs = [one for one in found if self._sees(connection, tenants.get(one.number))]
            answer.answer.extend(self._view(connection, one.document) for one in theirs)
            answer.send()

        self.tenancy.counting.ask(then)
        return answer

    def dashboard(self, connection: Connection, request: protocol.Dashboard, _fds: list[int]) -> Reply:
        """`graft dashboard`: the address of the page, which is there while the connection is."""
        return [self.pages.dashboards.add(connection, request.at, public=request.public)]

    def status(self, _connection: Connection, _request: protocol.Status, _fds: list[int]) -> Reply:
        """For `graft doctor` and the benchmarks. `call_ns` is the time of all `calls`, in nanoseconds."""
        return status_document(self.tenancy, self.files)

    def plan(self, connection: Connection, request: protocol.Plan, _fds: list[int]) -> Reply:
        """What graft-front has to do. Raises GraftError, and then the program in Python has to."""

        def needs_traps(ingress: Sequence[str], egress: Sequence[str]) -> bool:
            rules = [parse_ingress(r) for r in ingress], [parse_egress(r) for r in egress]
            return needs_swap(self._known(connection), 0, *rules)

        return plan_document(self.planner, request, direct=self.tenancy.configuration.direct, needs_traps=needs_traps)

    def reload(self, _connection: Connection, _request: protocol.Reload, _fds: list[int]) -> Reply:
        """`graftd --reload`: the faults of the files that are not in force."""
        return self.files.reload()

    def stop(self, _connection: Connection, request: protocol.Stop, _fds: list[int]) -> Reply:
        """`graftd --stop`: Refused (EBUSY) while containers run or engines' networks have members, unless forced.

        Then the containers' next socket() fails, and members without a container lose their addresses. `graftd
        --replace`: the containers' calls wait for the next graftd.
        """
        if request.replace and self.managed:
            raise Refused("a service manager keeps this graftd", hint="systemctl restart graftd", code="EBUSY")
        registry_ = self.tenancy.registry
        names, alone = [t.name for t in registry_.tenants.values()], attachments.alone(registry_)
        if names and not request.force and not request.replace:
            raise Refused(
                f"{len(names)} containers run: {listed(names)}",
                hint="end them first, or give --force: their new sockets will fail",
                code="EBUSY",
            )
        if alone and not request.force and not request.replace:
            raise Refused(
                f"{len(alone)} members of engines' networks: {listed([label(a) for a in alone])}",
                hint="end their containers first, or give --force: they lose their addresses",
                code="EBUSY",
            )
        if not request.replace:
            for attachment in alone:
                attachments.detach(registry_, attachment.key)
            self.engines.resolver.start()
            self.tenancy.calls.end_helpers()
            self.tenancy.forwards.end()
        self.replacing = request.replace
        self.tenancy.loop.running = False
        return {"pid": os.getpid()}

    # -- helpers --

    def _named(self, _connection: Connection, name: str) -> Tenant:
        tenant = self.tenancy.registry.by_name(name)
        if tenant is None:
            raise Refused(f"no container named '{name}'", hint="'graft ps' lists them", code="ENOENT")
        return tenant

    def _table(self, connection: Connection, netns: str | None) -> Table:
        named = self.tenancy.registry.by_name(netns) if netns else None
        if named:
            return named.table
        inside = self.tenancy.registry.direct_of(int(netns)) if netns and is_pid(netns) else None
        if inside:
            return inside.table
        try:
            fd, label = open_netns(netns or str(connection.pid))
        except Refused as error:
            if error.code != "ENOENT" or not netns or "/" in netns or is_pid(netns):
                raise
            text = f"no container and no network namespace is named '{netns}'"
            raise Refused(text, hint=error.hint, code="ENOENT") from None
        try:
            return self.tenancy.registry.table(fd, label)
        finally:
            os.close(fd)

    def _tenant(self, connection: Connection, netns: str | None) -> Tenant:
        table = self._table(connection, netns)
        named = self.tenancy.registry.by_name(netns) if netns else None
        tenant = named or self.tenancy.registry.by_netns(table.netns)
        if tenant is None:
            self.tenancy.registry.forget_empty(table)
            where = f"namespace '{netns}'" if netns else "this namespace"
            raise Refused(f"no container runs in {where}", hint="'graft ps' lists them", code="ENOENT")
        return tenant

    def _summary(self, tenant: Tenant) -> dict[str, Any]:
        made = {e.name for e in tenant.endpoints.values() if e.published}
        pid = live_pid(tenant)
        return {
            "name": tenant.name,
            "id": tenant.id,
            "pid": pid,
            "netns": tenant.netns,
            "netns_path": self.tenancy.direct.netns_path(tenant) if tenant.cgroup else f"/proc/{pid}/ns/net",
            "cgroup": tenant.cgroup,
            "status": "running" if tenant.listeners else "unsupervised",
            "started": tenant.started,
            "command": tenant.argv,
            "publish": [str(p) for p in tenant.publications],
            "addresses": [str(own.address) for own in tenant.owned],
            "named_endpoints": sorted(set(endpoint_names(tenant.ingress, tenant.egress)) - made),
            "kind": tenant.kind,
        }
