"""Attachments of engines (Docker, CNI) to network namespaces, and containers that engines are about to create.

Both take addresses and ports before a container's first process is there. An attachment and the container of its
namespace meet here, whichever comes first. A change ends with the registry's `apply` or `save`, here or in the
caller. Only the loop's thread may call these functions.
"""

import os
from collections.abc import Iterable

from graft.errors import Refused
from graft.kernel import netns
from graft.kernel.addresses import end_connections, has_address
from graft.rules.address import Address
from graft.rules.own_address import Own
from graft.rules.publication import Publication, host_addresses
from graft.tenants import ports, publish
from graft.tenants.attachment import Attachment, Expected, since_boot
from graft.tenants.registry import Registry
from graft.tenants.tenant import CONTAINER, Tenant

FORGOTTEN_SECONDS = 60.0


def give(registry: Registry, tenant: Tenant, owned: Iterable[Own]) -> None:
    """`--ip`: give a tenant addresses, and put them on the host's stack. Raises Refused if one is in use."""
    for own in owned:
        check_unowned(registry, own.address, tenant.uid if tenant.user else None)
        tenant.given.append(own)
        registry.add_address(own.address)


def check_unowned(registry: Registry, address: Address, viewer: int | None = None) -> None:
    """Raise Refused (EADDRINUSE) if a container, an attachment, or an expected container has this address.

    @viewer: the uid of a user without root who asks; what is not theirs is not named to them. None: root.
    """
    for other in registry.tenants.values():
        if any(own.address == address for own in other.owned):
            known = viewer in (None, other.uid)
            whose = f"the address of container '{other.name}'" if known else "in use"
            raise Refused(f"{address} is {whose}", hint="use another", code="EADDRINUSE")
    for attachment in registry.attachments.values():
        if any(own.address == address for own in attachment.addresses):
            where = f" in network '{attachment.network}'" if viewer is None else ""
            raise Refused(f"{address} is in use{where}", hint="use another", code="EADDRINUSE")
    for expected in registry.expected.values():
        if expected.holds() and any(own.address == address for own in expected.owned):
            whose = f"the address of container '{expected.name}'" if viewer is None else "in use"
            raise Refused(f"{address} is {whose}", hint="use another", code="EADDRINUSE")


def check_foreign(registry: Registry, address: Address) -> None:
    """Raise Refused for an address that the host has without graft: an engine's settings may not take that over."""
    if address not in registry.added and has_address(address):
        raise Refused(f"{address} is the host's own address", hint="use one that no device has", code="EADDRINUSE")


def number(registry: Registry, name: str) -> int:
    """The number by which the kernel knows an engine's network, from 1; a new name gets the next one."""
    if name not in registry.networks:
        registry.networks.append(name)
    return registry.networks.index(name) + 1


def add(registry: Registry, attachment: Attachment, viewer: int | None = None) -> None:
    """Register a new attachment, and take its addresses and ports. Raises Refused; then nothing has changed.

    @viewer: as publish.check_free() has it.
    """
    for own in attachment.addresses:
        check_unowned(registry, own.address, viewer)
        check_foreign(registry, own.address)
    where = (attachment.netns, attachment.cookie)
    shared = bool(attachment.addresses)
    _check_ports(registry, attachment.publications, [], where=where, shared=shared, viewer=viewer)
    done: list[Own] = []
    try:
        for own in attachment.addresses:
            registry.add_address(own.address)
            done.append(own)
    except BaseException:
        for own in done:
            registry.remove_address(own.address)
        raise
    registry.attachments[attachment.key] = attachment
    registry.save()


def _check_ports(
    registry: Registry,
    publications: Iterable[Publication],
    taken: Iterable[Publication],
    *,
    where: tuple[int, int],
    shared: bool,
    viewer: int | None,
) -> None:
    """Raise Refused unless one container may publish these beside @taken, which are its own already.

    @where, @shared and @viewer are those of publish.check_free.
    """
    accepted = list(taken)
    for publication in publications:
        addresses = host_addresses(publication, ipv6=registry.ipv6)
        ports.check_conflicts(publication, addresses, accepted, "this one")
        ports.check_inside(publication, addresses, accepted)
        publish.check_free(registry, publication, addresses, where=where, shared=shared, viewer=viewer)
        accepted.append(publication)


def attach(registry: Registry, tenant: Tenant) -> None:
    """Give a container the attachments of its namespace: root's, or those of the user whose container it is.

    One that came by the agent socket alone gets none. Raises Refused if a port is not free.
    """
    if not tenant.trusted and not tenant.user:
        return
    uid = tenant.uid if tenant.user else 0
    for attachment in registry.attachments.values():
        here = attachment.uid == uid and attachment.in_netns(tenant.netns, tenant.table.cookie)
        if here and attachment not in tenant.attached:
            tenant.attached.append(attachment)
            try:
                publish.publish(registry, tenant, attachment.publications, uid if tenant.user else None)
            except BaseException:
                tenant.attached.remove(attachment)
                raise


