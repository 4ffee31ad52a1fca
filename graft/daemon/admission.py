"""Admission: which processes become a tenant, and with which policy.

Tenants come from `graft run`, OCI runtimes, the wrapper (`graft -i ... -e ... -- CMD`), and programs with the API. A
peer is `trusted` if it is root of the host, or brings metadata that graftd has sealed. Any other peer gets the strict
policy, in its own network namespace, within the limits below.

The functions run in the loop's thread. They either make the whole change or raise GraftError and change nothing.
A /proc/PID of a peer is to be believed only after Connection.check_peer().
"""

import os
import time
from typing import Any

from graft import protocol
from graft.daemon.peer import check_listener
from graft.daemon.tenancy import Tenancy
from graft.engines.container import NAME_ROOM, Container, plain_name
from graft.errors import Refused, UsageError
from graft.kernel import addresses
from graft.log import log
from graft.rules.endpoint import EgressRule, IngressRule, check_distinct, parse_egress, parse_ingress
from graft.rules.limits import parse_limits
from graft.rules.match import check_rule
from graft.rules.own_address import check_families, parse_own
from graft.rules.publication import parse_publication
from graft.tenants import attachments, publish
from graft.tenants.registry import Registry
from graft.tenants.tenant import (
    API,
    CONTAINER,
    WRAPPER,
    Expected,
    Member,
    Table,
    Tenant,
    common_place,
    endpoint_document,
    needs_swap,
)

CREATE_SECONDS = 60.0  # an engine's time from `create` to the container's first process
NAME_MAX = 64
UNTRUSTED_RULES = 512  # of one tenant whose user is not root of the host
UNTRUSTED_LISTENERS = 16  # of one such tenant
UNTRUSTED_TENANTS = 64  # of one such user
EGRESS_DEFAULTS = ("host", "none")


def admit_target(
    tenancy: Tenancy, pid: int, uid: int, listener: int, wish: protocol.Run | protocol.Metadata, *, trusted: bool
) -> Tenant:
    """Make the container of the netns of @pid, or join the one that is there. @uid is the peer's.

    An untrusted peer gets the strict policy: it may only use endpoints of its own netns, which an administrator adds;
    it may not publish ports, nor connect as the host does. @listener belongs to graftd afterwards.

    Raises GraftError, and OSError for a full map or a process that has ended; then nothing has changed.
    """
    check_listener(listener)
    reg = tenancy.registry
    publications = [parse_publication(p) for p in wish.publish]
    ingress = [parse_ingress(r) for r in wish.ingress]
    egress = [parse_egress(r) for r in wish.egress]
    owned = [parse_own(a) for a in wish.ip]
    limits = parse_limits(wish.limits, tenancy.limits)
    check_families(owned)
    if wish.egress_default not in (None, *EGRESS_DEFAULTS):
        raise UsageError(f"egress '{wish.egress_default}' is unknown", hint="host or none")
    if not trusted and (publications or owned or wish.egress_default == "host"):
        raise Refused(
            "only root may publish ports, give addresses or open egress", hint="use endpoints", code="EPERM"
        )
    argv = list(wish.argv)
    engine = wish.container if isinstance(wish, protocol.Metadata) else ""
    if engine and not trusted:
        raise Refused("only root may speak for an engine", code="EPERM")
    attachments.no_longer_expect(reg, engine)
    if not trusted:
        _check_share(reg, uid, len(ingress) + len(egress))
        if wish.name:
            raise Refused("only root may name a container", hint="omit the name", code="EPERM")
    netns_fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    netns = os.fstat(netns_fd).st_ino
    tenant = reg.by_netns(netns)
    if not trusted and (netns == reg.home or (tenant and (tenant.trusted or tenant.uid != uid))):
        os.close(netns_fd)
        raise Refused(
            "only root may put programs under the policy of this namespace",
            hint="graft -i/-e -- COMMAND",
            code="EPERM",
        )
    if not trusted and tenant and len(tenant.listeners) >= UNTRUSTED_LISTENERS:
        os.close(netns_fd)
        raise Refused(f"{UNTRUSTED_LISTENERS} listeners of this namespace are served", code="ENOSPC")
    joining = tenant is not None
    before = tenant.rules() if tenant else None
    try:
        if tenant is None:
            label = wish.name or (plain_name(os.path.basename(argv[0])) if argv else "container")
            name = parse_container_name(wish.name) if wish.name is not None else f"{label[:48]}-{reg.next_id}"
            if engine and reg.by_name(name):
                name = f"{name[:NAME_ROOM]}-{engine[:12]}"
            tenant = reg.admit(reg.table(netns_fd, f"/proc/{pid}/ns/net"), name, argv)
            tenant.pid, tenant.netns_fd = pid, netns_fd
            narrowed = bool(egress) or not trusted
            tenant.egress_host = wish.egress_default == "host" or (wish.egress_default is None and not narrowed)
            tenant.strict = wish.strict or not trusted
            tenant.trusted, tenant.uid = trusted, uid
            tenant.limits = limits if trusted else limits.lowest(tenancy.limits)
            tenant.swap = wish.swap
            tenant.resolvers = addresses.loopback_resolvers()
            attachments.attach(reg, tenant)
            attachments.give(reg, tenant, owned)
        elif owned and [own for own in owned if own not in tenant.given]:
            raise Refused(
                f"this namespace runs container '{tenant.name}', which has its addresses",
                hint="omit --ip",
                code="EEXIST",
            )
        elif wish.name and wish.name != tenant.name and not engine:
            raise Refused(f"this namespace runs container '{tenant.name}'", hint="omit --name", code="EEXIST")
        elif wish.egress_default and tenant.egress_host != (wish.egress_default == "host"):
            raise Refused(
                f"container '{tenant.name}' runs with egress {'host' if tenant.egress_host else 'none'}",
                hint="one namespace has one policy; omit --egress",
                code="EEXIST",
            )
        else:
            os.close(netns_fd)
            # `exec` and a second `graft run` repeat rules that the container has
            publications = [p for p in publications if p not in tenant.publications]
            ingress = [r for r in ingress if r not in tenant.ingress]
            egress = [r for r in egress if r not in tenant.egress]
        if isinstance(wish, protocol.Metadata) and wish.container:
            if wish.container in tenant.members:  # `exec`: do not bring back what was removed meanwhile
                publications, ingress, egress = [], [], []
            tenant.members[wish.container] = Member(wish.engine, wish.name or "", wish.directory)
        if trusted:
            import_endpoints(reg, tenant, endpoint_names(ingress, egress))
        reg.add_rules(tenant, ingress, egress)
        publish.publish(reg, tenant, publications)
        if joining:
            reg.apply(tenant)
        else:
            reg.install(tenant)
        tenancy.adopt(tenant, listener, trusted=trusted)
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


