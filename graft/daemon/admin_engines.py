"""Orders of engines on the admin socket: graft-runtime, Podman's hook and graft-cni."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from graft import protocol
from graft.daemon.admission_engines import begin_guarded, expect_target
from graft.daemon.connection import Connection
from graft.daemon.joining import as_begun, new_rules
from graft.daemon.tenancy import Tenancy
from graft.engines import bundle, direct, joined, trust
from graft.engines.container import Container, metadata_of
from graft.engines.nameservers import named_by_engine
from graft.engines.resolver import Resolver
from graft.engines.seal import is_sealed
from graft.errors import GraftError, Refused, UsageError, from_oserror
from graft.kernel import addresses, foreign, linux, sysctl
from graft.kernel.addresses import parse_nameserver
from graft.kernel.mounts import mounts_of
from graft.kernel.netns import make_netns, netns_cookie_of
from graft.log import log
from graft.rules.address import parse_address
from graft.rules.configuration import configuration_path
from graft.rules.publication import fold, parse_publication
from graft.rules.request import parse_request, with_label
from graft.tenants import attachments
from graft.tenants.attachment import Attachment
from graft.tenants.tenant import POD

Reply = dict[str, Any] | list[Any]
UNJOINED_MAX = 1000


class Creation(NamedTuple):
    """Who creates a container: the process that is about to become its runtime, or Podman's."""

    pid: int
    bundle: str  # its directory; "" in Podman's hook


def _waits(attachment: Attachment) -> bool:
    """Has Docker given it a sandbox that no container is in yet? The namespace comes with the container's start."""
    nsfs = os.stat("/proc/self/ns/net").st_dev
    for path in attachment.sandbox:
        with contextlib.suppress(OSError):
            if os.stat(path).st_dev == nsfs:
                return False
    return bool(attachment.sandbox)


def _not_grafts(network: str) -> Refused:
    return Refused(f"network '{network}' is not graft's", hint=bundle.NETWORKS, code="EINVAL")


