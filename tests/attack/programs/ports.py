"""Ports and addresses that are not the container's."""

import contextlib
import ctypes
import resource
import socket

from .common import CHANCES, CLIENT, HOST, HOST6, LO, SECOND, TCP, UDP, V4, V6, accepted, attack, disconnect, libc


@attack
def bind_a_port_of_the_hosts():
    socket.socket(V4, TCP).bind(("0.0.0.0", 22))


def serve_at(family, address, asked, port=8099, protocol=0):
    """Listen at an address of the host's, at a port that nobody publishes: it is not there on the host."""
    with socket.socket(family, TCP, protocol) as server:
        server.bind((address, port))
        server.listen()
        socket.create_connection((asked, port), 5).close()


@attack
def serve_at_an_address_of_the_hosts():
    serve_at(V4, HOST, HOST)


@attack
def serve_at_an_address_of_the_hosts_6():
    serve_at(V6, HOST6, HOST6)


@attack
def serve_at_a_mapped_address():
    serve_at(V6, f"::ffff:{HOST}", HOST)


@attack
def datagrams_at_an_address_of_the_hosts():
    with socket.socket(V4, UDP) as server, socket.socket(V4, UDP) as client:
        server.bind((HOST, 8099))
        client.connect((HOST, 8099))
        client.send(b"x")
        client.settimeout(5)
        client.recv(9)


@attack
def serve_at_an_endpoints_real_address():
    serve_at(V4, SECOND, SECOND, port=8081)


@attack
def listen_without_bind():
    s = socket.socket(V4, TCP)
    s.listen()
    return s.getsockname()[0]


@attack
def listen_without_bind_6():
    s = socket.socket(V6, TCP)
    s.listen()
    return s.getsockname()[0]


@attack
def accepted_listens():
    sock, _peer = accepted()
    sock.listen()


@attack
def accepted_listens_after_disconnecting():
    """The kernel would take a port of the host's for it, and nobody counts accepted sockets."""
    sock, _peer = accepted()
    disconnect(sock)
    sock.listen()


@attack
def listen_on_no_socket():
    """A call that proceeds is one under which another thread may swap the descriptor."""
    with open("/dev/null") as file:
        if libc.listen(file.fileno(), 1):
            raise OSError(ctypes.get_errno(), "listen")


@attack
def listen_after_a_failed_bind():
    s = socket.socket(V4, TCP)
    with contextlib.suppress(OSError):
        s.bind((HOST, 8099))
    s.listen()
    with socket.socket(V4, TCP) as c:
        c.settimeout(1)
        c.connect((HOST, s.getsockname()[1]))


@attack
def bind_again_after_disconnecting():
    s = socket.socket(V4, UDP)
    s.connect((CLIENT, 9001))
    disconnect(s)
    s.bind((HOST, 22))


@attack
def bind_twice():
    """The second bind fails, and may not change what the first has made of the socket."""
    s = socket.socket(V4, UDP)
    s.bind(("127.0.0.1", 0))
    with contextlib.suppress(OSError):
        s.bind(("0.0.0.0", 0))
    s.connect((HOST, 9102))
    s.send(b"spoofed")


@attack
def v6only_after_autobind():
    """The kernel refuses the option, and a rule for [::] must not become one for both families."""
    s = socket.socket(V6, UDP)
    with contextlib.suppress(OSError):
        s.sendto(b"", ("::1", 9))
    with contextlib.suppress(OSError):
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    disconnect(s)
    s.bind(("::", 54))


@attack
def mptcp():
    serve_at(V4, HOST, HOST, protocol=262)


@attack
def mptcp_connects_to_the_hosts_loopback():
    socket.socket(V4, TCP, 262).connect(("127.0.0.1", 9101))


@attack
def accepted_socket_turns_round():
    s, _ = accepted()
    disconnect(s)
    s.bind((HOST, 22))


@attack
def accepted_socket_connects():
    s, _ = accepted()
    disconnect(s)
    s.connect((HOST, 9100))


@attack
def reuseport_with_the_host():
    s = socket.socket(V4, TCP)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind(("0.0.0.0", 9100))
    s.listen()
    s.settimeout(0.05)
    for _ in range(8):
        with socket.socket(V4, TCP) as c, contextlib.suppress(OSError):
            c.connect((HOST, 9100))
    with contextlib.suppress(TimeoutError):
        s.accept()
        return "OK"
    return "NEVER"


@attack
def reuseport_with_another_container():
    s = socket.socket(V4, TCP)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind((HOST, 9300))
    s.listen()


def by_chance(bind):
    """The host's server has SO_REUSEADDR; a port that the kernel chooses must never be that one."""
    for _ in range(CHANCES):
        with socket.socket(V4, UDP) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with contextlib.suppress(OSError):
                bind(s)
            if s.getsockname()[1] == 40000:
                return "OK"
    return "NEVER"


@attack
def udp_port_by_chance():
    return by_chance(lambda s: s.bind(("0.0.0.0", 0)))


@attack
def udp_port_by_chance_autobound():
    return by_chance(lambda s: s.sendto(b"", LO))


@attack
def fork_bomb_of_sockets():
    """Up to the limit, and no further."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    kept: list[socket.socket] = []
    while len(kept) < 5000:
        kept.append(socket.socket(V4, UDP))


@attack
def sockets_are_given_back():
    for _ in range(1000):
        socket.socket(V4, UDP).close()
    return "SERVED"
