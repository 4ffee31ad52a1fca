"""What the policy takes for granted about sk_lookup and listeners in a SOCKHASH, one fact a test."""

import contextlib
import select
import socket

import pytest

from graft.kernel.listening import TABLE
from graft.rules import slices, tables
from tests.kernel.harness import SLOT, TENANT_ID, World, isolated

V4, V6, TCP, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
OWN, OWN6 = "10.88.0.5", "fd88::5"


def owner(world: World) -> None:
    """Give the tenant an address of each family."""
    world.own(OWN)
    world.own(OWN6)
    world.tenant(tables.TENANT_EGRESS, OWN, OWN6)


def listen(world: World, address: str, port: int, *options: tuple[int, int, int], family: int = 0) -> socket.socket:
    server = world.sock(family or (V6 if ":" in address else V4))
    for option in options:
        server.setsockopt(*option)
    server.bind((address, port))
    server.listen()
    return server


def ask(address: str, port: int) -> socket.socket:
    """A connection of the host's."""
    return socket.create_connection((address, port), 3)


def meet(server: socket.socket, client: socket.socket) -> tuple[str, ...]:
    """The client's names and the server's: own and peer."""
    server.settimeout(3)
    accepted, _ = server.accept()
    with accepted, client:
        names = (client.getsockname(), client.getpeername(), accepted.getsockname(), accepted.getpeername())
        assert names[0][1] == names[3][1]
        accepted.sendall(b"x")
        assert client.recv(1) == b"x"
        peer, local = (f"{name[0]} {name[1]}" for name in names[1:3])
        return (names[0][0], peer, local, names[3][0])


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_listener_elsewhere_gets_what_is_sent_to_the_address(world: World):
    owner(world)
    server = listen(world, "0.0.0.0", 80)
    address, port = slices.slice_address(SLOT, 80)
    assert f"{address}:{port}" in world.real()
    assert OWN not in world.real()
    with world.outside():
        assert meet(server, ask(OWN, 80)) == (OWN, f"{OWN} 80", f"{OWN} 80", OWN)
        with pytest.raises(ConnectionRefusedError):
            ask(OWN, 81)
    server.close()
    with world.outside(), pytest.raises(ConnectionRefusedError):
        ask(OWN, 80)


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_dual_stack_listener_at_a_mapped_address_takes_ipv6(world: World):
    """Both ends of such a connection have IPv6 addresses, those of an IPv4 one are mapped."""
    owner(world)
    server = listen(world, "::", 80)
    assert "::ffff:127." in world.real()
    with world.outside():
        assert meet(server, ask(OWN6, 80)) == (OWN6, f"{OWN6} 80", f"{OWN6} 80", OWN6)
        assert meet(server, ask(OWN, 80)) == (OWN, f"{OWN} 80", f"::ffff:{OWN} 80", f"::ffff:{OWN}")
    client = world.sock(V6)
    client.connect(("::1", 80))
    assert meet(server, client) == ("::1", "::1 80", "::1 80", "::1")
    client = world.sock(V6)
    client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    client.bind(("::1", 0))
    client.connect(("::1", 80))
    assert meet(server, client) == ("::1", "::1 80", "::1 80", "::1")
    client = world.sock()
    client.connect(("127.0.0.1", 80))
    assert meet(server, client) == ("127.0.0.1", "127.0.0.1 80", "::ffff:127.0.0.1 80", "::ffff:127.0.0.1")


