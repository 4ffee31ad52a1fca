"""What the policy takes for granted about cgroup hooks and socket storage, one fact a test."""

import contextlib
import errno
import os
import re
import socket
import struct
import subprocess
import sys

import pytest

from graft.bench.lab import wait_for
from graft.kernel import diag, linux
from graft.rules import slices
from graft.trap.sockets import IP_BIND_ADDRESS_NO_PORT
from tests.kernel.harness import TENANT_ID, World, isolated

V4, V6, TCP, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM


def refused(number: int):
    return pytest.raises(OSError, match=f"Errno {number}\\]")


@pytest.mark.kernel
@isolated
def test_an_accepted_socket_is_in_its_listeners_cgroup(world: World):
    """It has no stamp, and is good for what a connection does alone."""
    for family, loopback in ((V4, "127.0.0.1"), (V6, "::1")):
        server = world.sock(family)
        server.bind((loopback, 80))
        server.listen()
        client = world.sock(family)
        client.connect((loopback, 80))
        accepted, _ = server.accept()
        assert world.stamper.tenant_of(accepted.fileno()) is None
        assert accepted.getsockname()[:2] == (loopback, 80)
        assert accepted.getpeername()[0] == loopback
        assert accepted.getpeername()[1] == client.getsockname()[1]
        accepted.sendall(b"x")
        assert client.recv(1) == b"x"
        with refused(errno.EPERM):
            accepted.setsockopt(socket.SOL_SOCKET, 36, 1)
        disconnect(accepted)
        with refused(errno.EPERM):
            accepted.connect((loopback, 80))
        with refused(errno.EPERM):
            accepted.bind(("::" if family == V6 else "0.0.0.0", 8000))
        accepted.listen()
        assert accepted.getsockname()[1]
        with world.outside(), refused(errno.ECONNREFUSED):
            socket.create_connection((loopback, accepted.getsockname()[1]), 3)


def disconnect(sock: socket.socket) -> None:
    """connect(2) with AF_UNSPEC."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(sock.fileno(), struct.pack("=H26x", 0), 28 if sock.family == V6 else 16) == 0


@pytest.mark.kernel
@isolated
def test_the_stamp_goes_with_the_descriptor(world: World):
    """To a process in another cgroup, by SCM_RIGHTS: the hooks of the creator's cgroup still run."""
    left, right = socket.socketpair()
    grafted = world.sock()
    socket.send_fds(left, [b"x"], [grafted.fileno()])
    if os.fork() == 0:
        with contextlib.suppress(BaseException):
            (world.root / "cgroup.procs").write_text("0")
            (received,) = socket.recv_fds(right, 1, 1)[1]
            sock = socket.socket(fileno=received)
            try:
                sock.bind(("192.0.2.1", 80))
            except OSError as error:
                os._exit(error.errno or 255)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == errno.EADDRNOTAVAIL


@pytest.mark.kernel
@isolated
def test_mapped_addresses_take_the_six_hooks(world: World):
    with refused(errno.ENETUNREACH):
        world.sock(V6).connect(("::ffff:192.0.2.1", 80))
    with refused(errno.EADDRNOTAVAIL):
        world.sock(V6).bind(("::ffff:192.0.2.1", 80))
    with refused(errno.ENETUNREACH):
        world.sock(V6, UDP).sendto(b"x", ("::ffff:192.0.2.1", 80))
    counted = {op: count for (op, _), count in world.kernel.counters(TENANT_ID).items()}
    assert counted == {"connect": 1, "bind": 1, "send": 1}


@pytest.mark.kernel
@isolated
def test_hooks_find_the_stamp_above_an_mptcp_subflow(world: World):
    if not os.path.exists("/proc/sys/net/mptcp/enabled"):
        return  # no MPTCP, no subflows
    server = world.sock(V4, TCP, 262)
    server.bind(("0.0.0.0", 80))
    server.listen()
    address, port = slices.slice_address(77, 80)
    assert f"{address}:{port}" in world.real()
    with refused(errno.ENETUNREACH):
        world.sock(V4, TCP, 262).connect(("192.0.2.1", 80))
    client = world.sock(V4, TCP, 262)
    client.connect(("127.0.0.1", 80))
    assert client.getpeername() == ("127.0.0.1", 80)


@pytest.mark.kernel
@isolated
def test_listen_without_bind_is_put_out_of_reach(world: World):
    """No bind hook runs; sockops sees the listener and ties it to an interface that is not there."""
    server = world.sock()
    server.listen()
    port = server.getsockname()[1]
    assert port
    with world.outside(), refused(errno.ECONNREFUSED):
        socket.create_connection(("127.0.0.1", port), 3)
    assert world.kernel.counters(TENANT_ID) == {("listen", "listen() on an unbound socket"): 1}


