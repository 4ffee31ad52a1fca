"""UDP sockets that are at their container's address for its network, and on the host's wildcard to go beyond it."""

import contextlib
import errno
import socket
import subprocess

import pytest

from graft.kernel.stamps import Stamp
from graft.rules import tables
from graft.rules.limits import Limits
from tests.kernel.harness import TENANT_ID, World, isolated
from tests.kernel.test_datagrams import HERE4, HERE6, hears, others
from tests.kernel.test_hooks import disconnect, refused
from tests.kernel.test_numbers import held

V4, V6, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_DGRAM
OWN = {V4: "10.88.0.5", V6: "fd88::5"}
ANY = {V4: "0.0.0.0", V6: "::"}
HERE = {V4: HERE4, V6: HERE6}
EPHEMERAL, ABROAD = 4, 1048576  # of csrc/abi.h
OTHERS = TENANT_ID + 1


def network(world: World, flags: int = tables.TENANT_EGRESS | tables.TENANT_ABROAD) -> None:
    """The tenant has an address of each family on a network of this host, and leaves elsewhere as the host does."""
    world.tenant(flags, OWN[V4], OWN[V6])
    for family in (V4, V6):
        world.own(OWN[family], flags=tables.HOLDER_LOCAL, network=1)
        world.egress(OWN[family], 24 if family == V4 else 64, OWN[family])
        subprocess.run(
            ("ip", "address", "add", f"{HERE[family]}/{32 if family == V4 else 128}", "dev", "lo"), check=True
        )
        world.egress(ANY[family], 0)


def stamp(world: World, sock: socket.socket) -> Stamp:
    found = world.stamper.get(sock.fileno())
    assert found
    return found


def real_port(world: World) -> int:
    """The port of the host's of the tenant's only socket."""
    (key,) = world.kernel.maps["udp_ports"].keys(8)
    return int.from_bytes(key[4:6], "little")


def members(world: World) -> int:
    """How many places the table has."""
    return len(list(world.kernel.maps["abroad"].keys(24)))


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_bind(world: World):
    """It is on the wildcard at a port of the kernel's choice, and the program sees what it has asked for."""
    network(world)
    for family in (V4, V6):
        for address in (ANY[family], OWN[family]):
            for port in (0, 5060):
                sock = world.sock(family, UDP)
                sock.bind((address, port))
                flags = stamp(world, sock).flags
                assert flags & (EPHEMERAL | ABROAD) == (
                    EPHEMERAL if (address, port) == (ANY[family], 0) else EPHEMERAL | ABROAD
                )
                assert sock.getsockname()[0] == address
                assert sock.getsockname()[1] == port or not port
                chosen = real_port(world)
                assert chosen not in (0, 5060)
                with world.outside():
                    sock2 = socket.socket(family, UDP)
                    sock2.bind((HERE[family], 5060))  # the host's port of that number is nobody's
                    with refused(errno.EADDRINUSE):
                        sock2 = socket.socket(family, UDP)
                        sock2.bind((HERE[family], chosen))
                assert held(world) == 1
                sock.close()
                assert (held(world), members(world)) == (0, 0)


@pytest.mark.kernel
@isolated
def test_where_the_address_is_known_elsewhere(world: World):
    """--ip, and pods: what arrives there comes by no hook of this host's, so that it is bound at the address."""
    network(world, tables.TENANT_EGRESS)
    sock = world.sock(V4, UDP)
    sock.bind((ANY[V4], 5060))
    assert (real_port(world), stamp(world, sock).flags & ABROAD) == (5060, 0)
    assert f"{OWN[V4]}:5060 " in world.real("-uan")
    assert members(world) == 0


@pytest.mark.kernel
@isolated
def test_a_program_of_the_hosts_asks(world: World):
    """The guard leads it by connect() and by a datagram, and it sees the answer come from where it has asked."""
    network(world)
    for family in (V4, V6):
        server = world.sock(family, UDP)
        server.bind((ANY[family], 53))
        for connected in (False, True):
            client = others(world, family, ANY[family])
            with world.outside():
                if connected:
                    client.connect((OWN[family], 53))
                    client.send(b"?")
                else:
                    client.sendto(b"?", (OWN[family], 53))
            data, peer = server.recvfrom(9)
            assert data == b"?"
            server.sendto(b"!", peer)
            with world.outside():
                data, peer = client.recvfrom(9)
            assert data == b"!"
            assert connected or peer[:2] == (OWN[family], 53)


