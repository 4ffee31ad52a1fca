"""The agent socket: whoever runs a program under the filter hands its listener over here.

The message is the OCI runtimes' (runc, crun): ContainerProcessState with one descriptor, `seccompFd`, and
what graft shall do as `metadata`. The runtime never reads an answer. A connection that ends without a
message is an aborted create, and normal.

Who asks decides what is believed. A peer that is root in the host's user namespace (a runtime) may name
another process as the target and publish ports; anybody else speaks for itself, in the netns that its own
pid shows, with the strict policy.
"""

import os
from typing import TYPE_CHECKING, Any

from graft import linux, protocol
from graft.admin import admit_target, same_user_namespace
from graft.connection import Connection
from graft.errors import GraftError, UsageError
from graft.log import log

if TYPE_CHECKING:
    from graft.daemon import Daemon


class Agent:
    """Takes listeners from runtimes and programs."""

    def __init__(self, daemon: "Daemon") -> None:
        self.daemon = daemon

    def serve(self, connection: Connection, message: bytes, fds: list[int]) -> dict[str, Any] | None:
        """One ContainerProcessState. Raises GraftError, which goes to the peer as well as to the log."""
        try:
            return self._serve(connection, message, fds)
        except GraftError as error:
            log.warning("agent: pid %d: %s", connection.pid, error)
            raise

    def _serve(self, connection: Connection, message: bytes, fds: list[int]) -> dict[str, Any]:
        state = protocol.decode_state(message)
        if "seccompFd" not in state.fds or len(fds) != len(state.fds):
            raise UsageError(f"{len(state.fds)} names and {len(fds)} descriptors", hint="send one 'seccompFd'")
        listener = fds[state.fds.index("seccompFd")]
        trusted = connection.uid == 0 and self._is_host(connection.pid)
        wish = protocol.decode_metadata(state.metadata)
        pid = (state.pid or state.state.pid or connection.pid) if trusted else connection.pid
        known = self.daemon.registry.by_name(wish.name) if trusted and wish.name else None
        if known and not (state.pid or state.state.pid):
            self.daemon.adopt(known, listener)  # crun's exec names no process
            return {"name": known.name}
        self.daemon.reap()
        tenant = admit_target(self.daemon, pid, listener, wish, trusted=trusted)
        for fd in fds:
            if fd != listener:
                os.close(fd)
        return {"name": tenant.name}

    @staticmethod
    def _is_host(pid: int) -> bool:
        try:
            return same_user_namespace(pid) and linux.netns_inode(pid) == linux.netns_inode()
        except OSError:
            return False
