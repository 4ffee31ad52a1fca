"""The address family AF_GRAFT (include/graft.h) for programs written to it, on a kernel that does not have it.

Theory of operation

A socket of the family is an ordinary grafted socket with a state beside its stamp: the endpoint that it is bound to,
the setsockopt() calls that wait, and two switches. The state is in the kernel's socket storage (the map `families`),
so it goes where the socket goes and ends with it. Until bind() the socket is a stand-in, of the internet family that
the endpoint `default-source` has. bind() binds the stand-in to the endpoint, or replaces it by a socket that fits
(graft/trap/swap.py).

What a program sees (AF_GRAFT's README, include/graft.h):

socket()      SOCK_STREAM and SOCK_DGRAM. The descriptor is between FAMILY_FIRST and FAMILY_LAST if one of them is
              free and safe to take (graft/trap/numbers.py), because the filter knows sockets of the family by that
              (graft/kernel/traps.py).
bind()        Takes a sockaddr_gr with the name of an endpoint in the tenant's table. Fails with ENOENT, EAFNOSUPPORT,
              or EINVAL if the address is too short or the socket is bound.
any by name   Fails with EACCES if the endpoint is not there for that (allow(); docs/af_graft.md has the table).
connect()     Takes a sockaddr_gr, and connects to the endpoint's address. Other addresses work as on any socket of
              the endpoint's family. An unbound socket is bound to `default-source` first, or fails with ENOENT.
sendto()      As connect(). If an unbound datagram socket sends to an internet address, the BPF hook decides.
getsockname() Returns the endpoint's name, or with GRAFT_NAME_TRANSPARENT on the host socket's address.
options       Those of level IPPROTO_GRAFT are implemented here. Those of other levels fail before bind() with
              EADDRNOTAVAIL, or wait for it if GRAFT_SO_DELAYED is on. SOL_SOCKET applies to the stand-in at once.

What still fails: on a descriptor outside FAMILY_FIRST to FAMILY_LAST (after dup(2), or if all are taken), the filter
traps only calls with a sockaddr_gr or level IPPROTO_GRAFT.
"""

import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from graft.kernel import linux
from graft.kernel.foreign import own_address
from graft.kernel.maps import Map
from graft.kernel.stamps import (
    FAMILY_SIZE,
    STAMP_FAMILY,
    STAMP_NAMED,
    STAMP_PERMIT,
    STAMP_SOURCE,
    STAMP_STAYS,
    Stamp,
)
from graft.kernel.traps import SOCKADDR_GR
from graft.rules.address import ANY6, parse_address
from graft.rules.endpoint import DEFAULT_SOURCE, Endpoint
from graft.trap import deputy, swap, target
from graft.trap.actions import PROCEED, Action, Answer, Inject
from graft.trap.caller import Caller
from graft.trap.sockets import Sockets, TenantView

GRAFT_SO_DELAYED = 1
GRAFT_SO_DELAYED_EXECUTE = 2
GRAFT_SO_DELAYED_RESULT = 3
GRAFT_SO_TRANSPARENT = 4
GRAFT_NAME_TRANSPARENT = 5
SSO_TRANS_SIZE = 128
# SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF and _EBPF: the value has a pointer or a descriptor, which
# in graftd's process would mean something else
POINTERS = (26, 50, 51, 52)
QUEUE_MAX = 64
VALUE_MAX = 116
DATAGRAM_MAX = 65507
DELAYED, TRANSPARENT_NAME = 1, 2
HEAD = struct.Struct("=16sII")
WAITING = struct.Struct(f"=iiiHH{VALUE_MAX}s")
RESULT = struct.Struct("=iii")
TRANS = struct.Struct("=iiI")
INT = struct.Struct("=i")


class Option:
    """A setsockopt() that waits for bind(), or has been carried out (@done). @result: 0 or a negative errno."""

    def __init__(self, level: int, name: int, value: bytes, *, result: int = 0, done: bool = False) -> None:
        self.level = level
        self.name = name
        self.value = value
        self.result = result
        self.done = done


