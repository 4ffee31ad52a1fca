"""The agent socket (agent.sock): it takes the seccomp listeners of filtered programs, and requests of the API.

OCI runtimes (runc, crun) send ContainerProcessState (OCI runtime specification, config-linux.md) with one descriptor,
`seccompFd`. Its `metadata` says what graft shall do. A runtime never reads an answer. A connection that ends without
a message is normal: the runtime has given up `create`. The wrapper (`graft -i ... -- CMD`) sends the same message.
The Python and C API send requests of graft's own (graft/protocol.py, AgentRequest).

Anyone may connect, so what a message may ask depends on the peer. A peer that is root in the host's user namespace
and netns (a runtime), or that brings metadata with graftd's seal (graft/engines/seal.py), may name another process as
the target, and publish ports. Metadata that was sealed for a user is that user's, and gives what is granted to them
(graft/daemon/agent_users.py). Any other peer speaks for itself alone, in the netns of its own pid, and gets the
strict policy.

All of this runs in the loop's thread.
"""

import contextlib
import errno
import os
import signal
import socket
from functools import partial
from typing import Any

from graft import protocol
from graft.daemon.admission import (
    admit_target,
    admit_wrapper,
    api_tenant,
    check_listener,
    endpoints_of,
    required_traps,
)
from graft.daemon.admission_engines import admit_guarded
from graft.daemon.admission_users import check_count
from graft.daemon.agent_users import UserListeners
from graft.daemon.connection import Connection, Later
from graft.daemon.tenancy import Tenancy
from graft.engines.seal import is_sealed
from graft.errors import GraftError, Refused, UsageError, from_oserror
from graft.kernel.foreign import ForeignSocket, own_address
from graft.kernel.stamps import Stamp
from graft.log import log
from graft.process.closing import close_foreign
from graft.process.lines import Lines, Then
from graft.rules.endpoint import DEFAULT_SOURCE, Endpoint
from graft.tenants.peers import is_filtered, refuse_contained
from graft.tenants.tenant import Tenant
from graft.trap.family import QUEUE_MAX, VALUE_MAX, Option, State
from graft.trap.target import Owner

LOOKS_MOST = 64  # threads


