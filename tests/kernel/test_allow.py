"""What a tenant with a list of destinations may reach, and where its queries for names go (csrc/allow.bpf.h)."""

import errno
import socket
import statistics
import subprocess
import time

import pytest

from graft.kernel import linux
from graft.kernel.denials import Event
from graft.rules import tables
from graft.rules.address import Address, parse_address
from tests.kernel.harness import TENANT_ID, World, isolated

FLAGS = tables.TENANT_EGRESS | tables.TENANT_ALLOW | tables.TENANT_NAMES
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
FAR = {4: "192.0.2.7", 6: "2001:db8::7"}
SECOND = 1_000_000_000


def listed(world: World, flags: int = FLAGS) -> None:
    """A tenant with a list, which its egress rules let go everywhere; there is a device that has all addresses."""
    world.tenant(flags)
    for prefix in ("0.0.0.0", "::"):
        world.egress(prefix, 0)
    for words in (("-4", "route", "add", "local", "192.0.2.0/24", "dev", "lo"), ("-6", "route", "add", "local", "2001:db8::/64", "dev", "lo")):
        subprocess.run(("ip", *words), check=True)
    world.kernel.know_locals([parse_address(f"{net}{number}") for net in ("192.0.2.", "2001:db8::") for number in (7, 8)])


def allow(world: World, prefix: str, bits: int, port: int = 0) -> None:
    address = parse_address(prefix)
    key = tables.ALLOWED_KEY.pack(tables.ALLOWED_FIXED_BITS + bits + (96 if address.v4 else 0), TENANT_ID, port, address.raw)
    world.kernel.maps["allowed"].update(key, bytes(4))


def pin(world: World, address: str, port: int = 0, seconds: int = 60) -> None:
    key = tables.PINNED_KEY.pack(TENANT_ID, port, parse_address(address).raw)
    world.kernel.maps["pinned"].update(key, tables.PIN.pack(time.monotonic_ns() + seconds * SECOND))


def outcome(world: World, family: int, address: str, port: int, kind: int = socket.SOCK_STREAM) -> str:
    """What connect() and, of UDP, a send without it come to; ECONNREFUSED of TCP is that it may."""
    told = []
    with world.sock(FAMILIES[family], kind) as sock:
        told.append(_code(lambda: sock.connect((address, port))))
    if kind == socket.SOCK_DGRAM:
        with world.sock(FAMILIES[family], kind) as sock:
            told.append(_code(lambda: sock.sendto(b"x", (address, port))))
    assert len(set(told)) == 1, told
    return told[0]


def _code(call: object) -> str:
    try:
        call()  # type: ignore[operator]
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "OK"


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_the_list(world: World):
    """By prefix and by pin, at one port or at all; for TCP and UDP, both families; and not by a mapped address round it."""
    listed(world)
    for family, other in ((4, "192.0.2.8"), (6, "2001:db8::8")):
        far = FAR[family]
        for kind, may in ((socket.SOCK_STREAM, "ECONNREFUSED"), (socket.SOCK_DGRAM, "OK")):
            assert outcome(world, family, far, 8000, kind) == "ENETUNREACH"
            pin(world, far, 8000)
            assert [outcome(world, family, far, port, kind) for port in (8000, 8001)] == [may, "ENETUNREACH"]
            pin(world, far)
            assert outcome(world, family, far, 8001, kind) == may
            for port in (0, 8000):
                pin(world, far, port, seconds=-1)
            assert outcome(world, family, far, 8000, kind) == "ENETUNREACH"
            allow(world, "192.0.2.8" if family == 4 else "2001:db8::8", 32 if family == 4 else 128, 8000)
            assert [outcome(world, family, other, port, kind) for port in (8000, 8001)] == [may, "ENETUNREACH"]
    with world.sock(socket.AF_INET6) as sock:
        assert _code(lambda: sock.connect((f"::ffff:{FAR[4]}", 8000))) == "ENETUNREACH"
    counted = world.kernel.counters(TENANT_ID)
    assert {reason for _, reason in counted} == {"a destination that it is not allowed"}


