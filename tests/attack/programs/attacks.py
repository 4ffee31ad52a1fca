"""What a hostile program in a container tries with ordinary calls. Runs inside; see ../test_attacks.py.

usage: attacks.py HOST CLIENT SECOND HOST6 OTHER ATTACKS: reads names from stdin, tries each in a child of its own,
prints what came of it, one line each: the name of an errno, or OK, or a word of the attack's.
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

HOST, CLIENT, SECOND, HOST6, OTHER, COMPILED = sys.argv[1:] if __name__ == "__main__" else ("10.0.0.1", "10.0.0.2", "10.0.0.3", "::1", "", "")
CLIENT6 = "2001:db8:77::2"
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
V4, V6 = socket.AF_INET, socket.AF_INET6
CHANCES = 12000
LO = ("127.0.0.1", 9)
ATTACKS: dict[str, Callable[[], str | None]] = {}
libc = ctypes.CDLL(None, use_errno=True)


def attack(function):
    ATTACKS[function.__name__] = function
    return function


def disconnect(sock):
    address = struct.pack("=H14x", 0)
    if libc.connect(sock.fileno(), address, len(address)):
        raise OSError(ctypes.get_errno(), "disconnect")


def option(level, name, value):
    """An attack that sets an option."""

    def tries(family=V4, kind=UDP):
        socket.socket(family, kind).setsockopt(level, name, value)

    return tries


def accepted():
    """An accepted socket, and its peer."""
    with socket.socket(V4, TCP) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        c = socket.create_connection(server.getsockname())
        return server.accept()[0], c


# ---- ports ----


@attack
def bind_a_port_of_the_hosts():
    socket.socket(V4, TCP).bind(("0.0.0.0", 22))


@attack
def bind_an_address_of_the_hosts():
    socket.socket(V4, TCP).bind((HOST, 8099))


@attack
def bind_an_address_of_the_hosts_6():
    socket.socket(V6, TCP).bind((HOST6, 8099))


@attack
def bind_a_mapped_address():
    socket.socket(V6, TCP).bind((f"::ffff:{HOST}", 8099))


@attack
def bind_an_endpoints_real_address():
    socket.socket(V4, TCP).bind((SECOND, 8081))


@attack
def listen_without_bind():
    s = socket.socket(V4, TCP)
    s.listen()
    return s.getsockname()[0]


@attack
def listen_without_bind_6():
    s = socket.socket(V6, TCP)
    s.listen()
    return s.getsockname()[0]


@attack
def listen_after_a_failed_bind():
    s = socket.socket(V4, TCP)
    with contextlib.suppress(OSError):
        s.bind((HOST, 8099))
    s.listen()
    with socket.socket(V4, TCP) as c:
        c.settimeout(1)
        c.connect((HOST, s.getsockname()[1]))


@attack
def bind_again_after_disconnecting():
    s = socket.socket(V4, UDP)
    s.connect((CLIENT, 9001))
    disconnect(s)
    s.bind((HOST, 22))


@attack
def bind_twice():
    """The second bind fails, and may not change what the first has made of the socket."""
    s = socket.socket(V4, UDP)
    s.bind(("127.0.0.1", 0))
    with contextlib.suppress(OSError):
        s.bind(("0.0.0.0", 0))
    s.connect((HOST, 9102))
    s.send(b"spoofed")


@attack
def v6only_after_autobind():
    """The kernel refuses the option, and a rule for [::] must not become one for both families."""
    s = socket.socket(V6, UDP)
    with contextlib.suppress(OSError):
        s.sendto(b"", ("::1", 9))
    with contextlib.suppress(OSError):
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    disconnect(s)
    s.bind(("::", 54))


@attack
def mptcp():
    s = socket.socket(V4, TCP, 262)
    s.bind((HOST, 22))


@attack
def mptcp_connects_to_the_hosts_loopback():
    socket.socket(V4, TCP, 262).connect(("127.0.0.1", 9101))


@attack
def accepted_socket_turns_round():
    s, _ = accepted()
    disconnect(s)
    s.bind((HOST, 22))


@attack
def accepted_socket_connects():
    s, _ = accepted()
    disconnect(s)
    s.connect((HOST, 9100))


@attack
def reuseport_with_the_host():
    s = socket.socket(V4, TCP)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind(("0.0.0.0", 9100))
    s.listen()
    s.settimeout(0.05)
    for _ in range(8):
        with socket.socket(V4, TCP) as c, contextlib.suppress(OSError):
            c.connect((HOST, 9100))
    with contextlib.suppress(TimeoutError):
        s.accept()
        return "OK"
    return "NEVER"


@attack
def reuseport_with_another_container():
    s = socket.socket(V4, TCP)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind((HOST, 9300))


def by_chance(bind):
    """The host's server has SO_REUSEADDR; a port that the kernel chooses must never be that one."""
    for _ in range(CHANCES):
        with socket.socket(V4, UDP) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with contextlib.suppress(OSError):
                bind(s)
            if s.getsockname()[1] == 40000:
                return "OK"
    return "NEVER"


