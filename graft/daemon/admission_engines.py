"""Admission of engines' containers: what is reserved at `create`, and the two steps of those that are direct.

The functions run in the loop's thread. They either make the whole change or raise GraftError and change nothing.
"""

import os
import time

from graft import protocol
from graft.daemon.admission import admit_target, check_listener
from graft.daemon.admission_users import User, known_endpoints
from graft.daemon.joining import check_same_sysctls
from graft.daemon.tenancy import Tenancy
from graft.engines.container import Container
from graft.errors import Refused
from graft.kernel import sysctl
from graft.log import log
from graft.rules.endpoint import EgressRule, IngressRule, check_distinct
from graft.rules.endpoint_names import names_need_swap
from graft.rules.match import check_rule
from graft.rules.request import parse_request
from graft.tenants import attachments
from graft.tenants.attachment import Expected
from graft.tenants.tenant import Tenant, needs_swap

CREATE_SECONDS = 60.0  # an engine's time from `create` to the container's first process


def expect_target(
    tenancy: Tenancy,
    metadata: protocol.Metadata,
    container: Container,
    creator: int,
    user: User | None = None,
) -> None:
    """Check and reserve what a container needs that the engine's process with pid @creator is about to create.

    Its ports and addresses are taken from now on, until its first process is there, its creator ends, or
    CREATE_SECONDS have passed. @user: whose engine it is, if not root's. @metadata's `traps_addresses` is set if a
    rule needs the traps of the swap path.

    Raises GraftError for what `admit_target` would refuse later, and OSError if @creator has ended.
    """
    reg = tenancy.registry
    asked = parse_request(metadata.request)
    check_distinct(asked.ingress, asked.egress)
    sysctl.check(metadata.request.sysctl, reg.ephemeral)
    netns, cookie = container.where
    joined = reg.by_netns(netns) if netns else None
    if joined:
        check_same_sysctls(joined, metadata.request.sysctl)
    known = known_endpoints(reg, user) if user else reg.home_endpoints()
    endpoints = {**known, **(joined.endpoints if joined else {})}
    rules: list[IngressRule | EgressRule] = [*asked.ingress, *asked.egress]
    for rule in rules:
        check_rule(rule, endpoints)
    metadata.traps_addresses |= needs_swap(endpoints, 0, asked.ingress, asked.egress)
    if metadata.request.asks_graft and netns in reg.tables:
        metadata.traps_addresses |= names_need_swap(reg.tables[netns].endpoints, 0)
    owned = [own for own in asked.ip if joined is None or own not in joined.given]
    networked = bool(container.network) or any(a.in_netns(netns, cookie) for a in reg.attachments.values())
    pidfd = os.pidfd_open(creator)
    try:
        attachments.expect(
            reg,
            metadata.container,
            Expected(
                pidfd,
                metadata.name or metadata.container,
                container.where,
                asked.publish,
                owned,
                networked or bool(asked.ip),
                time.monotonic() + CREATE_SECONDS,
            ),
            user.account.uid if user else None,
        )
    except BaseException:
        os.close(pidfd)
        raise


def begin_guarded(tenancy: Tenancy, pid: int, metadata: protocol.Metadata) -> Tenant:
    """Put the cgroup of @pid, the first process of an engine's direct container, under the policy, before it goes on.

    Raises GraftError, OSError; then nothing has changed.
    """
    tenancy.forget_unstarted()
    netns_fd = tenancy.direct.kept.get(metadata.container)
    if netns_fd is None:
        raise Refused(
            "graftd has been started since this container was prepared", hint="start it again", code="ESRCH"
        )
    tenant = admit_target(tenancy, pid, 0, None, metadata, trusted=True, netns_fd=netns_fd)
    tenancy.direct.mark(metadata.container)
    return tenant


def admit_guarded(tenancy: Tenancy, pid: int, listener: int, metadata: protocol.Metadata) -> Tenant:
    """Receive from the listener of a process of an engine's direct container, whose cgroup has the policy.

    @listener belongs to graftd afterwards. Raises Refused for a process that is elsewhere, OSError if it has ended.
    """
    check_listener(listener)
    tenant = tenancy.registry.direct_of(pid)
    if tenant is None or metadata.container not in tenant.members:
        raise Refused(
            "the process is in no cgroup with the policy",
            hint="graft.direct=on: graft's hook of the stage prestart, or graft-runtime, has not run",
            code="EPERM",
        )
    tenancy.direct.forget(metadata.container)
    if not tenant.listeners:  # Docker's hook, which graft's comes before, has said which sandbox this netns is
        attachments.attach(tenancy.registry, tenant)
        tenancy.registry.apply(tenant)
        tenancy.registry.moved.add(tenant)
    tenancy.adopt(tenant, listener, trusted=True, pid=pid, member=metadata.container)
    log.debug("container %s: pid %d, direct", tenant.name, pid)
    return tenant
