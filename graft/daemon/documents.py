"""What commands show, as JSON documents."""

import contextlib
from typing import Any

from graft.kernel import denials, linux, netns
from graft.rules.address import Address
from graft.tenants.tenant import Tenant


def live_pid(tenant: Tenant) -> int:
    """The pid of a container's first process; once that has ended, of another process in its namespace."""
    with contextlib.suppress(OSError):
        if linux.netns_inode(tenant.pid) == tenant.netns:
            return tenant.pid
    return next(iter(netns.processes_in_netns(tenant.netns)), tenant.pid)


def slice_of(tenant: Tenant, *, v4: bool) -> bytes:
    """The first address, in 16 bytes, of the slice that stands for a tenant's loopback."""
    from graft.rules.slices import slice_address

    return slice_address(tenant.slice_number, 1, v4=v4)[0].raw


def event_document(when: float, event: denials.Event) -> dict[str, Any]:
    """One refused call in JSON; @when is in seconds since the epoch."""
    import errno

    document: dict[str, Any] = {
        "time": when,
        "op": event.op,
        "reason": event.reason,
        "errno": errno.errorcode.get(event.error, str(event.error)),
        "command": event.comm,
    }
    if event.op == "setsockopt":
        document["level"], document["option"] = event.port >> 16, event.port & 0xFFFF
    else:
        document["address"] = Address(event.address).with_port(event.port)
    return document
