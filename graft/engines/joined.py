"""A network namespace that a container joins: one of its engine's network plugins, or another container's.

A container's sockets are the host's. So what is in its netns acts on none of them: no device, no route, no VPN, and
no firewall that is to stop what would go past the VPN. Its connections would leave by the host's route. A container
that may expect otherwise is refused when it is created.
"""

import os

from graft import protocol
from graft.engines.container import Container
from graft.errors import Refused
from graft.kernel import foreign, linux, netns, nowhere, rtnetlink
from graft.rules.address import Address
from graft.tenants import inside
from graft.tenants.registry import Registry

LINKS_MOST = 4096
PARTS_MAX = 400  # of a path, those of links on the way included


def _without_waiting(path: str, flags: int) -> int:
    """Open without blocking, because @path may be a FIFO (an opener for open())."""
    return os.open(path, flags | os.O_NONBLOCK)


def below(root: str, path: str) -> str:
    """@path as a process sees it whose root directory is @root: an absolute link on the way (/var/run) stays there.

    What is in /proc is left to the kernel: its links lead where no path does.
    """
    done, rest = "", path.split("/")
    for _ in range(PARTS_MAX):
        if not rest:
            break
        part = rest.pop(0)
        try:
            link = os.readlink(f"{root}{done}/{part}") if part and not done.startswith("/proc") else ""
        except (OSError, ValueError):
            link = ""
        if link:
            rest = link.split("/") + rest
            done = "" if link.startswith("/") else done
        elif part == "..":
            done = os.path.dirname(done).rstrip("/")
        elif part not in ("", "."):
            done += f"/{part}"
    return f"{root}{done}"


def where(path: str) -> tuple[int, int]:
    """Inode and cookie of the netns at @path, zeros for no path. Raises Refused if it is no netns, or not visible."""
    if not path:
        return 0, 0
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            foreign.check_netns(file.fileno())
            return os.fstat(file.fileno()).st_ino, netns.netns_cookie_of(file.fileno())
    except (OSError, ValueError) as error:
        raise Refused(
            f"the network namespace {path}: {getattr(error, 'strerror', None) or error}",
            hint="graftd has to see what the container joins",
            code="EINVAL",
        ) from None


def foreign_devices(path: str, device: str, known: set[Address]) -> list[str]:
    """The names of the devices in the netns at @path, beside lo, that are up (IFF_UP) and not graft's.

    Graft's is the one called @device, and its peer: by name, group and kind, and only if it has no address but those
    @known to be put there. Whoever may change one of these may have made a tunnel of it. Raises OSError.
    """
    with open(path, "rb", opener=_without_waiting) as file, rtnetlink.channel_in(file.fileno()) as channel:
        strange = {held.ifindex for held in channel.addresses() if held.address not in known}
        links = channel.links(LINKS_MOST)
    if len(links) == LINKS_MOST:
        return [links[-1].name]  # among so many is one of somebody else's
    up = [link for link in links if link.flags & linux.IFF_UP and link.name != nowhere.LO]
    return [link.name for link in up if not nowhere.is_own(link, device) or link.ifindex in strange]


def check_devices(registry: Registry, container: Container) -> None:
    """Refuse a container whose netns has a device that is not graft's. Raises Refused."""
    if container.where[0] in (0, registry.home):
        return
    tenant = registry.by_netns(container.where[0])
    device = inside.device_of(registry, tenant) if tenant else ""
    known = {*inside.shown(tenant), *inside.wanted(registry, tenant)} if tenant else set()
    try:
        names = foreign_devices(container.path, device, known)
    except OSError as error:
        raise Refused(f"the devices in {container.path}: {error.strerror}", code="EINVAL") from None
    if names:
        raise Refused(
            f"the network that it joins has a device of its own ({names[0]}): its sockets would be the host's, and "
            "leave by the host's route, past that network's, its VPN and its firewall",
            hint="--network none, or a network of graft; or run it without graft",
            code="EINVAL",
        )


def check_members(registry: Registry, container: Container, metadata: protocol.Metadata) -> None:
    """Refuse to join a container that may have CAP_NET_ADMIN, unless this one asks for it, too. Raises Refused.

    What that one does with it, a VPN or a firewall, is often there for those who join it.
    """
    running = registry.by_netns(container.where[0])
    able = sorted(running.members.keys() - running.no_netadmin - {container.id}) if running else ()
    if running and able and not metadata.netadmin:
        raise Refused(
            f"container '{running.members[able[0]].name}', which it joins, may have CAP_NET_ADMIN: a VPN or a "
            "firewall there would act on none of its sockets, which are the host's",
            hint="create it with graft.netadmin=on as well, if none is meant to",
            code="EPERM",
        )