@isolated
def test_a_listener_of_one_family_is_not_found_by_the_other(world: World):
    owner(world)
    only6 = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    for address, options, other, own in (("127.0.0.1", (), "::1", None), ("0.0.0.0", (), "::1", OWN6), ("::", (only6,), "127.0.0.1", OWN)):
        server = listen(world, address, 80, *options)
        with pytest.raises(ConnectionRefusedError):
            world.sock(V6 if ":" in other else V4).connect((other, 80))
        with world.outside():
            for target in (own,) if own else (OWN, OWN6):
                with pytest.raises(ConnectionRefusedError):
                    ask(target, 80)
        server.close()


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_the_kernel_chooses_within_a_group(world: World):
    """SO_REUSEPORT: each of the group gets connections, and whoever is left of it all of them."""
    owner(world)
    share = (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    servers = [listen(world, "0.0.0.0", 80, share) for _ in range(64)]
    assert count(world) == 64
    with world.outside():
        clients = [ask(OWN, 80) for _ in range(300)]
        ready = [s for s in servers if select.select([s], [], [], 0)[0]]
        assert len(ready) > 40
    for client in clients:
        client.close()
    left = servers.pop(20)
    left.setblocking(False)
    for server in servers:
        server.close()
    with contextlib.suppress(BlockingIOError):
        while True:
            left.accept()[0].close()
    with world.outside():
        meet(left, ask(OWN, 80))
    more = [listen(world, "0.0.0.0", 80, share) for _ in range(100)]  # beyond the slots the first and the last are found
    left.close()
    for server in more[:-1]:
        server.close()
    with world.outside():
        meet(more[-1], ask(OWN, 80))
    more[-1].close()
    assert count(world) == 0


def count(world: World) -> int:
    """How many entries of `listeners` are counted as the tenant's."""
    used, _, _ = TABLE.unpack(world.kernel.maps["listening"].get(TENANT_ID.to_bytes(4, "little")) or bytes(24))
    return int(used)


@isolated
def test_a_listener_that_has_ended_to_listen_is_not_used(world: World):
    owner(world)
    server = listen(world, "0.0.0.0", 80)
    for _ in range(40):
        server.shutdown(socket.SHUT_RDWR)
        with world.outside(), pytest.raises(ConnectionRefusedError):
            ask(OWN, 80)
        server.listen()
        with world.outside():
            ask(OWN, 80).close()
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    assert count(world) == 0


@isolated
def test_a_datagram_goes_to_the_containers_socket_alone(world: World):
    """Not to the host's on the wildcard; of a group each is found, and what is left of it; also a socket that sends."""
    owner(world)
    world.egress("0.0.0.0", 0, OWN)
    share = (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with world.outside():
        host = socket.socket(V4, UDP)
        host.setsockopt(*share)
        host.bind(("0.0.0.0", 53))
        client = socket.socket(V4, UDP)
        client.settimeout(3)
        client.bind(("127.0.0.1", 0))
        client.connect((OWN, 53))
        client.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            client.recv(1)
    servers = [world.sock(V4, UDP) for _ in range(40)]
    for server in servers:
        server.setsockopt(*share)
        server.bind(("0.0.0.0", 54))
    for gone in servers[:20], servers[21:]:
        for server in gone:
            server.close()
    client.connect((OWN, 54))
    client.send(b"x")
    assert servers[20].recv(1) == b"x"
    sender = world.sock(V4, UDP)
    sender.sendto(b"x", (OWN, 54))
    peer = servers[20].recvfrom(1)[1]
    servers[20].sendto(b"y", peer)
    assert sender.recv(1) == b"y"
    for sock in (sender, servers[20]):
        sock.close()
    assert list(world.kernel.maps["udp_ports"].keys(8)) == []
    assert TABLE.unpack(world.kernel.maps["listening"].get(TENANT_ID.to_bytes(4, "little")) or b"")[1] == 0


@isolated
def test_a_listener_is_at_its_own_containers_addresses_alone(world: World):
    """Not at another container's, nor at an address that another has by now, nor once its container has ended."""
    owner(world)
    world.own("10.88.0.6", holder=TENANT_ID + 1)
    server = listen(world, "0.0.0.0", 80)
    late = world.sock()
    late.bind((OWN, 81))
    with world.outside():
        meet(server, ask(OWN, 80))
        with pytest.raises(ConnectionRefusedError):
            ask("10.88.0.6", 80)
        world.own(OWN, holder=TENANT_ID + 1)
        with pytest.raises(ConnectionRefusedError):
            ask(OWN, 80)
    world.own(OWN)
    world.kernel.maps["tenants"].delete(TENANT_ID.to_bytes(4, "little"))
    late.listen()  # a program that was sent the socket
    assert count(world) == 1
    with world.outside(), pytest.raises(ConnectionRefusedError):
        ask(OWN, 81)
