"""Admission: which processes become a tenant, and with which policy.

Tenants come from `graft run`, OCI runtimes, the wrapper (`graft -i ... -e ... -- CMD`), and programs with the API. A
peer is `trusted` if it is root of the host, or brings metadata that graftd has sealed. Any other peer gets the strict
policy, in its own network namespace, within the limits below.

The functions run in the loop's thread. They either make the whole change or raise GraftError and change nothing.
A /proc/PID of a peer is to be believed only after Peer.check().
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from graft import protocol
from graft.daemon import admission_users
from graft.daemon.admission_users import User
from graft.daemon.joining import new_rules
from graft.daemon.tenancy import Tenancy
from graft.engines.container import NAME_ROOM, plain_name
from graft.errors import Refused, UsageError
from graft.kernel import addresses, sysctl
from graft.log import log
from graft.process.closing import is_listener
from graft.rules import grants
from graft.rules.endpoint import EgressRule, Endpoint, IngressRule, check_distinct, endpoint_names
from graft.rules.match import check_rule
from graft.rules.request import Parsed, Request, needs_root, parse_container_name, parse_request
from graft.tenants import attachments, publish
from graft.tenants.accounts import check_netns
from graft.tenants.attachment import Expected
from graft.tenants.registry import Registry
from graft.tenants.tenant import (
    API,
    CONTAINER,
    WRAPPER,
    Member,
    Table,
    Tenant,
    common_place,
    needs_swap,
    table_documents,
)

UNTRUSTED_LISTENERS = 16  # of one such tenant
UNTRUSTED_TENANTS = 64  # of one such user
UNTRUSTED_TENANTS_ALL = 4096  # of all such users: one person may have 65536 uids (subuid(5))

Target = protocol.Run | protocol.Metadata


def admit_target(
    tenancy: Tenancy,
    pid: int,
    uid: int,
    listener: int | None,
    target: Target,
    *,
    trusted: bool,
    netns_fd: int | None = None,
    user: User | None = None,
) -> Tenant:
    """Make the container of the netns of @pid, or join the one that is there. @uid is the peer's.

    @netns_fd: the netns of a direct container, whose processes live in graftd's. It stays the caller's.

    An untrusted peer gets the strict policy: it may only use endpoints of its own netns, which an administrator adds;
    it may not publish ports, nor connect as the host does. @user: who asks by the user socket, and gets what is
    granted to them. @listener belongs to graftd afterwards; None: that of an engine's direct container comes later,
    by admit_guarded().

    Raises GraftError, and OSError for a full map or a process that has ended; then nothing has changed.
    """
    if listener is not None:
        check_listener(listener)
    reg = tenancy.registry
    asked = parse_request(target.request)
    _check_asked(reg, uid, target, asked, trusted=trusted, user=user)
    expected = attachments.no_longer_expect(reg, _container_id(target))
    if asked.direct and netns_fd is None:
        raise Refused("its runtime has not run graft's hook", hint="omit graft.direct", code="EOPNOTSUPP")
    with _netns_of(reg, pid, netns_fd) as netns_fd:
        netns = os.fstat(netns_fd).st_ino
        running = reg.by_netns(netns)
        if not trusted:
            _check_namespace(reg, netns, running, uid, by_user=user is not None)
        if user:
            check_netns(netns_fd, user.account)
        if user and not running:
            admission_users.check_share(reg, user)
        if running:
            asked = new_rules(running, target, asked, _container_id(target))
        before = running.rules() if running else None
        tenant = running or _new_target(reg, pid, netns_fd, target, user)
        try:
            if not running:
                tenant.trusted, tenant.uid = trusted, uid
                tenant.networked = expected is not None and expected.shared
                _set_policy(tenancy, tenant, target, asked, user)
                tenant.netns_made = _is_made(tenant, target, expected)
                if tenant.asks_graft:
                    tenancy.resolver.serve()
            _add_rules(reg, tenant, target, asked, trusted=trusted, user=user)
            if asked.direct and listener is None:
                tenancy.direct.take(tenant, pid)
            elif asked.direct:
                tenancy.direct.begin(tenant, pid)
            if running:
                tenant.lost_listener |= not tenant.listeners and listener is not None
                reg.apply(tenant)
            else:
                reg.install(tenant)
                reg.moved.add(tenant)
            if listener is None:
                tenancy.store.put(f"netns-{tenant.id}", tenant.netns_fd)
            else:
                idle, member = isinstance(target, protocol.Metadata) and target.sandbox, _container_id(target)
                tenancy.adopt(tenant, listener, trusted=trusted, pid=pid, idle=idle, member=member)
        except BaseException:
            if before:
                tenant.restore(before)
            else:
                tenancy.direct.end(tenant)
                reg.remove(tenant)
                tenancy.resolver.forget(tenant)
            raise
    tell = log.debug if running else log.info  # an engine's exec, which a health check does every few seconds
    tell("container %s: pid %d, netns %d", tenant.name, pid, netns)
    return tenant


@contextlib.contextmanager
def _netns_of(reg: Registry, pid: int, given: int | None = None) -> Iterator[int]:
    """The netns that @pid is known by: a descriptor that is closed after the block. @given: it came with a message.

    Those of a direct container live in graftd's, and are known by the container's. Raises OSError if it has ended.
    """
    inside = None if given is not None else reg.direct_of(pid)
    fd = os.dup(given) if given is not None else -1
    if fd < 0:
        fd = os.dup(inside.netns_fd) if inside else os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _container_id(target: Target) -> str:
    """The engine's id of the container; "" if no engine made it."""
    return target.container if isinstance(target, protocol.Metadata) else ""


