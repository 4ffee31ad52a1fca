"""The admin socket: requests of `graft`, one each connection."""

import contextlib
import os
from typing import TYPE_CHECKING, Any

from graft import __version__, bpf, host, linux, protocol, registry
from graft.connection import Connection
from graft.endpoint import Address, EgressRule, IngressRule, parse_egress, parse_ingress, parse_publication
from graft.errors import Refused, UsageError
from graft.log import log
from graft.registry import Table, Tenant

if TYPE_CHECKING:
    from graft.daemon import Daemon

Reply = dict[str, Any] | list[Any]
NAME_MAX = 64
EGRESS_DEFAULTS = ("host", "none")


class Admin:
    """Answers admin requests from a daemon's registry."""

    def __init__(self, daemon: "Daemon") -> None:
        self.daemon = daemon

    def serve(self, connection: Connection, line: bytes, fds: list[int]) -> Reply:
        """One request → the value of "ok". Raises GraftError."""
        if not connection.vetted:
            refuse_targets(self.daemon, connection.pid)
        request = protocol.decode_request(line)
        if request.version != __version__:
            raise Refused(
                f"graftd {__version__} is running, this is graft {request.version}",
                hint="restart graftd with this version: 'graftd --stop', then run again",
                code="EPROTO",
            )
        if isinstance(request, protocol.Hello):
            connection.vetted = True
            return {}
        connection.vetted = False
        self.daemon.reap()
        reply: Reply = getattr(self, _method(type(request).__name__))(connection, request, fds)
        return reply

    # -- running --

    def run(self, connection: Connection, request: protocol.Run, fds: list[int]) -> Reply:
        """A target hands over its listener; its netns is the peer's own."""
        if len(fds) != 1:
            raise UsageError("a run request carries one descriptor, the seccomp listener")
        tenant = admit_target(self.daemon, connection.pid, fds[0], request, trusted=True)
        return {"name": tenant.name, "id": tenant.id}

    # -- endpoints --

    def endpoint_add(self, connection: Connection, request: protocol.EndpointAdd, _fds: list[int]) -> Reply:
        """graft endpoint add."""
        table = self._table(connection, request.netns)
        try:
            added = self.daemon.registry.add_endpoint(table, request.name, request.type, request.addr, request.port)
        finally:
            self._forget_empty(table)
        return registry.endpoint_document(added)

    def endpoint_del(self, connection: Connection, request: protocol.EndpointDel, _fds: list[int]) -> Reply:
        """graft endpoint del."""
        table = self._table(connection, request.netns)
        try:
            self.daemon.registry.delete_endpoint(table, request.name)
        finally:
            self._forget_empty(table)
        return {}

    def endpoint_show(self, connection: Connection, request: protocol.EndpointShow, _fds: list[int]) -> Reply:
        """graft endpoint show."""
        table = self._table(connection, request.netns)
        self._forget_empty(table)
        if request.name is not None and request.name not in table.endpoints:
            raise Refused(f"endpoint '{request.name}' does not exist in this namespace", code="ENOENT")
        shown = [e for e in table.endpoints.values() if request.name in (None, e.name)]
        return [registry.endpoint_document(e) for e in shown]

    def _forget_empty(self, table: Table) -> None:
        if not table.endpoints and self.daemon.registry.by_netns(table.netns) is None:
            self.daemon.registry.tables.pop(table.netns, None)

    # -- rules --

    def rule_add(self, connection: Connection, request: protocol.RuleAdd, _fds: list[int]) -> Reply:
        """graft rule add: all of them or none."""
        tenant = self._tenant(connection, request.netns)
        publications = [parse_publication(p) for p in request.publish]
        ingress = [parse_ingress(r) for r in request.ingress]
        egress = [parse_egress(r) for r in request.egress]
        before = tenant.rules()
        try:
            _import_endpoints(self.daemon.registry, tenant, endpoint_names(ingress, egress))
            self.daemon.registry.add_rules(tenant, ingress, egress)
            self.daemon.registry.publish(tenant, publications)
            self.daemon.registry.apply(tenant)
        except BaseException:
            tenant.restore(before)
            raise
        return {}

    def rule_del(self, connection: Connection, request: protocol.RuleDel, _fds: list[int]) -> Reply:
        """graft rule del: all of them or none."""
        tenant = self._tenant(connection, request.netns)
        publications = [parse_publication(p) for p in request.publish]
        ingress = [parse_ingress(r) for r in request.ingress]
        egress = [parse_egress(r) for r in request.egress]
        before = tenant.rules()
        try:
            self.daemon.registry.delete_rules(tenant, ingress, egress)
            for publication in publications:
                self.daemon.registry.unpublish(tenant, publication)
            self.daemon.registry.apply(tenant)
        except BaseException:
            tenant.restore(before)
            raise
        return {}

    def rule_show(self, connection: Connection, request: protocol.RuleShow, _fds: list[int]) -> Reply:
        """graft rule show."""
        return registry.rule_documents(self._tenant(connection, request.netns))

    # -- looking --

    def ps(self, _connection: Connection, _request: protocol.Ps, _fds: list[int]) -> Reply:
        """graft ps."""
        return [self._summary(t) for t in self.daemon.registry.tenants.values()]

    def inspect(self, _connection: Connection, request: protocol.Inspect, _fds: list[int]) -> Reply:
        """graft inspect."""
        tenant = self.daemon.registry.by_name(request.name)
        if tenant is None:
            raise Refused(f"no container named '{request.name}'", hint="'graft ps' lists them", code="ENOENT")
        self.daemon.kernel.drain()
        counters = self.daemon.kernel.counters(tenant.id)
        return {
            **self._summary(tenant),
            "loopback": {
                "ipv4": f"{Address(_slice(tenant, v4=True))}/27",
                "ipv6": f"{Address(_slice(tenant, v4=False))}/96",
            },
            "uid": tenant.owner,
            "endpoints": [registry.endpoint_document(e) for e in tenant.table.endpoints.values()],
            "rules": registry.rule_documents(tenant),
            "resolvers": [str(r) for r in tenant.resolvers],
            "refused": [
                {"op": op, "reason": reason, "count": count} for (op, reason), count in sorted(counters.items())
            ],
            "last_refused": [
                denial_document(when, denial) for when, denial in self.daemon.denials.get(tenant.id, ())
            ],
        }

    def status(self, _connection: Connection, _request: protocol.Status, _fds: list[int]) -> Reply:
        """For graft doctor and the benchmarks."""
        daemon = self.daemon
        return {
            "version": __version__,
            "pid": os.getpid(),
            "kept": daemon.store.kept,
            "containers": len(daemon.registry.tenants),
            "calls": daemon.calls,
            "call_ns": daemon.call_ns,
        }

    def stop(self, _connection: Connection, request: protocol.Stop, _fds: list[int]) -> Reply:
        """graftd --stop: refused while containers run, unless forced (their next socket() fails then)."""
        names = [t.name for t in self.daemon.registry.tenants.values()]
        if names and not request.force:
            raise Refused(
                f"{len(names)} containers run: {', '.join(names[:5])}",
                hint="end them first, or give --force: their new sockets will fail",
                code="EBUSY",
            )
        self.daemon.loop.running = False
        return {"pid": os.getpid()}

    # -- helpers --

    def _table(self, connection: Connection, netns: str | None) -> Table:
        named = self.daemon.registry.by_name(netns) if netns else None
        if named:
            return named.table
        fd, label = host.open_netns(netns or str(connection.pid))
        try:
            return self.daemon.registry.table(os.fstat(fd).st_ino, label)
        finally:
            os.close(fd)

    def _tenant(self, connection: Connection, netns: str | None) -> Tenant:
        table = self._table(connection, netns)
        tenant = self.daemon.registry.by_netns(table.netns)
        if tenant is None:
            self._forget_empty(table)
            where = f"namespace '{netns}'" if netns else "this namespace"
            raise Refused(f"no container runs in {where}", hint="'graft ps' lists them", code="ENOENT")
        return tenant

    def _summary(self, tenant: Tenant) -> dict[str, Any]:
        return {
            "name": tenant.name,
            "id": tenant.id,
            "pid": live_pid(tenant),
            "netns": tenant.netns,
            "status": "running" if tenant.listeners else "unsupervised",
            "started": tenant.started,
            "command": tenant.argv,
            "publish": [str(p) for p in tenant.publications],
        }


