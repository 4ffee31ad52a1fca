"""Who reaches a UDP socket, and whom its datagrams reach."""

import contextlib
import errno
import socket
import struct
import subprocess

import pytest

from graft.kernel import linux
from graft.kernel.stamps import OWN_TENANT
from graft.rules import slices
from graft.rules.limits import Limits
from tests.kernel.harness import TENANT_ID, World, isolated
from tests.kernel.test_hooks import disconnect, refused
from tests.kernel.test_numbers import held

V4, V6, TCP, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
LO = 25  # SO_BINDTODEVICE
HERE4, HERE6 = "192.0.2.7", "2001:db8::7"


def addresses(world: World) -> None:
    """Addresses of the host's that are no loopback, and egress to them."""
    for address in ("192.0.2.7/32", "192.0.2.8/32", "2001:db8::7/128", "2001:db8::8/128"):
        subprocess.run(("ip", "address", "add", address, "dev", "lo"), check=True)
    world.egress("192.0.2.0", 24)
    world.egress("239.0.0.0", 8)
    world.egress("2001:db8::", 32)


def others(world: World, family: int, address: str = "") -> socket.socket:
    """A UDP socket of the host's, bound to a port of the kernel's choice."""
    with world.outside():
        sock = socket.socket(family, UDP)
    sock.settimeout(5)
    sock.bind((address, 0))
    return sock


def hears(sock: socket.socket) -> bytes:
    """What has arrived; over the loopback that is when sendto() returns."""
    sock.settimeout(0)
    try:
        return sock.recv(99)
    except BlockingIOError:
        return b""


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_whom_it_has_sent_to_may_answer(world: World):
    """From any port of its, as TFTP's servers do, and nobody from another address; bound to port 0 or not at all."""
    addresses(world)
    for family, here in ((V4, HERE4), (V6, HERE6), (V6, f"::ffff:{HERE4}")):
        for bound in (False, True):
            peer = others(world, V4 if "." in here else V6, here.removeprefix("::ffff:"))
            second = others(world, peer.family, peer.getsockname()[0])
            stranger = others(world, peer.family, peer.getsockname()[0].replace("7", "8"))
            asker = world.sock(family, UDP)
            if bound:
                asker.bind(("::" if family == V6 else "0.0.0.0", 0))
            asker.sendto(b"?", (here, peer.getsockname()[1]))
            _, source = peer.recvfrom(9)
            stranger.sendto(b"stranger", source)
            assert hears(asker) == b""
            for one in (peer, second):
                one.sendto(b"answer", source)
                assert hears(asker) == b"answer"


@pytest.mark.kernel
@isolated
def test_a_connected_socket_sends_to_a_mapped_peer(world: World):
    """The kernel names the peer's real address to the hook of IPv4 for each send()."""
    addresses(world)
    server, client = world.sock(V4, UDP), world.sock(V6, UDP)
    server.bind(("127.0.0.1", 5000))
    client.connect(("::ffff:127.0.0.1", 5000))
    client.send(b"?")
    server.settimeout(5)
    told, source = server.recvfrom(9)
    assert (told, source) == (b"?", ("127.0.0.1", client.getsockname()[1]))
    server.sendto(b"answer", source)
    assert hears(client) == b"answer"
    peer = others(world, V4, HERE4)
    client = world.sock(V6, UDP)
    client.connect((f"::ffff:{HERE4}", peer.getsockname()[1]))
    client.send(b"?")
    assert peer.recv(9) == b"?"
    with refused(errno.ENETUNREACH):
        client.sendto(b"?", ("::ffff:203.0.113.1", 9))


@isolated
def test_a_server_ends_with_its_container(world: World):
    """Somebody else may have it (SCM_RIGHTS), and the rule that gave it its port has gone."""
    addresses(world)
    world.ingress(80, "0.0.0.0", 8080)
    world.ingress(80, "0.0.0.0", 8080, protocol=socket.IPPROTO_UDP)
    servers = {kind: world.sock(V4, kind) for kind in (TCP, UDP)}
    for sock in servers.values():
        sock.bind(("0.0.0.0", 80))
    servers[TCP].listen()
    with world.outside(), socket.create_connection((HERE4, 8080), 5):
        pass
    asker = others(world, V4, HERE4)
    asker.sendto(b"?", (HERE4, 8080))
    assert hears(servers[UDP]) == b"?"
    world.kernel.maps["tenants"].delete(TENANT_ID.to_bytes(4, "little"))
    asker.sendto(b"?", (HERE4, 8080))
    assert hears(servers[UDP]) == b""
    with world.outside(), pytest.raises(TimeoutError):
        socket.create_connection((HERE4, 8080), 1)


