"""Listeners that users' engines bring, with metadata that graftd has sealed for the user (users_engines.py).

Theory of operation

Goal: a process of a user's container is under the user's policy, and whoever brings a user's seal gets no more.

Facts: the runtime's message names a process by its PID, which may be anybody's, and used again when graftd looks. A
runtime does not wait for an answer, and ends. Whoever may read the container's files has the seal.

Solution: a seal for a user is good for that user's processes alone, by the uid of who connects. The PID says which
network namespace it is; that one must be of a user namespace of the user's, by the descriptor that is kept. What is
granted is looked up as for the user socket. A process that is refused is ended, if it is the user's: it must not go
on without a policy.

What still fails: a user may put a process of theirs under the policy of a container of theirs, which that user could
have had by the container itself.
"""

import contextlib
import os
import signal
from collections.abc import Callable

from graft import protocol
from graft.daemon.admission import admit_target, check_listener
from graft.daemon.admission_users import AT, User
from graft.daemon.connection import Connection
from graft.daemon.tenancy import Tenancy
from graft.errors import GraftError, Refused, UsageError, from_oserror
from graft.kernel import linux
from graft.log import log
from graft.process.closing import close_foreign
from graft.tenants.accounts import check_netns, is_delegated
from graft.tenants.peers import refuse_contained_user


class Process:
    """The process that a runtime names, held by a pidfd, with its netns; nothing of it if it named none."""

    def __init__(self, pid: int) -> None:
        self.pid, self.pidfd, self.netns = pid, -1, -1
        if not pid:
            return
        try:
            self.pidfd = os.pidfd_open(pid)
            self.netns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            self.uids = linux.uids(pid)
        except (OSError, ValueError):
            self.close()
            raise Refused("the container's process has ended", code="ESRCH") from None

    def lives(self) -> bool:
        """Is it still there, so that what was read is of it?"""
        return self.pidfd >= 0 and linux.alive(self.pidfd)

    def close(self) -> None:
        """Close what is held."""
        for fd in (self.pidfd, self.netns):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.netns = -1


class UserListeners:
    """Takes users' listeners. @find: calls back with the User of a uid, as the user socket knows them."""

    def __init__(self, tenancy: Tenancy, find: Callable[[int, Callable[[User], None]], None]) -> None:
        self.tenancy = tenancy
        self.find = find

    def take(
        self,
        connection: Connection,
        state: protocol.ContainerProcessState,
        metadata: protocol.Metadata,
        fds: list[int],
    ) -> None:
        """Take a listener that came with metadata sealed for a user. Raises GraftError; later faults are logged."""
        if connection.uid != metadata.uid:
            raise Refused("this seal is another user's", code="EPERM")
        try:
            refuse_contained_user(self.tenancy.registry, connection.peer)
        except Refused as error:
            if error.code != "ESRCH":  # a runtime may have ended by now
                raise
        if state.fds != ["seccompFd"] or len(fds) != 1:
            raise UsageError(f"{len(state.fds)} names and {len(fds)} descriptors", hint="send one 'seccompFd'")
        check_listener(fds[0])
        process = Process(state.pid or state.state.pid)
        number = f"{state.state.id}{AT}{metadata.uid}"
        self.find(metadata.uid, lambda user: self._found(user, process, number, metadata, fds[0]))

    def _found(self, user: User, process: Process, number: str, metadata: protocol.Metadata, listener: int) -> None:
        try:
            self._admit(user, process, number, metadata, listener)
        except (GraftError, OSError) as error:
            why = error if isinstance(error, GraftError) else from_oserror("take the listener", error)
            log.warning("container %s of user %s is ended: %s", metadata.name, user.account.name, why)
            self._end(user, process)
            with contextlib.suppress(OSError):
                close_foreign(listener)
        finally:
            process.close()

    def _admit(self, user: User, process: Process, number: str, metadata: protocol.Metadata, listener: int) -> None:
        registry = self.tenancy.registry
        self.tenancy.calls.reap()
        if not process.pid:  # `crun exec` sends none
            known = registry.by_container(number)
            if known is None or not user.owns(known):
                raise Refused("there is no such container", code="ENOENT")
            self.tenancy.adopt(known, listener, trusted=False)
            return
        if not process.lives():
            raise Refused("the container's process has ended", code="ESRCH")
        admit_target(
            self.tenancy,
            process.pid,
            user.account.uid,
            listener,
            metadata,
            trusted=False,
            netns_fd=process.netns,
            user=user,
        )

    def _end(self, user: User, process: Process) -> None:
        """Kill a process that is refused, if it is the user's, in a netns of theirs. No other is theirs to name."""
        if process.netns < 0:
            return
        with contextlib.suppress(OSError, GraftError):
            check_netns(process.netns, user.account)
            if process.lives() and all(is_delegated(uid, user.account) for uid in process.uids):
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