def _check_asked(reg: Registry, uid: int, target: Target, asked: Parsed, *, trusted: bool, user: User | None) -> None:
    """Raise Refused if who asks may not have that."""
    if user:
        admission_users.check_asked(reg, user, asked)
    elif not trusted:
        _check_untrusted(reg, uid, target, asked)


def _check_untrusted(reg: Registry, uid: int, target: Target, asked: Parsed) -> None:
    """Raise Refused if a user without root asks for what only root may have, or for more than their share."""
    if needs_root(target.request):
        raise Refused(
            "only root may publish ports, give addresses or open egress", hint="use endpoints", code="EPERM"
        )
    if _container_id(target):
        raise Refused("only root may speak for an engine", code="EPERM")
    _check_share(reg, uid, len(asked.ingress) + len(asked.egress))
    if target.name:
        raise Refused("only root may name a container", hint="omit the name", code="EPERM")


def _check_namespace(reg: Registry, netns: int, running: Tenant | None, uid: int, *, by_user: bool) -> None:
    """Raise Refused if a user without root may not put programs into @netns, where the container @running may be.

    @by_user: they ask by the user socket, and what they have by it has another policy.
    """
    if netns == reg.home or (running and (running.trusted or running.uid != uid or bool(running.user) != by_user)):
        raise Refused(
            "only root may put programs under the policy of this namespace",
            hint="graft -i/-e -- COMMAND",
            code="EPERM",
        )
    if running and len(running.listeners) >= UNTRUSTED_LISTENERS:
        raise Refused(f"{UNTRUSTED_LISTENERS} listeners of this namespace are served", code="ENOSPC")


def _new_target(reg: Registry, pid: int, netns_fd: int, target: Target, user: User | None) -> Tenant:
    """A container without a policy, which is not installed yet. Raises Refused, UsageError, OSError."""
    container_id = _container_id(target)
    if target.name is not None:
        name = parse_container_name(target.name)
    else:
        label = plain_name(os.path.basename(target.argv[0])) if target.argv else "container"
        name = f"{label[:48]}-{reg.next_id}"
    full_name = user.full_name if user else str
    if container_id and reg.by_name(full_name(name)):
        name = f"{name[:NAME_ROOM]}-{container_id[:12]}"
    name = full_name(name)
    return _new_tenant(reg, CONTAINER, pid, netns_fd, name, target.argv)


def _is_made(tenant: Tenant, target: Target, expected: Expected | None) -> bool:
    """Was the netns of a new container made for it, and not prepared or shared by somebody else?

    `graft run` makes one unless it says otherwise, a runtime if the engine names none, and an engine for a network of
    graft's. @expected: what the engine said of the container at `create`.
    """
    if isinstance(target, protocol.Run):
        return not target.joins
    return bool(tenant.attached) or (expected is not None and not any(expected.where))


def _set_policy(tenancy: Tenancy, tenant: Tenant, target: Target, asked: Parsed, user: User | None) -> None:
    """Give a new container what is not a rule: flags, limits, addresses, attachments. Raises GraftError."""
    sysctl.check(target.request.sysctl, tenancy.registry.ephemeral)
    tenant.asked = target.request
    tenant.user, tenant.gid = (user.account.name, user.account.gid) if user else ("", 0)
    open_way = user.grants.egress == "host" if user else tenant.trusted
    narrowed = bool(asked.egress) or not open_way
    tenant.egress_host = asked.egress_default == "host" or (asked.egress_default is None and not narrowed)
    tenant.strict = target.strict or not (tenant.trusted or user)
    limits = asked.limits.or_else(tenancy.limits)
    most = user.grants.limits.or_else(tenancy.limits) if user else tenancy.limits
    if user:
        grants.check_limits(most, asked.limits)
    tenant.limits = limits if tenant.trusted else limits.lowest(most)
    tenant.traps_addresses = target.traps_addresses
    tenant.resolvers = addresses.loopback_resolvers()
    attachments.attach(tenancy.registry, tenant)
    attachments.give(tenancy.registry, tenant, asked.ip)


