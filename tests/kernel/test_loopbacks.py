"""Further addresses of a tenant's loopback: where they are, and who has them."""

import errno
import socket
import struct

import pytest

from graft.kernel.programs import LOOPBACKS_SIZE
from graft.rules.slices import SLICE4_NET, SLICE_LOOPBACKS, SLICE_SHIFT
from tests.kernel.harness import TENANT_ID, WIDE, World, isolated

KEY = TENANT_ID.to_bytes(4, "little")
UDP = socket.SOCK_DGRAM


def known(world: World) -> list[str]:
    """The tenant's addresses, by number."""
    raw = world.kernel.maps["loopbacks"].get(KEY) or b""
    return [socket.inet_ntoa(ip) for ip in (raw[at : at + 4] for at in range(0, len(raw), 8)) if ip != bytes(4)]


def place(number: int, port: int) -> str:
    """Where the port of the address with this number really is."""
    index = (port >> 12) + (16 + 16 * number if number else 0)
    return f"{socket.inet_ntoa(struct.pack('!I', SLICE4_NET + (WIDE << SLICE_SHIFT) + index))}:{61440 | port & 4095}"


def listen(world: World, address: str, port: int = 8080) -> socket.socket:
    server = world.sock()
    server.bind((address, port))
    server.listen()
    return server


def names(server: socket.socket, client: socket.socket) -> tuple[str, ...]:
    """The client's two, and the accepted socket's."""
    accepted, peer = server.accept()
    with accepted:
        ends = (client.getsockname(), client.getpeername(), accepted.getsockname(), accepted.getpeername(), peer)
        assert ends[0][1] == ends[4][1]
        return tuple(end[0] for end in ends)


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_each_address_has_a_place(world: World):
    world.widen()
    servers = {address: listen(world, address) for address in ("127.0.0.1", "127.0.0.2", "127.64.1.1")}
    assert known(world) == ["127.0.0.2", "127.64.1.1"]
    for number, address in enumerate(servers):
        assert place(number, 8080) in world.real()
        client = world.sock()
        client.connect((address, 8080))
        assert names(servers[address], client) == ("127.0.0.1", address, address, "127.0.0.1", "127.0.0.1")
    with pytest.raises(ConnectionRefusedError):
        world.sock().connect(("127.0.0.3", 8080))
    with pytest.raises(OSError, match=rf"\[Errno {errno.EADDRINUSE}\]"):
        listen(world, "0.0.0.0")


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_datagram_comes_from_the_address_of_its_socket(world: World):
    world.widen()
    one, two, anybody = (world.sock(kind=UDP) for _ in range(3))
    one.bind(("127.0.0.2", 53))
    two.bind(("127.0.0.3", 0))
    anybody.bind(("0.0.0.0", 54))
    port = two.getsockname()[1]
    assert place(2, port) in world.real("-uln")
    two.sendto(b"q", ("127.0.0.2", 53))
    assert one.recvfrom(9) == (b"q", ("127.0.0.3", port))
    one.sendto(b"a", ("127.0.0.3", port))
    assert two.recvfrom(9) == (b"a", ("127.0.0.2", 53))
    two.sendto(b"q", ("127.0.0.9", 54))
    assert anybody.recvfrom(9) == (b"q", ("127.0.0.3", port))
    anybody.sendto(b"a", ("127.0.0.3", port))
    assert two.recvfrom(9) == (b"a", ("127.0.0.1", 54))
    assert known(world) == ["127.0.0.2", "127.0.0.3"]


@isolated
def test_only_who_is_there_gets_a_number(world: World):
    world.widen()
    for last in range(2, 50):
        with pytest.raises(ConnectionRefusedError):
            world.sock().connect((f"127.1.1.{last}", 8080))
    assert known(world) == []
    server = listen(world, "0.0.0.0")
    client = world.sock()
    client.connect(("127.1.1.1", 8080))
    assert names(server, client)[2] == "127.1.1.1"
    assert known(world) == ["127.1.1.1"]


@isolated
def test_the_last_place_is_shared(world: World):
    world.widen()
    held = [listen(world, f"127.0.0.{last}") for last in range(2, 2 + SLICE_LOOPBACKS)]
    with pytest.raises(OSError, match=rf"\[Errno {errno.EADDRINUSE}\]"):
        listen(world, "127.0.0.99")
    listen(world, "127.0.0.99", 81).close()
    assert len(known(world)) == len(held) == SLICE_LOOPBACKS


@isolated
def test_a_tenant_of_an_earlier_graftd_has_one_address(world: World):
    """A new one may have the numbers before and behind its own."""
    world.kernel.maps["slices"].update((72).to_bytes(4, "little"), (TENANT_ID + 1).to_bytes(4, "little"))
    server = listen(world, "127.0.0.2")
    client = world.sock()
    client.connect(("127.0.0.1", 8080))
    assert names(server, client) == ("127.0.0.1",) * 5
    assert known(world) == []


@isolated
def test_they_end_with_the_tenant(world: World):
    world.widen()
    listen(world, "127.0.0.2")
    world.kernel.widen(TENANT_ID)
    assert known(world) == ["127.0.0.2"]
    assert len(world.kernel.maps["loopbacks"].get(KEY) or b"") == LOOPBACKS_SIZE
    world.kernel.forget(TENANT_ID)
    assert world.kernel.maps["loopbacks"].get(KEY) is None