class EngineOrders:
    """One method an order, as Admin has them. Each raises GraftError, and then nothing has changed."""

    def __init__(self, tenancy: Tenancy, resolver: Resolver) -> None:
        self.tenancy = tenancy
        self.resolver = resolver
        self.unjoined: dict[str, str] = {}  # Docker's containers that await their first network's name, by their ids

    def bundle(self, connection: Connection, request: protocol.Bundle, _fds: list[int]) -> Reply:
        """graft-runtime, before the real runtime's `create`: add the traps to the bundle's config.json."""
        path = Path(request.bundle, "config.json")
        bundle.write(path, self._edited(Creation(connection.pid, request.bundle), bundle.read(path), request.id))
        return {}

    def hook(self, connection: Connection, request: protocol.Hook, _fds: list[int]) -> Reply:
        """Podman's `precreate` hook: returns config.json with the traps."""
        return self._edited(Creation(linux.parent(connection.pid), ""), request.config, "")

    def exec(self, connection: Connection, request: protocol.Exec, _fds: list[int]) -> Reply:
        """graft-runtime, before the real runtime's `exec`, of a process with CAP_NET_ADMIN or in a direct container.

        Raises Refused.
        """
        tenant = self.tenancy.registry.by_container(request.id)
        if tenant and tenant.cgroup:
            direct.check_exec(request.process)
            self.tenancy.direct.enter(tenant, request.id, connection.pid)
        elif tenant:
            bundle.check_capabilities(request.process, allowed=request.id not in tenant.no_netadmin)
        return {}

    def start(self, _connection: Connection, request: protocol.Start, _fds: list[int]) -> Reply:
        """graft-runtime, before the real runtime's `start`: what Docker has given since `create` is graft's network.

        Raises Refused.
        """
        registry = self.tenancy.registry
        network = self.unjoined.pop(request.id, "")
        tenant = registry.by_container(request.id)
        if tenant and not network:  # another graftd has prepared it
            network = bundle.docker_network(tenant.members[request.id].directory)
        if network and not (tenant.attached if tenant else any(a.sandbox for a in attachments.alone(registry))):
            raise _not_grafts(network)
        return {}

    def begin(self, connection: Connection, request: protocol.Begin, _fds: list[int]) -> Reply:
        """graft-runtime as a hook: put a direct container's cgroup under the policy, before its program starts."""
        if connection.uid or not is_sealed(request.metadata, self.tenancy.directory):
            raise Refused("only a runtime's hook with metadata of graftd's may name a process", code="EPERM")
        metadata = protocol.decode_metadata(request.metadata)
        try:
            if not metadata.request.direct or metadata.container != request.state.id or request.state.pid <= 0:
                raise Refused("the state is of another container", code="EPERM")
            tenant = begin_guarded(self.tenancy, request.state.pid, metadata)
        except GraftError as error:
            log.warning("container %s: %s", metadata.name, error)
            raise
        except OSError as error:
            raise from_oserror("put the container under the policy", error, hint="see graftd's log") from None
        return {"netns": f"/proc/{os.getpid()}/fd/{tenant.netns_fd}"}

    def _edited(self, creation: Creation, config: dict[str, Any], container_id: str) -> dict[str, Any]:
        try:
            return self._edit(creation, config, container_id)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            log.warning("container %s: %r", container_id, error)
            raise UsageError(f"config.json does not follow the OCI runtime specification: {error!r}") from None

    def _edit(self, creation: Creation, config: dict[str, Any], container_id: str) -> dict[str, Any]:
        creator = creation.pid
        container = bundle.identify(config, container_id, f"/proc/{creator}/root")
        if bundle.is_unasked(container, container_id):
            return config
        try:
            self.tenancy.forget_unstarted()
            container = self._among_direct(container)
            self._check_network(container)
            metadata = metadata_of(container)
            self._check_same(container, metadata)
            self._check_trust(container, metadata)
            self._add_nameservers(container, config, creator, metadata)
            bundle.add_sysctls(config, metadata)
            bundle.check_capabilities(config.get("process") or {}, allowed=metadata.netadmin)
            joined.check_members(self.tenancy.registry, container, metadata)
            if metadata.request.direct:
                self._check_direct(creation, config, container, metadata)
            expect_target(self.tenancy, metadata, container, creator)
            made = bundle.edit(config, metadata, self.tenancy.directory)
            return self._make_direct(creation, made, container) if metadata.request.direct else made
        except GraftError as error:
            log.warning("container %s: %s", container.name, error)
            raise

    def _add_nameservers(
        self, container: Container, config: dict[str, Any], creator: int, metadata: protocol.Metadata
    ) -> None:
        """Have graft's resolver ask whom the engine has named for the container, if all of its queries come there.

        What is another container's address, or graft's own resolver, is left out: that one could not ask it.
        """
        asked, registry = metadata.request, self.tenancy.registry
        narrowed = asked.egress or asked.egress_default == "none"
        if not asked.asks_graft or asked.resolver or narrowed or container.directory:
            return
        if registry.by_netns(container.where[0]):  # it has whom the first one there has
            return
        holders = registry.kernel.maps["holders"]
        found = named_by_engine(config, f"/proc/{creator}/root")
        texts = [text for text in found if holders.get(parse_nameserver(text)[0].raw) is None]
        metadata.request = with_label(asked, "resolver", texts)

    def _among_direct(self, container: Container) -> Container:
        """@container, with the netns of the direct container that it joins by a PID, as engines have it."""
        found = re.search(r"/proc/([0-9]+)/ns/net$", container.path)
        try:
            tenant = self.tenancy.registry.direct_of(int(found[1])) if found else None
        except OSError:
            tenant = None
        if tenant is None:
            return container
        path = f"/proc/{os.getpid()}/fd/{tenant.netns_fd}"
        return container._replace(path=path, where=(tenant.netns, tenant.table.cookie))

    def _check_same(self, container: Container, metadata: protocol.Metadata) -> None:
        """Refuse a container that joins one which is direct, if it is not, or the other way round; or has another
        policy. A pod's has the pod's.
        """
        joined = self.tenancy.registry.by_netns(container.where[0]) if container.where[0] else None
        if joined and container.engine == POD:
            metadata.request = as_begun(joined, metadata.request)
        if joined and bool(joined.cgroup) != bool(metadata.request.direct):
            raise Refused(
                f"container '{joined.name}', whose network it joins, is {'' if joined.cgroup else 'not '}direct",
                hint=f"one network has one policy; {'give' if joined.cgroup else 'omit'} graft.direct=on",
                code="EEXIST",
            )
        if joined:
            new_rules(joined, metadata, parse_request(metadata.request), container.id)

    def _check_direct(
        self, creation: Creation, config: dict[str, Any], container: Container, metadata: protocol.Metadata
    ) -> None:
        root = f"/proc/{creation.pid}/root"
        mounts = mounts_of(creation.pid)
        if container.where[0] == self.tenancy.registry.home:
            raise bundle.shares_the_hosts(container.engine)
        if not creation.bundle and not direct.has_cgroup2(mounts):
            raise Refused(
                "graft.direct=on: without cgroup2 no runtime puts a container into a cgroup of its own there",
                hint="graft-runtime does, as the engine's runtime; or mount it at /sys/fs/cgroup/unified, for runc",
                code="EOPNOTSUPP",
            )
        if metadata.netadmin:
            raise Refused("graft.netadmin=on: CAP_NET_ADMIN would be over the host's network", code="EPERM")
        direct.check(config, mounts, root)
        direct.check_hooks(config, container.engine, joins=bool(container.path))

    def _make_direct(self, creation: Creation, config: dict[str, Any], container: Container) -> dict[str, Any]:
        """Make what the container has outside of its config.json: its netns, and with cgroup v1 its cgroup."""
        try:
            netns = os.open(container.path, os.O_RDONLY | os.O_CLOEXEC) if container.path else make_netns()
            path = self.tenancy.direct.keep(container.id, netns)
            if not self.tenancy.registry.by_netns(container.where[0]):
                with linux.inside_netns(netns):
                    sysctl.write(direct.network_sysctls(config))
            if creation.bundle and not direct.has_cgroup2(mounts_of(creation.pid)):
                self.tenancy.direct.prepare(container.id, creation.pid)
            rootfs = os.path.join(creation.bundle, (config.get("root") or {}).get("path") or "")
            holder = self.tenancy.direct.marks / container.id
            return direct.edit(config, self.tenancy.directory, path, os.fstat(netns).st_ino, rootfs, holder)
        except OSError as error:
            raise from_oserror("make the container direct", error, hint="see graftd's log") from None

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
        if container.network and not container.hooked:
            self.unjoined[container.id] = container.network
            for forgotten in list(self.unjoined)[:-UNJOINED_MAX]:  # their creation has failed meanwhile
                del self.unjoined[forgotten]
        elif container.network:
            attached = [a for t in self.tenancy.registry.tenants.values() for a in t.attached]
            if not any(_waits(a) for a in self.tenancy.registry.attachments.values() if a not in attached):
                raise _not_grafts(container.network)
        joined.check_devices(self.tenancy.registry, container)

    def attach(self, _connection: Connection, request: protocol.Attach, fds: list[int]) -> Reply:
        """graft-cni ADD: attach a namespace to a network of CNI. The descriptor is the namespace.

        Repeated for the same key, it replaces the attachment. Raises GraftError.
        """
        return self._attach(request, fds)

    def _attach(self, request: protocol.Attach, fds: list[int], uid: int = 0) -> Reply:
        """@uid: of the user without root whose engine asks."""
        if len(fds) != 1:
            raise UsageError("attach carries one descriptor, the namespace")
        registry_ = self.tenancy.registry
        foreign.check_netns(fds[0])
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
        attachment.uid = uid
        if request.resolver:
            attachment.resolver = parse_address(request.resolver)
        attachments.detach(registry_, request.key)
        attachments.add(registry_, attachment, uid or None)
        try:
            attachments.join(registry_, attachment)
        except BaseException:
            attachments.detach(registry_, request.key)
            raise
        self.resolver.start()
        os.close(fds[0])
        return {}

    def attached(self, _connection: Connection, request: protocol.Attached, _fds: list[int]) -> Reply:
        """graft-cni CHECK: the attachment's addresses that the host has, and those that it has not.

        Raises Refused if there is no attachment.
        """
        attachment = self.tenancy.registry.attachments.get(request.key)
        if attachment is None:
            raise Refused("the container is not attached", code="ENOENT")
        here = addresses.addresses()
        own = [str(own.address) for own in attachment.addresses]
        return {"addresses": [a for a in own if a in here], "missing": [a for a in own if a not in here]}

    def detach(self, _connection: Connection, request: protocol.Detach, _fds: list[int]) -> Reply:
        """graft-cni DEL: drop an attachment. One that does not exist is no error (CNI specification, DEL)."""
        registry_ = self.tenancy.registry
        gone = registry_.attachments.get(request.key)
        if gone:
            attachments.hand_on(registry_, gone, attachments.twins_inside(registry_, gone))
        attachments.detach(registry_, request.key)
        self.resolver.start()
        return {}