@attack
def udp_port_by_chance():
    return by_chance(lambda s: s.bind(("0.0.0.0", 0)))


@attack
def udp_port_by_chance_autobound():
    return by_chance(lambda s: s.sendto(b"", LO))


@attack
def fork_bomb_of_sockets():
    """Up to the limit, and no further."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    kept: list[socket.socket] = []
    while len(kept) < 5000:
        kept.append(socket.socket(V4, UDP))


@attack
def sockets_are_given_back():
    for _ in range(1000):
        socket.socket(V4, UDP).close()
    return "SERVED"


# ---- destinations ----


@attack
def hosts_loopback():
    socket.create_connection(("127.0.0.1", 9101), 2)


@attack
def hosts_loopback_by_wildcard():
    socket.create_connection(("0.0.0.0", 9101), 2)


@attack
def hosts_loopback_mapped():
    s = socket.socket(V6, TCP)
    s.connect(("::ffff:127.0.0.1", 9101))


@attack
def hosts_loopback_6():
    s = socket.socket(V6, TCP)
    s.connect(("::1", 9101))


@attack
def hosts_loopback_by_another_number():
    socket.create_connection(("127.1.2.3", 9100), 2)


@attack
def hosts_loopback_by_udp():
    socket.socket(V4, UDP).sendto(b"spoofed", ("127.0.0.1", 9102))


@attack
def hosts_loopback_fast_open():
    socket.socket(V4, TCP).sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", 9101))


@attack
def hosts_loopback_fast_open_connect():
    s = socket.socket(V4, TCP)
    s.setsockopt(socket.IPPROTO_TCP, 30, 1)
    s.connect(("127.0.0.1", 9101))
    s.send(b"x")


@attack
def hosts_abstract_socket():
    socket.socket(socket.AF_UNIX, TCP).connect("\0graft-attack-host")


@attack
def another_containers_loopback():
    socket.create_connection((OTHER.split(":")[0], int(OTHER.split(":")[1])), 2)


@attack
def another_containers_loopback_6():
    s = socket.socket(V6, TCP)
    s.connect(("fd67:7261:6674::1:0:0:1", 61445))


@attack
def reconnect_after_disconnecting():
    s = socket.socket(V4, UDP)
    with contextlib.suppress(OSError):
        s.connect((CLIENT, 9001))
    disconnect(s)
    s.connect(("127.0.0.1", 9102))
    s.send(b"spoofed")


@attack
def closed_tcp():
    socket.create_connection((CLIENT, 9000), 2)


@attack
def closed_tcp_6():
    s = socket.socket(V6, TCP)
    s.settimeout(2)
    s.connect((CLIENT6, 9000))


@attack
def closed_mapped():
    s = socket.socket(V6, TCP)
    s.settimeout(2)
    s.connect((f"::ffff:{CLIENT}", 9000))


@attack
def closed_udp():
    socket.socket(V4, UDP).sendto(b"x", (CLIENT, 9001))


@attack
def closed_udp_mapped():
    socket.socket(V6, UDP).sendto(b"x", (f"::ffff:{CLIENT}", 9001))


@attack
def closed_sendmsg():
    socket.socket(V4, UDP).sendmsg([b"x"], [], 0, (CLIENT, 9001))


@attack
def closed_fast_open():
    socket.socket(V4, TCP).sendto(b"x", socket.MSG_FASTOPEN, (CLIENT, 9000))


@attack
def closed_gso():
    s = socket.socket(V4, UDP)
    s.setsockopt(17, 103, 100)
    s.sendto(b"x" * 300, (CLIENT, 9001))


@attack
def closed_broadcast():
    s = socket.socket(V4, UDP)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    s.sendto(b"x", ("10.77.0.255", 9001))


@attack
def closed_multicast():
    socket.socket(V4, UDP).sendto(b"x", ("224.0.0.1", 9001))


@attack
def closed_to_the_host():
    socket.create_connection((HOST, 9100), 2)


# ---- sources ----


def pktinfo(source, device=0):
    return [(socket.IPPROTO_IP, 8, struct.pack("=i4s4s", device, socket.inet_aton(source), bytes(4)))]


@attack
def source_by_pktinfo():
    s = socket.socket(V4, UDP)
    s.sendmsg([b"spoofed"], pktinfo("127.0.0.1"), 0, (HOST, 9102))


@attack
def source_by_pktinfo_connected():
    s = socket.socket(V4, UDP)
    s.connect((HOST, 9102))
    s.sendmsg([b"spoofed"], pktinfo(SECOND))


@attack
def source_after_the_loopback():
    """Autobound, connected to its own loopback, then to the host: the kernel has kept 127.0.0.1."""
    s = socket.socket(V4, UDP)
    with contextlib.suppress(OSError):
        s.sendto(b"", LO)
    with contextlib.suppress(OSError):
        s.connect(LO)
    with socket.socket(V4, UDP) as server:
        server.bind(LO)
        s.connect(LO)
    s.connect((HOST, 9102))
    s.send(b"spoofed")


@attack
def source_by_bind():
    s = socket.socket(V4, UDP)
    s.bind(("127.0.0.1", 0))
    s.sendto(b"spoofed", (HOST, 9102))


@attack
def source_by_bind_no_port():
    s = socket.socket(V4, TCP)
    s.setsockopt(socket.IPPROTO_IP, 24, 1)
    s.bind((SECOND, 0))
    s.connect((HOST, 9100))


@attack
def source_by_freebind():
    s = socket.socket(V4, UDP)
    s.setsockopt(socket.IPPROTO_IP, 15, 1)
    s.bind(("198.51.100.7", 0))


@attack
def source_by_sticky_pktinfo():
    s = socket.socket(V6, UDP)
    s.setsockopt(socket.IPPROTO_IPV6, 50, socket.inet_pton(V6, "2001:db8::bad") + struct.pack("=i", 0))


@attack
def source_route():
    """The message is taken, the packet is not."""
    s = socket.socket(V4, UDP)
    route = bytes([131, 7, 4]) + socket.inet_aton(HOST) + b"\0"
    s.sendmsg([b"spoofed"], [(socket.IPPROTO_IP, 7, route)], 0, (HOST, 9102))
    return "DROPPED"


@attack
def extension_header():
    s = socket.socket(V6, UDP)
    s.sendmsg([b"spoofed"], [(socket.IPPROTO_IPV6, 59, bytes([17, 0, 1, 4, 0, 0, 0, 0]))], 0, (HOST6, 9102))
    return "DROPPED"


# ---- options ----

ATTACKS |= {
    "so_bindtodevice": option(1, 25, b"veth0\0"),
    "so_bindtoifindex": option(1, 62, 2),
    "so_mark": option(1, 36, 7),
    "so_debug": option(1, 1, 1),
    "so_rcvbufforce": option(1, 33, 1 << 20),
    "so_priority": option(1, 12, 7),
    "ip_transparent": option(0, 19, 1),
    "ip_freebind": option(0, 15, 1),
    "ip_options": option(0, 4, bytes([131, 7, 4, 10, 0, 0, 1, 0])),
    "ip_unicast_if": option(0, 50, struct.pack(">i", 2)),
    "ip_multicast_if": option(0, 32, socket.inet_aton(HOST)),
    "ip_add_membership": option(0, 35, socket.inet_aton("239.1.2.3") + socket.inet_aton(HOST)),
    "mcast_join_group": option(0, 42, struct.pack("=i4xHH4s120x", 2, 2, 0, socket.inet_aton("239.1.2.3"))),
    "ip_local_port_range": option(0, 51, 22 << 16 | 22),
    "iptables_replace": option(0, 64, bytes(64)),
    "ipvs_flush": option(0, 1157, bytes(64)),
    "multicast_routing": option(0, 200, 1),
}
for name, tried in {
    "ipv6_transparent": option(41, 75, 1),
    "ipv6_freebind": option(41, 78, 0),
    "ipv6_join_group": option(41, 20, socket.inet_pton(V6, "ff02::1234") + struct.pack("=i", 2)),
    "ipv6_rthdr": option(41, 57, bytes([0, 2, 4, 1, 0, 0, 0, 0]) + bytes(16)),
    "ipv6_addrform": option(41, 1, V4),
    "ipv6_flowlabel_lease": option(41, 32, bytes(16) + struct.pack(">I", 0x1234) + bytes([0, 1, 1, 0, 6, 0, 6, 0]) + bytes(4)),
    "ipv6_join_anycast": option(41, 27, socket.inet_pton(V6, HOST6) + struct.pack("=i", 2)),
}.items():
    ATTACKS[name] = partial(tried, family=V6)
for name, tried in {"tcp_repair": option(6, 19, 1), "tcp_ulp_smc": option(6, 31, b"smc")}.items():
    ATTACKS[name] = partial(tried, kind=TCP)


@attack
def option_of_an_accepted_socket():
    accepted()[0].setsockopt(1, 25, b"veth0\0")


@attack
def firewall_by_getsockopt():
    info, size = ctypes.create_string_buffer(b"filter", 84), ctypes.c_uint32(84)
    with socket.socket(V4, UDP) as s:
        if libc.getsockopt(s.fileno(), 0, 64, info, ctypes.byref(size)):
            raise OSError(ctypes.get_errno(), "getsockopt")


@attack
def netns_cookie():
    """The container's own, not the host's."""
    here = socket.socket(socket.AF_UNIX, UDP).getsockopt(1, 71, 8)
    return "OWN" if socket.socket(V4, UDP).getsockopt(1, 71, 8) == here else "OK"


# ---- devices ----


def device(request):
    def tries():
        with socket.socket(V4, UDP) as s:
            fcntl.ioctl(s.fileno(), request, struct.pack("16s240x", b"veth0"))

    return tries


DEVICE_REQUESTS = {
    "read_the_address": 0x8915,
    "read_the_hardware_address": 0x8927,
    "read_the_flags": 0x8913,
    "change_the_address": 0x8916,
    "change_the_flags": 0x8914,
    "change_the_mtu": 0x8922,
    "rename_the_device": 0x8923,
    "add_a_route": 0x890B,
    "change_arp": 0x8955,
    "add_a_bridge": 0x89A0,
    "ethtool": 0x8946,
    "wireless": 0x8B01,
    "bonding": 0x8990,
    "tunnel": 0x89F1,
    "hardware_time_stamps": 0x89B0,
}
ATTACKS |= {name: device(request) for name, request in DEVICE_REQUESTS.items()}


@attack
def hosts_namespace_by_ioctl():
    with socket.socket(V4, UDP) as s:
        fcntl.ioctl(s.fileno(), 0x894C)


@attack
def list_the_devices():
    buffer = array.array("B", bytes(4000))
    with socket.socket(V4, UDP) as s:
        told = fcntl.ioctl(s.fileno(), 0x8912, struct.pack("=i4xQ", len(buffer), buffer.buffer_info()[0]))
    count = struct.unpack_from("=i", told)[0] // 40
    return ",".join(buffer.tobytes()[n * 40 : n * 40 + 16].split(b"\0")[0].decode() for n in range(count))


# ---- other families, other descriptors ----


@attack
def packet_socket_sees_only_lo():
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    s.bind(("veth0", 0))


@attack
def raw_socket_reaches_nothing():
    s = socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    s.sendto(b"\x08\0" + bytes(6), (HOST, 0))


@attack
def netlink_sees_only_lo():
    told = subprocess.run(("ip", "-o", "link"), capture_output=True, text=True).stdout
    return ",".join(line.split(":")[1].strip() for line in told.splitlines())


@attack
def netlink_changes_nothing():
    done = subprocess.run(("ip", "address", "add", "10.77.0.9/24", "dev", "veth0"), capture_output=True, text=True)
    return "OK" if done.returncode == 0 else "FAILED"


@attack
def bpf():
    attr = struct.pack("=IIII", 1, 4, 4, 1) + bytes(112)
    if libc.syscall(321, 0, attr, len(attr)) < 0:
        raise OSError(ctypes.get_errno(), "bpf")


@attack
def join_the_hosts_namespace():
    fd = os.open("/proc/1/ns/net", os.O_RDONLY)
    if libc.setns(fd, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


@attack
def descriptor_to_an_ungrafted_process():
    """Whoever gets the socket stands under the same policy."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, TCP)
    s = socket.socket(V4, TCP)
    child = os.fork()
    if not child:
        libc.unshare(0x10000000)
        _, fds, _, _ = socket.recv_fds(theirs, 9, 1)
        with socket.socket(fileno=fds[0]) as got:
            try:
                got.bind((HOST, 22))
                theirs.send(b"OK")
            except OSError as error:
                theirs.send(errno.errorcode[error.errno or 0].encode())
        os._exit(0)
    socket.send_fds(ours, [b"x"], [s.fileno()])
    told = ours.recv(99).decode()
    os.waitpid(child, 0)
    return told