@pytest.mark.kernel
@isolated
def test_a_listener_whose_bind_has_waited_is_put_out_of_reach(world: World):
    """graftd binds it first, if it is asked; a process that was sent the socket may not be trapped."""
    for family, address in ((V4, "0.0.0.0"), (V6, "::")):
        server = world.late(family)
        server.bind((address, 8099))
        assert server.getsockname()[:2] == (address, 8099)
        with refused(errno.EINVAL):
            server.bind((address, 8098))
        server.listen()
        port = re.findall(r":(\d+) ", world.real())[-1]
        with world.outside(), refused(errno.ECONNREFUSED):
            socket.create_connection(("127.0.0.1" if family == V4 else "::1", int(port)), 3)
    assert world.kernel.counters(TENANT_ID) == {("listen", "listen() on an unbound socket"): 2}


@pytest.mark.kernel
@isolated
def test_a_bind_that_waits_takes_no_port_of_the_kernels(world: World):
    """Whoever gets IP_BIND_ADDRESS_NO_PORT unset, while graftd binds: nobody counts such ports."""
    now = world.kernel.maps["settling"]
    for family, address in ((V4, "0.0.0.0"), (V6, "::")):
        sock = world.late(family)
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 0)  # which the program alone sees
        sock.bind((address, 8098))
        other = world.late(family)
        now.update(struct.pack("=i", other.fileno()), os.getpid().to_bytes(4, "little"))
        other.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 0)
        now.update(struct.pack("=i", other.fileno()), bytes(4))
        with refused(errno.EPERM):
            other.bind((address, 8099))
        other.close()
        sock.close()


@isolated
def test_listeners_out_of_reach_give_their_ports_back(world: World):
    """graftd ends those of both families, and no other; more than one answer of the kernel's has."""
    kept = []
    for family in (V4, V6):
        for bind in (True, *[False] * 300):
            kept.append(world.sock(family))
            if bind:
                kept[-1].bind(("127.0.0.1" if family == V4 else "::1", 80))
            kept[-1].listen()
    assert len(world.real().splitlines()) == 602
    cgroup = world.cgroup.stat().st_ino
    assert diag.end_stray_listeners(cgroup) == 600
    assert len(world.real().splitlines()) == 2
    assert diag.end_stray_listeners(cgroup) == 0


@pytest.mark.kernel
@isolated
def test_a_listener_that_has_a_device_is_out_of_reach(world: World):
    """A link-local destination gives the socket a device; who lacks CAP_NET_RAW may not tie it to another one."""
    with subprocess.Popen(("unshare", "--net", "sleep", "60")) as neighbour:
        try:
            wait_for(lambda: linux.netns_inode(neighbour.pid) != linux.netns_inode(), "the neighbour")
            inside = ("nsenter", "--net", "--target", str(neighbour.pid))
            subprocess.run(("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v0", "netns", str(neighbour.pid)), check=True)
            for where, own in ((), "fe80::1"), (inside, "fe80::2"):
                subprocess.run((*where, "ip", "address", "add", f"{own}/64", "dev", "v0", "nodad"), check=True)
                subprocess.run((*where, "ip", "link", "set", "v0", "up"), check=True)
            world.egress("fe80::", 10)
            server = world.sock(V6)
            server.setblocking(False)
            with refused(errno.EINPROGRESS):
                server.connect(("fe80::2", 9, 0, socket.if_nametoindex("v0")))
            disconnect(server)
            os.seteuid(65534)
            server.listen()
            os.seteuid(0)
            code = f"import socket; s = socket.socket(10, 1); s.settimeout(2); s.connect(('fe80::1', {server.getsockname()[1]}, 0, socket.if_nametoindex('v0')))"
            with world.outside():
                told = subprocess.run((*inside, sys.executable, "-c", code), capture_output=True, text=True)
            assert "TimeoutError" in told.stderr
            with world.outside(), socket.socket() as hosts:
                hosts.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"v0")
                hosts.listen()
                assert len(world.real().splitlines()) == 2
                assert diag.end_stray_listeners(world.cgroup.stat().st_ino) == 1
                assert len(world.real().splitlines()) == 1
        finally:
            neighbour.kill()


@isolated
def test_a_failed_bind_does_not_open_listen(world: World):
    """The bind hook ran and allowed, the bind failed: listen() then takes a port that no rule gave."""
    first = world.sock()
    first.bind(("127.0.0.1", 80))
    first.listen()
    second = world.sock()
    with refused(errno.EADDRINUSE):
        second.bind(("127.0.0.1", 80))
    second.listen()
    with world.outside(), refused(errno.ECONNREFUSED):
        socket.create_connection(("127.0.0.1", second.getsockname()[1]), 3)


