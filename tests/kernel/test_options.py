"""Socket options by value and length: what a grafted socket answers is what the kernel answers, unless it is refused."""

import contextlib
import ctypes
import errno
import mmap
import os
import re
import signal
import socket
import threading
from pathlib import Path

import pytest

from graft.kernel.stamps import GRAFT_LEVEL, GRAFT_PROBE, PROBE
from scripts import options
from scripts.options import REFUSED, Refused
from tests.kernel.harness import TENANT_ID, World, isolated

V4, V6, TCP, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
IPPROTO_UDPLITE, UDP_ENCAP, TCP_ULP, SO_NETNS_COOKIE = 136, 100, 31, 71
LENGTHS = (0, 1, 3, 4, 5, 16, 17, 4095, 4096, 4097, 8192)
NUMBERS = (*range(220), 256, 511, 1000, *range(1150, 1170), 65536, 0x7FFFFFFF)
libc = ctypes.CDLL(None, use_errno=True)


def put(sock: socket.socket, level: int, name: int, value: bytes) -> int:
    """setsockopt(2): 0 or an errno."""
    text = ctypes.create_string_buffer(value, max(len(value), 1))
    ctypes.set_errno(0)
    return 0 if libc.setsockopt(sock.fileno(), level, name, text, len(value)) == 0 else ctypes.get_errno()


def get(sock: socket.socket, level: int, name: int, length: int) -> tuple[int, bytes]:
    """getsockopt(2) into @length bytes of 0xaa: 0 or an errno, and what the buffer and the length are then."""
    text, size = ctypes.create_string_buffer(b"\xaa" * length, max(length, 1)), ctypes.c_uint32(length)
    ctypes.set_errno(0)
    failed = libc.getsockopt(sock.fileno(), level, name, text, ctypes.byref(size))
    return (ctypes.get_errno() if failed else 0), text.raw[:length] + size.value.to_bytes(4, "little")


def grafted_and_plain(world: World, family: int, kind: int) -> tuple[socket.socket, socket.socket]:
    grafted = world.sock(family, kind)
    with world.outside():
        return grafted, socket.socket(family, kind)


@isolated
def test_values_at_every_length(world: World) -> None:
    """Each option whose value a hook looks at."""
    for family, kind, level, name, values in (
        (V4, UDP, socket.SOL_SOCKET, socket.SO_PRIORITY, (0, 5, 1 << 8)),
        (V4, TCP, socket.SOL_SOCKET, socket.SO_PRIORITY, (0, 5, 1 << 8)),
        (V4, UDP, socket.SOL_SOCKET, socket.SO_REUSEADDR, (0, 1, 1 << 16)),
        (V6, UDP, socket.SOL_SOCKET, socket.SO_REUSEPORT, (0, 1, 1 << 16)),
        (V4, TCP, socket.SOL_SOCKET, socket.SO_REUSEPORT, (0, 1, 1 << 16)),
        (V6, UDP, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, (0, 1, 1 << 16)),
        (V6, TCP, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, (0, 1, 1 << 16)),
    ):
        for value in values:
            for length in LENGTHS:
                grafted, plain = grafted_and_plain(world, family, kind)
                with grafted, plain:
                    text = value.to_bytes(4, "little")[:length] + bytes(max(length - 4, 0))
                    got, expected = put(grafted, level, name, text), put(plain, level, name, text)
                    where = f"option {level}, {name} of {value} at length {length}"
                    if name == socket.SO_PRIORITY and value > 6 and length >= 4:
                        assert got == errno.EPERM, where
                        assert grafted.getsockopt(level, name) == 0, where
                        continue
                    assert got == expected, where
                    for size in LENGTHS:
                        assert get(grafted, level, name, size) == get(plain, level, name, size), (where, size)