@isolated
def test_a_list_does_not_widen_the_rules(world: World):
    world.tenant(FLAGS)
    pin(world, FAR[4])
    assert outcome(world, 4, FAR[4], 8000) == "ENETUNREACH"
    assert ("connect", "outside the egress rules") in world.kernel.counters(TENANT_ID)


@pytest.mark.kernel
@isolated
def test_queries_are_led_to_the_resolver(world: World):
    """Wherever they are sent, and shown as come from there; the sender is known by its slice."""
    listed(world)
    for family, resolver in ((4, tables.RESOLVER), (6, tables.RESOLVER6)):
        with world.outside():
            server = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
            stream = socket.socket(FAMILIES[family])
            for each in (server, stream):
                world.stamper.stamp(each.fileno(), 0, 0)
                if family == 6:
                    each.setsockopt(socket.IPPROTO_IPV6, linux.IPV6_FREEBIND, 1)
                each.bind((str(resolver), 53))
            server.settimeout(5)
            stream.listen()
            stream.settimeout(5)
        for connected in (True, False):
            for target in (FAR[family], "127.0.0.1" if family == 4 else "::1"):
                with world.sock(FAMILIES[family], socket.SOCK_DGRAM) as sock:
                    if connected:
                        sock.connect((target, 53))
                        sock.send(b"query")
                        assert sock.getpeername()[:2] == (target, 53)
                    else:
                        sock.sendto(b"query", (target, 53))
                    _, client = server.recvfrom(99)
                    raw = parse_address(client[0]).raw
                    assert raw[12] == 127 if family == 4 else raw.startswith(bytes.fromhex("fd67726166740000"))
                    server.sendto(b"answer", client)
                    data, peer = sock.recvfrom(99)
                    assert (data, peer[:2]) == (b"answer", (target, 53))
        with world.sock(FAMILIES[family]) as sock:
            sock.connect((FAR[family], 53))
            assert sock.getpeername()[:2] == (FAR[family], 53)
            stream.accept()[0].close()
        server.close()
        stream.close()
    assert world.kernel.counters(TENANT_ID) == {}


@isolated
def test_learning_lets_everything_through(world: World):
    """Each destination is told once."""
    listed(world, FLAGS | tables.TENANT_LEARN)
    events: list[Event] = []
    world.kernel.reports.open(events.append)
    for _ in range(3):
        assert outcome(world, 4, FAR[4], 8000) == "ECONNREFUSED"
    world.kernel.reports.drain()
    assert [(event.reason, Address(event.address).with_port(event.port)) for event in events] == [("learnt", f"{FAR[4]}:8000")]
    assert world.kernel.counters(TENANT_ID) == {}


@pytest.mark.alone
@isolated
def test_ten_thousand_pins_cost_a_connection_nothing(world: World):
    """connect() of UDP, which is nothing but the hook: with 10,000 pins beside it within 1.1 of one alone."""
    listed(world)
    pin(world, FAR[4], 8000)

    def cost() -> float:
        """ns of one connect(), the median of rounds."""
        with world.sock(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((FAR[4], 8000))
            rounds = []
            for _ in range(40):
                began = time.perf_counter_ns()
                for _ in range(500):
                    sock.connect((FAR[4], 8000))
                rounds.append((time.perf_counter_ns() - began) / 500)
            return statistics.median(rounds)

    cost()
    few, many = [], []
    keys = [tables.PINNED_KEY.pack(TENANT_ID, 443, parse_address(f"10.{n >> 8}.{n & 255}.1").raw) for n in range(10_000)]
    end = tables.PIN.pack(time.monotonic_ns() + 600 * SECOND)
    for _ in range(5):  # in turn
        few.append(cost())
        for key in keys:
            world.kernel.maps["pinned"].update(key, end)
        many.append(cost())
        for key in keys:
            world.kernel.maps["pinned"].delete(key)
    ratio = min(many) / min(few)
    print(f"connect() of UDP: {min(few):.0f} ns with 1 pin, {min(many):.0f} ns with 10,000: {ratio:.3f}")
    assert ratio < 1.1
