"""The admin socket (graftd.sock): requests of `graft`, graft-cni, graft-runtime, and the OCI hook.

A connection carries one request, or `hello` and then one request. Each class of graft/protocol.py has a method of
its name here, which gets the request and its descriptors and returns the value of "ok". A method that returns owns
the descriptors; if it raises, the connection closes them. All of this runs in the loop's thread.

Requests that change something are refused while state.json cannot be written, because the change would not survive
a restart of graftd.
"""

import os
from pathlib import Path
from typing import Any

from graft import __version__, protocol
from graft.daemon.admission import admit_target, endpoint_names, expect_target, import_endpoints
from graft.daemon.connection import Connection
from graft.daemon.documents import _slice, denial_document, live_pid
from graft.daemon.peer import refuse_targets
from graft.daemon.tenancy import Tenancy
from graft.engines import bundle
from graft.engines.container import Container, wish
from graft.engines.resolver import Resolver
from graft.errors import Failure, GraftError, Refused, UsageError
from graft.kernel import addresses, linux
from graft.kernel.netns import netns_cookie_of, open_netns
from graft.log import log
from graft.rules.address import Address, parse_address
from graft.rules.endpoint import parse_egress, parse_endpoint_words, parse_ingress
from graft.rules.own_address import network_of
from graft.rules.publication import parse_publication
from graft.tenants import attachments
from graft.tenants.attachment import Attachment
from graft.tenants.tenant import CONTAINER, Table, Tenant, endpoint_document, needs_swap, rule_documents

Reply = dict[str, Any] | list[Any]


READING = (
    protocol.Hello,
    protocol.EndpointShow,
    protocol.RuleShow,
    protocol.Ps,
    protocol.Inspect,
    protocol.Bundle,
    protocol.Attached,
    protocol.Status,
    protocol.Stop,
)


