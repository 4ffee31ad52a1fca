"""What a tenant has in the maps that all share is bounded, and ends with its sockets or with the tenant."""

import contextlib
import re
import socket
from pathlib import Path

import pytest

from graft.kernel.listening import TABLE
from graft.kernel.programs import ASKERS, PORTS, SERVED, SERVED_KEY
from graft.rules import tables
from graft.rules.address import parse_address
from graft.rules.limits import Limits
from tests.kernel.harness import TENANT_ID, World, isolated

V4, TCP, UDP = socket.AF_INET, socket.SOCK_STREAM, socket.SOCK_DGRAM
KEY = TENANT_ID.to_bytes(4, "little")
OTHER = TENANT_ID + 1
ABI = Path(__file__).parents[2].joinpath("csrc/abi.h").read_text()
SERVED_MAX, LISTENERS_MAX = (int(re.findall(rf"#define {name} (\d+)", ABI)[0]) for name in ("SERVED_MAX", "LISTENERS_MAX"))
DYNAMIC_KEY = 8


def served(world: World) -> int:
    """How many entries of `served_ports` are counted as the tenant's."""
    raw = world.kernel.maps["ports"].get(KEY)
    assert raw is not None
    return int(PORTS.unpack(raw)[2])


@isolated
def test_a_tenant_that_has_gone_has_no_counters(world: World):
    """Its sockets may be in other hands, and go on being refused: nobody would delete what is counted of it then."""
    sock = world.sock(V4, UDP)
    world.kernel.maps["tenants"].delete(KEY)
    world.kernel.forget(TENANT_ID)
    for _ in range(3):
        with contextlib.suppress(OSError):
            sock.sendto(b"x", ("192.0.2.1", 9))
    assert world.kernel.counters(TENANT_ID) == {}
    assert world.kernel.counters(0) == {("send", "the container's policy is gone"): 3}


@isolated
def test_served_ports_have_room_for_others(world: World):
    other = SERVED_KEY.pack(parse_address("192.0.2.1").raw, 443)
    world.kernel.maps["served_ports"].update(other, SERVED.pack(OTHER, 8443))
    for port in range(1, SERVED_MAX + 100):
        world.ingress(port, "127.0.0.9", 10000 + port)
        with world.sock() as sock:
            sock.bind(("0.0.0.0", port))
    keys = list(world.kernel.maps["served_ports"].keys(SERVED_KEY.size))
    assert other in keys
    assert len(keys) == served(world) + 1 == SERVED_MAX + 1
    world.kernel.forget(TENANT_ID)
    assert list(world.kernel.maps["served_ports"].keys(SERVED_KEY.size)) == [other]


@isolated
def test_listeners_have_room_for_others(world: World):
    """One container's listeners fill its share of the table; what is beyond is told, and is there on the loopback."""
    world.own("10.88.0.5")
    world.tenant(tables.TENANT_EGRESS, own4="10.88.0.5")
    world.kernel.maps["listening"].update(KEY, TABLE.pack(LISTENERS_MAX - 1, 0, 0))
    servers = []
    for port in (80, 81):
        servers.append(world.sock())
        servers[-1].bind(("0.0.0.0", port))
        servers[-1].listen()
        world.sock().connect(("127.0.0.1", port))
    world.sock().connect(("10.88.0.5", 80))
    with pytest.raises(ConnectionRefusedError):
        world.sock().connect(("10.88.0.5", 81))
    assert world.kernel.counters(TENANT_ID) == {("listen", "no port is left that the kernel may choose"): 1}
    for server in servers:
        server.close()
    assert TABLE.unpack(world.kernel.maps["listening"].get(KEY) or b"")[0] == LISTENERS_MAX - 1
    world.kernel.forget(TENANT_ID)
    assert world.kernel.maps["listening"].get(KEY) is None


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_dynamic_port_is_forgotten_with_its_socket(world: World):
    world.ingress(80, "127.0.0.9", 0)
    entries = world.kernel.maps["dynamic_ports"]
    first, second = world.sock(), world.sock()
    for sock in (first, second):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    first.bind(("0.0.0.0", 80))
    assert len(list(entries.keys(DYNAMIC_KEY))) == 1
    second.bind(("0.0.0.0", 80))
    second.listen()
    first.close()
    world.sock().connect(("127.0.0.1", 80))
    second.close()
    assert list(entries.keys(DYNAMIC_KEY)) == []


@isolated
def test_who_asks_one_tenant_is_not_in_anothers_table(world: World):
    """Whoever floods a published UDP server has its own table filled; the last to ask is answered."""
    world.kernel.limit(OTHER, Limits())
    before = world.kernel.maps["asker_tables"].get(OTHER.to_bytes(4, "little"))
    world.tenant(tables.TENANT_REPLIES)
    real = parse_address("127.0.0.9")
    key = tables.INGRESS_KEY.pack(
        tables.INGRESS_FIXED_BITS + 16,
        TENANT_ID,
        socket.IPPROTO_UDP,
        tables.INET,
        0,
        parse_address("0.0.0.0").raw,
        (53).to_bytes(2, "big"),
    )
    world.kernel.maps["ingress"].update(key, tables.INGRESS_VALUE.pack(real.raw, 5300, 53, 0, 0, 1))
    server = world.sock(V4, UDP)
    server.bind(("0.0.0.0", 53))
    for number in range(5000):
        with world.outside() if not number else contextlib.nullcontext():
            asker = socket.socket(V4, UDP)
        world.stamper.stamp(asker.fileno(), 0, 0)
        asker.bind((f"127.200.{number >> 8}.{number & 255}", 0))
        asker.sendto(b"?", ("127.0.0.9", 5300))
        _, source = server.recvfrom(9)
        server.sendto(b"answer", source)
        asker.settimeout(5)
        assert asker.recv(9) == b"answer"
        asker.close()
    raw = world.kernel.maps["asker_tables"].get(KEY)
    assert raw is not None
    places = memoryview(ASKERS.unpack(raw)[1]).cast("Q").tolist()
    assert sum(map(bool, places)) > len(places) * 0.8
    assert world.kernel.maps["asker_tables"].get(OTHER.to_bytes(4, "little")) == before