class Agent:
    """Answers the messages of the agent socket, with the registry of a Daemon."""

    def __init__(self, tenancy: Tenancy, users: UserListeners) -> None:
        self.tenancy = tenancy
        self.users = users
        self._looks = Lines(tenancy.loop, LOOKS_MOST, lambda: None)  # by tenant, at sockets that were sent

    @staticmethod
    def whole(text: bytes) -> bool:
        """Is it a whole message?"""
        return protocol.complete(text)

    def serve(self, connection: Connection, message: bytes, fds: list[int]) -> Any:
        """Carry out one message; the result is the value of "ok". Raises GraftError, after logging it."""
        try:
            if protocol.is_agent_request(message):
                connection.peer.check()
                return self._answer(connection, protocol.decode_agent_request(message), fds)
            return self._serve(connection, message, fds)
        except GraftError as error:
            log.warning("agent: pid %d: %s", connection.pid, error)
            raise

    def _serve(self, connection: Connection, message: bytes, fds: list[int]) -> dict[str, Any]:
        state = protocol.decode_state(message)
        sealed = is_sealed(state.metadata, self.tenancy.directory)
        metadata = protocol.decode_metadata(state.metadata)
        if sealed and metadata.uid:
            self.users.take(connection, state, metadata, fds)
            return {}
        if not sealed:
            connection.peer.check()
        else:
            self._refuse_contained(connection)
        if metadata.wrapper:
            return self._wrapper(connection, metadata, fds)
        if "seccompFd" not in state.fds or len(fds) != len(state.fds):
            raise UsageError(f"{len(state.fds)} names and {len(fds)} descriptors", hint="send one 'seccompFd'")
        listener = fds[state.fds.index("seccompFd")]
        trusted = sealed or self._is_host(connection)
        pid = (state.pid or state.state.pid or connection.pid) if trusted else connection.pid
        known = self.tenancy.registry.by_container(state.state.id) if trusted else None
        if known is None and trusted and metadata.name and not metadata.container:
            known = self.tenancy.registry.by_name(metadata.name)
        if known and not (state.pid or state.state.pid):
            check_listener(listener)
            self.tenancy.adopt(known, listener, trusted=True)  # `crun exec` sends no pid
            return {"name": known.name}
        self.tenancy.calls.reap()
        try:
            if sealed and metadata.request.direct:
                tenant = admit_guarded(self.tenancy, pid, listener, metadata)
            else:
                tenant = admit_target(self.tenancy, pid, connection.uid, listener, metadata, trusted=trusted)
        except GraftError as error:
            if sealed:
                self._end(pid, metadata, error)
            raise
        for fd in fds:
            if fd != listener:
                close_foreign(fd)
        return {"name": tenant.name}

    def _refuse_contained(self, connection: Connection) -> None:
        """Raise Refused if who brings a seal is a process of a container. A runtime may have ended by now."""
        try:
            refuse_contained(self.tenancy.registry, connection.peer, "another container's seal")
        except Refused as error:
            if error.code != "ESRCH":
                raise

    def _end(self, pid: int, metadata: protocol.Metadata, why: GraftError) -> None:
        """Kill a process of a container that graft refuses: it must not go on without a policy.

        Its engine sees it end. One that was to be direct is in the host's netns, and known by its filter.
        """
        log.error("container %s is ended: %s", metadata.name, why)
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                contained = self.tenancy.registry.netns_of(pid) != self.tenancy.registry.home
                if contained or (metadata.request.direct and is_filtered(pid)):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    def _wrapper(self, connection: Connection, metadata: protocol.Metadata, fds: list[int]) -> dict[str, Any]:
        if len(fds) > 1:
            raise UsageError(f"a wrapper sends one listener, not {len(fds)} descriptors")
        self.tenancy.calls.reap()
        trusted = self._is_root(connection)
        listener = fds[0] if fds else None
        tenant = admit_wrapper(self.tenancy, connection.pid, connection.uid, listener, metadata, trusted=trusted)
        if metadata.verbose:
            self.tenancy.listen_in(tenant, connection)
        return {"name": tenant.name, "scope": tenant.scope}

    # -- the Python API --

    def _answer(self, connection: Connection, request: protocol.AnyAgentRequest, fds: list[int]) -> Any:
        if isinstance(request, protocol.Traps):
            if fds:
                raise UsageError("this request has no descriptors")
            if not self._is_root(connection):
                check_count(len(request.ingress) + len(request.egress))
            return {"swap": required_traps(self.tenancy, connection.pid, request)}
        if isinstance(request, protocol.Endpoints):
            if fds:
                raise UsageError("this request has no descriptors")
            return endpoints_of(self.tenancy, connection.pid)
        tenant = api_tenant(self.tenancy, connection.pid, connection.uid)
        self.tenancy.follow(tenant, connection.pid)
        try:
            if isinstance(request, protocol.Permit):
                return self._permit(tenant, request, fds)
            if fds:
                raise UsageError("this request has no descriptors")
            return self._open(connection, tenant, request)
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "EIO")
            raise Refused(error.strerror or str(error), code=code) from None

    @staticmethod
    def _is_root(connection: Connection) -> bool:
        return connection.uid == 0 and connection.peer.administrates()

    @staticmethod
    def _owner(connection: Connection) -> Owner:
        return Owner(connection.peer.uid, connection.peer.gid)

    @staticmethod
    def _endpoint(tenant: Tenant, name: str) -> Endpoint:
        endpoint = tenant.endpoints.get(name)
        if endpoint is None:
            raise Refused(f"endpoint '{name}' does not exist in this namespace", code="ENOENT")
        return endpoint

    def _open(self, connection: Connection, tenant: Tenant, request: protocol.Open) -> dict[str, Any]:
        """Make a socket that is bound to an endpoint, or may connect to another one, or both."""
        if request.type not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            raise UsageError(f"socket type {request.type} is not SOCK_STREAM or SOCK_DGRAM")
        if request.bind is None and request.connect is None:
            raise UsageError("neither bind nor connect names an endpoint")
        if len(request.options) > QUEUE_MAX:
            raise UsageError(f"more than {QUEUE_MAX} socket options")
        try:
            options = [Option(o.level, o.name, bytes.fromhex(o.value)[:VALUE_MAX]) for o in request.options]
        except ValueError:
            raise UsageError("the value of a socket option is not hexadecimal") from None
        family = self.tenancy.family
        to = self._endpoint(tenant, request.connect) if request.connect is not None else None
        source = request.bind
        if source is None and to and DEFAULT_SOURCE in tenant.endpoints and to.address:
            source = DEFAULT_SOURCE
        reply: dict[str, Any] = {}
        kind = request.type
        if to and to.address is None:
            made = self.tenancy.sockets.make(tenant, socket.AF_UNIX, kind, place=0)
        elif to and source is None:
            inet = socket.AF_INET if to.kind == "ipv4" else socket.AF_INET6
            made = self.tenancy.sockets.make(tenant, inet, kind, place=to.place)
        else:
            made = family.make(tenant, kind, 0)
        with made:
            new = made
            if source is not None and (to is None or to.address):
                state = State(queue=options)
                new = family.attach(
                    self._owner(connection), tenant, made, state, self._endpoint(tenant, source), leave=to is not None
                )
                refused = next((o for o in state.queue if o.result), None)
                if refused:
                    new.close()
                    raise OSError(-refused.result, os.strerror(-refused.result))
            if to and to.address:
                reply["address"] = family.permit(tenant, new, to)
            elif to:
                new.setblocking(False)
                error = family.connect_unix(new, to, self._owner(connection), lambda: False)
                if error:
                    raise OSError(error, os.strerror(error))
            reply["family"] = int(new.family)
            connection.replies = [os.dup(new.fileno())]
            if new is not made:
                new.close()
        return reply

    def _permit(self, tenant: Tenant, request: protocol.Permit, fds: list[int]) -> Later:
        """Let the attached socket, which must be this tenant's, reach an endpoint. Answers its address, later."""
        if len(fds) != 1:
            raise UsageError("attach the socket")
        endpoint = self._endpoint(tenant, request.name)
        if endpoint.address is None:
            raise Refused(
                f"endpoint '{request.name}' is of type unix", hint="connect a new socket", code="EAFNOSUPPORT"
            )
        if not os.readlink(f"/proc/self/fd/{fds[0]}").startswith("socket:["):
            raise UsageError("the descriptor is not a socket")
        later = Later({})

        def look() -> Then:
            """In a thread: its program may hold the socket's lock."""
            try:
                sock = ForeignSocket.adopt(fds[0])
            except OSError as error:
                return partial(done, None, None, "", error)
            try:
                return partial(done, sock, self.tenancy.sockets.stamp(sock, tenant), own_address(sock), None)
            except OSError as error:
                return partial(done, sock, None, "", error)

        def done(sock: ForeignSocket | None, stamp: Stamp | None, own: str, error: OSError | None) -> None:
            try:
                if error:
                    raise error
                assert sock is not None
                if stamp is None or stamp.tenant != tenant.id:
                    raise Refused("the socket is not one of graft's", code="EPERM")
                endpoint = self._endpoint(tenant, request.name)  # which may have changed
                later.answer = {"address": self.tenancy.family.permit(tenant, sock, endpoint, own)}
            except GraftError as refused:
                later.error = refused
            except OSError as failed:
                later.error = from_oserror("graftd", failed)
            finally:
                close_foreign(sock.detach() if sock else fds[0])
            later.send()

        self._looks.push(tenant.id, lambda: look)
        return later

    def _is_host(self, connection: Connection) -> bool:
        """Is the peer root of the host, in graftd's own netns? Nobody else may name another process."""
        peer, registry = connection.peer, self.tenancy.registry
        try:
            refuse_contained(registry, peer, "the agent socket's orders")
            return peer.uid == 0 and peer.netns(registry) == registry.home and peer.administrates()
        except Refused:
            return False
