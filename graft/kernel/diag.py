"""Destroy listeners that nobody can reach (sock_diag(7), SOCK_DESTROY).

listen() on a socket that no bind hook saw takes a port of the kernel's choice, before any hook runs.
csrc/bind.bpf.h then ties the socket to an interface that does not exist. The port would be the host's loss.
"""

import contextlib
import socket
import struct

NOWHERE = 0x7FFFFFFF  # the interface that does not exist: csrc/bind.bpf.h, graft_sockops()
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21  # linux/sock_diag.h
REQUEST, ACK, DUMP = 1, 4, 0x300  # linux/netlink.h, NLM_F_*
NLMSG_ERROR, NLMSG_DONE = 2, 3
TCP_LISTEN = 10
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
QUESTION = struct.Struct("=BBBBI48s")  # struct inet_diag_req_v2
ID = slice(HEADER.size + 4, HEADER.size + 52)  # struct inet_diag_sockid in a struct inet_diag_msg
DEVICE = struct.Struct("=36xI8x")  # idiag_if of it
PATIENCE = 1.0  # seconds


def end_stray_listeners() -> int:
    """Destroy the TCP listeners of this netns that are tied to NOWHERE; best effort. Returns how many there were."""
    count = 0
    for family in (socket.AF_INET, socket.AF_INET6):
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as sock,
        ):
            sock.settimeout(PATIENCE)
            _ask(sock, SOCK_DIAG_BY_FAMILY, DUMP, family, bytes(48))
            stray = [found for found in _listeners(sock) if DEVICE.unpack(found)[0] == NOWHERE]
            count += len(stray)
            for found in stray:
                _ask(sock, SOCK_DESTROY, ACK, family, found)
                sock.recv(1024)
    return count


def _ask(sock: socket.socket, kind: int, flags: int, family: int, found: bytes) -> None:
    question = QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << TCP_LISTEN, found)
    sock.send(HEADER.pack(HEADER.size + len(question), kind, REQUEST | flags, 0, 0) + question)


def _listeners(sock: socket.socket) -> list[bytes]:
    """The struct inet_diag_sockid of each socket in the answer to a dump. Raises OSError."""
    found: list[bytes] = []
    while True:
        data = sock.recv(1 << 16)
        while data:
            length, kind = HEADER.unpack_from(data)[:2]
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                return found
            found.append(data[ID])
            data = data[(length + 3) & ~3 :]
