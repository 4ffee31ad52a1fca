"""Who listens: the host's own programs, from /proc/net (proc_net(5)), and a container's, from graft's maps."""

import contextlib
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from graft.kernel.addresses import ephemeral_ports
from graft.kernel.maps import Map
from graft.rules.address import Address

TABLES = Path("/proc/net")
LISTENING = {"tcp": "0A", "udp": "07"}  # TCP_LISTEN; of UDP TCP_CLOSE: not connected (include/net/tcp_states.h)
TABLE_KEY = struct.Struct("=I16sHH")  # struct graft_listener_key
TABLE = struct.Struct("=QQQ")  # struct graft_listening
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


def wildcard_ports(below_uid: int) -> set[tuple[int, int]]:
    """The ports of the current netns that are taken on 0.0.0.0 or [::], as (protocol, port).

    @below_uid: sockets of this uid and greater ones do not count; they are containers'. Nor does a UDP port that the
    kernel may have chosen: whoever has it now will have another one tomorrow. Raises OSError.
    """
    low, high = ephemeral_ports()
    found = {
        (PROTOCOLS[kind], port)
        for kind in PROTOCOLS
        for name in (kind, f"{kind}6")
        for port, uid in _entries(TABLES / name, LISTENING[kind])
        if uid < below_uid
    }
    return {(protocol, port) for protocol, port in found if protocol == socket.IPPROTO_TCP or not low <= port <= high}


def ports_in_use(protocol: int) -> set[int]:
    """The local ports of all sockets of the current netns that the kernel lists. Raises OSError.

    @protocol: IPPROTO_TCP or IPPROTO_UDP.
    """
    kind = next(kind for kind, number in PROTOCOLS.items() if number == protocol)
    return {int(row[1].rpartition(":")[2], 16) for name in (kind, f"{kind}6") for row in _rows(TABLES / name)}


def _rows(path: Path) -> Iterator[list[str]]:
    """The fields of each socket in a table; nothing without the family."""
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        next(file)
        yield from map(str.split, file)


def _entries(path: Path, state: str) -> Iterator[tuple[int, int]]:
    """Port and uid of each socket in this state at the wildcard; nothing without the family.

    TCP's listeners come first (net/ipv4/tcp_ipv4.c, tcp_seq_start()), and the connections after them may be many.
    """
    for fields in _rows(path):
        address, _, port = fields[1].partition(":")
        if fields[3] == state and not address.strip("0"):
            yield int(port, 16), int(fields[7])
        elif fields[3] != state and path.name.startswith("tcp"):
            return


def listens(maps: Mapping[str, Map], tenant: int, address: Address, port: int) -> bool:
    """Does a program of the tenant's listen at what it calls @port of @address (csrc/listeners.bpf.h)? Any thread."""
    kept = maps["listening"].get(tenant.to_bytes(4, "little"))
    slots = TABLE.unpack(kept)[2] if kept else 0
    keys = (TABLE_KEY.pack(tenant, address.raw, port, slot) for slot in range(slots.bit_length()))
    return any(maps["listeners"].get(key) is not None for key in keys)
