"""Ports that nobody names: private ones, chosen in BPF, and the host's, chosen by the kernel and counted."""

import ctypes
import errno
import resource
import socket
import threading

import pytest

from graft.kernel.programs import NUMBERS, NUMBERS_SIZE, PORTS
from graft.kernel.stamps import OWN_TENANT
from graft.rules import slices
from graft.rules.limits import Limits
from graft.rules.sysctl import NUMBERS_WORDS
from tests.kernel.harness import SLOT, TENANT_ID, World, isolated

V4, V6, TCP, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
NUMBERS_ALL = NUMBERS_WORDS * 64
libc = ctypes.CDLL(None, use_errno=True)
KEY = TENANT_ID.to_bytes(4, "little")


def refused(number: int):
    return pytest.raises(OSError, match=f"Errno {number}\\]")


def taken(world: World) -> int:
    """How many numbers are marked."""
    raw = world.kernel.maps["numbers"].get(KEY)
    assert raw is not None
    return int.from_bytes(raw[NUMBERS.size :], "little").bit_count()


def held(world: World, tenant: int = TENANT_ID) -> int:
    """How many ports are counted."""
    raw = world.kernel.maps["ports"].get(tenant.to_bytes(4, "little"))
    assert raw is not None
    return int(PORTS.unpack(raw)[0])


def fill(world: World, free: tuple[int, ...] = ()) -> None:
    """Mark all numbers but some, of all kinds."""
    one = bytearray(b"\xff" * (NUMBERS_WORDS * 8))
    for number in free:
        one[(number - 32768) // 8] &= ~(1 << (number - 32768) % 8)
    world.kernel.maps["numbers"].update(KEY, NUMBERS.pack(5, 0) + bytes(one) * 4)


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_private_number_is_none_of_the_hosts(world: World):
    """TCP, UDP, both families, dual stack: the real port is above the ephemeral range, and the number is shown.

    A UDP socket of both families has a port of the host's: one number cannot be at two slices. It is marked in both.
    """
    world.tenant(0)
    for family, address, v4 in (
        (V4, "127.0.0.1", True),
        (V4, "0.0.0.0", True),
        (V6, "::1", False),
        (V6, "::", True),
        (V6, "::ffff:127.0.0.1", True),
    ):
        for kind in (TCP, UDP):
            with world.sock(family, kind) as sock:
                sock.bind((address, 0))
                shown = sock.getsockname()
                assert shown[0] == address
                if (address, kind) == ("::", UDP):
                    assert f"*:{shown[1]} " in world.real("-uln")
                    assert (taken(world), held(world)) == (2, 1)
                    continue
                assert 32768 <= shown[1] < slices.SLICE_PORT_BASE
                if kind == TCP:
                    sock.listen()
                real, port = slices.slice_address(SLOT, shown[1], v4=v4)
                told = f"[::ffff:{real}]:{port}" if family == V6 and v4 else f"{real.with_port(port)}"
                assert told in world.real("-tln" if kind == TCP else "-uln")
                assert taken(world) == 1
        assert taken(world) == 0


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_number_is_given_back_in_each_family(world: World):
    """A socket of both families that sends without a bind has one in each; after a disconnect connect() chooses anew."""
    world.tenant(0)
    server = world.sock(V6, UDP)
    server.bind(("::1", 0))
    sock = world.sock(V6, UDP)
    sock.sendto(b"?", server.getsockname())
    assert taken(world) == 3
    sock.connect(server.getsockname())
    assert libc.connect(sock.fileno(), bytes(28), 28) == 0  # AF_UNSPEC: the kernel takes its port back
    sock.connect(server.getsockname())
    assert taken(world) == 2
    sock.close()
    assert taken(world) == 1
    server.close()
    assert taken(world) == 0


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_who_is_bound_to_port_0_is_reached(world: World):
    for family, address in ((V4, "127.0.0.1"), (V6, "::1")):
        server = world.sock(family)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT: a private one is chosen all the same
        server.bind((address, 0))
        server.listen()
        client = world.sock(family)
        client.connect((address, server.getsockname()[1]))
        accepted = server.accept()[0]
        assert accepted.getsockname()[:2] == client.getpeername()[:2] == server.getsockname()[:2]
        datagrams, asker = world.sock(family, UDP), world.sock(family, UDP)
        datagrams.bind((address, 0))
        asker.connect(datagrams.getsockname())
        asker.send(b"question")
        _, source = datagrams.recvfrom(9)
        assert source[:2] == asker.getsockname()[:2]
        datagrams.sendto(b"answer", source)
        assert asker.recv(9) == b"answer"
        assert asker.getsockname()[1] >= 32768
    assert held(world) == 0


@isolated
def test_every_number_can_be_had_once(world: World):
    """Bound sockets that do not listen, which no look-up finds; then EADDRINUSE, as the kernel has it."""
    free = (32768, 40000, 40001, 61439)
    fill(world, free)
    kept = [world.sock() for _ in free]
    for sock in kept:
        sock.bind(("127.0.0.1", 0))
    assert sorted(sock.getsockname()[1] for sock in kept) == sorted(free)
    with refused(errno.EADDRINUSE):
        world.sock().bind(("127.0.0.1", 0))
    kept.pop(2).close()
    with world.sock() as again:
        again.bind(("0.0.0.0", 0))
    with world.sock(V6) as other:
        other.bind(("::1", 0))
    assert world.kernel.counters(TENANT_ID) == {("bind", "no port is left that the kernel may choose"): 1}


@isolated
def test_a_number_that_was_named_is_not_chosen(world: World):
    fill(world, (40000, 40001))
    named = world.sock()
    named.bind(("127.0.0.1", 40000))
    chosen = world.sock()
    chosen.bind(("127.0.0.1", 0))
    assert chosen.getsockname()[1] == 40001
    with refused(errno.EADDRINUSE):
        world.sock().bind(("127.0.0.1", 40001))
    named.close()
    with world.sock() as sock:
        sock.bind(("127.0.0.1", 0))
        assert sock.getsockname()[1] == 40000


@isolated
def test_a_number_that_others_share_is_not_chosen(world: World):
    """The first of a SO_REUSEPORT group gives the number back, and the others still have it."""
    fill(world, (40000, 40001))
    group = [world.sock(), world.sock()]
    for sock in group:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 40000))
        sock.listen()
    group.pop(0).close()
    sock = world.sock()
    sock.bind(("127.0.0.1", 0))
    assert sock.getsockname()[1] == 40001