class Admin:
    """Answers admin requests, with the registry of a Daemon."""

    def __init__(self, tenancy: Tenancy, resolver: Resolver, *, managed: bool) -> None:
        self.tenancy = tenancy
        self.resolver = resolver
        self.managed = managed  # does a service manager keep this graftd?

    def serve(self, connection: Connection, line: bytes, fds: list[int]) -> Reply:
        """Carry out one request: @line is its JSON, the result is the value of "ok".

        Raises GraftError, for instance Refused (EPROTO) for a client of another version.
        """
        connection.check_peer()
        if not connection.vetted:
            refuse_targets(self.tenancy, connection.pid)
        request = protocol.decode_request(line)
        if request.version != __version__ and not isinstance(request, protocol.Stop):
            raise Refused(
                f"graftd {__version__} is running, this is graft {request.version}",
                hint="replace it by this version: graftd --replace",
                code="EPROTO",
            )
        if isinstance(request, protocol.Hello):
            connection.vetted = True
            return self._hello(connection, request)
        connection.vetted = False
        if fds and not isinstance(request, protocol.Run | protocol.EndpointAdd | protocol.Attach):
            raise UsageError("this request has no descriptors")
        changes = not isinstance(request, READING)
        if changes:
            self._saved(f"nothing was changed: {self.tenancy.registry.state} cannot be written")
        self.tenancy.calls.reap()
        reply: Reply = getattr(self, _method(type(request).__name__))(connection, request, fds)
        if changes:
            self._saved(
                f"done, but {self.tenancy.registry.state} cannot be written: a restart of graftd would undo it"
            )
        return reply

    def _saved(self, otherwise: str) -> None:
        registry = self.tenancy.registry
        if not registry.saved:
            registry.save()
        if not registry.saved:
            raise Failure(otherwise, hint="make room there", code="ENOSPC")

    def _hello(self, connection: Connection, request: protocol.Hello) -> Reply:
        if not request.ingress and not request.egress:
            return {}
        ingress = [parse_ingress(r) for r in request.ingress]
        egress = [parse_egress(r) for r in request.egress]
        known = dict(self.tenancy.registry.home_endpoints())
        if request.netns:
            table = self._table(connection, request.netns)
            known |= table.endpoints
            self.tenancy.registry.forget_empty(table)
        return {"swap": needs_swap(known, 0, ingress, egress)}

    # -- running --

    def run(self, connection: Connection, request: protocol.Run, fds: list[int]) -> Reply:
        """`graft run`: a target hands over its listener. Its netns is the peer's own. Raises GraftError."""
        if len(fds) != 1:
            raise UsageError("a run request carries one descriptor, the seccomp listener")
        tenant = admit_target(self.tenancy, connection.pid, connection.uid, fds[0], request, trusted=True)
        return {"name": tenant.name, "id": tenant.id}

    # -- endpoints --

    def endpoint_add(self, connection: Connection, request: protocol.EndpointAdd, fds: list[int]) -> Reply:
        """`graft endpoint add`: all of them or none. Returns them in JSON."""
        registry_ = self.tenancy.registry
        table = self._table(connection, request.netns)
        try:
            wanted = []
            for new in request.endpoints:
                words = parse_endpoint_words(new.words)
                place = 0
                if words.netns:
                    if not 0 <= new.netns < len(fds):
                        raise UsageError(f"endpoint '{new.name}': its netns did not come with the request")
                    place = self._place(fds[new.netns], words.netns)
                wanted.append((new.name, words, place))
            added = registry_.add_endpoints(table, wanted)
        finally:
            registry_.forget_empty(table)
            self.tenancy.keep_places()
        for fd in fds:
            os.close(fd)
        return [endpoint_document(e) for e in added]

    def _place(self, fd: int, label: str) -> int:
        try:
            linux.check_netns(fd)
        except OSError:
            raise UsageError(f"netns '{label}' is not a network namespace") from None
        return self.tenancy.registry.place(fd, label)

    def endpoint_del(self, connection: Connection, request: protocol.EndpointDel, _fds: list[int]) -> Reply:
        """`graft endpoint del`: all of them or none."""
        table = self._table(connection, request.netns)
        try:
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
        shown = [e for e in table.endpoints.values() if request.name in (None, e.name)]
        return [endpoint_document(e) for e in sorted(shown, key=lambda e: e.name)]

    # -- rules --

    def rule_add(self, connection: Connection, request: protocol.RuleAdd, _fds: list[int]) -> Reply:
        """`graft rule add`: all of them or none."""
        tenant = self._tenant(connection, request.netns)
        publications = [parse_publication(p) for p in request.publish]
        ingress = [parse_ingress(r) for r in request.ingress]
        egress = [parse_egress(r) for r in request.egress]
        if publications and tenant.kind != CONTAINER:
            raise Refused(f"'{tenant.name}' is a wrapper, which publishes nothing", hint="give it -i", code="EINVAL")
        before = tenant.rules()
        try:
            if tenant.kind == CONTAINER:
                import_endpoints(self.tenancy.registry, tenant, endpoint_names(ingress, egress))
            self.tenancy.registry.add_rules(tenant, ingress, egress)
            self.tenancy.registry.publish(tenant, publications)
            self.tenancy.registry.apply(tenant)
        except BaseException:
            tenant.restore(before)
            raise
        return {}

    def rule_del(self, connection: Connection, request: protocol.RuleDel, _fds: list[int]) -> Reply:
        """`graft rule del`: all of them or none."""
        tenant = self._tenant(connection, request.netns)
        publications = [parse_publication(p) for p in request.publish]
        ingress = [parse_ingress(r) for r in request.ingress]
        egress = [parse_egress(r) for r in request.egress]
        before = tenant.rules()
        try:
            self.tenancy.registry.delete_rules(tenant, ingress, egress)
            for publication in publications:
                self.tenancy.registry.unpublish(tenant, publication)
            self.tenancy.registry.apply(tenant)
        except BaseException:
            tenant.restore(before)
            raise
        return {}

    def rule_show(self, connection: Connection, request: protocol.RuleShow, _fds: list[int]) -> Reply:
        """`graft rule show`: the tenant's rules in JSON."""
        return rule_documents(self._tenant(connection, request.netns))

    # -- looking --

    def ps(self, _connection: Connection, _request: protocol.Ps, _fds: list[int]) -> Reply:
        """`graft ps`: a summary of each tenant."""
        return [self._summary(t) for t in self.tenancy.registry.tenants.values()]

    def inspect(self, _connection: Connection, request: protocol.Inspect, _fds: list[int]) -> Reply:
        """`graft inspect`: all that graftd knows of one tenant, with the kernel's counters and its last refusals."""
        tenant = self.tenancy.registry.by_name(request.name)
        if tenant is None:
            raise Refused(f"no container named '{request.name}'", hint="'graft ps' lists them", code="ENOENT")
        self.tenancy.kernel.drain()
        counters = self.tenancy.kernel.counters(tenant.id)
        return {
            **self._summary(tenant),
            "loopback": {
                "ipv4": f"{Address(_slice(tenant, v4=True))}/27",
                "ipv6": f"{Address(_slice(tenant, v4=False))}/96",
            },
            "uid": tenant.owner,
            "endpoints": [endpoint_document(e) for e in tenant.table.endpoints.values()],
            "rules": rule_documents(tenant),
            "resolvers": [str(r) for r in tenant.resolvers],
            "limits": {
                name: {"used": used, "max": most}
                for name, used, most in zip(
                    tenant.limits._fields, self.tenancy.kernel.used(tenant.id), tenant.limits, strict=True
                )
            },
            "refused": [
                {"op": op, "reason": reason, "count": count} for (op, reason), count in sorted(counters.items())
            ],
            "last_refused": [
                denial_document(when, denial) for when, denial in self.tenancy.denials.get(tenant.id, ())
            ],
        }

    # -- engines --

    def bundle(self, connection: Connection, request: protocol.Bundle, _fds: list[int]) -> Reply:
        """graft-runtime, before the real runtime's `create`: add the traps to the bundle's config.json."""
        path = Path(request.bundle, "config.json")
        bundle.write(path, self._edited(connection.pid, bundle.read(path), request.id))
        return {}

    def hook(self, connection: Connection, request: protocol.Hook, _fds: list[int]) -> Reply:
        """Podman's `precreate` hook: returns config.json with the traps."""
        return self._edited(linux.parent(connection.pid), request.config, "")

    def _edited(self, creator: int, config: dict[str, Any], number: str) -> dict[str, Any]:
        try:
            return self._edit(creator, config, number)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            log.warning("container %s: %r", number, error)
            raise UsageError(f"config.json does not follow the OCI runtime specification: {error!r}") from None

    def _edit(self, creator: int, config: dict[str, Any], number: str) -> dict[str, Any]:
        container = bundle.identify(config, number)
        try:
            self._check_network(container)
            asked = wish(container)
            expect_target(self.tenancy, asked, container, creator)
            return bundle.edit(config, asked, self.tenancy.directory)
        except GraftError as error:
            log.warning("container %s: %s", container.name, error)
            raise

    def _check_network(self, container: Container) -> None:
        """Refuse a container that another network plugin has given an interface: its ports would lead nowhere."""
        if container.network:
            attached = [a for t in self.tenancy.registry.tenants.values() for a in t.attached]
            if all(a in attached or not a.sandbox for a in self.tenancy.registry.attachments.values()):
                raise Refused(
                    f"network '{container.network}' is not graft's",
                    hint="--network none, or a network made by 'docker network create -d graft NAME'",
                    code="EINVAL",
                )
        if container.where[0] not in (0, self.tenancy.registry.home):
            names = [n for n in bundle.devices(container.path) if n != "lo"]
            if names:
                raise Refused(
                    f"the container has a network of its own ({names[0]})",
                    hint="--network none, or a network of graft",
                    code="EINVAL",
                )

    def attach(self, _connection: Connection, request: protocol.Attach, fds: list[int]) -> Reply:
        """graft-cni ADD: attach a namespace to a network of CNI. The descriptor is the namespace.

        Repeated for the same key, it replaces the attachment. Raises GraftError.
        """
        if len(fds) != 1:
            raise UsageError("attach carries one descriptor, the namespace")
        registry_ = self.tenancy.registry
        linux.check_netns(fds[0])
        attachment = Attachment(request.key, f"cni/{request.network}")
        attachment.netns, attachment.cookie = os.fstat(fds[0]).st_ino, netns_cookie_of(fds[0])
        if attachment.netns == registry_.home:
            raise UsageError("the namespace is the host's own")
        number = attachments.number(registry_, attachment.network)
        attachment.addresses = [network_of(a, number, request.within) for a in request.addresses]
        attachment.publications = [parse_publication(p) for p in request.publish]
        attachment.offered = [{"publish": str(p)} for p in attachment.publications]
        if attachments.twins_inside(registry_, attachment):  # each of a container's networks names its ports
            attachment.publications = []
        attachment.names = [n for n in request.names if n]
        if request.resolver:
            attachment.resolver = parse_address(request.resolver)
        attachments.detach(registry_, request.key)
        attachments.add(registry_, attachment)
        try:
            attachments.join(registry_, attachment)
        except BaseException:
            attachments.detach(registry_, request.key)
            raise
        self.resolver.start()
        os.close(fds[0])
        return {}

    def attached(self, _connection: Connection, request: protocol.Attached, _fds: list[int]) -> Reply:
        """graft-cni CHECK: the attachment's addresses that the host has. Raises Refused if there is no attachment."""
        attachment = self.tenancy.registry.attachments.get(request.key)
        if attachment is None:
            raise Refused("the container is not attached", code="ENOENT")
        here = addresses.addresses()
        return {"addresses": [str(own.address) for own in attachment.addresses if str(own.address) in here]}

    def detach(self, _connection: Connection, request: protocol.Detach, _fds: list[int]) -> Reply:
        """graft-cni DEL: drop an attachment. One that does not exist is no error (CNI specification, DEL)."""
        registry_ = self.tenancy.registry
        gone = registry_.attachments.get(request.key)
        if gone:
            attachments.hand_on(registry_, gone, attachments.twins_inside(registry_, gone))
        attachments.detach(registry_, request.key)
        self.resolver.start()
        return {}

    def status(self, _connection: Connection, _request: protocol.Status, _fds: list[int]) -> Reply:
        """For `graft doctor` and the benchmarks. `call_ns` is the time of all `calls`, in nanoseconds."""
        tenancy = self.tenancy
        calls, ns = tenancy.calls.counted()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "kept": tenancy.store.kept,
            "containers": len(tenancy.registry.tenants),
            "calls": calls,
            "call_ns": ns,
        }

    def stop(self, _connection: Connection, request: protocol.Stop, _fds: list[int]) -> Reply:
        """`graftd --stop`: Refused (EBUSY) while containers run, unless forced; their next socket() fails then.

        `graftd --replace`: the containers' calls wait for the next graftd.
        """
        if request.replace and self.managed:
            raise Refused("a service manager keeps this graftd", hint="systemctl restart graftd", code="EBUSY")
        names = [t.name for t in self.tenancy.registry.tenants.values()]
        if names and not request.force and not request.replace:
            raise Refused(
                f"{len(names)} containers run: {', '.join(names[:5])}",
                hint="end them first, or give --force: their new sockets will fail",
                code="EBUSY",
            )
        if not request.replace:
            self.tenancy.calls.end_helpers()
        self.tenancy.loop.running = False
        return {"pid": os.getpid()}

    # -- helpers --

    def _table(self, connection: Connection, netns: str | None) -> Table:
        named = self.tenancy.registry.by_name(netns) if netns else None
        if named:
            return named.table
        fd, label = open_netns(netns or str(connection.pid))
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
        return {
            "name": tenant.name,
            "id": tenant.id,
            "pid": live_pid(tenant),
            "netns": tenant.netns,
            "status": "running" if tenant.listeners else "unsupervised",
            "started": tenant.started,
            "command": tenant.argv,
            "publish": [str(p) for p in tenant.publications],
            "addresses": [str(own.address) for own in tenant.owned],
            "named_endpoints": sorted(set(endpoint_names(tenant.ingress, tenant.egress)) - made),
            "kind": tenant.kind,
        }


def _method(name: str) -> str:
    """The name of the method for a request's class: EndpointAdd is answered by endpoint_add."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
