"""Publications of tenants (`-p`): given, checked against what others have or expect, and taken back.

Functions on the registry. They change tables and rules; Registry.apply() brings those to the kernel.
"""

import os
import socket
from collections.abc import Callable, Iterable
from functools import partial

from graft.errors import Refused
from graft.kernel.open_sockets import EVERY_STATE, LISTENING, open_sockets
from graft.kernel.stamps import OWN_TENANT, Stamper
from graft.rules.address import Address
from graft.rules.endpoint import Endpoint, IngressRule
from graft.rules.publication import Publication, host_addresses, published
from graft.tenants import ports
from graft.tenants.attachment import Attachment
from graft.tenants.registry import Registry
from graft.tenants.tenant import OWNER_BASE, Tenant


def publish(
    registry: Registry, tenant: Tenant, publications: Iterable[Publication], viewer: int | None = None
) -> None:
    """Add `-p` publications to a tenant's table and rules; `apply` brings them to the kernel.

    @viewer: as check_free() has it. Raises Refused for a port that is in use; then nothing has changed.
    """
    taken = set(tenant.table.endpoints)
    made: list[tuple[Endpoint, IngressRule]] = []
    accepted: list[Publication] = []
    for publication in publications:
        pairs = published(publication, taken, ipv6=registry.ipv6)
        addresses = [endpoint.address for endpoint, _ in pairs if endpoint.address]
        ports.check_conflicts(publication, addresses, [*tenant.publications, *accepted], tenant.name)
        ports.check_inside(publication, addresses, [*tenant.publications, *accepted])
        check_free(
            registry,
            publication,
            addresses,
            where=(tenant.netns, tenant.table.cookie),
            shared=tenant.shares,
            viewer=viewer,
            mine=partial(_has, registry, tenant, publication.protocol),
        )
        made += pairs
        accepted.append(publication)
    for endpoint, rule in made:
        tenant.table.endpoints[endpoint.name] = endpoint
        tenant.ingress.append(rule)
    tenant.publications += accepted


def check_free(
    registry: Registry,
    publication: Publication,
    addresses: list[Address],
    *,
    where: tuple[int, int],
    shared: bool,
    viewer: int | None = None,
    mine: Callable[[int, int], bool] = lambda _port, _inside: False,
) -> None:
    """Raise Refused, with the holder's name, unless a container in the namespace @where may publish this.

    @viewer: the uid of a user without root who asks; what is not theirs is not named to them. @where is its inode
    and cookie. @shared: the container has an address of its own, so that its sockets share
    port numbers with those of other such containers (`Tenant.owner`). @mine is that of ports.check_publication().
    """
    for other in registry.tenants.values():
        if (other.netns, other.table.cookie) != where:
            name = other.name if viewer in (None, other.uid) else ports.SOMEBODY
            ports.check_conflicts(publication, addresses, other.publications, name)
    for attachment in registry.attachments.values():
        if not attachment.in_netns(*where):
            name = _label(registry, attachment) if viewer is None else ports.SOMEBODY
            ports.check_conflicts(publication, addresses, attachment.publications, name)
    for expected in registry.expected.values():
        if expected.holds() and (expected.where == (0, 0) or expected.where != where):
            name = expected.name if viewer is None else ports.SOMEBODY
            ports.check_conflicts(publication, addresses, expected.publications, name)

    def own(probe: socket.socket) -> None:
        Stamper(registry.kernel.maps["stamps"]).stamp(probe.fileno(), OWN_TENANT, 0)
        if shared:
            os.fchown(probe.fileno(), OWNER_BASE, -1)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    ports.check_publication(publication, addresses, own, viewer, mine)


def _has(registry: Registry, tenant: Tenant, protocol: int, port: int, inside: int) -> bool:
    """Is whatever has this host port a socket of @tenant's that asked for @inside?

    So is that of a server whose publication was deleted while it ran. Of UDP the kernel tells the owner alone. One
    without sock_diag(7) tells nothing.
    """
    tcp = protocol == socket.IPPROTO_TCP
    stamps = registry.kernel.maps["stamps"].fd
    states = LISTENING if tcp else EVERY_STATE
    try:
        found = list(open_sockets(stamps, protocols=(protocol,), states=states, port=port))
    except OSError:
        return False
    if tcp:
        return bool(found) and all(
            s.stamp and (s.stamp.tenant, s.stamp.local[1]) == (tenant.id, inside) for s in found
        )
    return bool(found) and not tenant.shares and all(s.uid == tenant.owner for s in found)


def _label(registry: Registry, attachment: Attachment) -> str:
    """The name of the container that has an attachment, for messages."""
    tenant = next((t for t in registry.tenants.values() if attachment in t.attached), None)
    return tenant.name if tenant else next(iter(attachment.names), attachment.key)


def not_published(publication: Publication, tenant: Tenant) -> Refused:
    """Why a publication cannot be taken from @tenant, which has none such."""
    return Refused(
        f"-p {publication} is not published by '{tenant.name}'",
        hint="'graft rule show CONTAINER' lists what is",
        code="ENOENT",
    )


def unpublish(tenant: Tenant, publication: Publication) -> None:
    """Undo a publication; sockets that are bound through it stay open. Raises Refused if there is none."""
    if publication not in tenant.publications:
        raise not_published(publication, tenant)
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
