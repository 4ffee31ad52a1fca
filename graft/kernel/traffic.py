"""What the closed TCP connections of tenants have carried (csrc/traffic.bpf.h)."""

import struct
from typing import NamedTuple

from graft.kernel.maps import Map

TRAFFIC = struct.Struct("=QQQQQQ")


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
