"""What is asked at the loopback comes from the loopback and is answered from it, wherever a UDP server really is."""

import errno
import socket
import subprocess

import pytest

from graft.rules import tables
from tests.kernel.harness import World, isolated
from tests.kernel.test_datagrams import hears, others
from tests.kernel.test_hooks import disconnect, refused

V4, V6, TCP, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
OWN4, OWN6, HOST4 = "192.0.2.7", "2001:db8::7", "192.0.2.8"


def own(world: World, own4: str = OWN4, own6: str = "::") -> None:
    """Give the tenant addresses of its own, from which it leaves; the host has another one."""
    subprocess.run(("ip", "address", "add", f"{HOST4}/32", "dev", "lo"), check=True)
    world.tenant(tables.TENANT_EGRESS, own4, own6)
    for address in {own4, own6} - {"::"}:
        world.own(address)
        world.egress("::" if ":" in address else "0.0.0.0", 0, address)


def talk(server: socket.socket, client: socket.socket, loopback: str, *, mapped: bool = False) -> None:
    """Ask and answer twice, by sendto() and connected: each sees the loopback, and the port that the other bound."""
    to = (f"::ffff:{loopback}" if mapped else loopback, server.getsockname()[1])
    seen = f"::ffff:{loopback}" if server.family == V6 and ":" not in loopback else loopback
    for connect in (False, True):
        if connect:
            client.connect(to)
            assert client.getpeername()[:2] == to
            assert client.getsockname()[0] == to[0]
            client.send(b"?")
        else:
            client.sendto(b"?", to)
        data, source = server.recvfrom(9)
        assert (data, source[:2]) == (b"?", (seen, client.getsockname()[1]))
        server.sendto(b"!", source)
        data, source = client.recvfrom(9)
        assert (data, source[:2]) == (b"!", to)


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_connected_socket_of_ipv6_whose_peer_is_of_ipv4(world: World):
    """As Java's DatagramSocket is. The kernel names the peer for the hook, as connect() has translated it."""
    world.ingress(53, "0.0.0.0", 5353, protocol=socket.IPPROTO_UDP)
    world.egress(HOST4, 32)
    subprocess.run(("ip", "address", "add", f"{HOST4}/32", "dev", "lo"), check=True)
    world.know()
    for address, port in (("127.0.0.1", 5000), ("0.0.0.0", 53), ("0.0.0.0", 0)):
        server, client = world.sock(V4, UDP), world.sock(V6, UDP)
        server.bind((address, port))
        talk(server, client, "127.0.0.1", mapped=True)
        other = world.sock(V4, UDP)
        other.bind(("127.0.0.1", 6000))
        client.sendto(b"other", ("::ffff:127.0.0.1", 6000))
        assert other.recv(9) == b"other"
        disconnect(client)
        server.close()
        other.close()
    peer, client = others(world, V4, HOST4), world.sock(V6, UDP)
    client.connect((f"::ffff:{HOST4}", peer.getsockname()[1]))
    client.send(b"?")
    data, source = peer.recvfrom(9)
    peer.sendto(b"!", source)
    assert (data, client.recvfrom(9)[1][:2]) == (b"?", (f"::ffff:{HOST4}", peer.getsockname()[1]))


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_dual_stack_socket_has_both_loopbacks(world: World):
    """sendto() of ::1 does not become a mapped address, for which udpv6_sendmsg() has ENOTSUPP (524)."""
    for port in (53, 0):
        for client, loopback, bind in (
            (world.sock(V4, UDP), "127.0.0.1", None),
            (world.sock(V6, UDP), "::1", None),
            (world.sock(V6, UDP), "::1", ("::1", 0)),
            (world.sock(V6, UDP), "::1", ("::", 54)),
        ):
            with world.sock(V6, UDP) as server, client:
                server.bind(("::", port))
                if bind:
                    client.bind(bind)
                talk(server, client, loopback)
    with world.sock(V4, UDP) as alone, world.sock(V6, UDP) as client:
        alone.bind(("127.0.0.1", 53))
        client.sendto(b"?", ("::1", 53))
        client.connect(("::1", 53))
        client.send(b"?")
        assert hears(alone) == b""


