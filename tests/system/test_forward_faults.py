"""What is dialled inside a container's netns, and what somebody does against it: each has its share, nothing spins."""

import contextlib
import os
import resource
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from graft.bench.lab import SLOWNESS, wait_for
from graft.daemon.shares import COMMON, EACH, EACH_BURST, EACH_RATE, SURE
from graft.kernel import linux
from graft.kernel.netns import belongs_here
from tests.conftest import python
from tests.system.inside import ECHOES, TELLS, Inside, cpu_seconds, everything, has_entrance, relays, start

# SOCK_DESTROY (sock_diag(7)) for what a connection to 127.0.0.1:80 from lo would find: ss(8) does not get that far
DESTROY = """
import socket, struct
sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 4)
found = struct.pack("!HH4s12x16x", 80, 0, socket.inet_aton("127.0.0.1")) + struct.pack("=III", 1, 2**32 - 1, 2**32 - 1)
sock.send(struct.pack("=IHHIIBBBBI", 72, 21, 5, 0, 0, socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 1 << 10) + found)
assert not struct.unpack_from("=i", sock.recv(1024), 16)[0]
"""


@pytest.fixture(autouse=True)
def _many_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 8192), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def echoes(sock, timeout=20.0):
    """Does the server give back a byte?"""
    sock.settimeout(timeout)
    sock.sendall(b"x")
    try:
        return sock.recv(1) == b"x"
    except TimeoutError:
        return False


# -- the listener --


def test_a_destroyed_listener(lab):
    """A container with CAP_NET_ADMIN ends graftd's listener: graftd makes another, later each time, and waits idly."""
    _, inside = start(lab, ECHOES)
    graftd = lab.daemon_pid()
    with inside, inside.dial("127.0.0.1", 80) as open_before:
        assert echoes(open_before)
        for pause in (1, 2):
            begun = time.monotonic()
            lab.graft("run", "--netns", "web", *python(DESTROY), check=True)
            used, since = cpu_seconds(graftd), time.monotonic()
            time.sleep(0.5 * pause)
            assert cpu_seconds(graftd) - used < 0.25 * (time.monotonic() - since) + 0.1
            wait_for(lambda: has_entrance(lab, inside.path), "another listener")
            assert time.monotonic() - begun > pause
        with inside.dial("127.0.0.1", 80) as after:
            assert echoes(after)
        assert echoes(open_before)


def test_a_listener_is_destroyed_without_a_graftd(own_lab):
    """The next graftd finds it broken, or does not find it at all, and makes another."""
    lab = own_lab
    _, inside = start(lab, ECHOES)
    open_before = inside.dial("127.0.0.1", 80)
    assert echoes(open_before)
    keeper, graftd = lab.keeper_pid(), lab.daemon_pid()
    os.kill(keeper, signal.SIGSTOP)
    try:
        os.kill(graftd, signal.SIGKILL)
        lab.host("nsenter", f"--net={inside.path}", *python(DESTROY), check=True)
        assert not has_entrance(lab, inside.path)
    finally:
        os.kill(keeper, signal.SIGCONT)
    wait_for(lambda: lab.daemon_pid() not in (0, graftd) and lab.containers(), "the next graftd")
    with inside, open_before:
        wait_for(lambda: has_entrance(lab, inside.path), "another listener")
        assert echoes(open_before)
        used = cpu_seconds(lab.daemon_pid())
        with inside.dial("127.0.0.1", 80) as sock:
            assert echoes(sock)
        time.sleep(0.5)
        assert cpu_seconds(lab.daemon_pid()) - used < 0.25 * SLOWNESS


# -- whose netns --


@contextlib.contextmanager
def native(netns, port):
    """A server of nobody's container in a netns."""
    with linux.inside_netns(netns):
        server = socket.create_server(("127.0.0.1", port))
    server.settimeout(10)
    with server:
        yield server


def is_reached(server, netns, port):
    """Does who dials the port in the netns reach this server?"""
    with linux.inside_netns(netns):
        client = socket.socket()
    with client:
        client.connect(("127.0.0.1", port))
        peer, name = server.accept()
        peer.close()
        return name == client.getsockname()


@pytest.mark.parametrize("whose", ["host", "named", "users"])
def test_a_netns_of_others_has_no_entrance(lab, whose):
    """Its own servers are reached there, whatever a container that joins it listens for."""
    name = f"{lab.tag}-n"
    if whose == "host":
        path = f"/run/netns/{lab.host_ns}"
    elif whose == "named":
        lab.ip("netns", "add", name)
        path = f"/run/netns/{name}"
    else:
        owner = lab.spawn("unshare", "-r", "-n", "sleep", "inf")
        wait_for(lambda: Path(f"/proc/{owner.pid}/comm").read_text() == "sleep\n", "the user's netns")
        path = f"/proc/{owner.pid}/ns/net"
    try:
        process = lab.spawn_graft("--name", "guest", "--netns", path, *python(TELLS), "0.0.0.0 4022", stdout=-1)
        assert process.stdout.readline() == "ready\n"
        netns = os.open(path, os.O_RDONLY)
        with native(netns, 4022) as server:
            start(lab, ECHOES)[1].__exit__()  # entrances are made in the order of the containers
            assert not has_entrance(lab, path)
            assert is_reached(server, netns, 4022)
        os.close(netns)
        lab.end(process)
    finally:
        if whose == "named":
            lab.ip("netns", "del", name)


