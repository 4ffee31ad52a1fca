"""Orders of users' own engines on the user socket: rootless Podman's hook and plugins, and rootless Docker's runtime.

Theory of operation

Goal: containers of an engine that runs without root are its user's, and get what is granted to the user.

Facts: a rootless engine is in a user namespace of its user's, and calls itself root there. Its files are in places
that the user chose; to open one of them may block for ever (FUSE), and would be done with root's rights here. What a
container is called, and what it asks for, is the user's own word anyway.

Solution: graftd opens nothing of the user's. Their side (graft/engines/prepare.py) reads the engine's files, and
sends config.json with what they say, and namespaces as descriptors. Each must be of a user namespace that the user
has made. Keys, ids of containers and names of networks have the uid at their end, so that no two users', nor root's,
meet. The metadata that the runtime will bring has the uid as well, under the seal (graft/daemon/agent_users.py).
"""

import os
import re
from collections.abc import Collection
from typing import Any

import msgspec

from graft import protocol
from graft.daemon.admin_engines import EngineOrders, Reply
from graft.daemon.admission_engines import expect_target
from graft.daemon.admission_users import AT, SETTINGS_MAX, User, check_asked, check_count, check_rules, check_share
from graft.daemon.connection import Connection
from graft.engines import bundle, joined
from graft.engines.container import Container, metadata_of
from graft.errors import GraftError, Refused, UsageError
from graft.kernel import addresses, foreign, linux
from graft.kernel.netns import netns_cookie_of
from graft.log import log
from graft.rules import grants
from graft.rules.address import parse_address
from graft.rules.publication import parse_publication
from graft.rules.request import parse_request
from graft.tenants.accounts import check_netns

ENGINES = ("docker", "podman", "oci")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
LABEL_MAX = 255  # characters of a name or a key
NAMES_MAX = 64  # of a container on a network
ADDRESSES_MAX = 16  # likewise: graftd's loop puts each on the host's lo
FOR_EACH = 4  # networks of a container, as many as may be on average