@attack
def admin_socket():
    s = socket.socket(socket.AF_UNIX, TCP)
    s.settimeout(2)
    s.connect(os.environ["GRAFT_RUN_DIR"] + "/graftd.sock")
    s.sendall(b'{"op":"ps","version":"0.1.0"}\n')
    told = s.recv(65536)
    return "EPERM" if b'"EPERM"' in told else f"OK {told!r}"


@attack
def keepers_socket():
    s = socket.socket(socket.AF_UNIX, UDP)
    s.connect(os.environ["GRAFT_RUN_DIR"] + "/notify.sock")


@attack
def supervisors_socket():
    """A process of the container says that it is a graft-sup without a graftd."""
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.settimeout(2)
    s.connect(os.environ["GRAFT_RUN_DIR"] + "/helpers.sock")
    fd = os.memfd_create("forged")
    os.truncate(fd, 128 + 64 * 128)
    os.pwrite(fd, struct.pack("=IIIIQIIQQII32s", 2, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, b"x" * 32), 0)
    socket.send_fds(s, [b"graft-sup"], [fd, fd, fd])
    return {b"n": "REFUSED", b"y": "OK"}.get(s.recv(1), "CLOSED")


def agent(message, fds=()):
    s = socket.socket(socket.AF_UNIX, TCP)
    s.settimeout(5)
    s.connect(os.environ["GRAFT_RUN_DIR"] + "/agent.sock")
    with contextlib.suppress(OSError):
        socket.send_fds(s, [message[:65536]], fds)
        s.sendall(message[65536:])
    told = b""
    with contextlib.suppress(OSError):
        while piece := s.recv(65536):
            told += piece
    return "OK" if b'"ok"' in told else "REFUSED"