def expect_target(tenancy: Tenancy, wish: protocol.Metadata, container: Container, creator: int) -> None:
    """Check and reserve what a container needs that the engine's process with pid @creator is about to create.

    Its ports and addresses are taken from now on, until its first process is there, its creator ends, or
    CREATE_SECONDS have passed. `wish.swap` is set if a rule needs the traps of the swap path.

    Raises GraftError for what `admit_target` would refuse later, and OSError if @creator has ended.
    """
    reg = tenancy.registry
    publications = [parse_publication(p) for p in wish.publish]
    ingress = [parse_ingress(r) for r in wish.ingress]
    egress = [parse_egress(r) for r in wish.egress]
    check_distinct(ingress, egress)
    netns, cookie = container.where
    joined = reg.by_netns(netns) if netns else None
    endpoints = {**reg.home_endpoints(), **(joined.endpoints if joined else {})}
    rules: list[IngressRule | EgressRule] = [*ingress, *egress]
    for rule in rules:
        check_rule(rule, endpoints)
    wish.swap = wish.swap or needs_swap(endpoints, 0, ingress, egress)
    owned = [own for own in map(parse_own, wish.ip) if joined is None or own not in joined.given]
    networked = bool(container.network) or any(a.in_netns(netns, cookie) for a in reg.attachments.values())
    pidfd = os.pidfd_open(creator)
    try:
        attachments.expect(
            reg,
            wish.container,
            Expected(
                pidfd,
                wish.name or wish.container,
                container.where,
                publications,
                owned,
                networked or bool(wish.ip),
                time.monotonic() + CREATE_SECONDS,
            ),
        )
    except BaseException:
        os.close(pidfd)
        raise


def required_traps(tenancy: Tenancy, pid: int, wish: protocol.Traps) -> bool:
    """Does a wrapper of @pid with these rules need the traps of the swap path (graft/trap/swap.py)?

    Raises GraftError for a rule that is wrong, or names an endpoint that @pid's netns lacks.
    """
    ingress, egress = _wrapper_rules(wish)
    endpoints = _peer_table(tenancy.registry, pid).endpoints
    rules: list[IngressRule | EgressRule] = [*ingress, *egress]
    for rule in rules:
        check_rule(rule, endpoints)
    names = endpoint_names(ingress, egress)
    return needs_swap(endpoints, common_place(endpoints, names), ingress, egress)


def _peer_table(reg: Registry, pid: int) -> Table:
    """The endpoint table of a peer's netns, only to read. An empty one is not kept in the registry."""
    netns_fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        table = reg.table(netns_fd, f"/proc/{pid}/ns/net")
        reg.forget_empty(table)
        return table
    finally:
        os.close(netns_fd)


def endpoints_of(tenancy: Tenancy, pid: int) -> list[dict[str, Any]]:
    """The endpoints of the netns of @pid in JSON, sorted by name."""
    found = _peer_table(tenancy.registry, pid).endpoints.values()
    return [endpoint_document(e) for e in sorted(found, key=lambda e: e.name)]


def _wrapper_rules(wish: protocol.Traps | protocol.Metadata) -> tuple[list[IngressRule], list[EgressRule]]:
    ingress = [parse_ingress(r) for r in wish.ingress]
    egress = [parse_egress(r) for r in wish.egress]
    check_distinct(ingress, egress)
    return ingress, egress