def test_a_server_of_the_netnss_own(lab):
    """While one listens there no entrance is made. One that comes later is reached where the container has no server."""
    _, inside = start(lab, TELLS, "127.0.0.1 80")
    path = inside.path
    with inside:
        with native(inside.netns, 90) as other, native(inside.netns, 80):
            assert is_reached(other, inside.netns, 90)
            assert inside.told("127.0.0.1", 80).startswith("127.0.0.1"), "the container's comes first"
        with native(inside.netns, 90) as other:
            lab.host("nsenter", f"--net={path}", *python(DESTROY), check=True)
            time.sleep(2.5 * SLOWNESS)
            assert not has_entrance(lab, path)
            assert is_reached(other, inside.netns, 90)
        wait_for(lambda: has_entrance(lab, path), "the entrance")
        assert inside.told("127.0.0.1", 80)


def test_the_listeners_own_address(lab):
    """Who gives it to a device reaches the container's servers there, and no listener of graftd's."""
    _, inside = start(lab, TELLS, "0.0.0.0 80")
    enter = ("nsenter", f"--net={inside.path}")
    lab.host(*enter, "ip", "address", "add", "192.0.0.8/32", "dev", "lo", check=True)
    port = int(lab.host(*enter, "ss", "-tlnH").stdout.split()[3].rpartition(":")[2])
    with inside:
        assert inside.told("192.0.0.8", port) is None
        assert inside.told("192.0.0.8", 80) == "127.0.0.1 ('127.0.0.1', 80)"


# -- the relay --


def test_a_slow_reader_costs_nothing(lab):
    """Clients that have sent their last byte, and do not read their answers: nothing spins.

    Of one of the answers, what does not fit on its way to the client waits whole before the relay, with its end.
    """
    program = """
import socket, threading
sock = socket.create_server(("127.0.0.1", 80), backlog=128)
print("ready", flush=True)
def serve(peer):
    size = int(peer.makefile().read())
    peer.sendall(bytes(size))
    peer.close()
while True:
    threading.Thread(target=serve, args=(sock.accept()[0],)).start()
"""
    sizes = range(1 << 16, 4 << 20, 1 << 16)
    _, inside = start(lab, program)
    with inside:
        clients = [inside.dial("127.0.0.1", 80) for _ in sizes]
        for sock, size in zip(clients, sizes, strict=True):
            sock.sendall(b"%d" % size)
            sock.shutdown(socket.SHUT_WR)
        (relay,) = wait_for(lambda: relays(lab), "the relay, before which the kernel takes connections")

        def is_quiet():
            used = cpu_seconds(relay)
            time.sleep(0.5)
            return cpu_seconds(relay) - used < 0.1

        wait_for(is_quiet, "that all has come that fits, and nothing spins", 30)
        assert [len(everything(sock)) for sock in clients] == list(sizes)
        for sock in clients:
            sock.close()


def test_a_client_ends_before_the_server_answers(lab):
    """`nc -N </dev/null`, while the server's backlog is full: the end of the client's bytes waits as well."""
    program = """
import socket, sys
sock = socket.create_server(("127.0.0.1", 80), backlog=0)
first = socket.create_connection(("127.0.0.1", 80))
print("ready", flush=True)
sys.stdin.readline()
while True:
    peer = sock.accept()[0]
    if peer.getpeername() != first.getsockname():
        peer.sendall(b"all" if peer.recv(1) == b"" else b"?")
    peer.close()
"""
    process = lab.spawn_graft("--name", "web", *python(program), stdin=-1, stdout=-1)
    assert process.stdout.readline() == "ready\n"
    with Inside(lab) as inside:
        wait_for(lambda: has_entrance(lab, inside.path), "the entrance")
        with inside.dial("127.0.0.1", 80) as sock:
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            process.stdin.write("\n")
            process.stdin.flush()
            sock.settimeout(20)
            assert everything(sock) == b"all"