@pytest.mark.kernel
@isolated
def test_a_connected_send_with_a_control_message_passes(world: World):
    """It runs the sendmsg hook with family 0 and no address."""
    for family, loopback in ((V4, "127.0.0.1"), (V6, "::1")):
        server = world.sock(family, UDP)
        server.bind((loopback, 53))
        client = world.sock(family, UDP)
        client.connect((loopback, 53))
        if family == V4:
            info = (0, 8, struct.pack("=I4s4s", 0, bytes(4), bytes(4)))
        else:
            info = (41, 50, struct.pack("=16sI", bytes(16), 0))
        client.sendmsg([b"x"], [info])
        assert server.recvfrom(9)[0] == b"x"


@isolated
def test_a_low_port_needs_no_capability_where_a_rule_gives_it(world: World):
    world.ingress(8080, "127.0.0.9", 80)
    sock = world.sock()
    if os.fork() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            sock.bind(("0.0.0.0", 8080))
            os._exit(sock.getsockname()[1] != 8080)
        except OSError as error:
            os._exit(error.errno or 255)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0


@isolated
def test_reuseport_is_shared_by_owner(world: World):
    """A socket that is owned by a tenant's uid does not join a listener of the host's."""
    world.ingress(80, "127.0.0.9", 8080)
    with world.outside():
        host = socket.socket()
    host.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    host.bind(("127.0.0.9", 8080))
    host.listen()
    sock = world.sock()
    os.fchown(sock.fileno(), 0x70000001, -1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with refused(errno.EADDRINUSE):
        sock.bind(("0.0.0.0", 80))


@isolated
def test_any_address_of_the_slices_can_be_bound(world: World):
    """AnyIP: a local route and IPV6_FREEBIND, no address on lo."""
    server = world.sock(V6)
    server.bind(("::1", 443))
    server.listen()
    address, port = slices.slice_address(77, 443, v4=False)
    assert f"[{address}]:{port}" in world.real()
    client = world.sock(V6)
    client.connect(("::1", 443))
    assert client.getpeername()[:2] == ("::1", 443)


@pytest.mark.kernel
@isolated
def test_raw_sockets_run_no_hook(world: World):
    """So they are never grafted: what they send is not seen."""
    raw = world.sock(V4, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    raw.sendto(bytes([8, 0, 0xF7, 0xFF, 0, 0, 0, 0]), ("127.0.0.1", 0))
    assert world.kernel.counters(TENANT_ID) == {}


@isolated
def test_the_guard_leaves_other_namespaces_alone(world: World):
    from graft.kernel import linux

    linux.unshare(linux.CLONE_NEWNET)
    linux.loopback_up()
    with world.outside():
        server = socket.socket()
        server.bind(("127.64.0.1", 80))
        server.listen()
        socket.create_connection(("127.64.0.1", 80), 3)


@isolated
def test_the_guard_keeps_the_unstamped_out(world: World):
    server = world.sock()
    server.bind(("127.0.0.1", 80))
    server.listen()
    address, port = slices.slice_address(77, 80)
    for family, target in ((V4, str(address)), (V6, f"::ffff:{address}")):
        with world.outside(), refused(errno.ECONNREFUSED):
            socket.socket(family).connect((target, port))
        with world.outside(), refused(errno.ECONNREFUSED):
            socket.socket(family, UDP).sendto(b"x", (target, port))


@isolated
def test_a_network_beside_the_slices_may_be_sent_to(world: World):
    """Packets to the IPv6 slices leave by the loopback alone; fd67:1::/64 is anybody's network."""
    for words in (
        "link add graft0 type veth peer name graft1",
        "link set graft0 up",
        "link set graft1 up",
        "address add fd67:1::1/64 dev graft0 nodad",
        "neighbour add fd67:1::2 lladdr 02:00:00:00:00:02 dev graft0",
    ):
        subprocess.run(("ip", *words.split()), check=True)
    world.egress("::", 0)
    assert world.sock(V6, UDP).sendto(b"x", ("fd67:1::2", 9)) == 1


@isolated
def test_a_wildcard_listener_of_the_host_is_alien(world: World):
    with world.outside():
        host = socket.socket()
    host.bind(("0.0.0.0", slices.SLICE_PORT_BASE | 80))
    host.listen()
    with refused(errno.ECONNREFUSED):
        world.sock().connect(("127.0.0.1", 80))


@pytest.mark.kernel
@isolated
def test_fast_open_runs_the_connect_hook(world: World):
    with refused(errno.ENETUNREACH):
        socket.socket.sendto(world.sock(), b"x", socket.MSG_FASTOPEN, ("192.0.2.1", 80))


@pytest.mark.kernel
@isolated
def test_reconnecting_runs_the_hook_again(world: World):
    """connect(AF_UNSPEC) runs none, the next connect does; a source chosen before stays."""
    server = world.sock(V4, UDP)
    server.bind(("127.0.0.1", 53))
    client = world.sock(V4, UDP)
    client.connect(("127.0.0.1", 53))
    disconnect(client)
    with refused(errno.ENETUNREACH):
        client.connect(("192.0.2.1", 53))
    client.connect(("127.0.0.1", 53))
    client.send(b"again")
    assert server.recv(9) == b"again"
