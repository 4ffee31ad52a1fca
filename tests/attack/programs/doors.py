"""Graftd's doors, from inside: whoever has a socket of graftd's takes no orders from a container's program."""

import array
import contextlib
import json
import os
import socket
import struct
import time

from .common import TCP, V4, attack

RUN = os.environ.get("GRAFT_RUN_DIR", "")


def plugin(method, request):
    """One request to Docker's plugin socket: the driver's answer; CLOSED if there is none."""
    path = f"/run/docker/plugins/{os.path.basename(RUN)}.sock"
    if not os.path.exists(path):
        return "ABSENT"
    s = socket.socket(socket.AF_UNIX, TCP)
    s.settimeout(5)
    s.connect(path)
    body = json.dumps(request).encode()
    head = f"POST /{method} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    told = b""
    with contextlib.suppress(OSError):
        s.sendall(head.encode() + body)
        while piece := s.recv(65536):
            told += piece
    return told.partition(b"\r\n\r\n")[2].decode() or "CLOSED"


def publish_22():
    mapping = {"Proto": 6, "Port": 22, "HostPort": 22, "HostPortEnd": 22}
    options = {"com.docker.network.portmap": [mapping]}
    endpoint = {"EndpointID": "e" * 64, "NetworkID": "n" * 64, "Options": options, "Interface": {"Address": "10.99.0.9/24"}}
    told = plugin("NetworkDriver.CreateEndpoint", endpoint)
    key = {"EndpointID": "e" * 64, "NetworkID": "n" * 64}
    if told == '{"Interface": {}}':
        plugin("NetworkDriver.Join", {**key, "SandboxKey": "/proc/self/ns/net", "Options": {}})
        plugin("NetworkDriver.DeleteEndpoint", key)
    return told


@attack
def door_of_dockers_plugin():
    """Host port 22 published, as dockerd would."""
    return publish_22()


@attack
def door_of_dockers_plugin_by_a_child_that_ends():
    """Whoever connected has ended, so that nobody can look at it; its child has the connection."""
    path = f"/run/docker/plugins/{os.path.basename(RUN)}.sock"
    if not os.path.exists(path):
        return "ABSENT"
    reading, writing = os.pipe()
    if not os.fork():
        s = socket.socket(socket.AF_UNIX, TCP)
        s.settimeout(5)
        try:
            s.connect(path)
        except OSError:
            os.write(writing, b"EACCES")
            os._exit(0)
        if os.fork():
            os._exit(0)
        time.sleep(0.3)
        told = b""
        with contextlib.suppress(OSError):
            s.sendall(b"POST /Plugin.Activate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
            told = s.recv(65536)
        os.write(writing, b"OK" if b"Implements" in told else b"CLOSED")
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        return file.read()


@attack
def door_of_the_supervisors():
    """helpers.sock hears no process of a container, whatever it brings."""
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.settimeout(5)
    s.connect(RUN + "/helpers.sock")
    fds = array.array("i", [0, 0, 0])
    with contextlib.suppress(OSError):
        s.sendmsg([b"graft-sup"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        return {b"": "CLOSED", b"n": "HEARD", b"y": "OK"}[s.recv(1)]
    return "CLOSED"


@attack
def door_of_the_admin_by_a_passed_connection():
    """A connection made by one process is used by another: it stays the first one's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    if not os.fork():
        s = socket.socket(socket.AF_UNIX, TCP)
        try:
            s.connect(RUN + "/graftd.sock")
            socket.send_fds(theirs, [b"x"], [s.fileno()])
        except OSError:
            theirs.send(b"n")
        os._exit(0)
    text, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if text == b"n":
        return "EACCES"
    os.wait()
    with socket.socket(fileno=fds[0]) as s:
        s.settimeout(5)
        s.sendall(b'{"op":"ps","version":"0.1.0"}\n')
        told = s.recv(65536)
    return "EPERM" if b'"EPERM"' in told or b'"ESRCH"' in told else f"OK {told!r}"


@attack
def name_of_graftd_taken():
    """The name that a graftd claims is of the host's netns: in the container's it means nothing."""
    s = socket.socket(socket.AF_UNIX, TCP)
    s.bind("\0graftd")
    socket.socket(socket.AF_UNIX, TCP).connect("\0graftd")


SYN, ACK = 2, 16


def segment(source, port, flags, number=0, answered=0):
    """A TCP segment from 127.0.0.1 to itself (RFC 9293, 3.1)."""
    head = struct.pack("!HHIIBBHHH", source, port, number, answered, 5 << 4, flags, 65535, 0, 0)
    whole = socket.inet_aton("127.0.0.1") * 2 + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(head)) + head
    total = sum(struct.unpack(f"!{len(whole) // 2}H", whole))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:16] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[18:]


def answer(raw, source, port, seconds=0.1):
    """The number in the answer to a SYN from this port; None if it is refused, or none comes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            got = raw.recv(100)[20:]
        except TimeoutError:
            break
        if struct.unpack("!HH", got[:4]) == (port, source) and got[13] & (SYN | 4):
            return struct.unpack("!I", got[4:8])[0] if got[13] == SYN | ACK else None
    return None


def flood(raw, port):
    """Wait for the entrance, which is made after the container has started, and fill its queue. False: it is not."""
    raw.settimeout(0.1)
    for _ in range(50):
        raw.sendto(segment(20000, port, SYN), ("127.0.0.1", 0))
        if answer(raw, 20000, port) is not None:
            break
        time.sleep(0.1)
    else:
        return False
    for source in range(20000, 25000):
        raw.sendto(segment(source, port, SYN), ("127.0.0.1", 0))
    return True


def is_served(server):
    """Does a program of the container's reach it? graftd has answered its listen()."""
    server.settimeout(5)
    with socket.socket(V4, TCP) as client:
        client.setblocking(False)  # its queue may be full of others
        client.connect_ex(server.getsockname())
        while (peer := server.accept())[1] != client.getsockname():
            peer[0].close()
        return True


@attack
def flood_of_the_entrance():
    """Requests for connections to its own server, by packets: graftd's listener in the netns gets them."""
    with socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw, socket.create_server(("127.0.0.1", 0)) as server:
        return "SERVED" if flood(raw, server.getsockname()[1]) and is_served(server) else "UNANSWERED"


@attack
def connections_by_packets():
    """Whole connections, which no socket of this program's has: where the netns answers by cookies, no reset ends them."""
    with open("/proc/sys/net/ipv4/tcp_syncookies", "w") as cookies:
        cookies.write("2")
    with socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(5)
        if not flood(raw, port):
            return "UNANSWERED"
        while True:  # what the flood has brought
            try:
                raw.recv(100)
            except TimeoutError:
                break
        source, until = 30000, time.monotonic() + 2
        while time.monotonic() < until:
            source += 1
            raw.sendto(segment(source, port, SYN), ("127.0.0.1", 0))
            number = answer(raw, source, port, 0.01)
            if number is not None:
                raw.sendto(segment(source, port, ACK, 1, (number + 1) & 0xFFFFFFFF), ("127.0.0.1", 0))
        came = server.accept()[0]
        came.close()
        return "SERVED" if is_served(server) else "UNANSWERED"