@isolated
def test_a_bind_that_fails_keeps_no_number(world: World):
    first = world.sock()
    first.bind(("127.0.0.1", 40000))
    second = world.sock()
    for _ in range(3):
        with refused(errno.EADDRINUSE):
            second.bind(("127.0.0.1", 40000))
    second.bind(("127.0.0.1", 0))
    with refused(errno.EINVAL):
        second.bind(("127.0.0.1", 0))
    assert taken(world) == 2
    second.close()
    first.close()
    assert taken(world) == 0


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_threads_get_different_numbers(world: World):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    sockets = [world.sock() for _ in range(2000)]

    def work(mine: list[socket.socket]) -> None:
        for sock in mine:
            sock.bind(("127.0.0.1", 0))

    threads = [threading.Thread(target=work, args=(sockets[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({sock.getsockname()[1] for sock in sockets}) == taken(world) == 2000


@isolated
def test_all_tenants_together_have_a_ceiling(world: World):
    world.kernel._limit_ports(OWN_TENANT, 1)
    first, second = world.sock(V4, UDP), world.sock(V4, UDP)
    first.bind(("0.0.0.0", 0))
    with refused(errno.EADDRINUSE):
        second.bind(("0.0.0.0", 0))
    second.bind(("127.0.0.1", 0))


@isolated
def test_a_new_graftd_forgets_no_number(world: World):
    sock = world.sock()
    sock.bind(("127.0.0.1", 0))
    world.kernel.limit(TENANT_ID, Limits())
    assert taken(world) == 1
    world.kernel.forget(TENANT_ID)
    assert len(list(world.kernel.maps["numbers"].keys(4))) == 0
    sock.close()
    assert NUMBERS_SIZE == 8 + 4 * NUMBERS_ALL // 8
