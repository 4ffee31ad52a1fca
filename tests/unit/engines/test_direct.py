"""Which containers of engines can be direct, and what changes in their config.json."""

import copy
from pathlib import Path
from typing import Any

import pytest

from graft.engines import direct
from graft.errors import Refused
from graft.kernel.mounts import Mount

HOST = [
    Mount("/", "ext4"),
    Mount("/proc", "proc"),
    Mount("/sys", "sysfs"),
    Mount("/sys/fs/cgroup", "cgroup2"),
    Mount("/run", "tmpfs"),
    Mount("/cgroups", "cgroup"),
]
SETKEY = {"path": "/proc/1/exe", "args": ["libnetwork-setkey", "-exec-root=/run", "abc"], "env": ["A=1"]}


def config(**more: Any) -> dict[str, Any]:
    """An OCI configuration of a container that can be direct."""
    kinds = ("pid", "mount", "network", "uts", "ipc")
    section = {
        "namespaces": [{"type": kind} for kind in kinds],
        "readonlyPaths": ["/proc/bus", "/proc/sys"],
        "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0", "net/ipv4/ping_group_range": "0 0", "kernel.shm_rmid_forced": "1"},
        "seccomp": {"listenerMetadata": "{sealed}"},
    }
    process = {"capabilities": {"bounding": ["CAP_CHOWN", "CAP_NET_RAW"], "effective": None}}
    return {"linux": {**section, **more}, "process": process, "root": {"path": "rootfs"}}


@pytest.mark.parametrize(
    ("place", "found"),
    [("/sys/fs/cgroup", True), ("/sys/fs/cgroup/unified", True), ("/mnt", False), ("/sys/fs/cgroup/systemd", False)],
)
def test_has_cgroup2(place: str, found: bool) -> None:
    assert direct.has_cgroup2([Mount("/sys/fs/cgroup", "tmpfs"), Mount(place, "cgroup2")]) is found


def test_what_lies_on_top_counts() -> None:
    assert not direct.has_cgroup2([Mount("/sys/fs/cgroup", "cgroup2"), Mount("/sys/fs/cgroup", "tmpfs")])


@pytest.mark.parametrize(
    "source", ["/", "/sys", "/sys/fs", "/sys/fs/cgroup", "/sys/fs/cgroup/x", "/sys/class", "/proc", "/proc/1/root", "/cgroups", "/run/.."]
)
def test_volumes_that_lead_out(source: str) -> None:
    for extra in ({"type": "bind"}, {"options": ["rbind", "ro"]}, {"type": "none", "options": ["bind"]}):
        made = config() | {"mounts": [{"destination": "/there", "source": source, **extra}]}
        with pytest.raises(Refused, match="which leads out of its cgroup"):
            direct.check(made, HOST, "")


@pytest.mark.parametrize("source", ["/run", "/srv/proc", "/system", "/run/x", "/procession", "/cgroups2"])
def test_volumes_that_do_not(source: str) -> None:
    direct.check(config() | {"mounts": [{"destination": "/there", "source": source, "type": "bind"}]}, HOST, "")


def test_a_volume_by_a_link(tmp_path: Path) -> None:
    """The engine's process has another root; a link there leads from that one."""
    (tmp_path / "link").symlink_to("/sys/fs")
    made = config() | {"mounts": [{"destination": "/there", "source": "/link", "type": "bind"}]}
    with pytest.raises(Refused, match="the volume /sys/fs at /there"):
        direct.check(made, HOST, str(tmp_path))


def test_edit() -> None:
    before = config()
    before["hooks"] = {"prestart": [SETKEY], "poststop": [{"path": "/bin/true"}]}
    given = copy.deepcopy(before)
    made = direct.edit(given, Path("/run/graft"), "/proc/7/fd/8", 4026, "/b/rootfs", Path("/h"))
    assert given == before
    assert [space["type"] for space in made["linux"]["namespaces"]] == ["pid", "mount", "uts", "ipc", "cgroup"]
    assert made["linux"]["sysctl"] == {"kernel.shm_rmid_forced": "1"}
    (hook,) = made["hooks"]["prestart"]
    assert hook["path"].endswith("/graft-runtime")
    assert hook["args"] == ["graft-begin", "--graft-run-dir=/run/graft", "/proc/1/exe", *SETKEY["args"]]
    assert hook["env"] == ["A=1", "GRAFT_METADATA={sealed}", "GRAFT_HOLDER=/h"]
    (hook,) = made["hooks"]["createContainer"]
    assert hook["args"] == ["graft-network"]
    there = {"GRAFT_NETNS=/proc/7/fd/8", "GRAFT_NETNS_INODE=4026", "GRAFT_ROOTFS=/b/rootfs"}
    assert set(hook["env"]) == there | {"GRAFT_HOLDER=/h"}
    assert made["hooks"]["poststop"] == [{"path": "/bin/true"}]
    (hook,) = direct.edit(config(), Path("/run/graft"), "x", 1, "/", Path("/h"))["hooks"]["prestart"]
    assert hook["args"] == ["graft-begin", "--graft-run-dir=/run/graft"]


def test_network_sysctls() -> None:
    assert direct.network_sysctls(config()) == ["net.ipv4.ip_unprivileged_port_start=0", "net/ipv4/ping_group_range=0 0"]


@pytest.mark.parametrize("stage", direct.STAGES)
def test_hooks(stage: str) -> None:
    with pytest.raises(Refused, match="the hook /opt/hook"):
        direct.check_hooks({"hooks": {stage: [{"path": "/opt/hook"}]}}, "docker", joins=True)
    if stage != "prestart":
        with pytest.raises(Refused, match="the hook /proc/1/exe"):
            direct.check_hooks({"hooks": {stage: [SETKEY]}}, "docker", joins=True)


def test_dockers_hook() -> None:
    direct.check_hooks({"hooks": {"prestart": [SETKEY]}}, "docker", joins=False)
    direct.check_hooks({}, "docker", joins=True)
    direct.check_hooks({}, "podman", joins=False)
    with pytest.raises(Refused, match="this Docker looks for the container's network at its first process"):
        direct.check_hooks({}, "docker", joins=False)
    with pytest.raises(Refused, match="the hook /proc/1/exe"):
        direct.check_hooks({"hooks": {"prestart": [SETKEY]}}, "oci", joins=False)
