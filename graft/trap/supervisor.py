"""Decide what a trapped call does: one trapped call, one action.

Theory of operation

A target runs under a filter that traps what graft/kernel/traps.py lists and explains. Its trapped calls wait in the
kernel until somebody who holds the listener answers (seccomp_unotify(2)). graft/trap/listeners.py receives them,
and runs the decision in a worker thread, because reading a target's memory may block. Several threads decide at a
time, also for one tenant. The functions of this module, one for each call, return an action, which
graft/trap/dispatch.py then carries out in the same thread:

    Proceed     the kernel runs the call as it stands. That is safe only if its arguments are registers, or if the
                call cannot touch the host: the target may change its memory, and what a descriptor number means, at
                any time.
    Answer      the call is over: it returns a value, or fails with an errno.
    Inject      the call returns a new descriptor of the target, a copy of ours.
    Replace     a copy of our socket takes the place of one of the target's; then Proceed or Answer follows.

socket()    It is made here, in the host's netns, and stamped before the target sees it. Its three arguments are
            registers. MPTCP, for which Go's listeners ask, becomes TCP: the further subflows of an MPTCP connection
            choose their own addresses and run no connect hook of ours. If the target has moved to another netns
            than its tenant's, the call proceeds, and gives it an ordinary socket there.
listen()    It is done here, on our duplicate of the socket. An unbound socket is bound first, and one whose bind has
            waited, to the tenant's private loopback, so that no port of the host opens without a rule. A socket that
            accept() gave may not listen again: the kernel would take a port of the host's for it. Only on sockets of
            other families does the call proceed. If the target puts a grafted one at that number meanwhile, the hooks
            put the listening socket out of reach (bind.bpf.h, receive.bpf.h).
ioctl()     Network devices only: see graft/trap/ioctl.py.
bind(),     If the address means an endpoint of type unix or in another netns, another socket replaces the target's
connect(),  (graft/trap/swap.py). A unix socket is bound or connected here. Otherwise the call proceeds, and the BPF
sendto()    hooks decide on the address, which the kernel reads itself.
names and   A unix socket shows the internet address that the program asked for, and accepts the options of TCP and IP
options     without effect.
AF_GRAFT    See graft/trap/family.py.

Nothing here trusts the target: a PID may be gone, memory may be unmapped, numbers may be anything. If the target has
ended, the kernel drops the answer. A PID that another process has by then is not taken for the target's
(graft/trap/caller.py).

What still fails: the netns of a recycled PID may be compared, and descriptors of its process be listed. That has no
effect, since the answer is dropped.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from graft.kernel import linux, sysctl, traps
from graft.kernel.maps import Map
from graft.kernel.stamps import STAMP_CONNECTED, STAMP_INGRESS, STAMP_LATE, STAMP_SOURCE, STAMP_WAITS, Stamp
from graft.rules import match, tables
from graft.rules.address import ANY4, ANY6, Address
from graft.rules.endpoint import Endpoint
from graft.rules.endpoint_names import endpoint_at
from graft.rules.slices import in_names
from graft.trap import cold, ioctl, swap, target
from graft.trap.actions import PROCEED, Action, Answer, Inject
from graft.trap.caller import Caller
from graft.trap.family import Family, State
from graft.trap.listener import Notification
from graft.trap.numbers import Turns
from graft.trap.sockets import IP_BIND_ADDRESS_NO_PORT, Sockets, TenantView

SOCK_TYPE_MASK = 0xF
TCP_CLOSED = b"\x07"  # tcpi_state of struct tcp_info (linux/tcp.h): TCP_CLOSE
LOOPBACK_SEGMENT = 65483  # TCP_MAXSEG over lo; programs size their buffers by it
PROTOCOLS: dict[int, dict[int, int]] = {
    socket.SOCK_STREAM: {0: 0, socket.IPPROTO_TCP: 0, linux.IPPROTO_MPTCP: 0},
    socket.SOCK_DGRAM: {0: 0, socket.IPPROTO_UDP: 0},
}

# What tells a call on a socket of AF_GRAFT; a call without a trap for the family is known by the descriptor alone.
FAMILY_TRAPS = {call.name: tuple(t for t in traps.TRAPS if t.family and t.call == call.name) for call in traps.CALLS}

Handler = Callable[[Caller, TenantView], Action]
OnSocket = Callable[[Caller, TenantView, socket.socket, Stamp], Action]
OnFamily = Callable[[Caller, TenantView, socket.socket, State], Action]


class On(NamedTuple):
    """What decides a call on a grafted socket of the caller's own tenant.

    @any: on one of the internet, or a unix socket in its place. @family: on one of AF_GRAFT; None if it proceeds.
    """

    any: OnSocket
    family: OnFamily | None


class Supervisor:
    """Decides trapped calls, and makes the sockets for them. Any worker thread may call it.

    @sockets makes the sockets, @family answers for those of AF_GRAFT. @owners: the BPF map `holders`. @is_hosts: is
    the netns with this inode graftd's own, or one in which grafted sockets are made? @let_listen lets the sockets of
    the tenant with this number listen.
    """

    def __init__(
        self,
        sockets: Sockets,
        family: Family,
        owners: Map,
        is_hosts: ioctl.IsHosts,
        let_listen: Callable[[int], None],
    ) -> None:
        self.sockets = sockets
        self.stamps = sockets.stamps
        self.owners = owners  # BPF map: containers' own addresses
        self.family = family
        self.is_hosts = is_hosts
        self.let_listen = let_listen
        self.turns = Turns()  # by the inode of a socket that is to listen: a server's workers inherit one
        self.handlers: dict[str, Handler] = {
            "socket": self.create,
            "listen": self.listen,
            "socketpair": self.create_pair,
            "ioctl": lambda caller, tenant: ioctl.decide(caller, tenant, self.stamps, is_hosts),
        }
        self.handlers |= {name: partial(self._on_socket, name, on) for name, on in self._on().items()}

    def _on(self) -> dict[str, On]:
        """The calls that are decided by the stamp of the socket that they are made on."""
        return {
            "bind": On(self._bind, self.family.bind),
            "connect": On(self._connect, self.family.connect),
            "sendto": On(self._connect, self.family.sendto),
            "getsockname": On(_show, self.family.getsockname),
            "getpeername": On(_show, None),
            "setsockopt": On(_option, self.family.setsockopt),
            "getsockopt": On(_option, self.family.getsockopt),
        }

    def handle(self, call: Notification, tenant: TenantView, waiting: Callable[[], bool]) -> Action:
        """Decide one trapped call. An OSError on the way becomes the call's errno.

        @waiting: returns whether the target still waits for the answer.
        """
        handler = self.handlers.get(traps.trapped(call.arch, call.nr))
        if handler is None:  # 32-bit and x32, and what the filter of a foreign listener traps
            return Answer(error=errno.ENOSYS)
        try:
            return handler(Caller(call, waiting), tenant)
        except OSError as error:
            return Answer(error=error.errno or errno.EIO)

    def create(self, caller: Caller, tenant: TenantView) -> Action:
        """socket(2): make the socket here, stamp it, and inject it; refuse a family that reaches out of any netns."""
        if traps.BEYOND.holds(caller.args):
            return Answer(error=errno.EAFNOSUPPORT)
        family = caller.args[0] & 0xFFFFFFFF
        flags = caller.args[1] & 0xFFFFFFFF
        kind = flags & SOCK_TYPE_MASK
        # AF_SMC by another name
        if kind == socket.SOCK_STREAM and caller.args[2] & 0xFFFFFFFF == linux.IPPROTO_SMC:
            return Answer(error=errno.EPROTONOSUPPORT)
        # a listener from the agent socket may have any filter; for what ours does not trap, nothing is made here
        protocols = PROTOCOLS.get(kind) if traps.FAMILY.holds(caller.args) else None
        protocol = protocols.get(caller.args[2] & 0xFFFFFFFF) if protocols else None
        known = not flags & ~(SOCK_TYPE_MASK | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if not tenant.cgroup and (protocol is None or not known):
            return PROCEED
        try:
            if not self._is_inside(caller, tenant):
                return PROCEED
        except FileNotFoundError:
            return Answer(error=errno.ESRCH)
        if protocol is None or not known:
            return cold.create(caller, tenant, self.stamps)
        if family == linux.AF_GRAFT:
            return self.family.create(tenant, kind, flags)
        made = self.sockets.make(tenant, family, kind, place=tenant.place, flags=flags & socket.SOCK_NONBLOCK)
        return Inject(made.detach(), bool(flags & socket.SOCK_CLOEXEC))

    def create_pair(self, caller: Caller, tenant: TenantView) -> Action:
        """socketpair(2) of a direct container: made in its netns. Others make theirs."""
        try:
            inside = self._is_inside(caller, tenant)
        except FileNotFoundError:
            return Answer(error=errno.ESRCH)
        return cold.create_pair(caller, tenant) if tenant.cgroup and inside else PROCEED

    def _is_inside(self, caller: Caller, tenant: TenantView) -> bool:
        """Is the caller where the tenant's programs live, and not in a netns that it has made for itself?

        Those of a direct container live in graftd's netns. Raises OSError if it has ended.
        """
        netns = linux.netns_inode(caller.pid)
        return netns == (linux.netns_inode("thread-self") if tenant.cgroup else tenant.netns)

    def listen(self, caller: Caller, tenant: TenantView) -> Action:
        """listen(2): bind a socket that is not bound yet to the private loopback, then listen on our duplicate."""
        sock = caller.borrow()
        if sock is None:  # it is no socket; to proceed would let another thread put one there
            there = os.path.lexists(f"/proc/{caller.pid}/fd/{caller.number(0)}")
            return Answer(error=errno.ENOTSOCK if there else errno.EBADF)
        with sock, self.turns.at(os.fstat(sock.fileno()).st_ino):
            stamp = self.sockets.stamp(sock, tenant)
            if stamp is None:
                return _listen_unstamped(caller, sock)
            if sock.type != socket.SOCK_STREAM:
                return Answer(error=errno.EOPNOTSUPP)
            if stamp.flags & STAMP_SOURCE:  # its endpoint is there to connect from
                return Answer(error=errno.EACCES)
            if self._has_left(stamp):
                return Answer(error=errno.EADDRNOTAVAIL)
            state = self.family.state(sock)
            if state and not state.name:
                return Answer(error=errno.EADDRNOTAVAIL)
            if sock.family == socket.AF_UNIX:
                return PROCEED  # the target must call it: peers see who did (SO_PEERCRED)
            if tenant.cgroup and not stamp.place and not sock.getsockname()[1]:
                self.sockets.prepare(sock, tenant)
            if stamp.flags & STAMP_WAITS:
                self._settle(sock, stamp, sock.getsockname()[:2])
            elif sock.getsockname()[1] == 0:
                self._settle(sock, stamp, ("::" if sock.family == socket.AF_INET6 else "0.0.0.0", 0))
            self.let_listen(stamp.tenant)
            sock.listen(sysctl.follow_listening(sock, caller.number(1), tenant.sysctls))
        return Answer()

    def _settle(self, sock: socket.socket, stamp: Stamp, name: tuple[str, int]) -> None:
        """Bind a socket now, because it is to listen: a bind may wait (csrc/late.bpf.h). Raises OSError: EADDRINUSE.

        One that is connected, or that its program has bound meanwhile, is left to listen(2).
        """
        if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != TCP_CLOSED:
            return
        late = stamp.flags & STAMP_LATE  # it has the option, which is its program's to see, and graftd's to unset:
        self.stamps.settle(sock.fileno(), now=True)  # of a `dynamic` endpoint the kernel chooses the port
        try:
            if late:
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 0)
            try:
                sock.bind(name)
            finally:
                if late:
                    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        except OSError as error:
            found = self.stamps.get(sock.fileno())
            if error.errno != errno.EINVAL or (found and found.flags & STAMP_WAITS):
                raise  # the kernel would choose a port of the host's for listen(2)
        finally:
            self.stamps.settle(sock.fileno(), now=False)

    def _has_left(self, stamp: Stamp) -> bool:
        """Does the address that the socket of this stamp is bound to belong to another container by now?"""
        owner = self.owners.get(stamp.local_real[0]) if stamp.flags & STAMP_INGRESS else None
        return owner is not None and tables.OWNER.unpack(owner)[0] != stamp.tenant

    # -- addresses and options: AF_GRAFT, and endpoints that need another socket --

    def _on_socket(self, name: str, on: On, caller: Caller, tenant: TenantView) -> Action:
        """Decide the call @name on a socket. It proceeds unless the socket is one of this tenant."""
        sock = caller.borrow()
        if sock is None:
            return PROCEED
        with sock:
            if name == "getsockopt" and traps.reads_firewall(caller.args):
                own = ioctl.is_own(caller, tenant, self.stamps, sock, self.is_hosts)
                return PROCEED if own else Answer(error=_firewall_error(caller, sock))
            stamp = self.sockets.stamp(sock, tenant)
            if stamp is None:
                return self._unstamped(name, caller, tenant, sock)
            if stamp.tenant != tenant.id:
                return PROCEED
            state = self.family.state(sock) if _may_be_family(name, caller) else None
            if state is None:
                return on.any(caller, tenant, sock, stamp)
            return on.family(caller, tenant, sock, state) if on.family else PROCEED

    def _unstamped(self, name: str, caller: Caller, tenant: TenantView, sock: socket.socket) -> Action:
        """Ignore TCP and IP options on a connection that the server of a unix endpoint accepted; it has no stamp."""
        if name in ("setsockopt", "getsockopt") and sock.family == socket.AF_UNIX:
            with contextlib.suppress(OSError):  # it has no file
                file = linux.bound_file(sock)
                try:
                    if tenant.binds_file(os.fstat(file)):
                        return _ignore_option(caller)
                finally:
                    os.close(file)
        return PROCEED

    def _bind(self, caller: Caller, tenant: TenantView, sock: socket.socket, stamp: Stamp) -> Action:
        if tenant.cgroup and not stamp.place and sock.family != socket.AF_UNIX and not sock.getsockname()[1]:
            with self.turns.at(os.fstat(sock.fileno()).st_ino):
                self.sockets.prepare(sock, tenant)
        name, _ = caller.read_name(caller.args[1], caller.number(2))
        if name is None or name.address is None or sock.family == socket.AF_UNIX or sock.getsockname()[1]:
            return PROCEED
        protocol = socket.IPPROTO_TCP if sock.type == socket.SOCK_STREAM else socket.IPPROTO_UDP
        if in_names(name.address):
            endpoint = endpoint_at(tenant.endpoints, name.address)
            endpoint = endpoint if endpoint and endpoint.serves else None
        else:
            endpoint = match.match_ingress(tenant.ingress, tenant.endpoints, protocol, name.address, name.port)
        if endpoint is None and name.address.raw == ANY6 and _takes_ipv4(sock):
            endpoint = match.match_ingress(tenant.ingress, tenant.endpoints, protocol, Address(ANY4), name.port)
        if endpoint is None:
            return PROCEED
        if endpoint.address:
            return self._move(caller, tenant, sock, stamp, endpoint)
        local = (name.address.raw, name.port)
        new = self.sockets.make(tenant, socket.AF_UNIX, sock.type, place=0)
        try:
            swap.carry_options(sock, new)
            self.stamps.put(new.fileno(), Stamp(tenant.id, STAMP_INGRESS, 0, local))
            tenant.bound_path(endpoint.path, swap.bind_unix(new, endpoint, caller.owner()))
        except BaseException:
            new.close()
            raise
        return self.sockets.replace(caller.call, sock, new, Answer())

    def _connect(self, caller: Caller, tenant: TenantView, sock: socket.socket, stamp: Stamp) -> Action:
        """connect(2), and sendto(2) with an address."""
        connecting = caller.call.nr == linux.NR_CONNECT
        where, length = (1, 2) if connecting else (4, 5)
        name, _ = caller.read_name(caller.args[where], caller.number(length))
        if name is None or name.address is None:
            return PROCEED
        if sock.family == socket.AF_UNIX:  # an earlier call has replaced the socket, and connected or bound it
            connected = stamp.flags & STAMP_CONNECTED
            return Answer(error=errno.EISCONN if connected else errno.ECONNREFUSED) if connecting else PROCEED
        if in_names(name.address):
            endpoint = endpoint_at(tenant.endpoints, name.address)
            endpoint = endpoint if endpoint and endpoint.leaves else None
        else:
            endpoint = match.match_egress(tenant.egress, tenant.endpoints, match.destination(name.address))
        if endpoint is None or (not connecting and endpoint.address is None):
            return PROCEED
        if endpoint.address:
            return self._move(caller, tenant, sock, stamp, endpoint)
        new = self.sockets.make(tenant, socket.AF_UNIX, sock.type, place=0)
        try:
            swap.carry_options(sock, new)
            peer = (name.address.raw, name.port)
            self.stamps.put(new.fileno(), Stamp(tenant.id, STAMP_CONNECTED, 0, peer=peer))
            error = swap.connect_unix(new, endpoint.path, caller.owner(), caller.waiting)
            if error:
                new.close()
                return Answer(error=error)
        except BaseException:
            new.close()
            raise
        return self.sockets.replace(caller.call, sock, new, Answer())

    def _move(
        self, caller: Caller, tenant: TenantView, sock: socket.socket, stamp: Stamp, endpoint: Endpoint
    ) -> Action:
        """Replace an unbound socket by one in the endpoint's netns; the call then proceeds, and the hooks decide."""
        if endpoint.place == stamp.place or sock.getsockname()[1]:
            return PROCEED
        new = self.sockets.make(tenant, sock.family, sock.type, place=endpoint.place)
        try:
            swap.carry_options(sock, new)
        except BaseException:
            new.close()
            raise
        return self.sockets.replace(caller.call, sock, new, PROCEED)