def _add_rules(
    reg: Registry, tenant: Tenant, target: Target, asked: Parsed, *, trusted: bool, user: User | None
) -> None:
    """Add the rules and publications of @asked to a container, and the engine's container to its members.

    Raises GraftError.
    """
    if isinstance(target, protocol.Metadata) and target.container:
        tenant.members[target.container] = Member(target.engine, target.name or "", target.directory)
        if not target.netadmin:
            tenant.no_netadmin.add(target.container)
        if tenant.listeners and asked.publish:
            tenant.brought.setdefault(target.container, []).extend(asked.publish)
    if trusted or user:
        known = admission_users.known_endpoints(reg, user) if user else reg.home_endpoints()
        import_endpoints(tenant, endpoint_names(asked.ingress, asked.egress), known)
    if user:
        admission_users.check_own_endpoints(reg, user, tenant.endpoints, asked.ingress, asked.egress)
        more = len(asked.ingress) + len(asked.egress) + len(asked.publish)
        admission_users.check_count(admission_users.count_rules(tenant) + more)
    reg.add_rules(tenant, asked.ingress, asked.egress)
    publish.publish(reg, tenant, asked.publish, user.account.uid if user else None)


def required_traps(tenancy: Tenancy, pid: int, request: protocol.Traps) -> bool:
    """Does a wrapper of @pid with these rules need the traps of the swap path (graft/trap/swap.py)?

    Raises GraftError for a rule that is wrong, or names an endpoint that @pid's netns lacks.
    """
    ingress, egress = _wrapper_rules(Request(ingress=request.ingress, egress=request.egress))
    _refuse_inside_direct(tenancy.registry, pid)
    endpoints = _peer_table(tenancy.registry, pid).endpoints
    rules: list[IngressRule | EgressRule] = [*ingress, *egress]
    for rule in rules:
        check_rule(rule, endpoints)
    names = endpoint_names(ingress, egress)
    return needs_swap(endpoints, common_place(endpoints, names), ingress, egress)


def _refuse_inside_direct(reg: Registry, pid: int) -> None:
    if reg.direct_of(pid):
        raise Refused(
            "a direct container's programs make their sockets themselves, which no wrapper inside can change",
            hint="start the container without --direct, or give it the rules",
            code="EOPNOTSUPP",
        )


def _peer_table(reg: Registry, pid: int) -> Table:
    """The endpoint table of a peer's netns, only to read. An empty one is not kept in the registry."""
    with _netns_of(reg, pid) as netns_fd:
        table = reg.table(netns_fd, f"/proc/{pid}/ns/net")
    reg.forget_empty(table)
    return table


def peer_endpoints(tenancy: Tenancy, pid: int) -> Mapping[str, Endpoint]:
    """The endpoints of the netns of @pid, by name. Raises OSError if it has ended."""
    return _peer_table(tenancy.registry, pid).endpoints


def endpoints_of(tenancy: Tenancy, pid: int) -> list[dict[str, Any]]:
    """The endpoints of the netns of @pid in JSON, sorted by name."""
    return table_documents(_peer_table(tenancy.registry, pid).endpoints)


def _wrapper_rules(request: Request) -> tuple[list[IngressRule], list[EgressRule]]:
    asked = parse_request(request)
    check_distinct(asked.ingress, asked.egress)
    return asked.ingress, asked.egress


def admit_wrapper(
    tenancy: Tenancy, pid: int, uid: int, listener: int | None, metadata: protocol.Metadata, *, trusted: bool
) -> Tenant:
    """Make the tenant of `graft -i ... -e ... -- CMD`: it has its rules, and the endpoints of the netns of @pid.

    Without a @listener the wrapper runs inside a container or another wrapper, because the kernel allows a process
    only one listener (seccomp(2), EBUSY). The outer tenant's listener then supervises its processes, which are told
    apart by the number in `scope` (graft/trap/nested.py).

    Raises GraftError, and OSError for a full map or a process that has ended; then nothing has changed.
    """
    request = metadata.request
    if metadata.name or metadata.strict or request != Request(ingress=request.ingress, egress=request.egress):
        raise UsageError("a wrapper takes only ingress and egress rules")
    if listener is not None:
        check_listener(listener)
    reg = tenancy.registry
    _refuse_inside_direct(reg, pid)
    if not trusted:
        _check_share(reg, uid, len(request.ingress) + len(request.egress))
    ingress, egress = _wrapper_rules(request)
    with _netns_of(reg, pid) as netns_fd:
        netns = os.fstat(netns_fd).st_ino
        outer = None if listener is not None else _outer(reg, netns, uid)
        label = plain_name(os.path.basename(metadata.argv[0])) if metadata.argv else WRAPPER
        argv = [word[:256] for word in metadata.argv[:256]]
        tenant = _new_tenant(reg, WRAPPER, pid, netns_fd, f"{label[:48]}-{reg.next_id}", argv)
        try:
            tenant.asked, tenant.uid, tenant.trusted, tenant.verbose = request, uid, trusted, metadata.verbose
            tenant.traps_addresses = outer.traps_addresses if outer else metadata.traps_addresses
            tenant.limits = tenancy.limits
            tenant.place = common_place(tenant.endpoints, endpoint_names(ingress, egress))
            reg.add_rules(tenant, ingress, egress)
            tenant.parent = outer or reg.by_netns(netns)
            if outer:
                reg.take_scope(tenant)
            reg.install(tenant)
            if outer:
                tenancy.calls.divide(outer)
            if listener is not None:
                tenancy.adopt(tenant, listener, trusted=trusted)
        except BaseException:
            reg.remove(tenant)
            raise
    log.info("wrapper %s: pid %d, netns %d", tenant.name, pid, netns)
    return tenant