@dataclass
class State:
    """struct graft_family (csrc/abi.h): the endpoint's name, two switches in `flags`, and the options that wait."""

    name: str = ""
    flags: int = 0
    queue: list[Option] = field(default_factory=list)

    def pack(self) -> bytes:
        """The bytes of struct graft_family, FAMILY_SIZE of them."""
        head = HEAD.pack(self.name.encode(errors="surrogateescape"), self.flags, len(self.queue))
        queue = (WAITING.pack(o.level, o.name, o.result, len(o.value), o.done, o.value) for o in self.queue)
        return (head + b"".join(queue)).ljust(FAMILY_SIZE, b"\0")

    @classmethod
    def unpack(cls, raw: bytes) -> "State":
        """The state in the bytes of struct graft_family."""
        name, flags, count = HEAD.unpack_from(raw)
        state = cls(name.split(b"\0", 1)[0].decode(errors="surrogateescape"), flags)
        for at in range(min(count, QUEUE_MAX)):
            level, option, result, length, done, value = WAITING.unpack_from(raw, HEAD.size + at * WAITING.size)
            state.queue.append(Option(level, option, value[:length], result=result, done=bool(done)))
        return state


class Family:
    """The calls on sockets of AF_GRAFT. If a method raises OSError, the target's call fails with that errno.

    Any worker thread may call it (graft/trap/listeners.py).
    """

    def __init__(self, sockets: Sockets, families: Map) -> None:
        self.sockets = sockets
        self.families = families

    def state(self, sock: socket.socket) -> State | None:
        """The state of a socket; None if it is not of AF_GRAFT."""
        raw = self.families.get(sock.fileno().to_bytes(4, "little"))
        return None if raw is None else State.unpack(raw)

    def put(self, sock: socket.socket, state: State) -> None:
        """Write the state of a socket into the socket storage."""
        self.families.update(sock.fileno().to_bytes(4, "little"), state.pack())

    def make(self, tenant: TenantView, kind: int, flags: int) -> socket.socket:
        """Make a socket of the family, bound to no endpoint. @kind and @flags are socket(2)'s."""
        source = tenant.endpoints.get(DEFAULT_SOURCE)
        inet = source if source and source.address else None
        family = socket.AF_INET6 if inet and inet.kind == "ipv6" else socket.AF_INET
        place = inet.place if inet else tenant.place
        made = self.sockets.make(tenant, family, kind, place=place, flags=flags, stamp_flags=STAMP_FAMILY)
        try:
            self.put(made, State())
        except BaseException:
            made.close()
            raise
        return made

    def create(self, tenant: TenantView, kind: int, flags: int) -> Action:
        """socket(2) with AF_GRAFT: inject a stand-in, at a number of the family's if one is free."""
        made = self.make(tenant, kind, flags & socket.SOCK_NONBLOCK)
        return Inject(made.detach(), bool(flags & socket.SOCK_CLOEXEC), numbered=True)

    # -- bind --

    def bind(self, caller: Caller, tenant: TenantView, sock: socket.socket, state: State) -> Action:
        """bind(2) to the endpoint that a sockaddr_gr names."""
        length = caller.number(2)
        name, raw = caller.read_name(caller.args[1], length)
        if length < SOCKADDR_GR:
            return Answer(error=errno.EINVAL)
        if int.from_bytes(raw[:2], "little") != linux.AF_GRAFT or name is None:
            return Answer(error=errno.EAFNOSUPPORT)
        endpoint = tenant.endpoints.get(name.endpoint)
        if endpoint is None:
            return Answer(error=errno.ENOENT)
        if state.name:
            return Answer(error=errno.EINVAL)
        new = self.attach(caller.owner(), tenant, sock, state, endpoint)
        return self._done(caller, sock, new, Answer())

    def attach(
        self,
        who: target.Owner,
        tenant: TenantView,
        sock: socket.socket,
        state: State,
        endpoint: Endpoint,
        *,
        leave: bool = False,
    ) -> socket.socket:
        """Bind @sock to @endpoint, or if it does not fit, a new socket with its options. Returns the bound socket.

        @who: who gets a unix endpoint's file. Options that waited are carried out first. Writes @state. If the
        returned socket is a new one, the caller owns it. @leave: it is bound to connect or send from there, and not
        to serve. Raises OSError.
        """
        stream = sock.type == socket.SOCK_STREAM and endpoint.address is not None
        if leave and endpoint.address:
            # a datagram socket takes what anybody sends to its port: at a fixed one it is a server
            allow(endpoint, tenant, leave=True, serve=not stream and endpoint.port != 0)
        elif not (stream and endpoint.leaves):  # it may connect from there, and STAMP_SOURCE says: not listen
            allow(endpoint, tenant, serve=True)
        new = self._fitting(tenant, sock, endpoint)
        try:
            for option in state.queue:
                if new is not sock or not option.done:
                    _carry_out(new, option)
            if endpoint.address is None:
                tenant.bound_path(endpoint.path, swap.bind_unix(new, endpoint, who))
            else:
                self._bind_inet(tenant, new, endpoint)
            state.name = endpoint.name
            self.put(new, state)
        except BaseException:
            if new is not sock:
                new.close()
            else:
                self.put(sock, state)  # keeps the results of the options that were carried out
            raise
        return new

    def _fitting(self, tenant: TenantView, sock: socket.socket, endpoint: Endpoint) -> socket.socket:
        """Returns @sock if it has the endpoint's family and netns, else a new socket with the options of @sock."""
        families = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
        family = families.get(endpoint.kind, socket.AF_UNIX)
        stamp = self.sockets.stamps.get(sock.fileno())
        place = stamp.place if stamp else 0
        if sock.family == family and (family == socket.AF_UNIX or place == endpoint.place):
            return sock
        new = self.sockets.make(tenant, family, sock.type, place=endpoint.place, stamp_flags=STAMP_FAMILY)
        swap.carry_options(sock, new)
        return new

    def _bind_inet(self, tenant: TenantView, sock: socket.socket, endpoint: Endpoint) -> None:
        assert endpoint.address is not None
        stamps = self.sockets.stamps
        before = stamps.get(sock.fileno()) or Stamp(tenant.id)
        real = (endpoint.address.raw, endpoint.port)
        if sock.getsockname()[1] and before.flags & STAMP_NAMED and before.local_real == real:
            return  # an earlier graftd bound it, and was killed before it answered
        flags = before.flags | STAMP_NAMED
        flags |= (0 if endpoint.serves else STAMP_SOURCE) | (0 if endpoint.leaves else STAMP_STAYS)
        stamps.put(sock.fileno(), before._replace(flags=flags, local_real=real))
        try:
            if endpoint.address.raw == ANY6:  # the endpoint is of IPv6 alone
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(target.host_address(endpoint.address, endpoint.port))
        except OSError:
            stamps.put(sock.fileno(), before)
            raise

    def _default_source(self, caller: Caller, tenant: TenantView, sock: socket.socket, state: State) -> socket.socket:
        """Bind an unbound socket to `default-source`, before connect() or sendto(). Returns the bound socket."""
        if state.name:
            return sock
        source = tenant.endpoints.get(DEFAULT_SOURCE)
        if source is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self.attach(caller.owner(), tenant, sock, state, source, leave=True)

    def _done(self, caller: Caller, old: socket.socket, new: socket.socket, then: Action) -> Action:
        return then if new is old else self.sockets.replace(caller.call, old, new, then)

    # -- connect and send --

    def connect(
        self,
        caller: Caller,
        tenant: TenantView,
        sock: socket.socket,
        state: State,
    ) -> Action:
        """connect(2) to an endpoint's name or to an internet address."""
        length = caller.number(2)
        name, raw = caller.read_name(caller.args[1], length)
        if int.from_bytes(raw[:2], "little") != linux.AF_GRAFT:
            new = self._default_source(caller, tenant, sock, state)
            return self._done(caller, sock, new, PROCEED)
        if name is None:
            return Answer(error=errno.EINVAL)
        endpoint = tenant.endpoints.get(name.endpoint)
        if endpoint is None:
            return Answer(error=errno.ENOENT)
        allow(endpoint, tenant, leave=True)  # before it is bound to `default-source`
        if endpoint.address is None:
            return self._connect_unix(caller, tenant, sock, endpoint)
        new = self._default_source(caller, tenant, sock, state)
        try:
            error = self.connect_inet(tenant, new, endpoint, caller.waiting)
        except BaseException:
            if new is not sock:
                new.close()
            raise
        return self._done(caller, sock, new, Answer(error=error))

    def _connect_unix(
        self,
        caller: Caller,
        tenant: TenantView,
        sock: socket.socket,
        endpoint: Endpoint,
    ) -> Action:
        new = self._fitting(tenant, sock, endpoint)
        try:
            error = self.connect_unix(new, endpoint, caller.owner(), caller.waiting)
            if new is not sock:
                self.put(new, self.state(sock) or State())
        except BaseException:
            if new is not sock:
                new.close()
            raise
        return self._done(caller, sock, new, Answer(error=error))

    def connect_unix(
        self, sock: socket.socket, endpoint: Endpoint, who: target.Owner, waiting: Callable[[], bool]
    ) -> int:
        """Connect @sock to an endpoint of type unix or local: swap.connect_unix(). Raises OSError: EACCES."""
        allow(endpoint, leave=True)
        return swap.connect_unix(sock, endpoint.path, who, waiting)

    def permit(self, tenant: TenantView, sock: socket.socket, endpoint: Endpoint, own: str = "") -> tuple[str, int]:
        """Note in the stamp of @sock that it may reach @endpoint. Returns the endpoint's address for connect().

        @own: the address it is bound to; with it, this does not wait for the socket's lock. Raises OSError: EACCES if
        the endpoint, or the one that the socket is bound to, is not there to leave from or to; EAFNOSUPPORT for
        another family, ENETUNREACH if the endpoint is in another netns, EADDRNOTAVAIL if the socket has a source on
        its private loopback and the endpoint is elsewhere.
        """
        assert endpoint.address is not None
        allow(endpoint, tenant, leave=True)
        if sock.family != (socket.AF_INET if endpoint.kind == "ipv4" else socket.AF_INET6):
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        stamps = self.sockets.stamps
        stamp = stamps.get(sock.fileno()) or Stamp(tenant.id)
        if stamp.flags & STAMP_STAYS:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if stamp.place != endpoint.place:  # the same address in another netns is another server
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        bound = parse_address(own or own_address(sock))
        if bound.loopback and not stamp.flags & STAMP_NAMED and not endpoint.address.loopback:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        real = (endpoint.address.raw, endpoint.port)
        stamps.put(sock.fileno(), stamp._replace(flags=stamp.flags | STAMP_PERMIT, peer=real, peer_real=real))
        return target.host_address(endpoint.address, endpoint.port)

    def connect_inet(
        self, tenant: TenantView, sock: socket.socket, endpoint: Endpoint, waiting: Callable[[], bool]
    ) -> int:
        """Connect @sock to the endpoint's address. Returns 0, or the errno for the target.

        A blocking socket waits for the connection, as long as @waiting() says that the target waits.
        """
        address = self.permit(tenant, sock, endpoint)
        flags = fcntl.fcntl(sock, fcntl.F_GETFL)
        try:
            fcntl.fcntl(sock, fcntl.F_SETFL, flags | os.O_NONBLOCK)
            sock.connect(address)
            return 0
        except BlockingIOError as error:
            if flags & os.O_NONBLOCK:
                return error.errno or errno.EINPROGRESS
        except OSError as error:
            return error.errno or errno.EIO
        finally:
            fcntl.fcntl(sock, fcntl.F_SETFL, flags)
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while waiting():
            if poll.poll(1000):
                # finishes as a blocking connect() does; reading SO_ERROR would not
                return sock.connect_ex(address)
        return errno.EINTR

    def sendto(self, caller: Caller, tenant: TenantView, sock: socket.socket, state: State) -> Action:
        """sendto(2) with an address of 18 bytes: send a datagram to an endpoint's name."""
        name, _ = caller.read_name(caller.args[4], caller.number(5))
        if name is None or name.family != linux.AF_GRAFT or sock.type != socket.SOCK_DGRAM:
            return PROCEED
        endpoint = tenant.endpoints.get(name.endpoint)
        if endpoint is None:
            return Answer(error=errno.ENOENT)
        allow(endpoint, tenant, leave=True)
        if caller.args[2] > DATAGRAM_MAX:
            return Answer(error=errno.EMSGSIZE)
        new = self._default_source(caller, tenant, sock, state)
        try:
            data = caller.read(caller.args[1], caller.args[2])
            flags = caller.number(3) | socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            if endpoint.address:
                address = self.permit(tenant, new, endpoint)
                count = new.sendto(data, flags, address)
            elif new.family != socket.AF_UNIX:
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            else:
                count = deputy.sendto(caller.owner(), new, data, flags, endpoint.path)
        except BaseException:
            if new is not sock:
                new.close()
            raise
        return self._done(caller, sock, new, Answer(count))

    # -- names and options --

    def getsockname(self, caller: Caller, _tenant: TenantView, _sock: socket.socket, state: State) -> Action:
        """getsockname(2): the endpoint's name; before bind() family 0 and no name."""
        if state.flags & TRANSPARENT_NAME:
            return PROCEED
        family = linux.AF_GRAFT if state.name else 0
        value = struct.pack("=H16s", family, state.name.encode(errors="surrogateescape"))
        caller.write_value(caller.args[1], caller.args[2], value)
        return Answer()

    def setsockopt(self, caller: Caller, _tenant: TenantView, sock: socket.socket, state: State) -> Action:
        """setsockopt(2): the options of level IPPROTO_GRAFT; before bind(), those of other levels wait or fail."""
        level, option = caller.number(1), caller.number(2)
        where, length = caller.args[3], caller.number(4)
        if level == socket.SOL_SOCKET:
            return PROCEED  # applies to the stand-in; if bind() replaces that, it carries the option over
        if level != linux.IPPROTO_GRAFT:
            if not state.flags & DELAYED:
                return PROCEED if state.name else Answer(error=errno.EADDRNOTAVAIL)
            if not 0 <= length <= VALUE_MAX:
                return Answer(error=errno.EINVAL if length < 0 else errno.ENOBUFS)
            return self._wait(sock, state, Option(level, option, caller.read(where, length)))
        if option in (GRAFT_SO_DELAYED, GRAFT_NAME_TRANSPARENT):
            if not where or not 0 <= length <= INT.size:
                return Answer(error=errno.EINVAL)
            bit = DELAYED if option == GRAFT_SO_DELAYED else TRANSPARENT_NAME
            (value,) = INT.unpack(caller.read(where, INT.size))
            state.flags = state.flags | bit if value > 0 else state.flags & ~bit
            self.put(sock, state)
            return Answer()
        if option == GRAFT_SO_DELAYED_EXECUTE:
            for waiting in state.queue:
                if not waiting.done:
                    _carry_out(sock, waiting)
            self.put(sock, state)
            return Answer()
        if option == GRAFT_SO_TRANSPARENT:
            if not where or not TRANS.size <= length <= SSO_TRANS_SIZE:
                return Answer(error=errno.EINVAL)
            raw = caller.read(where, length)
            inner_level, inner, size = TRANS.unpack_from(raw)
            if size > length - TRANS.size:
                return Answer(error=errno.EINVAL)
            wanted = Option(inner_level, inner, raw[TRANS.size : TRANS.size + size])
            if state.flags & DELAYED:
                return self._wait(sock, state, wanted)
            if not state.name:
                return Answer(error=errno.EADDRNOTAVAIL)
            _carry_out(sock, wanted)
            return Answer(error=-wanted.result)
        return Answer(error=errno.ENOPROTOOPT)

    def _wait(self, sock: socket.socket, state: State, option: Option) -> Action:
        if len(state.queue) >= QUEUE_MAX:
            return Answer(error=errno.ENOBUFS)
        state.queue.append(option)
        self.put(sock, state)
        return Answer()

    def getsockopt(self, caller: Caller, _tenant: TenantView, sock: socket.socket, state: State) -> Action:
        """getsockopt(2): the switches, and the results of the options that waited."""
        level, option = caller.number(1), caller.number(2)
        if level != linux.IPPROTO_GRAFT:
            return PROCEED if state.name or level == socket.SOL_SOCKET else Answer(error=errno.EADDRNOTAVAIL)
        if option in (GRAFT_SO_DELAYED, GRAFT_NAME_TRANSPARENT):
            bit = DELAYED if option == GRAFT_SO_DELAYED else TRANSPARENT_NAME
            # the length is not read, because programs do not always set it
            switch = INT.pack(bool(state.flags & bit))
            caller.write((caller.args[3], switch), (caller.args[4], INT.pack(INT.size)))
            return Answer()
        if option == GRAFT_SO_DELAYED_RESULT:
            return self._results(caller, sock, state)
        return Answer(error=errno.ENOPROTOOPT)

    def _results(self, caller: Caller, sock: socket.socket, state: State) -> Action:
        """GRAFT_SO_DELAYED_RESULT: the results of options carried out, as many as fit. Each is returned once."""
        room = INT.unpack(caller.read(caller.args[4], INT.size))[0]
        done = [option for option in state.queue if option.done]
        told = done[: max(room, 0) // RESULT.size]
        value = b"".join(RESULT.pack(option.level, option.name, option.result) for option in told)
        caller.write_value(caller.args[3], caller.args[4], value)
        state.queue = [option for option in state.queue if option not in told]
        self.put(sock, state)
        return Answer(error=0 if len(told) == len(done) else errno.ENOBUFS)


def _carry_out(sock: socket.socket, option: Option) -> None:
    """Carry out an option without graftd's capabilities. Its result is 0 or -errno."""
    option.done = True
    option.result = 0
    try:
        if option.level == socket.SOL_SOCKET and option.name in POINTERS:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        with linux.with_capabilities(0):
            sock.setsockopt(option.level, option.name, option.value)
    except OSError as error:
        option.result = -(error.errno or errno.EIO)


def allow(endpoint: Endpoint, tenant: TenantView | None = None, *, serve: bool = False, leave: bool = False) -> None:
    """Raise OSError (EACCES) if programs may not serve at @endpoint, or not connect and send to and from it.

    An address that a user without root has added gives no leave to a @tenant that has none by itself. Every way to
    use an endpoint by its name passes here, whoever asks: the family's calls, and the API's requests.
    """
    narrowed = bool(endpoint.by_user and endpoint.address and tenant and not (tenant.parent or tenant).egress_host)
    if (serve and not endpoint.serves) or (leave and (narrowed or not endpoint.leaves)):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