@pytest.mark.kernel
@isolated
def test_a_stranger(world: World):
    """The host's programs at the port of the wildcard, by each of the host's addresses. Who is asked answers the container's."""
    network(world)
    for family, loopback in ((V4, "127.0.0.1"), (V6, "::1")):
        sock = world.sock(family, UDP)
        sock.bind((ANY[family], 5060))
        chosen = real_port(world)
        stranger = others(world, family, HERE[family])
        local = others(world, family, loopback)
        stranger.sendto(b"stranger", (HERE[family], chosen))
        local.sendto(b"stranger", (loopback, chosen))
        assert hears(sock) == b""
        sock.settimeout(5)
        sock.sendto(b"?", (HERE[family], stranger.getsockname()[1]))
        stranger.sendto(b"now a peer", stranger.recvfrom(9)[1])
        local.sendto(b"stranger", (loopback, chosen))
        assert (hears(sock), hears(sock)) == (b"now a peer", b"")
        sock.close()


@pytest.mark.kernel
@isolated
def test_another_tenants_socket(world: World):
    """It is not led to from another network, whatever the address that is asked."""
    network(world)
    sock = world.sock(V4, UDP)
    sock.bind((ANY[V4], 5060))
    world.kernel.maps["holders"].update(
        bytes(10) + b"\xff\xff" + socket.inet_aton("10.89.0.5"), tables.OWNER.pack(OTHERS, 2, tables.HOLDER_LOCAL, 0)
    )
    asker = world.sock(V4, UDP)
    with refused(errno.ENETUNREACH):
        asker.sendto(b"?", ("10.89.0.5", 5060))
    with refused(errno.ENETUNREACH):
        asker.connect(("10.89.0.5", 5060))


@pytest.mark.kernel
@isolated
def test_as_many_as_it_may(world: World):
    """A bind that is refused takes nothing; a socket that is bound anew after that has one place."""
    network(world)
    world.kernel.limit(TENANT_ID, Limits(ports=2))
    one, two, three = (world.sock(V4, UDP) for _ in range(3))
    one.bind((ANY[V4], 5060))
    with refused(errno.EADDRINUSE):
        two.bind((OWN[V4], 5060))
    assert (held(world), members(world)) == (1, 1)
    two.bind((OWN[V4], 5061))
    with refused(errno.EADDRINUSE):
        three.bind((ANY[V4], 5062))
    assert (held(world), members(world)) == (2, 2)
    one.close()
    three.bind((ANY[V4], 5060))
    assert (held(world), members(world)) == (2, 2)


@pytest.mark.kernel
@isolated
def test_the_kernels_source_of_a_connection(world: World):
    """A socket on the wildcard that connects to an address of this host has it as its own, and its program sees another."""
    network(world)
    server, client = world.sock(V4, UDP), world.sock(V4, UDP)
    server.bind((OWN[V4], 53))
    client.bind((ANY[V4], 5060))
    client.connect((OWN[V4], 53))
    assert (client.getsockname(), client.getpeername()) == ((OWN[V4], 5060), (OWN[V4], 53))
    client.send(b"?")
    data, peer = server.recvfrom(9)
    assert (data, peer) == (b"?", (OWN[V4], 5060))
    server.sendto(b"!", peer)
    assert hears(client) == b"!"
    disconnect(client)
    with contextlib.suppress(OSError):
        client.bind((ANY[V4], 5070))  # the kernel has taken the port back
    assert held(world) == 2


@pytest.mark.kernel
@isolated
def test_a_port_is_asked_for_again(world: World):
    """By the next bind, if somebody has connected to it; not the host's port of what was published meanwhile."""
    network(world)
    for family in (V4, V6):
        seen = []
        for connects in (True, True, False):
            server, client = world.sock(family, UDP), world.sock(family, UDP)
            server.bind((ANY[family], 53))
            seen.append(real_port(world))
            if connects:
                client.connect((OWN[family], 53))
            server.close()
            client.close()
        assert len(set(seen)) == 1
    world.ingress(54, "0.0.0.0", 40054, protocol=socket.IPPROTO_UDP)
    server, client = world.sock(V4, UDP), world.sock(V4, UDP)
    server.bind((ANY[V4], 54))
    client.connect((OWN[V4], 54))
    assert client.getpeername() == (OWN[V4], 54)
    assert not [key for key in world.kernel.maps["abroad_ports"].keys(24) if key[20:22] == (54).to_bytes(2, "little")]