def live_pid(tenant: Tenant) -> int:
    """The first process of a container, or another of its namespace once that has ended."""
    with contextlib.suppress(OSError):
        if linux.netns_inode(tenant.pid) == tenant.netns:
            return tenant.pid
    return next(iter(host.processes_in_netns(tenant.netns)), tenant.pid)


def _method(name: str) -> str:
    """EndpointAdd → endpoint_add."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _slice(tenant: Tenant, *, v4: bool) -> bytes:
    from graft.policy import slice_address

    return slice_address(tenant.slot, 1, v4=v4)[0].raw


def denial_document(when: float, denial: bpf.Denial) -> dict[str, Any]:
    """One refused call in JSON."""
    import errno

    document: dict[str, Any] = {
        "time": when,
        "op": denial.op,
        "reason": denial.reason,
        "errno": errno.errorcode.get(denial.error, str(denial.error)),
        "command": denial.comm,
    }
    if denial.op == "setsockopt":
        document["level"], document["option"] = denial.port >> 16, denial.port & 0xFFFF
    else:
        document["address"] = Address(denial.address).with_port(denial.port)
    return document


def refuse_targets(daemon: "Daemon", pid: int) -> None:
    """A container's own processes may not give orders, whatever their uid.

    They are under our filter, in a tenant's netns; a user namespace of their own would get them out of that
    netns, so peers in another user namespace than graftd's are refused as well.
    """
    if not same_user_namespace(pid):
        raise Refused("processes in another user namespace may not use the admin socket", code="EPERM")
    tenant = daemon.registry.by_netns(_peer_netns(pid))
    if tenant and tenant.listeners and _filtered(pid):
        raise Refused("processes inside a graft container may not use the admin socket", code="EPERM")


def same_user_namespace(pid: int) -> bool:
    """Is this process in graftd's own user namespace?"""
    try:
        return os.stat(f"/proc/{pid}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino
    except OSError:
        return False


def _filtered(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/status") as status:
            return any(line.split() == ["Seccomp:", "2"] for line in status)
    except OSError:
        return True


def _peer_netns(pid: int) -> int:
    try:
        return linux.netns_inode(pid)
    except OSError:
        raise Refused("the peer is gone", code="ESRCH") from None


def admit_target(
    daemon: "Daemon", pid: int, listener: int, wish: protocol.Run | protocol.Metadata, *, trusted: bool
) -> Tenant:
    """Make or join the tenant of the netns of @pid. Raises GraftError, and then nothing has changed.

    An untrusted peer gets the strict policy: conversions through endpoints of its own netns' table, which
    only the admin fills; no publications, no egress of the host's.
    """
    if os.readlink(f"/proc/self/fd/{listener}") != "anon_inode:seccomp notify":
        raise UsageError("the descriptor is not a seccomp listener")
    reg = daemon.registry
    publications = [parse_publication(p) for p in wish.publish]
    ingress = [parse_ingress(r) for r in wish.ingress]
    egress = [parse_egress(r) for r in wish.egress]
    if wish.egress_default not in (None, *EGRESS_DEFAULTS):
        raise UsageError(f"egress '{wish.egress_default}' is unknown", hint="host or none")
    if not trusted and (publications or wish.egress_default == "host"):
        raise Refused("only root may publish ports or open egress", hint="use endpoints", code="EPERM")
    argv = list(wish.argv) if isinstance(wish, protocol.Run) else []
    netns_fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    netns = os.fstat(netns_fd).st_ino
    tenant = reg.by_netns(netns)
    joining = tenant is not None
    before = tenant.rules() if tenant else None
    try:
        if tenant is None:
            label = wish.name or (os.path.basename(argv[0]) if argv else "container")
            name = parse_container_name(wish.name) if wish.name is not None else f"{label[:48]}-{reg.next_id}"
            tenant = reg.admit(reg.table(netns, f"/proc/{pid}/ns/net"), name, argv)
            tenant.pid, tenant.netns_fd = pid, netns_fd
            narrowed = bool(egress) or not trusted
            tenant.egress_host = wish.egress_default == "host" or (wish.egress_default is None and not narrowed)
            tenant.strict = wish.strict or not trusted
            tenant.trusted = trusted
            tenant.resolvers = host.loopback_resolvers()
        elif wish.name and wish.name != tenant.name:
            raise Refused(f"this namespace runs container '{tenant.name}'", hint="leave --name away", code="EEXIST")
        elif wish.egress_default and tenant.egress_host != (wish.egress_default == "host"):
            raise Refused(
                f"container '{tenant.name}' runs with egress {'host' if tenant.egress_host else 'none'}",
                hint="one namespace has one policy; leave --egress away",
                code="EEXIST",
            )
        else:
            os.close(netns_fd)
            # `exec` and a second `graft run` say again what holds already
            publications = [p for p in publications if p not in tenant.publications]
            ingress = [r for r in ingress if r not in tenant.ingress]
            egress = [r for r in egress if r not in tenant.egress]
        if trusted:
            _import_endpoints(reg, tenant, endpoint_names(ingress, egress))
        reg.add_rules(tenant, ingress, egress)
        reg.publish(tenant, publications)
        if joining:
            reg.apply(tenant)
        else:
            reg.install(tenant)
        daemon.adopt(tenant, listener)
    except BaseException:
        if tenant is not None and before is not None:
            tenant.restore(before)
        elif tenant is not None:
            reg.remove(tenant)
        else:
            os.close(netns_fd)
        raise
    log.info("container %s: pid %d, netns %d", tenant.name, pid, netns)
    return tenant


def endpoint_names(ingress: list[IngressRule], egress: list[EgressRule]) -> list[str]:
    """What the rules name."""
    return [*(rule.endpoint for rule in ingress), *(rule.endpoint for rule in egress)]


def _import_endpoints(reg: registry.Registry, tenant: Tenant, names: list[str]) -> None:
    """A fresh namespace has an empty table: what its rules name comes from the host's."""
    home = reg.tables.get(linux.netns_inode())
    for name in names:
        if home and name not in tenant.table.endpoints and name in home.endpoints:
            tenant.table.endpoints[name] = home.endpoints[name]


def parse_container_name(name: str) -> str:
    """A container name: up to 64 of letters, digits, '_', '.', '-'."""
    if not name or len(name) > NAME_MAX or not all((c.isalnum() and c.isascii()) or c in "_.-" for c in name):
        raise UsageError(
            f"container name '{name}' is not valid", hint=f"1 to {NAME_MAX} letters, digits, '_', '.', '-'"
        )
    if name.isdigit():
        raise UsageError(f"container name '{name}' looks like a pid", hint="add a letter")
    return name