@attack
def agent_message_malformed():
    return agent(b'{"ociVersion": 1, "fds": {}, "metadata": [' + b"\xff" * 100 + b"]}")


@attack
def agent_message_deep():
    return agent(b'{"fds":' + b"[" * 100000 + b"]" * 100000 + b"}")


@attack
def agent_message_huge():
    return agent(b'{"fds": ["' + b"x" * (2 << 20) + b'"]}')


@attack
def agent_message_publishes():
    return agent(
        b'{"ociVersion":"1","fds":["seccompFd"],"pid":1,"metadata":"{\\"publish\\":[\\"22:22\\"]}",'
        b'"state":{"id":"x","pid":1}}',
        [os.open("/dev/null", os.O_RDONLY)],
    )


@attack
def agent_message_names_anothers_process():
    return agent(
        b'{"ociVersion":"1","fds":["seccompFd"],"pid":1,"metadata":"{}","state":{"id":"x","pid":1}}',
        [os.open("/dev/null", os.O_RDONLY)],
    )


@attack
def forged_metadata():
    told = b'{"ociVersion":"1","fds":["seccompFd"],"pid":1,"metadata":"{\\"seal\\":\\"' + b"0" * 64
    return agent(told + b'\\"}","state":{"id":"x","pid":1}}', [os.open("/dev/null", os.O_RDONLY)])


