"""Rootless engines, from within: where graftd is found from a mount namespace in which /run is another one.

Podman calls a plugin of a network in a mount namespace that has an empty /run (containers/common,
libnetwork/internal/rootlessnetns). That is one thread's of Podman; the others are still where the machine's /run is,
in the same user namespace, so that the plugin may enter their root directory.
"""

import os

from graft import client

PARENTS_MAX = 8


def _parent(pid: str) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[1]


def root_of_engine() -> str:
    """The root directory of the nearest process above this one that sees the user socket; "" if this one does."""
    directory = client.run_directory()
    if os.path.exists(f"{directory}/user.sock"):
        return ""
    pid = "self"
    for _ in range(PARENTS_MAX):
        try:
            pid = _parent(pid)
            roots = [f"/proc/{pid}/task/{thread}/root" for thread in os.listdir(f"/proc/{pid}/task")]
        except (OSError, IndexError):  # the end of them
            return ""
        found = next((root for root in roots if os.path.exists(f"{root}{directory}/user.sock")), "")
        if found:
            return found
    return ""


def reach_graftd() -> str:
    """Have graft.client speak to the graftd that the engine sees. Returns the engine's root directory, "" for "/"."""
    root = root_of_engine()
    if root:
        held = os.open(f"{root}{client.run_directory()}", os.O_PATH | os.O_CLOEXEC)  # a thread may end
        os.environ["GRAFT_RUN_DIR"] = f"/proc/self/fd/{held}"
        client.act_as_user(anybody=True)
    return root


def check_graftd() -> None:
    """Raise GraftError if no graftd takes the orders of users without root, with what root has to do."""
    client.act_as_user(anybody=True)
    if not client.is_user():
        raise client.no_door()


def nameservers(root: str) -> list[str]:
    """The nameservers that the host below @root has (resolv.conf(5)).

    An engine's own are in a network that the container's sockets do not see.
    """
    try:
        with open(f"{root}/etc/resolv.conf", errors="replace") as file:
            words = [line.split() for line in file]
    except OSError:
        return []
    return [line[1] for line in words if len(line) > 1 and line[0] == "nameserver"]