@isolated
def test_ulp_at_every_length(world: World) -> None:
    """Only "tls" is known, and the kernel gets the copy that was looked at."""
    for text in (b"tls", b"tlsx", b"smc", b"espintcp", b"mptcp", b"t", b""):
        for length in LENGTHS:
            value = (text + bytes(length))[:length]
            with world.sock() as sock:
                got = put(sock, socket.IPPROTO_TCP, TCP_ULP, value)
                name = value.split(b"\0")[0]
                if name == b"tls":
                    assert got in (errno.ENOENT, errno.ENOTCONN), (value[:8], length)
                else:
                    assert got == (errno.ENOENT if length else errno.EINVAL), (value[:8], length)


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_the_kernel_does_not_read_a_long_value_again(world: World) -> None:
    """A hook sees a page of it at most; another thread changes it meanwhile."""
    text = mmap.mmap(-1, 8192)
    child = os.fork()
    if child == 0:
        while True:
            text[0] = 0
            text[0] = 100
    try:
        value = ctypes.c_char.from_buffer(text)
        with world.sock() as sock:
            for _ in range(20000):
                libc.setsockopt(sock.fileno(), socket.SOL_SOCKET, socket.SO_PRIORITY, ctypes.byref(value), len(text))
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) <= 6
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def pairs(world: World, family: int, kind: int, count: int) -> list[tuple[socket.socket, socket.socket]]:
    """Grafted sockets, each with one of the host's."""
    grafted = [world.sock(family, kind) for _ in range(count)]
    with world.outside():
        return [(sock, socket.socket(family, kind)) for sock in grafted]


def known(level: int, name: int) -> Refused | None:
    return next((row for row in REFUSED if row.level == level and name in row.names), None)


def has_level(level: int, family: int, kind: int) -> bool:
    """Does such a socket have options of this level?"""
    return not (
        (level == options.IPV6 and family == V4) or (level == options.TCP and kind == UDP) or (level == options.UDP and kind == TCP)
    )


@pytest.mark.parametrize("family", [V4, V6])
@pytest.mark.parametrize("kind", [TCP, UDP])
def test_every_number_of_every_level(family: int, kind: int) -> None:
    """What scripts/options.py lists is refused, but for its default; all else is answered as the kernel answers."""

    @isolated
    def sweep(world: World) -> None:
        wrong = []
        for level in options.LEVELS:
            for name, (grafted, plain) in zip(NUMBERS, pairs(world, family, kind, len(NUMBERS)), strict=True):
                row = known(level, name) if has_level(level, family, kind) else None
                for value in (b"", b"\0", bytes(3), bytes(4), bytes(5), bytes(8), bytes(20), b"\1", b"\1\0\0\0", b"\1\0\0\0\0"):
                    got, expected = put(grafted, level, name, value), put(plain, level, name, value)
                    if row is None or value in row.values:
                        right = got == expected
                    elif value.strip(b"\0"):
                        right = got == errno.EPERM or got == expected != 0
                    else:
                        right = got in (errno.EPERM, expected)
                    if not right:
                        wrong.append((level, name, value, errno.errorcode.get(got), errno.errorcode.get(expected)))
                grafted.close()
                plain.close()
        assert not wrong, "\n".join(map(str, wrong))

    sweep()


@isolated
def test_a_default_changes_nothing(world: World) -> None:
    """IPV6_FREEBIND is graft's: a program that takes it back can bind all the same."""
    for level, name in ((0, 15), (41, 78)):
        with world.sock(V6) as sock:
            assert put(sock, level, name, bytes(4)) == 0
            assert sock.getsockopt(level, name) == 0
            sock.bind(("::1", 80))


def headers() -> dict[str, int]:
    """The numbers that the kernel's headers give to names."""
    found: dict[str, int] = {}
    for name in ("asm-generic/socket.h", "linux/in.h", "linux/in6.h", "linux/tcp.h", "linux/udp.h"):
        text = Path("/usr/include", name).read_text()
        found |= {name: int(number) for name, number in re.findall(r"^#\s*define\s+(\w+)\s+(\d+)\b", text, re.MULTILINE)}
    return found


def test_the_names_are_the_kernels() -> None:
    """A name of the table that the headers have has the number there."""
    numbers = headers()
    named = {name: number for row in REFUSED for number, name in row.names.items() if name in numbers}
    assert {name: numbers[name] for name in named} == named
    assert len(named) > 40


def test_the_document_has_the_table() -> None:
    """docs/differences.md, between the markers."""
    text = options.DOCUMENT.read_text().partition(options.BEGIN)[2].partition(options.END)[0]
    assert text == options.table(), "run scripts/options.py --write"


@isolated
def test_what_is_unknown_is_refused(world: World) -> None:
    """Levels that TCP and UDP do not have, numbers that nobody has looked at, and UDP_ENCAP by both its levels."""
    with world.sock(V4, UDP) as sock:
        for length in LENGTHS:
            value = (1).to_bytes(4, "little")[:length] + bytes(max(length - 4, 0))
            for level in (socket.IPPROTO_UDP, IPPROTO_UDPLITE):
                assert put(sock, level, UDP_ENCAP, value) == (errno.EPERM if length >= 4 else errno.EINVAL)
            for level, name in ((socket.SOL_SOCKET, 85), (0, 53), (socket.IPPROTO_TCP, 47), (284, 1), (286, 1), (-1, 1)):
                short = level == socket.SOL_SOCKET and length < 4
                assert put(sock, level, name, value) == (errno.EINVAL if short else errno.ENOPROTOOPT), (level, name, length)
        for name in (1, 101, 103, 104):
            assert put(sock, socket.IPPROTO_UDP, name, bytes(4)) == 0