def _new_tenant(reg: Registry, kind: str, pid: int, netns_fd: int, name: str, argv: list[str]) -> Tenant:
    """A tenant of @kind of the netns @netns_fd (a copy is kept), which is not installed yet.

    A wrapper, or the users of the API, may do nothing but by a rule. Raises Refused, and OSError.
    """
    table = reg.table(netns_fd, f"/proc/{pid}/ns/net")
    try:
        tenant = reg.admit(table, name, argv)
        tenant.netns_fd = os.dup(netns_fd)
    except BaseException:
        reg.forget_empty(table)
        raise
    tenant.kind, tenant.pid = kind, pid
    if kind != CONTAINER:
        tenant.strict, tenant.egress_host, tenant.in_host_netns = True, False, table.netns == reg.home
    return tenant


def _check_share(reg: Registry, uid: int, rules: int) -> None:
    """Raise Refused if an unprivileged user asks for more than their share of the BPF maps and of graftd's time."""
    admission_users.check_count(rules)
    uids = [t.uid for t in reg.tenants.values() if not t.trusted]
    if uids.count(uid) >= UNTRUSTED_TENANTS:
        raise Refused(f"{UNTRUSTED_TENANTS} wrappers of this user are running", code="ENOSPC")
    if len(uids) >= UNTRUSTED_TENANTS_ALL:
        raise Refused(f"{UNTRUSTED_TENANTS_ALL} wrappers of users without root are running", code="ENOSPC")


def _outer(reg: Registry, netns: int, uid: int) -> Tenant:
    """The tenant whose listener a nested wrapper's processes are under: the container, or a wrapper of the user's."""
    running = [t for t in reg.of_netns(netns) if t.listeners and (t.kind == CONTAINER or t.uid == uid)]
    if not running:
        raise Refused(
            "this process is under a seccomp listener that is not graft's",
            hint="graft cannot supervise what another seccomp agent does",
            code="EBUSY",
        )
    return next((t for t in running if t.kind == CONTAINER), running[0])


def api_tenant(tenancy: Tenancy, pid: int, uid: int) -> Tenant:
    """The tenant of a program that asks for sockets by the agent socket: the container of its netns, if there is one,
    else the tenant of kind `api` that the netns has for this user, which is made if need be.

    Users do not share one: it has the limits, and the uid among whose sockets SO_REUSEPORT works.

    Raises Refused, and OSError if the program has ended.
    """
    reg = tenancy.registry
    with _netns_of(reg, pid) as netns_fd:
        netns = os.fstat(netns_fd).st_ino
        of_user = (t for t in reg.of_netns(netns) if t.kind == API and t.uid == uid)
        found = reg.by_netns(netns) or next(of_user, None)
        if found:
            return found
        if uid:
            _check_share(reg, uid, 0)
        tenant = _new_tenant(reg, API, pid, netns_fd, f"api-{reg.next_id}", [])
    tenant.uid, tenant.trusted = uid, uid == 0
    reg.install(tenant)
    return tenant


def import_endpoints(tenant: Tenant, names: list[str], known: Mapping[str, Endpoint]) -> None:
    """Copy endpoints that a container's rules name, and its table lacks, from those that are @known.

    A new namespace has an empty table; the copies are removed with the container.
    """
    for name in names:
        if name not in tenant.table.endpoints and name in known:
            tenant.table.endpoints[name] = known[name]._replace(imported=True, filed=False)


def check_listener(fd: int) -> None:
    """Raise UsageError unless @fd is a seccomp listener (seccomp_unotify(2))."""
    if not is_listener(fd):
        raise UsageError("the descriptor is not a seccomp listener")
