"""A node whose process 1 is systemd, with the machine's own programs: for what is done to a whole node.

Its root is in memory, over the machine's (overlayfs), so that whatever is installed there is gone with it. It has pid, mount, uts,
ipc and cgroup namespaces, all hierarchies of cgroups that the machine has, and the network of the laboratory's host. The machine's
sysctls, clock and modules are out of its reach, but for those of the network.
"""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

from graft.bench.lab import SLOWNESS, Lab, wait_for
from tests.kubernetes.node import SYSCTLS, bridge
from tests.packages.system import process_1

CGROUPS = Path("/sys/fs/cgroup")
EMPTY = ("kubelet", "containerd", "cni", "dbus")  # in /var/lib: what the machine has there is not the node's
SETUP = r"""
set -euo pipefail
mount -t proc proc /proc # unshare finds the namespace that it keeps by the pid that it has here
mount -t tmpfs -o mode=755 tmpfs "$WORK/memory"
cd "$WORK/memory"
mkdir upper work root sysctls
for name in $SYSCTLS; do
    mkdir -p "sysctls/${name%/*}"
    cat "/proc/sys/$name" >"sysctls/$name"
done
mount -t overlay -o "lowerdir=/,upperdir=$PWD/upper,workdir=$PWD/work" overlay root
cd root
mount -t proc proc proc
mount --bind proc/sys/net proc/sys/net
mount --rbind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
for name in $SYSCTLS; do mount --bind "../sysctls/$name" "proc/sys/$name"; done
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
for name in $HIERARCHIES; do
    mkdir "sys/fs/cgroup/$name"
    case $name in
    unified) mount -t cgroup2 cgroup2 sys/fs/cgroup/unified ;;
    systemd) mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd ;;
    *) mount -t cgroup -o "$name" cgroup "sys/fs/cgroup/$name" ;;
    esac
done
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty kmsg; do
    : >dev/$name
    mount --bind /dev/$name dev/$name
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for name in run tmp $EMPTY; do
    mkdir -p "$name"
    mount -t tmpfs -o mode=755 tmpfs "$name"
done
chmod 1777 tmp
mkdir -p run/lock .old ".$LAB"
mount --bind "$LAB" ".$LAB"
rm -rf etc/systemd/system/*.wants
for unit in $MASKED; do ln -sf /dev/null etc/systemd/system/$unit; done
echo node >etc/hostname
echo 0123456789abcdef0123456789abcdef >etc/machine-id
pivot_root . .old
umount --lazy /.old
rmdir /.old
exec env -i container=graft-node PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    setpriv --bounding-set=-sys_time,-sys_module,-mac_admin,-mac_override \
    /lib/systemd/systemd --log-target=journal --unit=basic.target
"""
MASKED = ("systemd-sysctl.service", "systemd-modules-load.service", "systemd-udevd.service", "docker.socket", "podman.socket")
CONFIG = """version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/host:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
"""


class Machine:
    """The node. It has containerd by its unit; no graft, until something installs it."""

    socket = "/run/containerd/containerd.sock"

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.within = f"{lab.tag}-node"  # the cgroup, in each hierarchy, that it sees as the root
        self.work = lab.work / "machine"
        (self.work / "memory").mkdir(parents=True)
        self.cgroups = [one / self.within for one in sorted(CGROUPS.iterdir()) if (one / "cgroup.procs").exists()]
        for path in self.cgroups:
            path.mkdir()
            if path.parent.name == "cpuset":
                for value in ("cpuset.cpus", "cpuset.mems"):
                    (path / value).write_text((path.parent / value).read_text())
        environment = {
            "WORK": str(self.work),
            "LAB": str(lab.work),
            "HIERARCHIES": " ".join(path.parent.name for path in self.cgroups),
            "SYSCTLS": " ".join(SYSCTLS),
            "EMPTY": " ".join(f"var/lib/{name}" for name in EMPTY) + " var/log/pods var/log/containers",
            "MASKED": " ".join(MASKED),
            "SETUP": SETUP,
        }
        enter = "".join(f"echo $$ >{path}/cgroup.procs; " for path in self.cgroups)
        namespaces = "--mount --uts --ipc --pid --cgroup --fork --kill-child --propagation private"
        self.log = open(lab.work / "machine.log", "w+")  # noqa: SIM115
        argv = ("bash", "-c", f'{enter} exec unshare {namespaces} bash -c "$SETUP"')
        self.process = lab.spawn(*argv, env={**os.environ, **environment}, stdout=self.log, stderr=self.log)
        try:
            self._boot()
        except BaseException:
            self.stop()
            raise

    def _boot(self) -> None:
        wait_for(lambda: self.init or self.process.poll() is not None, "process 1")
        assert self.process.poll() is None, (self.lab.work / "machine.log").read_text()
        states = ("running", "degraded")
        wait_for(lambda: self.run("systemctl is-system-running", check=False).stdout.strip() in states, "systemd", 60)
        plugins = [bridge("/var/lib/cni/ipam"), {"type": "portmap", "capabilities": {"portMappings": True}}]
        self.write("/etc/cni/net.d/00-bridge.conflist", json.dumps({"cniVersion": "1.0.0", "name": "bridge", "plugins": plugins}))
        self.write("/etc/containerd/config.toml", CONFIG)
        self.run("systemctl start containerd")

    @property
    def init(self) -> int:
        """As process_1() has it."""
        return process_1(self.process.pid)

    def inside(self) -> tuple[str, ...]:
        """The command by which a command gets there, as a unit that ends with it."""
        namespaces = ("--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root", "--wd=/")
        enter = ("nsenter", f"--target={self.init}", *namespaces)
        return (*enter, "systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--service-type=exec")

    def run(self, command: str, *, check: bool = True, timeout: float = 60.0) -> "subprocess.CompletedProcess[str]":
        """Run a shell command there. Asserts success, unless @check is false."""
        path = "--setenv=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        done = self.lab.host(*self.inside(), path, "bash", "-c", command, timeout=timeout * SLOWNESS)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done

    def write(self, path: str, text: str) -> None:
        """Write a file there."""
        Path(f"/proc/{self.init}/root{path}").write_text(text)

    def load(self, archive: Path) -> None:
        """Import an image, an OCI layout in the laboratory's work directory."""
        self.run(f"ctr -n k8s.io images import --snapshotter native {archive}")

    def stop(self) -> None:
        """End all of its processes, and remove its cgroups."""
        with contextlib.suppress(OSError):
            if init := self.init:
                os.kill(init, signal.SIGKILL)
        self.lab.end(self.process, signal.SIGKILL)
        self.log.close()

        def is_empty() -> bool:
            return not any(one.read_text() for path in self.cgroups for one in path.rglob("cgroup.procs"))

        wait_for(is_empty, "the end of its processes", 30)
        for top in self.cgroups:
            for path, _, _ in os.walk(top, topdown=False):
                Path(path).rmdir()
