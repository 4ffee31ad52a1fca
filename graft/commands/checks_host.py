"""The checks of `graft doctor` for what the host has that a container could use, or that does not hold for one."""

import contextlib
import os
import subprocess
from pathlib import Path

from graft.errors import Failure
from graft.kernel import libbpf


class Lack(Exception):
    """Something that graft needs or profits from is missing: what was found instead, and how to get it."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found = found
        self.remedy = remedy


MODPROBE = Path("/proc/sys/kernel/modprobe")  # the program by which the kernel loads modules
# A link of such a kind takes a UDP socket by its descriptor, of whatever netns, and sends by it past every hook
TUNNELS = {"gtp": "rtnl-link-gtp", "ovpn": "rtnl-link-ovpn"}  # module: the name by which the kernel asks for it


def _may_come(module: str, alias: str) -> bool:
    """Is this module in the kernel, or would modprobe(8) load it when the kernel asks for @alias?"""
    if Path("/sys/module", module).exists():
        return True
    if not MODPROBE.exists():
        return False  # a kernel without modules
    modprobe = MODPROBE.read_text().strip()
    if not os.access(modprobe, os.X_OK):
        return False
    told = subprocess.run((modprobe, "-n", "-v", "-b", alias), capture_output=True, text=True).stdout
    return any(line.startswith("insmod ") for line in told.splitlines())


def tunnels() -> str:
    """Kernel modules that would take a container's UDP socket. Raises Lack."""
    with contextlib.suppress(OSError, Failure):
        libbpf.try_load(libbpf.TUNNELS_OBJECT)
        return "no device takes a container's UDP socket"
    found = [module for module, alias in TUNNELS.items() if _may_come(module, alias)]
    if found:
        raise Lack(
            f"{', '.join(found)}: whoever has CAP_NET_ADMIN in any netns can have it send by a grafted UDP socket",
            f"echo 'install {found[0]} /bin/false' >>/etc/modprobe.d/graft.conf, and rmmod, where nothing needs it",
        )
    return f"no module takes a container's UDP sockets ({', '.join(TUNNELS)})"


# Makes a netns, and from another one, in a user namespace of its own, a pair of devices of which one is to be in it
PEER = """exec 9</proc/self/ns/net
exec unshare --user --map-root-user --net ip link add graft0 type veth peer name graft1 netns /proc/self/fd/9"""


def peers() -> str:
    """Does the kernel ask who puts the peer of a device into a netns (rtnl_get_peer_net())? Raises Lack."""
    done = subprocess.run(("unshare", "--net", "sh", "-c", PEER), capture_output=True, timeout=10)
    if done.returncode == 0:
        raise Lack(
            "CVE-2026-31692: whoever has a user namespace may put a device into any netns, a program in a direct "
            "container also into the host's",
            "a kernel with 'rtnetlink: add missing netlink_ns_capable() check for peer netns', or "
            "sysctl user.max_user_namespaces=0",
        )
    return "nobody puts a device into another's netns"


def owners() -> str:
    """Is the program loaded that keeps the uid of a container's socket (csrc/owners.bpf.h)? Raises Lack."""
    try:
        libbpf.try_load(libbpf.TUNNELS_OBJECT)
    except (OSError, Failure):
        raise Lack(
            "no BPF_MODIFY_RETURN: with CAP_CHOWN a container may share UDP ports of the host's by SO_REUSEPORT",
            "Linux with CONFIG_FUNCTION_TRACER and BTF (arm64: 6.4 or newer), or --cap-drop=CHOWN",
        ) from None
    return "the uid of a container's socket stays"


def _rules(what: str) -> list[str]:
    """The numbers of the routing rules that look at @what (ip-rule(8))."""
    told = "".join(
        subprocess.run(("ip", family, "rule"), capture_output=True, text=True).stdout for family in ("-4", "-6")
    )
    return sorted({line.split(":")[0] for line in told.splitlines() if f" {what} " in line}, key=int)


def uids() -> str:
    """Routing rules by user, which do not know a container's. Raises Lack."""
    rules = _rules("uidrange")
    if rules:
        raise Lack(
            f"routing rules by uidrange: {', '.join(rules)}",
            "sockets of containers have uids of graft's: a rule for users is to be one of the firewall (meta skuid)",
        )
    return "no routing rule looks at a user"


def marks() -> str:
    """Routing rules by mark, among which a container may choose. Raises Lack."""
    rules = _rules("fwmark")
    if rules:
        raise Lack(
            f"routing rules by fwmark: {', '.join(rules)}",
            "a container with CAP_NET_RAW may mark its datagrams, and choose among them: --cap-drop=NET_RAW",
        )
    return "no routing rule looks at a packet's mark"
