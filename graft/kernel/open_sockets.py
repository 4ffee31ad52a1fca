"""The TCP and UDP sockets of a netns by sock_diag(7), with graft's stamps, what they have carried, and their cgroup.

The kernel answers with what `ss` shows. Of TCP it adds the value of a BPF map of socket storage where it is asked
(INET_DIAG_REQ_SK_BPF_STORAGES, since Linux 5.7): so whose a socket is, and what its program asked for, comes with it.
Of UDP it does not (inet_sk_diag_fill()).

Sources: linux/inet_diag.h, linux/sock_diag.h, linux/tcp.h, net/ipv4/inet_diag.c.
"""

import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from graft.kernel.diag import (
    ATTRIBUTE,
    DUMP,
    HEADER,
    INET_DIAG_CGROUP_ID,
    MESSAGE_SIZE,
    NETLINK_SOCK_DIAG,
    NLMSG_DONE,
    NLMSG_ERROR,
    QUESTION,
    REQUEST,
    SOCK_DIAG_BY_FAMILY,
)
from graft.kernel.stamps import STAMP, Stamp
from graft.rules.address import ANY4

INET_DIAG_INFO, INET_DIAG_SK_BPF_STORAGES = 2, 20
REQ_SK_BPF_STORAGES, REQ_MAP_FD = 2, 1  # INET_DIAG_REQ_*, SK_DIAG_BPF_STORAGE_REQ_*
STORAGE_VALUE = 3  # SK_DIAG_BPF_STORAGE_MAP_VALUE
NESTED = 0x8000  # NLA_F_NESTED
EVERY_STATE = 0xFFFFFFFF & ~(1 << 6)  # but for TIME-WAIT
STATES = (
    *("", "ESTAB", "SYN-SENT", "SYN-RECV", "FIN-WAIT-1", "FIN-WAIT-2", "TIME-WAIT", "CLOSE"),
    *("CLOSE-WAIT", "LAST-ACK", "LISTEN", "CLOSING", "NEW-SYN-RECV"),
)  # as ss(8) calls them; the numbers are of net/tcp_states.h
LISTENING, HALF_OPEN = 1 << 10, 1 << 3  # of TCP; the kernel counts requests (NEW-SYN-RECV) as SYN-RECV
PATIENCE = 5.0  # seconds
# struct inet_diag_msg: family, state, timer, retransmissions; ports, addresses, device, cookie; expires, rqueue,
# wqueue, uid, inode
MESSAGE = struct.Struct("=BBBB2s2s16s16sI8sIIIII")
# struct tcp_info: last_data_sent, last_data_recv at 44 and 52; max_pacing_rate at 112; bytes_received at 128;
# segs_out, segs_in at 136; bytes_sent, bytes_retrans at 200
IDLE, PACING, RECEIVED, SEGMENTS, SENT = (
    struct.Struct(what) for what in ("=44xI4xI", "=112xQ", "=128xQ", "=136xII", "=200xQQ")
)


class Open(NamedTuple):
    """An open socket. Addresses are 16 bytes, IPv4 ones mapped, with a port. Bytes and segments are of TCP alone.

    `stamp`: graft's, None: it has none. `idle`: milliseconds without data, of TCP connections. `rate`: what
    SO_MAX_PACING_RATE says, in bytes a second, 0: no bound. `inode` is 0 where no process has it.
    """

    protocol: int
    state: int
    local: tuple[bytes, int]
    peer: tuple[bytes, int]
    queued: tuple[int, int]  # bytes that are not read yet, and not sent or acknowledged yet
    uid: int
    inode: int
    cgroup: int  # its inode
    stamp: Stamp | None
    received: int = 0
    sent: int = 0
    segments_in: int = 0
    segments_out: int = 0
    idle: int = 0
    rate: int = 0


