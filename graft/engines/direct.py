"""Direct containers of engines: what cannot be one, and what changes in config.json (OCI runtime-spec, config.md).

Theory of operation

Goal: the container's programs live in the host's netns, and make their TCP and UDP sockets in a cgroup that has the
policy (graft/kernel/direct.py). The netns that the engine knows, or that graftd makes where the runtime would have
made one, stays the container's: its other sockets are made there.

Facts: a runtime puts the first process into the container's cgroup, then runs the hooks of the stage prestart, and
ends the container if one fails. Only then the process goes on, to its root directory, its filter and the program.
What `exec` starts joins the cgroup before it has the filter. A network namespace that config.json does not name is
the runtime's own. sysfs shows the netns of whoever mounts it. /proc/sys/net is writable for uid 0 without any
capability. Root needs no capability to start a process in a cgroup that it can open (clone3(2), CLONE_INTO_CGROUP).

Solution: the network entry is left out; a hook of the stage prestart has graftd attach the policy to the cgroup; a
hook of the stage createContainer puts the sysfs and the /proc/net of the container's netns in the place of the host's
(both are graft-runtime, csrc/runtime_hooks.c). Docker's hook finds the sandbox by the first process's PID: graft's
runs it with the PID of a process that is in the container's netns. graftd sets the container's network sysctls.

Where a runtime sees no cgroup2, it puts no container into one. Then graft-runtime enters a cgroup2 before it becomes
the runtime, at `create` and at each `exec`.

What still fails: a hook of somebody else's finds the host's netns at the first process, and so does who joins the
container's netns by its PID. Engines' containers with graft are known by their cgroup; hooks are refused. Docker
from 28 on does it itself, between `create` and `start` (daemon/start_linux.go, initializeCreatedTask). It would bind
the host's netns as its sandbox, and `docker network connect` would put a device and a default route there.
A container that joins another's network has no sandbox of its own, and may be direct.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from graft.engines.bundle import DOCKER_HOOK
from graft.engines.container import Document
from graft.engines.joined import below
from graft.errors import Refused
from graft.kernel.mounts import Mount

PROGRAM = Path(__file__).parents[1] / "graft-runtime"
STAGES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart")
# capabilities(7): with each of these a process in the host's netns, or in its cgroup, is bound by nothing
CAPABILITIES = ("CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_BPF", "CAP_SYS_MODULE", "CAP_SYS_RAWIO")
TUN = ("c", 10, 200)  # /dev/net/tun (devices.txt of Linux)
KINDS = ("cgroup", "cgroup2", "proc", "sysfs")  # file systems of the host that lead out of the container


def has_cgroup2(mounts: Iterable[Mount]) -> bool:
    """Does a runtime that sees these @mounts put a container into a cgroup2 of its own?

    runc and crun do where /sys/fs/cgroup is cgroup2; runc from 1.1 on also where cgroup2 is beside cgroup v1.
    """
    kinds = {mount.place: mount.kind for mount in mounts}  # the last one at a place lies on top
    return "cgroup2" in (kinds.get("/sys/fs/cgroup"), kinds.get("/sys/fs/cgroup/unified"))


def check(config: Document, mounts: list[Mount], root: str) -> None:
    """Raise Refused for a container that cannot be direct.

    @mounts: those that the engine's process sees, whose root directory is @root.
    """
    section: Document = config.get("linux") or {}
    spaces = {n["type"]: n.get("path") or "" for n in section.get("namespaces") or ()}
    if "user" in spaces:
        raise _refused("a user namespace is not the host's network's owner", "leave out --userns and userns-remap")
    if "pid" not in spaces or _is_own(below(root, spaces["pid"]) if spaces["pid"] else "", "pid"):
        raise _refused("with the host's processes it would see a way out of its cgroup", "leave out --pid host")
    if spaces.get("cgroup"):
        raise _refused("it joins a cgroup namespace", "give it one of its own")
    if "/proc/sys" not in (section.get("readonlyPaths") or ()):
        raise _refused("/proc/sys/net would be the host's, and writable", "leave out --privileged, unmask=ALL")
    _check_process(config.get("process") or {})
    for device in section.get("devices") or ():
        if (device.get("type"), device.get("major"), device.get("minor")) == TUN:
            raise _refused(f"{device.get('path')} makes devices in the host's network", "leave out --device")
    for mount in config.get("mounts") or ():
        _check_mount(mount, mounts, root)


def _check_process(process: Document) -> None:
    for names in (process.get("capabilities") or {}).values():
        for name in names or ():
            if str(name).upper() in CAPABILITIES:
                raise _refused(f"{name} would hold in the host's network", "leave out --cap-add and --privileged")


def check_exec(process: Document) -> None:
    """Raise Refused for a process that may not be started in a direct container (runtime-spec, "Process")."""
    _check_process(process)


def _is_own(path: str, kind: str) -> bool:
    """Is the namespace at @path the one that graftd has?"""
    if not path:
        return False
    try:
        return os.stat(path).st_ino == os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return True  # nobody knows


def _check_mount(mount: Document, mounts: list[Mount], root: str) -> None:
    kind, place = str(mount.get("type") or ""), str(mount.get("destination") or "")
    options = mount.get("options") or ()
    if kind == "sysfs" and os.path.normpath(place) != "/sys":
        raise _refused(f"{place} would show the host's devices", "mount sysfs at /sys alone")
    if kind != "bind" and "bind" not in options and "rbind" not in options:
        return
    source = os.path.normpath(below(root, str(mount.get("source") or "/"))[len(root) :] or "/")
    for at in mounts:
        inside = source == at.place or source.startswith(at.place.rstrip("/") + "/")
        above = at.place == source or at.place.startswith(source.rstrip("/") + "/")
        if at.kind in KINDS and (above or inside):
            raise _refused(
                f"the volume {source} at {place} has {at.place}, which leads out of its cgroup",
                "leave the volume out, or what is above that directory",
            )


def _refused(why: str, hint: str) -> Refused:
    return Refused(f"graft.direct=on: {why}", hint=hint, code="EPERM")


def check_hooks(config: Document, engine: str, joins: bool) -> None:
    """Raise Refused for hooks that would take the host's netns for the container's, or where Docker has none.

    @joins: the container joins a netns.
    """
    hooks: dict[str, Any] = config.get("hooks") or {}
    for stage in STAGES:
        for hook in hooks.get(stage) or ():
            if not (engine == "docker" and stage == "prestart" and is_dockers(hook)):
                raise _refused(
                    f"the hook {hook.get('path')} ({stage}) would find the host's network at its first process",
                    "leave the hook out",
                )
    if engine == "docker" and not joins and not any(map(is_dockers, hooks.get("prestart") or ())):
        raise _refused(
            "this Docker looks for the container's network at its first process, and would change the host's",
            "Docker up to 27 does it by a hook, which graft can lead; with this one join another container's network",
        )


def is_dockers(hook: Document) -> bool:
    """Is it the hook by which dockerd sets the network up?"""
    return DOCKER_HOOK in msgspec.json.encode(hook.get("args") or ())


def edit(config: Document, directory: Path, netns: str, inode: int, rootfs: str, holder: Path) -> Document:
    """Return @config, which has graft's traps already, with what makes the container direct.

    @directory: graftd's. @netns: a path of the container's netns, whose @inode is checked. @rootfs: absolute.
    @holder: where the PID of a process is written that lives in that netns while the container does.
    """
    section: Document = config["linux"]
    kept = [n for n in section["namespaces"] if n["type"] != "network"]
    if all(n["type"] != "cgroup" for n in kept):
        kept.append({"type": "cgroup"})
    sysctls = {k: v for k, v in (section.get("sysctl") or {}).items() if not is_networks(k)}
    told = [f"GRAFT_METADATA={section['seccomp']['listenerMetadata']}", f"GRAFT_HOLDER={holder}"]
    begin: Document = {
        "path": str(PROGRAM),
        "args": ["graft-begin", f"--graft-run-dir={directory}"],
        "env": told,
    }
    inside = {
        "path": str(PROGRAM),
        "args": ["graft-network"],
        "env": [f"GRAFT_NETNS={netns}", f"GRAFT_NETNS_INODE={inode}", f"GRAFT_ROOTFS={rootfs}", told[1]],
    }
    hooks: dict[str, Any] = dict(config.get("hooks") or {})
    dockers = [
        {**hook, "path": str(PROGRAM), "args": [*begin["args"], hook["path"], *hook["args"]],
         "env": [*(hook.get("env") or ()), *told]}
        for hook in hooks.get("prestart") or ()
    ]  # fmt: skip
    hooks["prestart"] = dockers or [begin]
    hooks["createContainer"] = [inside]
    return {**config, "hooks": hooks, "linux": {**section, "namespaces": kept, "sysctl": sysctls}}


def is_networks(name: str) -> bool:
    """Is the sysctl of this name one of a network namespace's?"""
    return name.startswith(("net.", "net/"))


def network_sysctls(config: Document) -> list[str]:
    """The sysctls of the container's network, as NAME=VALUE, which graftd sets in its netns."""
    found: Document = (config.get("linux") or {}).get("sysctl") or {}
    return [f"{name}={value}" for name, value in sorted(found.items()) if is_networks(name)]