def test_the_next_graftd_counts_what_is_open(own_lab):
    """What a relay carries from before counts, and ends with its container."""
    lab = own_lab
    process, inside = start(lab, ECHOES)
    with inside:
        before = [inside.dial("127.0.0.1", 80) for _ in range(EACH - 10)]
        assert all(echoes(sock) for sock in before)
        (relay,) = relays(lab)
        graftd = lab.daemon_pid()
        os.kill(graftd, signal.SIGKILL)
        wait_for(lambda: lab.daemon_pid() not in (0, graftd) and lab.containers(), "the next graftd")
        after = [inside.dial("127.0.0.1", 80) for _ in range(11)]
        assert all(echoes(sock) for sock in after[:10])
        assert not echoes(after[10], 0.5)
        assert relays(lab) == [relay]
        before.pop().close()
        after[10].settimeout(20)
        assert after[10].recv(1) == b"x"
        lab.end(process, signal.SIGKILL)
        wait_for(lambda: not relays(lab), "the end of a relay whose clients stay")
        for sock in before + after:
            sock.close()


def test_a_relay_is_killed(lab):
    _, inside = start(lab, ECHOES)
    with inside, inside.dial("127.0.0.1", 80) as before:
        assert echoes(before)
        os.kill(relays(lab)[0], signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            assert before.recv(1) == b""
        wait_for(lambda: not relays(lab), "its end")
        with inside.dial("127.0.0.1", 80) as after:
            assert echoes(after)


# -- shares --


def test_one_container_has_its_limit(lab):
    """Who comes beyond it waits until another one goes; another container is served meanwhile."""
    _, inside = start(lab, ECHOES)
    _, other = start(lab, ECHOES, options=("--name", "other"))
    with inside, other:
        clients = [inside.dial("127.0.0.1", 80) for _ in range(EACH + 1)]
        assert all(echoes(client) for client in clients[:-1])
        assert not echoes(clients[-1], 0.5)
        with other.dial("127.0.0.1", 80) as sock:
            assert echoes(sock)
        clients[0].close()
        clients[-1].settimeout(20)
        assert clients[-1].recv(1) == b"x"
        for client in clients[1:]:
            client.close()


def test_all_but_one_take_what_they_can(lab):
    """Nine containers take all connections that are common; the tenth has its own."""
    names = [f"c{number}" for number in range(10)]
    spawned = [lab.spawn_graft("--name", name, *python(ECHOES), stdout=-1) for name in names]
    assert [process.stdout.readline() for process in spawned] == ["ready\n"] * len(names)
    entered = [Inside(lab, name) for name in names]
    paths = [inside.path for inside in entered]
    wait_for(lambda: all(has_entrance(lab, path) for path in paths), "the entrances")
    *others, late = entered
    whole = COMMON // (EACH - SURE)  # so many containers may have all that one may have
    clients = []
    for number, inside in enumerate(others):
        some = COMMON - whole * (EACH - SURE) + SURE
        clients += [inside.dial("127.0.0.1", 80) for _ in range(EACH if number < whole else some)]
    assert all(echoes(client) for client in clients)
    with others[-1].dial("127.0.0.1", 80) as sock:
        assert not echoes(sock, 0.5), "what is common is used up"
    last = [late.dial("127.0.0.1", 80) for _ in range(SURE + 1)]
    assert all(echoes(client) for client in last[:SURE])
    assert not echoes(last[SURE], 0.5)
    for sock in clients + last:
        sock.close()
    for inside in entered:
        inside.__exit__()


@pytest.mark.alone
def test_new_connections_have_a_rate(lab):
    """One container's clients come and go as fast as they can: graftd's loop, and another container, do not feel it."""
    _, inside = start(lab, ECHOES)
    _, other = start(lab, ECHOES, options=("--name", "other"))
    served, until = [0], time.monotonic() + 3

    def dial():
        while time.monotonic() < until:
            with inside.dial("127.0.0.1", 80) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                if echoes(sock):
                    served[0] += 1

    threads = [threading.Thread(target=dial) for _ in range(4)]
    with inside, other:
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        waits = []
        while time.monotonic() < until:
            since = time.monotonic()
            with other.dial("127.0.0.1", 80) as sock:
                assert echoes(sock)
            waits.append(time.monotonic() - since)
            time.sleep(0.3)
        for thread in threads:
            thread.join()
        assert served[0] <= EACH_BURST + EACH_RATE * (time.monotonic() - begun)
        assert max(waits) < 0.5 * SLOWNESS, waits


def test_whose_user_namespace_a_netns_is(lab):
    """The owner of another one is root there, and may have real sockets."""
    owner = lab.spawn("unshare", "-r", "-n", "sleep", "inf")
    wait_for(lambda: Path(f"/proc/{owner.pid}/comm").read_text() == "sleep\n", "the user's netns")
    found = []
    for path in ("/proc/self/ns/net", f"/run/netns/{lab.host_ns}", f"/proc/{owner.pid}/ns/net"):
        fd = os.open(path, os.O_RDONLY)
        found.append(belongs_here(fd))
        os.close(fd)
    assert found == [True, True, False]