class UserEngineOrders(EngineOrders):
    """One method an order, as EngineOrders has them. Each raises GraftError, and then nothing has changed."""

    def prepare(self, connection: Connection, request: protocol.Prepare, fds: list[int]) -> Reply:
        """A user's engine, before its runtime's `create`: returns config.json with the traps."""
        user: User = connection.user
        try:
            made = self._prepare(connection, user, request, fds)
        except GraftError as error:
            log.info("container %s of user %s: %s", request.name, user.account.name, error)
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"config.json does not follow the OCI runtime specification: {error!r}") from None
        for fd in fds:
            os.close(fd)
        return made

    def _prepare(
        self, connection: Connection, user: User, request: protocol.Prepare, fds: list[int]
    ) -> dict[str, Any]:
        registry = self.tenancy.registry
        container = _container(user, request, fds)
        self.tenancy.forget_unstarted()
        if container.network:
            raise Refused(f"network '{container.network}' is not graft's", hint=bundle.ROOTS_NETWORKS, code="EINVAL")
        joined.check_devices(registry, container)
        check_count(len((request.config.get("linux") or {}).get("sysctl") or ()), "sysctls")
        metadata = metadata_of(container)
        metadata.uid, metadata.directory = user.account.uid, ""
        running = registry.by_netns(container.where[0]) if container.where[0] else None
        if running and not user.owns(running):
            raise Refused(
                "the network that it joins has another's container", hint=bundle.ROOTS_NETWORKS, code="EPERM"
            )
        asked = parse_request(metadata.request)
        check_count(len(asked.publish) + len(asked.ingress) + len(asked.egress))
        check_asked(registry, user, asked)
        if not running:
            check_share(registry, user)
            self._check_expected(user)
        bundle.add_sysctls(request.config, metadata)
        bundle.check_capabilities(request.config.get("process") or {}, allowed=metadata.netadmin)
        joined.check_members(registry, container, metadata)
        expect_target(self.tenancy, metadata, container, linux.parent(connection.pid), user)
        return bundle.edit(request.config, metadata, self.tenancy.directory)

    def _check_expected(self, user: User) -> None:
        """Raise Refused (ENOSPC) if too many containers of the user's are being created."""
        _check_count(user, self.tenancy.registry.expected, user.grants.containers, "containers being created")

    def attach(self, connection: Connection, request: protocol.Attach, fds: list[int]) -> Reply:
        """A network of a user's engine, by its plugin: as root's, with what is granted to the user."""
        user: User = connection.user
        registry = self.tenancy.registry
        if len(fds) != 1:
            raise UsageError("attach carries one descriptor, the namespace")
        foreign.check_netns(fds[0])
        check_netns(fds[0], user.account)
        texts = (request.key, request.network, *request.names)
        if len(request.names) > NAMES_MAX or any(len(text) > LABEL_MAX for text in texts):
            raise UsageError("a name is too long, or there are too many")
        if len(request.addresses) > ADDRESSES_MAX:
            raise UsageError(f"{len(request.addresses)} addresses are too many", hint=f"at most {ADDRESSES_MAX}")
        theirs = [key for key, attachment in registry.attachments.items() if attachment.uid == user.account.uid]
        if _key(user, request.key) not in theirs:
            _check_count(user, theirs, user.grants.containers * FOR_EACH, "members of networks")
        for text in request.addresses:
            grants.check_address(user.grants, parse_address(text.partition("/")[0]))
        if request.resolver:
            grants.check_address(user.grants, parse_address(request.resolver))
        check_count(len(request.publish))
        check_rules(registry, user, [parse_publication(p) for p in request.publish], ())
        asked = msgspec.structs.replace(
            request, key=_key(user, request.key), network=_key(user, request.network), within="", pod=False
        )
        return self._attach(asked, fds, user.account.uid)

    def attached(self, connection: Connection, request: protocol.Attached, fds: list[int]) -> Reply:
        """As root's; with a descriptor, whether the namespace is on a network of the user's by graft."""
        user: User = connection.user
        if not fds:
            key = _key(user, request.key)
            return super().attached(connection, msgspec.structs.replace(request, key=key), fds)
        foreign.check_netns(fds[0])
        where = os.fstat(fds[0]).st_ino, netns_cookie_of(fds[0])
        attachments = self.tenancy.registry.attachments.values()
        found = [a for a in attachments if a.uid == user.account.uid and a.in_netns(*where)]
        if not found:
            raise Refused("this namespace is on no network of graft's", code="ENOENT")
        here = addresses.addresses()
        for fd in fds:
            os.close(fd)
        owned = [str(own.address) for attachment in found for own in attachment.addresses]
        return {"addresses": [address for address in owned if address in here]}

    def detach(self, connection: Connection, request: protocol.Detach, fds: list[int]) -> Reply:
        """As root's, of an attachment of the user's."""
        key = _key(connection.user, request.key)
        return super().detach(connection, msgspec.structs.replace(request, key=key), fds)


def _key(user: User, key: str) -> str:
    """What is the user's own @key, for all."""
    return f"{key}{AT}{user.account.uid}"


def _check_count(user: User, keys: Collection[str], most: int, what: str) -> None:
    have = sum(key.endswith(f"{AT}{user.account.uid}") for key in keys)
    if have >= most:
        raise Refused(
            f"you have {have} {what}, of {most} that are granted to you",
            hint=f"end one, or root may grant more: {grants.users_path()}",
            code="ENOSPC",
        )


def _container(user: User, request: protocol.Prepare, fds: list[int]) -> Container:
    """The container that a user's engine is about to create. Raises Refused, UsageError."""
    if request.engine not in ENGINES or not ID.fullmatch(request.id) or len(request.name) > LABEL_MAX:
        raise UsageError("this is no container of Docker or Podman", hint="install graft's hook or runtime anew")
    if sum(len(f"{key}{value}") for key, value in request.settings.items()) > SETTINGS_MAX:
        raise UsageError(f"graft's labels or annotations have more than {SETTINGS_MAX} characters")
    if len(fds) > 1:
        raise UsageError("a container joins one network namespace")
    path, where = "", (0, 0)
    for fd in fds:
        foreign.check_netns(fd)
        check_netns(fd, user.account)
        path, where = f"/proc/self/fd/{fd}", (os.fstat(fd).st_ino, netns_cookie_of(fd))
    return Container(
        request.engine,
        _key(user, request.id),
        request.name,
        request.settings,
        network=request.network,
        sandbox=request.sandbox,
        path=path,
        where=where,
    )
