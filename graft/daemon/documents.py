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


def _slice(tenant: Tenant, *, v4: bool) -> bytes:
    from graft.rules.slices import slice_address

    return slice_address(tenant.slot, 1, v4=v4)[0].raw


def denial_document(when: float, denial: denials.Denial) -> dict[str, Any]:
    """One refused call in JSON; @when is in seconds since the epoch."""
    import errno

    document: dict[str, Any] = {
        "time": when,
        "op": denial.op,
        "reason": denial.reason,
        "errno": errno.errorcode.get(denial.error, str(denial.error)),
        "command": denial.comm,
    }
    if denial.op == "setsockopt":
        document["level"], document["option"] = denial.port >> 16, denial.port & 0xFFFF
    else:
        document["address"] = Address(denial.address).with_port(denial.port)
    return document