@isolated
def test_a_dual_stack_bind_meets_those_of_one_family(world: World):
    """Both orders; SO_REUSEPORT lets all have the port. Nobody from outside reaches it."""
    pairs = (("127.0.0.1", "::"), ("::", "127.0.0.1"), ("::1", "::"), ("::", "::1"), ("::", "0.0.0.0"), ("::", "::"))
    for first, second in pairs:
        for reuse in (False, True):
            with world.sock(V6 if ":" in first else V4, UDP) as one, world.sock(V6 if ":" in second else V4, UDP) as two:
                for sock in (one, two):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
                one.bind((first, 53))
                if reuse:
                    two.bind((second, 53))
                    continue
                with refused(errno.EADDRINUSE):
                    two.bind((second, 53))
    with world.sock(V6, UDP) as server, others(world, V4) as stranger:
        server.bind(("::", 53))
        real = int(world.real("-uln").split("*:")[1].split()[0])
        stranger.sendto(b"x", ("127.0.0.1", real))
        assert hears(server) == b""


@isolated
def test_a_server_at_an_address(world: World):
    """Of the container's own, of the host's by a rule, or published at another port; and clients of every kind."""
    own(world, own6=OWN6)
    world.ingress(54, HOST4, 5454, protocol=socket.IPPROTO_UDP)
    world.ingress(55, "0.0.0.0", 5555, protocol=socket.IPPROTO_UDP)
    for family, loopback, wildcard in ((V4, "127.0.0.1", "0.0.0.0"), (V6, "::1", "::")):
        for port in (53, 54, 55, 0):
            for bind in (None, (wildcard, 0), (wildcard, 1053), (loopback, 0)):
                with world.sock(family, UDP) as server, world.sock(family, UDP) as client:
                    if family == V6:
                        for sock in (server, client):
                            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    server.bind((wildcard, port))
                    if bind:
                        client.bind(bind)
                    talk(server, client, loopback)


@isolated
def test_a_server_that_is_bound_to_an_address_is_not_at_the_loopback(world: World):
    own(world)
    server, client = world.sock(V4, UDP), world.sock(V4, UDP)
    server.bind((OWN4, 53))
    client.sendto(b"?", ("127.0.0.1", 53))
    assert hears(server) == b""
    client.sendto(b"?", (OWN4, 53))
    assert server.recvfrom(9) == (b"?", (OWN4, client.getsockname()[1]))


@isolated
def test_a_server_with_an_address_answers_whoever_asked(world: World):
    """An unconnected client of the host's has the container's own address as its source: the kernel chose it."""
    own(world)
    server = world.sock(V4, UDP)
    server.bind(("0.0.0.0", 53))
    for asker in (others(world, V4), others(world, V4, HOST4)):
        asker.sendto(b"?", (OWN4, 53))
        _, source = server.recvfrom(9)
        server.sendto(b"!", source)
        assert asker.recvfrom(9) == (b"!", (OWN4, 53))
    with others(world, V4, OWN4) as other:
        server.sendto(b"?", other.getsockname())
        assert hears(other) == b""


@isolated
def test_with_an_address_a_socket_bound_to_port_0_connects(world: World):
    own(world)
    peer = others(world, V4, HOST4)
    client = world.sock(V4, UDP)
    client.bind(("0.0.0.0", 0))
    name = ("0.0.0.0", client.getsockname()[1])
    assert name[1]
    client.connect(peer.getsockname())
    assert client.getsockname() == (OWN4, name[1])
    client.send(b"?")
    _, source = peer.recvfrom(9)
    assert source == client.getsockname()
    peer.sendto(b"!", source)
    assert client.recv(9) == b"!"
    with world.sock(V4, UDP) as second, others(world, V4) as stranger:
        second.bind(("0.0.0.0", 0))
        stranger.sendto(b"x", (OWN4, second.getsockname()[1]))
        assert hears(second) == b""