@isolated
def test_whoever_hears_a_group_may_answer(world: World):
    """As in mDNS and SSDP, whose answers come from hosts that nobody knew before."""
    addresses(world)
    asker, stranger = world.sock(V4, UDP), others(world, V4, "192.0.2.8")
    asker.sendto(b"?", (HERE4, 9))
    source = (HERE4, asker.getsockname()[1])
    stranger.sendto(b"stranger", source)
    assert hears(asker) == b""
    with contextlib.suppress(OSError):  # there is no route to it here
        asker.sendto(b"?", ("239.1.2.3", 1900))
    stranger.sendto(b"answer", source)
    assert hears(asker) == b"answer"


@isolated
def test_many_peers_may_answer(world: World):
    """A client of a thousand servers hears all; few strangers slip through."""
    addresses(world)
    asker, stranger = world.sock(V4, UDP), others(world, V4, "192.0.2.8")
    peers = [others(world, V4, HERE4) for _ in range(500)]
    for peer in peers:
        asker.sendto(b"?", peer.getsockname())
    source = (HERE4, asker.getsockname()[1])
    for peer in peers:
        peer.sendto(b"x", source)
        assert hears(asker) == b"x"
    heard = 0
    for _ in range(200):
        with others(world, V4, "192.0.2.8") as one:
            one.sendto(b"stranger", source)
        heard += bool(hears(asker))
    assert heard < 20
    stranger.close()


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_without_egress_nothing_arrives(world: World):
    addresses(world)
    world.tenant(0)
    for family, here in ((V4, HERE4), (V6, HERE6)):
        asker = world.sock(family, UDP)
        with refused(errno.ENETUNREACH):
            asker.sendto(b"?", ("198.51.100.1" if family == V4 else "2001:db9::1", 9))
        port = asker.getsockname()[1]
        assert port, "the kernel binds it before the hook runs"
        for address in (here, "127.0.0.1" if family == V4 else "::1"):
            with others(world, family) as stranger:
                stranger.sendto(b"stranger", (address, port))
            assert hears(asker) == b""


@isolated
def test_a_bind_that_the_kernel_refuses_opens_nothing(world: World):
    """The hook has allowed it, and noted it, before the kernel looks at the family."""
    addresses(world)
    world.tenant(0)
    world.ingress(53, "0.0.0.0", 5353, protocol=socket.IPPROTO_UDP)
    for address, port in (("127.0.0.1", 5000), ("0.0.0.0", 53)):
        asker = world.sock(V4, UDP)
        name = struct.pack("=HH4s8x", 99, socket.htons(port), socket.inet_aton(address))
        assert linux.libc.bind(asker.fileno(), name, len(name)) < 0
        with refused(errno.ENETUNREACH):
            asker.sendto(b"?", ("198.51.100.1", 9))
        with others(world, V4) as stranger:
            stranger.sendto(b"stranger", (HERE4, asker.getsockname()[1]))
        assert hears(asker) == b""


