"""Graftd's doors, from inside: whoever has a socket of graftd's takes no orders from a container's program."""

import array
import contextlib
import json
import os
import socket
import time

from .common import TCP, attack

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
