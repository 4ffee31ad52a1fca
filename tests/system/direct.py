"""What a program in a direct container of an engine sees and gets, whichever engine it is."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from graft.bench.lab import Lab, wait_for

# Its own port 80 is served privately; the answers of the kernel to each family; what a netns shows
PROBE = """
import ctypes, errno, json, os, socket, sys
def attempt(*words):
    try:
        with socket.socket(*words) as sock:
            return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
seen = {"netns": os.readlink("/proc/self/ns/net"), "sysfs": sorted(os.listdir("/sys/class/net"))}
seen["procfs"] = sorted(line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:])
with socket.socket(socket.AF_UNIX) as sock:
    sock.bind("\\0graft-its-own")
    seen["names"] = [line.split()[-1] for line in open("/proc/net/unix") if "@" in line]
seen["cgroup"] = open("/proc/self/cgroup").read().splitlines()[-1]
seen["grafted"] = {}
for name, family in (("ip4", socket.AF_INET), ("ip6", socket.AF_INET6)):
    with socket.socket(family) as sock:
        cookie = sock.getsockopt(socket.SOL_SOCKET, 71, 8)  # SO_NETNS_COOKIE
    with socket.socket(socket.AF_UNIX) as sock:
        seen["grafted"][name] = cookie == sock.getsockopt(socket.SOL_SOCKET, 71, 8)
seen["sockets"] = {
    "netlink": attempt(16, 3, 0), "unix": attempt(1, 1), "mptcp": attempt(2, 1, 262), "sctp": attempt(2, 1, 132),
    "vsock": attempt(40, 1), "udp": attempt(2, 2), "io": ctypes.CDLL(None).syscall(425, 1, None),
}
seen["links"] = sorted(name for _, name in socket.if_nameindex())
with socket.socket(socket.AF_INET6 if len(sys.argv) < 2 else socket.AF_INET) as server:
    server.bind(("", 0))
    server.listen()
    with socket.create_connection(("127.0.0.1", server.getsockname()[1]), 5):
        seen["itself"] = "ok"
for name, path in (("forward", "ipv4/ip_forward"), ("lo", "ipv6/conf/lo/disable_ipv6")):
    try:
        open(f"/proc/sys/net/{path}", "w").write("1")
        seen[name] = "written"
    except OSError as error:
        seen[name] = errno.errorcode[error.errno]
try:
    socket.create_connection(("127.0.0.1", int(os.environ.get("HOSTS_PORT", "9"))), 2)
    seen["hosts"] = "reached"
except OSError as error:
    seen["hosts"] = errno.errorcode[error.errno]
print(json.dumps(seen))
"""
LINKS = ["lo"]


def check(lab: Lab, printed: str, links: list[str] | None = None) -> dict[str, Any]:
    """Assert what PROBE has printed; @links: the devices of the container's netns."""
    seen: dict[str, Any] = json.loads(printed)
    assert seen["netns"] == f"net:[{os.stat(f'/run/netns/{lab.host_ns}').st_ino}]", "the program lives in the host's"
    assert seen["links"] == seen["sysfs"] == seen["procfs"] == (links or LINKS)
    assert seen["names"] == ["@graft-its-own"]
    assert seen["grafted"] == {"ip4": True, "ip6": True}, "the cookie of its own netns"
    assert seen["sockets"].pop("vsock") in ("EAFNOSUPPORT", "EPERM"), "EPERM is of the profile of Docker 23 and newer"
    assert seen["sockets"] == {
        "netlink": "ok", "unix": "ok", "mptcp": "EPROTONOSUPPORT", "sctp": "EPROTONOSUPPORT", "udp": "ok", "io": -1,
    }  # fmt: skip
    assert seen["cgroup"] == "0::/"
    assert (seen["itself"], seen["hosts"]) == ("ok", "ECONNREFUSED")
    assert (seen["forward"], seen["lo"]) == ("EROFS", "EROFS")
    return seen


def left(lab: Lab) -> list[str]:
    """What is left of direct containers: cgroups that graft made, marks, links for /proc/net, holders of a netns."""
    places = [Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line]
    found = [str(path) for place in set(places) for path in place.glob(f"{lab.run_dir.name}-engine-*")]
    found += [str(path) for name in ("direct", "net") for path in (lab.run_dir / name).glob("*")]
    return sorted(found) + holders(lab)


def holders(lab: Lab) -> list[str]:
    """The processes that hold the netns of containers of this laboratory's graftd."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            is_one = comm.read_text() == "graft-hold\n"
            if is_one and str(lab.run_dir) in (comm.parent / "cmdline").read_text():
                found.append(comm.parent.name)
    return found


def ended(lab: Lab) -> None:
    """Wait until nothing is left."""
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: not left(lab), "their end")
    there = left(lab)
    assert not there, there


def view_of_host(lab: Lab) -> str:
    """What a container could have changed of the host: its devices, addresses, routes and sysctls."""
    words = "ip -o link; ip -o address; ip route; ip -6 route; sysctl net.ipv4.ip_forward net.ipv6.conf.lo.disable_ipv6"
    return lab.host("sh", "-c", words).stdout.replace("tentative ", "")