def admit_wrapper(
    tenancy: Tenancy, pid: int, uid: int, listener: int | None, wish: protocol.Metadata, *, trusted: bool
) -> Tenant:
    """Make the tenant of `graft -i ... -e ... -- CMD`: it has its rules, and the endpoints of the netns of @pid.

    Without a @listener the wrapper runs inside a container or another wrapper, because the kernel allows a process
    only one listener (seccomp(2), EBUSY). The outer tenant's listener then supervises its processes, which are told
    apart by the number in `scope` (graft/trap/nested.py).

    Raises GraftError, and OSError for a full map or a process that has ended; then nothing has changed.
    """
    if wish.publish or wish.egress_default or wish.name or wish.strict or wish.ip:
        raise UsageError("a wrapper takes only ingress and egress rules")
    if listener is not None:
        check_listener(listener)
    reg = tenancy.registry
    if not trusted:
        _check_share(reg, uid, len(wish.ingress) + len(wish.egress))
    ingress, egress = _wrapper_rules(wish)
    netns_fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    netns = os.fstat(netns_fd).st_ino
    table = reg.table(netns_fd, f"/proc/{pid}/ns/net")
    tenant = None
    try:
        outer = None if listener is not None else _outer(reg, netns, uid)
        label = plain_name(os.path.basename(wish.argv[0])) if wish.argv else WRAPPER
        tenant = reg.admit(table, f"{label[:48]}-{reg.next_id}", [w[:256] for w in wish.argv[:256]])
        tenant.kind, tenant.pid, tenant.uid, tenant.netns_fd = WRAPPER, pid, uid, netns_fd
        tenant.strict, tenant.egress_host, tenant.trusted = True, False, trusted
        tenant.home, tenant.verbose = netns == reg.home, wish.verbose
        tenant.swap = outer.swap if outer else wish.swap
        tenant.limits = tenancy.limits
        names = endpoint_names(ingress, egress)
        tenant.place = common_place(table.endpoints, names)
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
        if tenant is not None:
            reg.remove(tenant)
        else:
            os.close(netns_fd)
            reg.forget_empty(table)
        raise
    log.info("wrapper %s: pid %d, netns %d", tenant.name, pid, netns)
    return tenant


def _check_share(reg: Registry, uid: int, rules: int) -> None:
    """Raise Refused if an unprivileged user asks for more than their share of the BPF maps and of graftd's time."""
    if rules > UNTRUSTED_RULES:
        raise Refused(f"{rules} rules are too many", hint=f"at most {UNTRUSTED_RULES} without root", code="ENOSPC")
    if sum(t.uid == uid and not t.trusted for t in reg.tenants.values()) >= UNTRUSTED_TENANTS:
        raise Refused(f"{UNTRUSTED_TENANTS} wrappers of this user are running", code="ENOSPC")


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
    else the netns' tenant of kind `api`, which is made if need be.

    Raises Refused, and OSError if the program has ended.
    """
    reg = tenancy.registry
    netns_fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    netns = os.fstat(netns_fd).st_ino
    found = reg.by_netns(netns) or next((t for t in reg.of_netns(netns) if t.kind == API), None)
    if found:
        os.close(netns_fd)
        return found
    table = reg.table(netns_fd, f"/proc/{pid}/ns/net")
    try:
        if uid:
            _check_share(reg, uid, 0)
        tenant = reg.admit(table, f"api-{reg.next_id}", [])
    except BaseException:
        os.close(netns_fd)
        reg.forget_empty(table)
        raise
    tenant.kind, tenant.pid, tenant.netns_fd = API, pid, netns_fd
    tenant.uid, tenant.trusted = uid, uid == 0
    tenant.strict, tenant.egress_host, tenant.home = True, False, netns == reg.home
    reg.install(tenant)
    return tenant


def endpoint_names(ingress: list[IngressRule], egress: list[EgressRule]) -> list[str]:
    """The names of the endpoints that the rules use, with repetitions."""
    return [*(rule.endpoint for rule in ingress), *(rule.endpoint for rule in egress)]


def import_endpoints(reg: Registry, tenant: Tenant, names: list[str]) -> None:
    """Copy endpoints that a container's rules name, and its table lacks, from the table of the host's netns.

    A new namespace has an empty table; the copies are removed with the container.
    """
    home = reg.home_endpoints()
    for name in names:
        if name not in tenant.table.endpoints and name in home:
            tenant.table.endpoints[name] = home[name]._replace(imported=True)


def parse_container_name(name: str) -> str:
    """Check a container's name: 1 to 64 of letters, digits, '_', '.', '-', and not a number. Raises UsageError."""
    if not name or len(name) > NAME_MAX or not all((c.isalnum() and c.isascii()) or c in "_.-" for c in name):
        raise UsageError(
            f"container name '{name}' is not valid", hint=f"1 to {NAME_MAX} letters, digits, '_', '.', '-'"
        )
    if name.isdigit():
        raise UsageError(f"container name '{name}' looks like a pid", hint="add a letter")
    return name
