"""What tenants have carried: closed TCP connections (csrc/traffic.bpf.h), and UDP (csrc/datagrams.bpf.h)."""

import struct
from typing import NamedTuple

from graft.kernel.maps import Map

TRAFFIC = struct.Struct("=QQQQQQ")
DATAGRAMS = struct.Struct("=QQQQ")


class Traffic(NamedTuple):
    """Connections that were accepted, and that were made; bytes and segments of both."""

    accepted: int = 0
    connected: int = 0
    received: int = 0
    sent: int = 0
    segments_received: int = 0
    segments_sent: int = 0


def closed_traffic(traffic: Map, tenant: int) -> Traffic:
    """Of a tenant's connections that are closed; @traffic: the map. Any thread. Raises OSError."""
    kept = traffic.get(tenant.to_bytes(4, "little"))
    return Traffic._make(TRAFFIC.unpack(kept)) if kept else Traffic()


class Datagrams(NamedTuple):
    """Bytes and datagrams of UDP, while they were counted."""

    bytes_received: int = 0
    bytes_sent: int = 0
    received: int = 0
    sent: int = 0


def counted_datagrams(datagrams: Map, tenant: int) -> Datagrams:
    """Of a tenant's UDP sockets; @datagrams: the map. Any thread. Raises OSError."""
    kept = datagrams.get(tenant.to_bytes(4, "little"))
    return Datagrams._make(DATAGRAMS.unpack(kept)) if kept else Datagrams()