@isolated
def test_the_hosts_netns_cookie_is_not_shown(world: World) -> None:
    with world.sock() as sock, world.outside():
        host = socket.socket().getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        for length in (*LENGTHS, 8):
            error, text = get(sock, socket.SOL_SOCKET, SO_NETNS_COOKIE, length)
            assert host not in text, length
            assert error == (0 if length == 8 else errno.EINVAL)


def ipv6_rule(world: World, kind: int) -> None:
    """A rule for [::]:9090 and none for IPv4."""
    world.ingress(9090, "::", 9090, protocol=socket.IPPROTO_TCP if kind == TCP else socket.IPPROTO_UDP)


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_a_short_v6only_changes_nothing(world: World) -> None:
    """The kernel refuses it, and a bind to [::] would take IPv4, too."""
    for kind in (TCP, UDP):
        ipv6_rule(world, kind)
        for length in (0, 1, 3):
            with world.sock(V6, kind) as sock:
                assert put(sock, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, b"\1\0\0\0"[:length]) == errno.EINVAL
                with pytest.raises(OSError, match=f"Errno {errno.EADDRNOTAVAIL}"):
                    sock.bind(("::", 9090))
        with world.sock(V6, kind) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(("::", 9090))
            assert sock.getsockname()[:2] == ("::", 9090)


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_v6only_changed_beside_a_bind(world: World) -> None:
    """Another thread changes it between the hook's look and the bind: the bind fails, or IPv6 alone is taken."""
    ipv6_rule(world, UDP)
    for _ in range(400):
        with world.sock(V6, UDP) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            start = threading.Barrier(2)

            def change(sock: socket.socket = sock, start: threading.Barrier = start) -> None:
                start.wait()
                for value in (0, 1, 0, 1, 0, 1, 0):
                    with contextlib.suppress(OSError):
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, value)

            thread = threading.Thread(target=change)
            thread.start()
            start.wait()
            with contextlib.suppress(OSError):
                sock.bind(("::", 9090))
            thread.join()
            if sock.getsockname()[1]:
                assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


@isolated
def test_a_rule_for_one_address_that_leads_to_any(world: World) -> None:
    """-p '[::]:9091:[::1]:80' gives no IPv4 either."""
    world.ingress(80, "::", 9091, at="::1")
    with world.sock(V6) as sock, pytest.raises(OSError, match=f"Errno {errno.EADDRNOTAVAIL}"):
        sock.bind(("::1", 80))
    with world.sock(V6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::1", 80))
        sock.listen()
        assert "[::]:9091" in world.real()


@isolated
def test_a_port_that_the_kernel_chose_stays_ipv6s(world: World) -> None:
    """A TCP socket that is disconnected loses such a port. It may lose IPV6_V6ONLY then, and listen."""
    world.ingress(9090, "::", 0)
    world.egress("::1", 128)
    with world.sock(V6) as server:
        server.bind(("::1", 80))
        server.listen()
        with world.sock(V6) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(("::", 9090))
            with contextlib.suppress(OSError):
                sock.connect(("::1", 80))
            assert libc.connect(sock.fileno(), bytes(28), 28) == 0
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.listen()
            told = [line.split()[3] for line in world.real().splitlines()]
            local = next(at for at in told if at.startswith(("*", "[::]%")))
            port = local.rpartition(":")[2]
            with world.outside(), pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", int(port)), 3)


@pytest.mark.kernel  # also on Linux 6.1
@isolated
def test_the_probe_answers_once(world: World) -> None:
    """Whoever made the socket asks before it gives it away. Afterwards the tenant's number is nobody's business."""
    for family, kind in ((V4, TCP), (V4, UDP), (V6, TCP), (V6, UDP)):
        with world.sock(family, kind, vouched=False) as sock:
            for length in (0, 1, 4, 7):
                assert get(sock, GRAFT_LEVEL, GRAFT_PROBE, length)[0]
            world.stamper.vouch(sock, TENANT_ID)
            for length in (*LENGTHS, PROBE.size):
                error, text = get(sock, GRAFT_LEVEL, GRAFT_PROBE, length)
                assert error
                assert TENANT_ID.to_bytes(4, "little") not in text