def open_sockets(
    stamps: int,
    *,
    protocols: Iterable[int] = (socket.IPPROTO_TCP, socket.IPPROTO_UDP),
    states: int = EVERY_STATE,
    port: int = 0,
) -> Iterator[Open]:
    """The TCP and UDP sockets of the calling thread's netns, but for TIME-WAIT. @stamps: the descriptor of the map.

    @states: a bit for each state that is asked for. @port: at this port alone; 0: at any. Raises OSError.
    """
    for protocol in protocols:
        for family in (socket.AF_INET, socket.AF_INET6):
            with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as sock:
                sock.settimeout(PATIENCE)
                sock.send(_question(family, protocol, stamps, states, port))
                yield from _answers(sock, protocol)


def _question(family: int, protocol: int, stamps: int, states: int, port: int) -> bytes:
    at = port.to_bytes(2, "big") + bytes(46)  # struct inet_diag_sockid
    asked = QUESTION.pack(family, protocol, 1 << INET_DIAG_INFO - 1, 0, states, at)
    which = ATTRIBUTE.pack(8, REQ_MAP_FD) + struct.pack("=i", stamps)
    asked += ATTRIBUTE.pack(ATTRIBUTE.size + len(which), REQ_SK_BPF_STORAGES | NESTED) + which
    return HEADER.pack(HEADER.size + len(asked), SOCK_DIAG_BY_FAMILY, REQUEST | DUMP, 0, 0) + asked


def _answers(sock: socket.socket, protocol: int) -> Iterator[Open]:
    while True:
        data = sock.recv(1 << 17)
        at = 0
        while at < len(data):
            length, kind = HEADER.unpack_from(data, at)[:2]
            if kind == NLMSG_ERROR:
                (number,) = struct.unpack_from("=i", data, at + HEADER.size)
                raise OSError(-number, "sock_diag")
            if kind == NLMSG_DONE:
                return
            yield _open(protocol, data[at + HEADER.size : at + length])
            at += (length + 3) & ~3


def _open(protocol: int, message: bytes) -> Open:
    family, state, _, _, sport, dport, src, dst, _, _, _, rqueue, wqueue, uid, inode = MESSAGE.unpack_from(message)
    stamp, info, cgroup = None, b"", 0
    for kind, value in _attributes(message[MESSAGE_SIZE:]):
        if kind == INET_DIAG_INFO:
            info = value
        elif kind == INET_DIAG_CGROUP_ID:
            cgroup = int.from_bytes(value[:8], "little")
        elif kind == INET_DIAG_SK_BPF_STORAGES:
            stamp = _stamp(value)
    found = Open(
        protocol,
        state,
        (_address(family, src), int.from_bytes(sport, "big")),
        (_address(family, dst), int.from_bytes(dport, "big")),
        (rqueue, wqueue),
        uid,
        inode,
        cgroup,
        stamp,
    )
    return _carried(found, info) if len(info) >= SENT.size else found


def _carried(found: Open, info: bytes) -> Open:
    rate = PACING.unpack_from(info)[0]
    found = found._replace(rate=0 if rate in (0xFFFFFFFF, (1 << 64) - 1) else rate)
    if STATES[found.state] == "LISTEN":  # the other fields mean something else there
        return found
    sent, again = SENT.unpack_from(info)
    segments_out, segments_in = SEGMENTS.unpack_from(info)
    return found._replace(
        received=RECEIVED.unpack_from(info)[0],
        sent=sent - again,
        segments_in=segments_in,
        segments_out=segments_out,
        idle=min(IDLE.unpack_from(info)),
    )


def _stamp(storages: bytes) -> Stamp | None:
    for _, storage in _attributes(storages):
        for kind, value in _attributes(storage):
            if kind == STORAGE_VALUE and len(value) == STAMP.size:
                return Stamp.unpack(value)
    return None


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, at)
        yield kind & ~NESTED, data[at + ATTRIBUTE.size : at + length]
        at += max(length + 3 & ~3, ATTRIBUTE.size)


def _address(family: int, raw: bytes) -> bytes:
    return ANY4[:12] + raw[:4] if family == socket.AF_INET else raw
