"""A published UDP server on the host's wildcard answers from the address that was asked (csrc/answer.bpf.h)."""

import errno
import socket
import struct
import subprocess

import pytest

from graft.rules import tables
from tests.kernel.harness import World, isolated
from tests.kernel.test_datagrams import hears, others
from tests.kernel.test_hooks import refused

V4, V6, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_DGRAM
ASKED4, ASKED6 = ("192.0.2.7", "192.0.2.8"), ("2001:db8::7", "2001:db8::8")
CLIENT4, CLIENT6 = "192.0.2.9", "2001:db8::9"
EVERYWHERE: dict[int, str] = {V4: "0.0.0.0", V6: "::"}


def host(world: World, *, egress: bool = True) -> None:
    """A host with several addresses, of which the kernel takes the client's own for an answer to it."""
    if egress:
        world.egress("0.0.0.0", 0)
    else:
        world.tenant(tables.TENANT_REPLIES)
    for address in (*ASKED4, CLIENT4):
        subprocess.run(("ip", "address", "add", f"{address}/32", "dev", "lo"), check=True)
    for address in (*ASKED6, CLIENT6):
        subprocess.run(("ip", "address", "add", f"{address}/128", "dev", "lo", "nodad"), check=True)
    for wildcard in EVERYWHERE.values():
        world.ingress(53, wildcard, 5353, protocol=socket.IPPROTO_UDP)


def serve(world: World, family: int) -> socket.socket:
    """A server, published."""
    server = world.sock(family, UDP)
    if family == V6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    server.bind((EVERYWHERE[family], 53))
    return server


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_it_answers_from_where_it_was_asked(world: World):
    """With egress, and with none; a client that is connected hears nothing else; two clients behind one address."""
    host(world, egress=False)
    for egress in (False, True):
        if egress:
            world.egress("0.0.0.0", 0)
            world.egress("::", 0)
        for family, client, asked in ((V4, CLIENT4, ASKED4), (V6, CLIENT6, ASKED6)):
            with serve(world, family) as server:
                clients = [others(world, family, client) for _ in asked]
                for one, address in zip(clients, asked, strict=True):
                    one.connect((address, 5353))
                    one.send(address.encode())
                told = [server.recvfrom(99) for _ in clients]
                for data, source in told:
                    server.sendto(data, source)
                for one, address in zip(clients, asked, strict=True):
                    assert hears(one) == address.encode()
                    one.close()


@isolated
def test_the_last_address_counts(world: World):
    host(world)
    server = serve(world, V4)
    client = others(world, V4, CLIENT4)
    for address in (*ASKED4, *ASKED4):
        client.sendto(b"?", (address, 5353))
        _, source = server.recvfrom(9)
        server.sendto(b"!", source)
        assert client.recvfrom(9) == (b"!", (address, 5353))


@isolated
def test_a_table_that_is_full(world: World):
    """Whoever asks again is answered from there; the rest as the kernel chooses."""
    host(world)
    server = serve(world, V4)
    first = others(world, V4, CLIENT4)
    first.connect((ASKED4[0], 5353))
    first.send(b"?")
    _, source = server.recvfrom(9)
    for _ in range(1500):
        with others(world, V4, CLIENT4) as one:
            one.sendto(b"x", (ASKED4[1], 5353))
            server.recv(9)
    first.send(b"?")
    assert server.recvfrom(9)[1] == source
    server.sendto(b"!", source)
    assert hears(first) == b"!"


@isolated
def test_more_addresses_than_are_kept(world: World):
    """The seventeenth is answered as the kernel chooses, and no other address is taken for it."""
    host(world)
    server = serve(world, V4)
    client = others(world, V4, CLIENT4)
    for n in range(17):
        address = f"198.51.100.{n}"
        subprocess.run(("ip", "address", "add", f"{address}/32", "dev", "lo"), check=True)
        client.sendto(b"?", (address, 5353))
        server.sendto(b"!", server.recvfrom(9)[1])
        assert client.recvfrom(9)[1][0] == (address if n < 16 else CLIENT4)


@isolated
def test_what_is_no_address_of_the_servers_is_not_chosen(world: World):
    """Another container's, a broadcast, and for a peer that has not asked none."""
    host(world)
    server = serve(world, V4)
    client = others(world, V4, CLIENT4)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    client.sendto(b"?", ("127.255.255.255", 5353))
    server.sendto(b"!", server.recvfrom(9)[1])
    assert client.recvfrom(9)[1][0] == CLIENT4
    with others(world, V4, CLIENT4) as stranger:
        client.sendto(b"?", (ASKED4[0], 5353))
        server.recv(9)
        server.sendto(b"x", stranger.getsockname())
        assert stranger.recvfrom(9)[1][0] == CLIENT4
    world.own(ASKED4[1], holder=4243)
    with refused(errno.ECONNREFUSED):
        client.sendto(b"?", (ASKED4[1], 5353))
    assert hears(server) == b""


@isolated
def test_a_source_that_the_program_names_holds(world: World):
    """IP_PKTINFO, as dnsmasq and unbound use it."""
    host(world)
    server = serve(world, V4)
    client = others(world, V4, CLIENT4)
    client.sendto(b"?", (ASKED4[0], 5353))
    _, source = server.recvfrom(9)
    info = struct.pack("=I4s4s", 0, socket.inet_aton(ASKED4[1]), bytes(4))
    server.sendmsg([b"!"], [(socket.IPPROTO_IP, 8, info)], 0, source)
    assert client.recvfrom(9) == (b"!", (ASKED4[1], 5353))
