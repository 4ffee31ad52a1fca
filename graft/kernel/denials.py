"""What the kernel's half reports: refused calls, and conversions and allowed calls that somebody asked to see."""

import struct
from typing import NamedTuple

DENIAL = struct.Struct("=IHHiI16sI16sI16sQI4x")

OPS = ("bind", "connect", "send", "setsockopt", "listen", "guard", "socket")
REASONS = (
    "no ingress rule",
    "outside the egress rules",
    "bound to the private loopback",
    "bound to another address than the egress rule's",
    "two host addresses for one dual-stack socket",
    "nobody of this container listens there",
    "forbidden socket option",
    "listen() on an unbound socket",
    "another's private loopback",
    "the container's policy is gone",
    "an accepted socket put to another use",
    "the endpoint is in another namespace than the socket",
    "no endpoint 'default-source'",
    "another container is bound there",
    "an address of a network that the container is not in",
    "more queries than a container may send",
    "no port is left that the kernel may choose",
    "no capability for a port as low as this",
    "a port that the node needs",
    "a kind of socket that is made elsewhere",
    "a process moved out of its container's cgroup",
    "more sockets than a container may have",
    "a destination that it is not allowed",
    "a name's address, and no endpoint to go to",
    "a peer beside others that the socket has had",
    "learnt",
    "converted",
    "allowed",
)
LEARNT, CONVERTED, ALLOWED = REASONS[-3:]


class Event(NamedTuple):
    """A refused, converted or allowed call, as the ring buffer reports it.

    For setsockopt, `port` is level << 16 | option. With the reason CONVERTED nothing was refused: the hook replaced
    the address, and `real` and `real_port` are the address that it became, or the one that the connection leaves
    from; with ALLOWED they are the address that it is bound to, or sends to. Addresses are 16 bytes, IPv4 ones
    mapped. `when` is in seconds since the epoch. `pid` and `comm` are of the process, 0 and "" where the hook does
    not know it.
    """

    tenant: int
    op: str
    reason: str
    error: int
    protocol: int
    address: bytes
    port: int
    real: bytes
    real_port: int
    comm: str
    when: float
    pid: int