def join(registry: Registry, attachment: Attachment) -> None:
    """Give an attachment whose namespace is known now to the container there, if there is one. Raises Refused."""
    tenant = next(
        (
            t
            for t in registry.tenants.values()
            if t.kind == CONTAINER and attachment.in_netns(t.netns, t.table.cookie)
        ),
        None,
    )
    if tenant:
        attach(registry, tenant)
        registry.apply(tenant)
        registry.moved.add(tenant)
    else:
        registry.save()


def republish(registry: Registry, attachment: Attachment) -> None:
    """Give an attachment's new ports to its container. Raises Refused if one is not free."""
    for tenant in registry.tenants.values():
        if attachment in tenant.attached:
            publish.publish(registry, tenant, attachment.publications)
            registry.apply(tenant)
    registry.save()


def twins_inside(registry: Registry, attachment: Attachment) -> list[Attachment]:
    """The other attachments of the same namespace to which the engine gave the same ports."""
    return [
        other
        for other in registry.attachments.values()
        if other.key != attachment.key
        and attachment.offered
        and other.offered == attachment.offered
        and other.in_netns(attachment.netns, attachment.cookie)
    ]


def hand_on(registry: Registry, attachment: Attachment, twins: Iterable[Attachment]) -> None:
    """Before an attachment goes, move its ports to a twin, so that the container stays published."""
    twin = next((t for t in twins if not t.publications), None)
    if twin and attachment.publications:
        twin.publications = attachment.publications
        leave(registry, attachment)
        attachment.publications = []
        republish(registry, twin)


def leave(registry: Registry, attachment: Attachment) -> None:
    """Take an attachment from its container, and end connections at its addresses; other containers cannot have its
    addresses and ports until `detach`.
    """
    attachment.netns, attachment.cookie, attachment.sandbox = 0, 0, []
    for tenant in registry.tenants.values():
        if attachment in tenant.attached:
            tenant.attached.remove(attachment)
            for publication in attachment.publications:
                if publication in tenant.publications:
                    publish.unpublish(tenant, publication)
            registry.apply(tenant)
            registry.moved.add(tenant)
            for own in attachment.addresses:
                end_connections(own.address)
    registry.save()


def detach(registry: Registry, key: str) -> None:
    """Remove an attachment, and its addresses from the host. One that does not exist is no error."""
    attachment = registry.attachments.pop(key, None)
    if attachment is None:
        return
    leave(registry, attachment)
    for own in attachment.addresses:
        registry.remove_address(own.address)


def alone(registry: Registry) -> list[Attachment]:
    """The attachments that no container of graft's has: of namespaces in which another runtime started the processes,
    or nothing runs yet, or any more.
    """
    running = [attachment for tenant in registry.tenants.values() for attachment in tenant.attached]
    return [attachment for attachment in registry.attachments.values() if attachment not in running]


def forget_dead(registry: Registry) -> None:
    """Remove attachments whose namespace has ended: their engine was killed before it could detach them."""
    for attachment in alone(registry):
        if since_boot() - attachment.since < FORGOTTEN_SECONDS:
            continue
        known = attachment.netns and netns.netns_alive(attachment.netns, "")
        if not known and (attachment.netns or not any(map(os.path.exists, attachment.sandbox))):
            detach(registry, attachment.key)


def expect(registry: Registry, number: str, expected: Expected, viewer: int | None = None) -> None:
    """Reserve the ports and addresses of a container that an engine is creating. @number is the engine's id of it.

    @viewer: as publish.check_free() has it. `expected.pidfd` is closed when the container is no longer expected.
    Raises Refused if something is not free.
    """
    no_longer_expect(registry, number)
    here = [p for a in registry.attachments.values() if a.in_netns(*expected.where) for p in a.publications]
    where, shared = expected.where, expected.shared
    _check_ports(registry, expected.publications, here, where=where, shared=shared, viewer=viewer)
    for own in expected.owned:
        check_unowned(registry, own.address, viewer)
        check_foreign(registry, own.address)
    registry.expected[number] = expected


def no_longer_expect(registry: Registry, number: str) -> Expected | None:
    """Drop the reservation of a container that is there, or will not come; what it was, for where it was."""
    expected = registry.expected.pop(number, None)
    if expected:
        os.close(expected.pidfd)
    return expected


def forget_expected(registry: Registry) -> None:
    """Drop reservations whose creators have ended, or have taken too long."""
    for number in [n for n, expected in registry.expected.items() if not expected.holds()]:
        no_longer_expect(registry, number)
