"""What containers may send to graftd's resolver: each, and all together (csrc/budget.bpf.h)."""

import contextlib
import socket
import time

import pytest

from graft.kernel.programs import TENANT
from graft.rules import tables
from graft.rules.limits import Limits
from tests.kernel.harness import SLOT, TENANT_ID, World, isolated

RESOLVER = ("127.0.0.11", 53)
SURE, OWN, ALL = 100, 400, 1000
UDP_SEGMENT, RCVBUFFORCE = 103, 33


def resolver(world: World, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    """A socket where graftd has its resolver."""
    with world.outside():
        server = socket.socket(type=kind)
        server.setsockopt(socket.SOL_SOCKET, RCVBUFFORCE, 16 << 20)
        server.bind(RESOLVER)
    server.setblocking(False)
    return server


def asker(world: World, number: int = 0, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    """A socket of the tenant with this number, which is made if there is none, and may ask the resolver."""
    tenant = TENANT_ID + number
    key = tenant.to_bytes(4, "little")
    world.kernel.limit(tenant, Limits())
    world.kernel.maps["tenants"].update(key, TENANT.pack(0, SLOT + number, 0, 0, bytes(4), bytes(16)))
    for service, value in tables.compile_services(tenant, (), named=True).items():
        world.kernel.maps["services"].update(service, value)
    made = socket.socket(type=kind)
    world.stamper.stamp(made.fileno(), tenant, 0)
    made.setblocking(False)
    return made


def received(server: socket.socket) -> int:
    """How many datagrams are there."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while server.recv(65536) is not None:
            count += 1
    return count


def flood(sock: socket.socket, times: int, data: bytes = b"x", *, connected: bool = True) -> float:
    """Send so often; returns the seconds that it took."""
    began = time.monotonic()
    if connected:
        sock.connect(RESOLVER)
    for _ in range(times):
        sock.sendmsg([data], (), 0, None if connected else RESOLVER)  # what is dropped is dropped in silence
    return time.monotonic() - began


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_one_container(world: World):
    server = resolver(world)
    for number, connected in enumerate((True, False)):
        took = flood(asker(world, number), 8000, b"" if connected else b"x", connected=connected)
        most = SURE + OWN + 2300 * took + 5  # on a slow machine that is all of them
        assert SURE + OWN <= received(server) <= most
        refused = world.kernel.counters(TENANT_ID + number).get(("send", "more queries than a container may send"), 0)
        assert refused >= 8000 - most, took
        world.kernel.maps["budgets"].delete(bytes(4))


@isolated
def test_what_is_long_costs_more(world: World):
    server = resolver(world)
    took = flood(asker(world), 1500, bytes(4096))
    assert received(server) <= (SURE + OWN + 2300 * took) / 9 + 2
    segments = asker(world, 1)
    segments.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 10)
    took = flood(segments, 1000, bytes(600))
    assert received(server) <= SURE + OWN + 2300 * took + 2


@isolated
def test_connections(world: World):
    server = resolver(world, socket.SOCK_STREAM)
    server.listen(4096)
    began, kept = time.monotonic(), []
    for _ in range(2000):
        kept.append(asker(world, kind=socket.SOCK_STREAM))
        with contextlib.suppress(BlockingIOError):
            kept[-1].connect(RESOLVER)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            server.accept()
            count += 1
    took = time.monotonic() - began  # on a slow machine the kernel has asked again meanwhile
    assert (SURE + OWN) // 4 - 2 <= count <= (SURE + OWN + 2300 * took) / 4 + 3


@isolated
def test_all_together_and_a_bystander(world: World):
    server = resolver(world)
    began = time.monotonic()
    for number in range(8):
        flood(asker(world, number), 3000)
    took = time.monotonic() - began
    assert 8 * SURE + ALL <= received(server) <= 8 * SURE + ALL + (5000 + 8 * 20) * took + 10
    flood(asker(world, 9), SURE)
    assert received(server) == SURE


@isolated
def test_other_destinations_cost_nothing(world: World):
    server = world.sock(kind=socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    client = world.sock(kind=socket.SOCK_DGRAM)
    client.connect(("127.0.0.1", 53))
    for _ in range(20):
        for _ in range(100):
            client.send(b"x")
        for _ in range(100):
            assert server.recv(9) == b"x"
