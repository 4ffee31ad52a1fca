"""The user socket (user.sock): requests of `graft` by anyone, about what is their own.

Theory of operation

Goal: an ordinary user has containers without root, as the administrator grants it, and has no part in those of
others.

Facts: SO_PEERCRED tells the uid of whoever connected as the host has it, also of one that is root in a user namespace
of its own (user_namespaces(7)). Such a user can enter what it has made, and nothing else.

Solution: the requests are those of the admin socket, as far as READING and CHANGING have them. Each is about
containers of the peer's user alone, and an endpoint table that all of these have in common. A connection begins with
Hello, when graftd looks up who that user is (graft/tenants/accounts.py) and what is granted to them
(graft/rules/grants.py). A process of a container gives no orders here either: `graft run` connects before it is one.

What still fails: a process outside of a container that obeys one inside, such as a shell that reads a shared file,
is its user's.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from graft import protocol
from graft.daemon import admission_users, moves
from graft.daemon.admin import Admin, Reply
from graft.daemon.admission import admit_target, peer_endpoints
from graft.daemon.admission_users import User
from graft.daemon.agent_users import UserListeners
from graft.daemon.connection import Connection, Later
from graft.daemon.documents import engine_users
from graft.daemon.files import Files
from graft.daemon.pages import Pages
from graft.daemon.requests import Given, check_version
from graft.daemon.tenancy import Tenancy
from graft.daemon.users_engines import UserEngineOrders
from graft.engines.resolver import Resolver
from graft.errors import GraftError, Refused, UsageError
from graft.kernel.netns import is_pid
from graft.rules.endpoint import Endpoint, EndpointWords
from graft.rules.grants import users_path
from graft.tenants.accounts import Account, Accounts, unprivileged_port, user_table
from graft.tenants.peers import refuse_contained_user
from graft.tenants.tenant import Table, Tenant, table_documents

READING = (
    protocol.EndpointShow,
    protocol.RuleShow,
    protocol.Ps,
    protocol.Inspect,
    protocol.Learnt,
    protocol.Log,
    protocol.Sockets,
    protocol.StatsAll,
    protocol.Status,
)
CHANGING = (
    protocol.Run,
    protocol.EndpointAdd,
    protocol.EndpointDel,
    protocol.EndpointMove,
    protocol.RuleAdd,
    protocol.RuleDel,
    protocol.RuleMove,
)
OF_ENGINES = (protocol.Prepare, protocol.Attach, protocol.Attached, protocol.Detach)


class Users(Admin):
    """Answers the requests of users without root, with the registry of a Daemon."""

    def __init__(self, tenancy: Tenancy, resolver: Resolver, files: Files, pages: Pages, *, managed: bool) -> None:
        super().__init__(tenancy, resolver, files, pages, managed=managed)
        self.accounts = Accounts(tenancy.loop)
        self.engines = UserEngineOrders(tenancy, resolver)
        self.listeners = UserListeners(tenancy, self.find)  # those that come by agent.sock

    def serve(self, connection: Connection, line: bytes, fds: list[int]) -> Reply:
        """Carry out one request: @line is its JSON, the result is the value of "ok". Raises GraftError."""
        connection.peer.check()
        request = protocol.decode_request(line)
        check_version(request)
        if isinstance(request, protocol.Hello):
            if not connection.uid:
                raise Refused("root's orders go to graftd.sock", hint="run as another user", code="EPERM")
            refuse_contained_user(self.tenancy.registry, connection.peer)
            return self._begin(connection, request)
        if not connection.vetted:
            raise UsageError("a connection to the user socket begins with hello")
        connection.vetted = False
        if not isinstance(request, READING + CHANGING + OF_ENGINES):
            raise Refused("only root may do this", hint="run it as root", code="EPERM")
        try:
            return self._carry_out(connection, request, fds)
        except GraftError as error:
            error.message = connection.user.own_words(error.message)
            raise

    def _begin(self, connection: Connection, request: protocol.Hello) -> Reply:
        """Answer Hello, as soon as it is known who the peer's user is."""
        admission_users.check_count(max(len(request.ingress), len(request.egress)))
        known = self.accounts.known(connection.uid)
        if known:
            return self._welcome(connection, request, known)
        later = Later({})

        def found(account: Account) -> None:
            try:
                later.answer = self._welcome(connection, request, account)
            except GraftError as error:
                later.error = error
            later.send()

        self.accounts.find(connection.uid, found)
        return later

    def _welcome(self, connection: Connection, request: protocol.Hello, account: Account) -> Reply:
        connection.user = self._user(account)
        connection.vetted = True
        return self._hello(connection, request)

    def _user(self, account: Account) -> User:
        return User(account, self.files.granted.of(account.name, account.groups))

    def find(self, uid: int, then: Callable[[User], None]) -> None:
        """Have @then called with the user of @uid, by the loop, as soon as it is known who that is."""
        self.accounts.find(uid, lambda account: then(self._user(account)))

    # -- running --

    def run(self, connection: Connection, request: protocol.Run, fds: list[int]) -> Reply:
        """`graft run`: a target in a netns of the user's own hands over its listener. Raises GraftError."""
        if len(fds) != 1:
            raise UsageError("a run request carries the seccomp listener")
        asked = request.request
        for each in (asked.publish, asked.ingress, asked.egress, asked.ip, asked.resolver, asked.sysctl):
            admission_users.check_count(len(each))
        user: User = connection.user
        tenant = admit_target(
            self.tenancy, connection.pid, user.account.uid, fds[0], request, trusted=False, user=user
        )
        return self._started(connection, tenant)

    # -- endpoints and rules --

    def endpoint_add(self, connection: Connection, request: protocol.EndpointAdd, fds: list[int]) -> Reply:
        """`graft endpoint add`, to the user's own table or that of a container."""
        table = self._table(connection, request.netns)
        admission_users.check_count(len(table.endpoints) + len(request.endpoints), "endpoints")
        return super().endpoint_add(connection, request, fds)

    def _check_endpoint(self, connection: Connection, name: str, words: EndpointWords) -> None:
        admission_users.check_endpoint(self.tenancy.registry, connection.user, name, words)

    def _add_endpoints(
        self, _connection: Connection, table: Table, wanted: list[tuple[str, EndpointWords, int]]
    ) -> list[Endpoint]:
        return self.tenancy.registry.add_endpoints(table, wanted, look=False)  # a path may be one that blocks

    def endpoint_show(self, connection: Connection, request: protocol.EndpointShow, fds: list[int]) -> Reply:
        """`graft endpoint show`: of the user's own table, and of the netns that the peer is in; or a container's."""
        if request.netns:
            return super().endpoint_show(connection, request, fds)
        known = {**peer_endpoints(self.tenancy, connection.pid), **self._known(connection)}
        if request.name is not None and request.name not in known:
            raise Refused(
                f"endpoint '{request.name}' does not exist", hint="'graft endpoint show' lists them", code="ENOENT"
            )
        return table_documents(known, request.name)

    def rule_add(self, connection: Connection, request: protocol.RuleAdd, fds: list[int]) -> Reply:
        """`graft rule add`: all of them or none."""
        tenant = self._tenant(connection, request.netns)
        more = len(request.publish) + len(request.ingress) + len(request.egress)
        admission_users.check_count(admission_users.count_rules(tenant) + more)
        return super().rule_add(connection, request, fds)

    def rule_del(self, connection: Connection, request: protocol.RuleDel, fds: list[int]) -> Reply:
        """`graft rule del`: all of them or none."""
        admission_users.check_count(len(request.publish) + len(request.ingress) + len(request.egress))
        return super().rule_del(connection, request, fds)

    def _check_rules(self, connection: Connection, tenant: Tenant, given: Given) -> None:
        registry, user = self.tenancy.registry, connection.user
        admission_users.check_rules(registry, user, given.publications, given.egress)
        known = {**self._known(connection), **tenant.endpoints}
        admission_users.check_own_endpoints(registry, user, known, given.ingress, given.egress)

    def _pair(self, _connection: Connection, _request: protocol.EndpointMove | protocol.RuleMove) -> moves.Pair:
        raise Refused(
            "only root may hand a port over: it is led past whatever is bound there",
            hint="'graft rule del', end what listens there, then 'graft rule add'",
            code="EPERM",
        )

    # -- looking --

    def ps(self, connection: Connection, _request: protocol.Ps, _fds: list[int]) -> Reply:
        """`graft ps`: a summary of each of the user's containers."""
        user: User = connection.user
        theirs = [t for t in self.tenancy.registry.tenants.values() if user.owns(t)]
        return [self._view(connection, self._summary(t)) for t in theirs]

    def inspect(self, connection: Connection, request: protocol.Inspect, fds: list[int]) -> Reply:
        """`graft inspect`: all that graftd knows of one of the user's containers."""
        if is_pid(request.name) or self._own(connection.user, request.name) is None:
            raise Refused(f"no container named '{request.name}'", hint="'graft ps' lists them", code="ENOENT")
        return super().inspect(connection, request, fds)

    def learnt(self, connection: Connection, request: protocol.Learnt, fds: list[int]) -> Reply:
        """`graft run --learn`: what a container of the user's has reached."""
        full = connection.user.full_name(request.name)
        return super().learnt(connection, protocol.Learnt(version=request.version, name=full), fds)

    def status(self, connection: Connection, request: protocol.Status, fds: list[int]) -> Reply:
        """For `graft doctor`: what is granted, and how much of it is taken. Nothing of others."""
        user: User = connection.user
        whole: Any = super().status(connection, request, fds)
        theirs = [t for t in self.tenancy.registry.tenants.values() if user.owns(t)]
        return {
            "version": whole["version"],
            "pid": whole["pid"],
            "kept": whole["kept"],
            "containers": len(theirs),
            "engines": engine_users(self.tenancy.registry, user.account.uid),
            "user": user.account.name,
            "unprivileged": unprivileged_port(),
            "granted": user.grants.document(),
            "granted_by": str(users_path()) if os.path.lexists(users_path()) else "",
        }

    # -- what is the user's --

    def _sees(self, connection: Connection, tenant: Tenant | None) -> bool:
        return tenant is not None and bool(connection.user.owns(tenant.parent or tenant))

    def _view(self, connection: Connection, document: dict[str, Any]) -> dict[str, Any]:
        user: User = connection.user
        return user.own_view(document)

    def _named(self, connection: Connection, name: str) -> Tenant:
        return self._tenant(connection, name)

    def _known(self, connection: Connection) -> Mapping[str, Endpoint]:
        return admission_users.known_endpoints(self.tenancy.registry, connection.user)

    def _own(self, user: User, name: str) -> Tenant | None:
        """The user's container with this name, or this PID in its netns; None if there is none."""
        registry = self.tenancy.registry
        if is_pid(name):
            try:
                netns = registry.netns_of(int(name))
            except OSError:
                return None
            found = registry.by_netns(netns)
        else:
            found = registry.by_name(user.full_name(name))
        return found if found and user.owns(found) else None

    def _table(self, connection: Connection, netns: str | None) -> Table:
        return (
            self._tenant(connection, netns).table
            if netns
            else user_table(self.tenancy.registry, connection.user.account.uid)
        )

    def _tenant(self, connection: Connection, netns: str | None) -> Tenant:
        found = self._own(connection.user, netns) if netns else None
        if found is None:
            what = f"no container named '{netns}'" if netns else "no container is named"
            raise Refused(what, hint="'graft ps' lists them", code="ENOENT")
        return found
