"""What commands show, as JSON documents."""

import contextlib
import os
from typing import Any

from graft import __version__
from graft.daemon.files import Files
from graft.daemon.tenancy import Tenancy
from graft.kernel import denials, linux, netns
from graft.rules.address import PROTOCOL_NAME, Address
from graft.rules.configuration import configuration_path
from graft.tenants import attachments
from graft.tenants.attachment import Attachment
from graft.tenants.direct import first_process, is_inside
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant


def live_pid(tenant: Tenant) -> int:
    """The pid of a container's first process; once that has ended, of another process in its namespace."""
    if tenant.cgroup:
        return tenant.pid if is_inside(tenant, tenant.pid) else first_process(tenant) or tenant.pid
    with contextlib.suppress(OSError):
        if linux.netns_inode(tenant.pid) == tenant.netns:
            return tenant.pid
    return next(iter(netns.processes_in_netns(tenant.netns)), tenant.pid)


def slice_of(tenant: Tenant, *, v4: bool) -> bytes:
    """The first address, in 16 bytes, of the slice that stands for a tenant's loopback."""
    from graft.rules.slices import slice_address

    return slice_address(tenant.slice_number, 1, v4=v4)[0].raw


def event_document(event: denials.Event) -> dict[str, Any]:
    """One refused call in JSON."""
    import errno

    document: dict[str, Any] = {
        "time": event.when,
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


def label(attachment: Attachment) -> str:
    """What an attachment is called in a message: a name that its network knows, or the engine's key; the network."""
    return f"{next(iter(attachment.names), attachment.key)} ({attachment.network.removeprefix('cni/')[:12]})"


def engine_users(registry: Registry, uid: int = 0) -> dict[str, list[str]]:
    """Of each engine of `graft install`, what is there by graft: its containers, and members of networks.

    @uid: of the user without root whose engines they are; 0: root's.

    A member of a CNI network that no container has may be Podman's as well as containerd's.
    """
    found: dict[str, list[str]] = {"docker": [], "podman": [], "containerd": []}
    names = {"cri": "containerd"}
    for tenant in registry.tenants.values():
        if (tenant.uid if tenant.user else 0) != uid:
            continue
        for engine in {names.get(member.engine, member.engine) for member in tenant.members.values()} & found.keys():
            found[engine].append(tenant.name)
    for attachment in attachments.alone(registry):
        if attachment.uid != uid:
            continue
        for engine in ("docker",) if attachment.key.startswith("docker/") else ("podman", "containerd"):
            found[engine].append(label(attachment))
    return found


def status_document(tenancy: Tenancy, files: Files) -> dict[str, Any]:
    """What graftd is and does. `call_ns` is the time of all `calls`, in nanoseconds."""
    calls, ns = tenancy.calls.counted()
    return {
        "version": __version__,
        "pid": os.getpid(),
        "kept": tenancy.store.kept,
        "containers": len(tenancy.registry.tenants),
        "calls": calls,
        "call_ns": ns,
        "configuration": tenancy.configuration.document(),
        "reserved": sorted(f"{port}/{PROTOCOL_NAME[protocol]}" for protocol, port in tenancy.reserved),
        "readers": len(tenancy.readers),
        "configured_by": str(configuration_path()),
        "faults": files.faults(),
        "engines": engine_users(tenancy.registry),
    }
