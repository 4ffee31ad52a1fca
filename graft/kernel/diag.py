"""TCP listeners by sock_diag(7): those that nobody can reach are destroyed, those of a netns are found.

listen() on a socket that no bind hook saw takes a port of the kernel's choice, before any hook runs.
csrc/bind.bpf.h then ties the socket to an interface that does not exist. One that has a device already, by a
link-local address, may keep it; csrc/receive.bpf.h drops what comes to it. The port would be the host's loss.
"""

import contextlib
import socket
import struct

from graft.kernel import linux

NOWHERE = 0x7FFFFFFF  # the interface that does not exist: csrc/bind.bpf.h, graft_sockops()
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21  # linux/sock_diag.h
REQUEST, ACK, DUMP = 1, 4, 0x300  # linux/netlink.h, NLM_F_*
NLMSG_ERROR, NLMSG_DONE = 2, 3
TCP_LISTEN = 10
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
QUESTION = struct.Struct("=BBBBI48s")  # struct inet_diag_req_v2
ID = slice(HEADER.size + 4, HEADER.size + 52)  # struct inet_diag_sockid in a struct inet_diag_msg
ADDRESS, ADDRESS_SIZES = slice(4, 20), {socket.AF_INET: 4, socket.AF_INET6: 16}  # idiag_src of it
DEVICE = struct.Struct("=36xI8x")  # idiag_if of it
MESSAGE_SIZE = 72  # of a struct inet_diag_msg, which attributes follow
ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
INET_DIAG_CGROUP_ID = 21
PATIENCE = 1.0  # seconds


def end_stray_listeners(cgroup: int) -> int:
    """Destroy the TCP listeners of this netns that are tied to NOWHERE, and those of containers that have a device.

    @cgroup: the inode of the cgroup in which the sockets of containers are made. Best effort. Returns how many there
    were.
    """
    count = 0
    for family in (socket.AF_INET, socket.AF_INET6):
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as sock,
        ):
            sock.settimeout(PATIENCE)
            _ask(sock, SOCK_DIAG_BY_FAMILY, DUMP, family, bytes(48))
            for found, made_in in _listeners(sock):
                (device,) = DEVICE.unpack(found)
                if not device or (device != NOWHERE and made_in != cgroup):
                    continue
                count += 1
                _ask(sock, SOCK_DESTROY, ACK, family, found)
                sock.recv(1024)
    return count


def listening_in(netns: int) -> list[str]:
    """The addresses at which TCP sockets listen in the netns with the descriptor @netns, as text. Raises OSError."""
    found = []
    with linux.inside_netns(netns):
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG)
    with sock:
        sock.settimeout(PATIENCE)
        for family in (socket.AF_INET, socket.AF_INET6):
            _ask(sock, SOCK_DIAG_BY_FAMILY, DUMP, family, bytes(48))
            size = ADDRESS_SIZES[family]
            found += [socket.inet_ntop(family, at[ADDRESS][:size]) for at, _ in _listeners(sock)]
    return found


def _ask(sock: socket.socket, kind: int, flags: int, family: int, found: bytes) -> None:
    question = QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << TCP_LISTEN, found)
    sock.send(HEADER.pack(HEADER.size + len(question), kind, REQUEST | flags, 0, 0) + question)


def _listeners(sock: socket.socket) -> list[tuple[bytes, int]]:
    """The struct inet_diag_sockid of each socket in the answer to a dump, and its cgroup. Raises OSError."""
    found: list[tuple[bytes, int]] = []
    while True:
        data = sock.recv(1 << 16)
        while data:
            length, kind = HEADER.unpack_from(data)[:2]
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                return found
            found.append((data[ID], _cgroup(data[HEADER.size + MESSAGE_SIZE : length])))
            data = data[(length + 3) & ~3 :]


def _cgroup(attributes: bytes) -> int:
    """The inode of a socket's cgroup; 0 if the kernel does not tell (before Linux 5.9)."""
    while len(attributes) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(attributes)
        if kind == INET_DIAG_CGROUP_ID:
            return int.from_bytes(attributes[ATTRIBUTE.size : ATTRIBUTE.size + 8], "little")
        attributes = attributes[max(length + 3 & ~3, ATTRIBUTE.size) :]
    return 0