@isolated
def test_it_talks_with_its_own_loopback(world: World):
    """Without a bind, bound to port 0 of the wildcard, connected or not; and so do two such sockets with each other."""
    for family, loopback, wildcard in ((V4, "127.0.0.1", "0.0.0.0"), (V6, "::1", "::")):
        for kind in ("private", "wildcard"):
            server = world.sock(family, UDP)
            if family == V6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.bind((loopback, 5300) if kind == "private" else (wildcard, 0))
            to = (loopback, server.getsockname()[1])
            for bind in (False, True):
                for connect in (False, True):
                    client = world.sock(family, UDP)
                    if bind:
                        client.bind((wildcard, 0))
                    if connect:
                        client.connect(to)
                    client.send(b"?") if connect else client.sendto(b"?", to)
                    data, source = server.recvfrom(9)
                    assert data == b"?"
                    server.sendto(b"answer", source)
                    assert client.recv(9) == b"answer", (family, kind, bind, connect)
                    client.close()
            server.close()


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_server_of_the_host_on_the_device_lo(world: World):
    """A look-up without a device does not find it, and it would receive what is sent to the slices."""
    for family, loopback in ((V4, "127.0.0.1"), (V6, "::1")):
        wildcard = "0.0.0.0" if family == V4 else "::"
        with world.outside():
            stream, datagrams = socket.socket(family, TCP), socket.socket(family, UDP)
        for sock in (stream, datagrams):
            if family == V6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.SOL_SOCKET, LO, b"lo")
            sock.bind((wildcard, slices.SLICE_PORT_BASE | 80))
        stream.listen()
        with refused(errno.ECONNREFUSED):
            world.sock(family).connect((loopback, 80))
        connected = world.sock(family, UDP)
        connected.connect((loopback, 80))
        for send in (
            lambda connected=connected: connected.send(b"x"),
            lambda family=family, loopback=loopback: world.sock(family, UDP).sendto(b"x", (loopback, 80)),
        ):
            with refused(errno.EPERM):
                send()
        assert hears(datagrams) == b""
        with world.sock(family) as own:
            own.bind((loopback, 81))
            own.listen()
            world.sock(family).connect((loopback, 81))


@isolated
def test_nobody_else_gets_what_was_for_the_containers_server(world: World):
    """The server is gone, the client is still connected, and a program of the host has the port."""
    for loopback, family in (("127.0.0.1", V4), ("::1", V6)):
        wildcard = "0.0.0.0" if family == V4 else "::"
        server = world.sock(family, UDP)
        server.bind((wildcard, 0))
        port = server.getsockname()[1]
        client, bound = world.sock(family, UDP), world.sock(family, UDP)
        client.connect((loopback, port))
        bound.bind((wildcard, 0))
        bound.connect((loopback, port))
        client.send(b"own")
        assert server.recv(9) == b"own"
        server.close()
        with world.outside():
            host = socket.socket(family, UDP)
        host.bind((wildcard, port))
        for sock in (client, bound):
            with refused(errno.EPERM):
                sock.send(b"secret")
        assert hears(host) == b""


@isolated
def test_a_closed_port_of_the_loopback(world: World):
    """As on any host: TCP is refused, a datagram is answered by ICMP."""
    for family, loopback in ((V4, "127.0.0.1"), (V6, "::1")):
        with refused(errno.ECONNREFUSED):
            world.sock(family).connect((loopback, 80))
        client = world.sock(family, UDP)
        client.connect((loopback, 80))
        client.send(b"x")
        with refused(errno.ECONNREFUSED):
            client.recv(9)
        disconnect(client)
    assert world.kernel.counters(TENANT_ID) == {}


@isolated
def test_ports_of_the_host_are_counted(world: World):
    """UDP by bind, connect and send, each once for a socket; what is beyond the limit is refused."""
    world.kernel.limit(TENANT_ID, Limits(ports=3))
    world.egress("127.0.0.0", 8)
    world.egress("192.0.2.0", 24)
    bound, connected, sent, more = (world.sock(V4, UDP) for _ in range(4))
    bound.bind(("0.0.0.0", 0))
    with contextlib.suppress(OSError):  # no route
        connected.connect(("192.0.2.1", 9))
    for _ in range(2):
        with contextlib.suppress(OSError):
            sent.sendto(b"x", ("127.0.0.1", 9))
    assert held(world) == held(world, OWN_TENANT) == 3
    with refused(errno.EADDRINUSE):
        more.bind(("0.0.0.0", 0))
    with refused(errno.EADDRNOTAVAIL):
        more.connect(("192.0.2.1", 9))
    assert more.getsockname()[1] == 0
    with refused(errno.ENOBUFS):
        more.sendto(b"x", ("127.0.0.1", 9))
    bound.close()
    more.sendto(b"x", ("127.0.0.1", 9))
    for sock in (connected, sent, more):
        sock.close()
    assert held(world) == held(world, OWN_TENANT) == 0