def _listen_unstamped(caller: Caller, sock: socket.socket) -> Action:
    """listen(2) on a socket without a stamp: the container's own one, one that was passed in, or an accepted one."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return PROCEED  # peers on a unix socket see who called it (SO_PEERCRED)
    if sock.type == socket.SOCK_STREAM and not any(sock.getsockopt(socket.SOL_SOCKET, linux.SO_NETNS_COOKIE, 8)):
        # the option hook has 0 for an accepted socket of a container's, and the kernel for none
        connected = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != TCP_CLOSED
        return Answer(error=errno.EINVAL if connected else errno.EADDRNOTAVAIL)
    sock.listen(sysctl.follow_listening(sock, caller.number(1), ()))
    return Answer()


def _takes_ipv4(sock: socket.socket) -> bool:
    """Would this socket take IPv4 as well, bound to [::]? See IPV6_V6ONLY in ipv6(7)."""
    return sock.family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def _may_be_family(name: str, caller: Caller) -> bool:
    """Would the filter trap this call for a socket of AF_GRAFT? If not, its state need not be read."""
    tests = FAMILY_TRAPS[name]
    return any(trap.holds(caller.args) for trap in tests) if tests else traps.NUMBER.holds(caller.args)


def _option(caller: Caller, _tenant: TenantView, sock: socket.socket, _stamp: Stamp) -> Action:
    """setsockopt(2) and getsockopt(2)."""
    return _ignore_option(caller) if sock.family == socket.AF_UNIX else PROCEED


def _ignore_option(caller: Caller) -> Action:
    """Accept a TCP or IP option of a unix socket without effect. getsockopt() reads 0, except for TCP_MAXSEG."""
    if caller.call.nr == linux.NR_GETSOCKOPT:
        segment = (caller.number(1), caller.number(2)) == (socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        value = (LOOPBACK_SEGMENT if segment else 0).to_bytes(4, "little")
        caller.write_value(caller.args[3], caller.args[4], value)
    return Answer()


def _show(caller: Caller, _tenant: TenantView, sock: socket.socket, stamp: Stamp) -> Action:
    """getsockname(2) and getpeername(2) of a unix socket that the program takes for an internet one."""
    if sock.family != socket.AF_UNIX:
        return PROCEED
    if caller.call.nr == linux.NR_GETPEERNAME:
        if not stamp.flags & STAMP_CONNECTED:
            return Answer(error=errno.ENOTCONN)
        raw, port = stamp.peer
    elif stamp.flags & STAMP_INGRESS:
        raw, port = stamp.local
    else:  # a client's own address: the wildcard
        raw, port = (ANY4, 0) if Address(stamp.peer[0]).v4 else (ANY6, 0)
    caller.write_value(caller.args[1], caller.args[2], target.sockaddr(Address(raw), port))
    return Answer()


def _firewall_error(caller: Caller, sock: socket.socket) -> int:
    """The errno of getsockopt() of a number among the firewall's: the kernel's, where it has no such option."""
    if caller.number(1) == socket.IPPROTO_IPV6 and sock.family == socket.AF_INET:
        return errno.EOPNOTSUPP
    return errno.EPERM if traps.firewall_has(caller.args) else errno.ENOPROTOOPT
