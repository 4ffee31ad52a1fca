"""Orders of engines on the admin socket: graft-runtime, Podman's hook and graft-cni."""

import os
from pathlib import Path
from typing import Any

from graft import protocol
from graft.daemon.admission import expect_target
from graft.daemon.connection import Connection
from graft.daemon.tenancy import Tenancy
from graft.engines import bundle, joined, trust
from graft.engines.container import Container, metadata_of
from graft.engines.resolver import Resolver
from graft.errors import GraftError, Refused, UsageError
from graft.kernel import addresses, linux
from graft.kernel.netns import netns_cookie_of
from graft.log import log
from graft.rules.address import parse_address
from graft.rules.configuration import configuration_path
from graft.rules.publication import fold, parse_publication
from graft.rules.request import parse_request
from graft.tenants import attachments
from graft.tenants.attachment import Attachment
from graft.tenants.tenant import POD

Reply = dict[str, Any] | list[Any]


class EngineOrders:
    """One method an order, as Admin has them. Each raises GraftError, and then nothing has changed."""

    def __init__(self, tenancy: Tenancy, resolver: Resolver) -> None:
        self.tenancy = tenancy
        self.resolver = resolver

    def bundle(self, connection: Connection, request: protocol.Bundle, _fds: list[int]) -> Reply:
        """graft-runtime, before the real runtime's `create`: add the traps to the bundle's config.json."""
        path = Path(request.bundle, "config.json")
        bundle.write(path, self._edited(connection.pid, bundle.read(path), request.id))
        return {}

    def hook(self, connection: Connection, request: protocol.Hook, _fds: list[int]) -> Reply:
        """Podman's `precreate` hook: returns config.json with the traps."""
        return self._edited(linux.parent(connection.pid), request.config, "")

    def exec(self, _connection: Connection, request: protocol.Exec, _fds: list[int]) -> Reply:
        """graft-runtime, before the real runtime's `exec` of a process with CAP_NET_ADMIN. Raises Refused."""
        tenant = self.tenancy.registry.by_container(request.id)
        if tenant:
            bundle.check_capabilities(request.process, allowed=request.id not in tenant.no_netadmin)
        return {}

    def _edited(self, creator: int, config: dict[str, Any], container_id: str) -> dict[str, Any]:
        try:
            return self._edit(creator, config, container_id)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            log.warning("container %s: %r", container_id, error)
            raise UsageError(f"config.json does not follow the OCI runtime specification: {error!r}") from None

    def _edit(self, creator: int, config: dict[str, Any], container_id: str) -> dict[str, Any]:
        container = bundle.identify(config, container_id, f"/proc/{creator}/root")
        try:
            self._check_network(container)
            metadata = metadata_of(container)
            self._check_trust(container, metadata)
            bundle.add_sysctls(config, metadata)
            bundle.check_capabilities(config.get("process") or {}, allowed=metadata.netadmin)
            joined.check_members(self.tenancy.registry, container, metadata)
            expect_target(self.tenancy, metadata, container, creator)
            return bundle.edit(config, metadata, self.tenancy.directory)
        except GraftError as error:
            log.warning("container %s: %s", container.name, error)
            raise

    def _check_trust(self, container: Container, metadata: protocol.Metadata) -> None:
        """Refuse what the administrator's configuration does not let this container ask for."""
        tenancy = self.tenancy
        path = str(configuration_path())
        trust.check_believed(container, tenancy.configuration, tenancy.limits, path)
        asked = parse_request(metadata.request)
        given = trust.given_to(tenancy.registry, container) if asked.ip else []
        trust.check_addresses(container, asked.ip, given, tenancy.configuration.addresses, path)
        if container.engine == POD:
            trust.check_ports(asked.publish, tenancy.reserved, path)

    def _check_network(self, container: Container) -> None:
        """Refuse a container whose network is not graft's, as far as its engine or its netns say so."""
        if container.network:
            attached = [a for t in self.tenancy.registry.tenants.values() for a in t.attached]
            if all(a in attached or not a.sandbox for a in self.tenancy.registry.attachments.values()):
                raise Refused(
                    f"network '{container.network}' is not graft's",
                    hint="--network none, or a network made by 'docker network create -d graft NAME'",
                    code="EINVAL",
                )
        joined.check_devices(self.tenancy.registry, container)

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
        for text in request.addresses:
            attachment.give(text, number, request.within)
        attachment.publications = fold(parse_publication(p) for p in request.publish)
        if request.pod:
            trust.check_ports(attachment.publications, self.tenancy.reserved, str(configuration_path()))
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