@attack
def flood_of_connections():
    kept = []
    for _ in range(600):
        s = socket.socket(socket.AF_UNIX, TCP)
        s.setblocking(False)
        with contextlib.suppress(OSError):
            s.connect(os.environ["GRAFT_RUN_DIR"] + "/agent.sock")
        kept.append(s)
    return "SERVED" if socket.socket(V4, TCP).fileno() > 2 else "LOST"


@attack
def flood_of_calls():
    def work():
        while not over:
            with contextlib.suppress(OSError), socket.socket(V4, TCP) as s:
                s.listen()

    over = []
    threads = [threading.Thread(target=work) for _ in range(64)]
    for t in threads:
        t.start()
    time.sleep(0.3)
    over.append(1)
    for t in threads:
        t.join()
    return "SERVED"


@attack
def links_in_the_run_directory():
    os.symlink("/etc/passwd", os.environ["GRAFT_RUN_DIR"] + "/state.new")


@attack
def run_directory_is_not_ours():
    os.rename(os.environ["GRAFT_RUN_DIR"] + "/agent.sock", os.environ["GRAFT_RUN_DIR"] + "/other.sock")


@attack
def nested_namespace():
    """Deeper down the policy is the same."""
    if libc.unshare(0x40000000 | 0x10000000):
        raise OSError(ctypes.get_errno(), "unshare")
    socket.create_connection((HOST, 9101), 1)


@attack
def descriptor_limit_of_nothing():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    socket.socket(V4, TCP)


def run(name):
    """The outcome of one attack, in a child that may not outlive it."""
    if name not in ATTACKS:
        done = subprocess.run((COMPILED, name, HOST, CLIENT), capture_output=True, text=True, timeout=60)
        return done.stdout.strip() or f"status {done.returncode}"
    try:
        return ATTACKS[name]() or "OK"
    except TimeoutError:
        return "TIMEOUT"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def main():
    print("up", flush=True)
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.setsid()
            signal.alarm(60)
            os.write(writing, run(line.strip()).encode())
            os._exit(0)
        os.close(writing)
        with open(reading) as told:
            print(told.read() or "DIED", flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