@isolated
def test_names_of_a_socket_that_is_not_connected_any_more(world: World):
    for family, loopback, none in ((V4, "127.0.0.1", "0.0.0.0"), (V6, "::1", "::"), (V6, "::ffff:127.0.0.1", "::")):
        for kind in (TCP, UDP):
            with world.sock(family, kind) as server, world.sock(family, kind) as client:
                server.bind((loopback, 80))
                if kind == TCP:
                    server.listen()
                client.connect((loopback, 80))
                disconnect(client)
                assert client.getsockname()[0] == none
                with refused(errno.ENOTCONN):
                    client.getpeername()
                client.connect((loopback, 80))
                assert client.getsockname()[0] == loopback


@isolated
def test_a_socket_of_tcp_that_was_disconnected_goes_elsewhere(world: World):
    """Its address of the slice is not its own: it was lent to it by connect()."""
    subprocess.run(("ip", "address", "add", f"{HOST4}/32", "dev", "lo"), check=True)
    world.egress("192.0.2.0", 24)
    inside, client = world.sock(), world.sock()
    inside.bind(("127.0.0.1", 80))
    inside.listen()
    with world.outside():
        outside = socket.create_server((HOST4, 0))
    for to in (("127.0.0.1", 80), outside.getsockname(), ("127.0.0.1", 80)):
        client.connect(to)
        assert client.getpeername() == to
        disconnect(client)
    client.bind(("127.0.0.1", 81))
    assert client.getsockname() == ("127.0.0.1", 81)


@isolated
def test_the_wildcard_as_a_destination_is_this_host(world: World):
    for family, wildcard, loopback in ((V4, "0.0.0.0", "127.0.0.1"), (V6, "::", "::1")):
        for kind in (TCP, UDP):
            with world.sock(family, kind) as server, world.sock(family, kind) as client:
                server.bind((loopback, 80))
                if kind == TCP:
                    server.listen()
                client.connect((wildcard, 80))
                assert (client.getsockname()[0], client.getpeername()[:2]) == (loopback, (loopback, 80))
    with world.sock(V4, UDP) as server, world.sock(V6, UDP) as client:
        server.bind(("127.0.0.1", 80))
        client.bind(("::ffff:127.0.0.1", 0))
        client.connect(("::", 80))
        assert client.getpeername()[:2] == ("::ffff:127.0.0.1", 80)
        client.send(b"?")
        assert server.recv(9) == b"?"


@isolated
def test_a_socket_connects_to_itself(world: World):
    own(world)
    world.ingress(54, "0.0.0.0", 5454, protocol=socket.IPPROTO_UDP)
    for family, wildcard, loopback in ((V4, "0.0.0.0", "127.0.0.1"), (V6, "::", "::1")):
        for kind in (TCP, UDP):
            for bind in ((loopback, 80), (loopback, 0), (wildcard, 80), (wildcard, 54), (wildcard, 0)):
                if kind == TCP and bind == (wildcard, 54):
                    continue
                with world.sock(family, kind) as sock:
                    if family == V6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    if kind == TCP:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind(bind)
                    itself = (loopback, sock.getsockname()[1])
                    sock.connect(itself)
                    assert sock.getsockname()[:2] == sock.getpeername()[:2] == itself
                    sock.send(b"x")
                    assert sock.recv(9) == b"x"


@isolated
def test_several_names_for_one_client(world: World):
    """An unconnected socket that asks several servers sees each answer come from where it asked; eight are kept."""
    for port in range(100, 108):
        world.ingress(port, "0.0.0.0", 5000 + port, protocol=socket.IPPROTO_UDP)
    servers = [world.sock(V4, UDP) for _ in range(8)]
    client = world.sock(V4, UDP)
    for port, server in enumerate(servers, 100):
        server.bind(("0.0.0.0", port))
        client.sendto(b"?", ("127.0.0.1", port))
    for port, server in enumerate(servers, 100):
        server.sendto(b"!", server.recvfrom(9)[1])
        assert client.recvfrom(9) == (b"!", ("127.0.0.1", port))
