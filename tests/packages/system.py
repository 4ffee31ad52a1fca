"""A Debian whose process 1 is systemd, in namespaces of its own, made from a directory that is left as it is.

It has pid, mount, net, ipc, uts and cgroup namespaces, and a cgroup whose directory it sees as /sys/fs/cgroup. What
it writes to its root is in memory, over the directory (overlayfs). It cannot change what is the machine's: /sys and
/proc/sys but for the network's part are read-only, the clock, modules and the kernel's log are out of reach, and
systemd-sysctl is masked.

Its network has a neighbour, the namespace `client`, at the other end of a wire.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Any

from graft.bench.lab import SLOWNESS, wait_for
from graft.kernel.cgroup import cgroup2_root

HOST, CLIENT = "10.77.0.1", "10.77.0.2"
MASKED = ("systemd-sysctl.service", "systemd-timesyncd.service", "systemd-modules-load.service", "apt-daily.timer", "apt-daily-upgrade.timer")
SETUP = r"""
set -euo pipefail
mount -t proc proc /proc # unshare finds the namespace that it keeps by the pid that it has here
mount -t tmpfs -o mode=755 tmpfs "$WORK"
mkdir "$WORK/upper" "$WORK/work" "$WORK/root"
mount -t overlay -o "lowerdir=$BASE,upperdir=$WORK/upper,workdir=$WORK/work" overlay "$WORK/root"
cd "$WORK/root"
mount -t proc proc proc
mount --bind proc/sys/net proc/sys/net
mount --rbind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do
    : >dev/$name
    mount --bind /dev/$name dev/$name
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir -p run/lock .old packages
mount --bind -o ro "$PACKAGES" packages
for unit in $MASKED; do ln -sf /dev/null etc/systemd/system/$unit; done
echo packages >etc/hostname
echo 0123456789abcdef0123456789abcdef >etc/machine-id
mkdir run/netns
: >run/netns/client
unshare --net=run/netns/client true
inside="nsenter --net=run/netns/client ip"
$inside link add wire type veth peer name wire netns $$
$inside link set lo up
$inside link set wire up
$inside address add $CLIENT/24 dev wire
ip link set lo up
ip link set wire up
ip address add $HOST/24 dev wire
pivot_root . .old
umount --lazy /.old
rmdir /.old
exec env -i container=graft-packages PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    setpriv --bounding-set=-sys_time,-sys_module,-syslog,-mac_admin,-mac_override /lib/systemd/systemd --log-target=journal
"""


def process_1(outer: int) -> int:
    """The PID outside of process 1 of the pid namespace that process @outer, an unshare(1), has made, once it is systemd; else 0."""
    children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
    for pid in map(int, children):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                return pid
    return 0


class System:
    """A Debian that has booted. @base: its root. @packages: a directory that it sees as /packages."""

    def __init__(self, base: Path, packages: Path) -> None:
        self.name = f"graft-packages-{uuid.uuid4().hex[:6]}"
        self.cgroup = cgroup2_root() / self.name
        self.work = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.cgroup.mkdir()
        environment = {"WORK": str(self.work), "BASE": str(base), "PACKAGES": str(packages), "MASKED": " ".join(MASKED)}
        environment |= {"HOST": HOST, "CLIENT": CLIENT}
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--fork", "--kill-child")
        enter = f'echo $$ >{self.cgroup}/cgroup.procs; exec unshare {" ".join(namespaces)} --propagation private bash -c "$SETUP"'
        self.log = open(self.work.with_suffix(".log"), "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            ("bash", "-c", enter), env={**os.environ, **environment, "SETUP": SETUP},
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        try:
            self._boot()
        except BaseException:
            self.end()
            raise

    def _boot(self) -> None:
        wait_for(lambda: self.init or self.process.poll() is not None, "process 1")
        assert self.process.poll() is None, self.log_text()
        outside = next(line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        (cgroup2_root() / outside.lstrip("/") / "cgroup.procs").write_text(str(self.process.pid))
        states = ("running", "degraded")
        wait_for(lambda: self.run("systemctl is-system-running", direct=True).stdout.strip() in states, "systemd", 60)
        failed = self.run("systemctl --failed --no-legend --plain", check=True).stdout
        assert not failed, failed

    @property
    def init(self) -> int:
        """As process_1() has it."""
        return process_1(self.process.pid)

    def log_text(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def run(self, command: str, *, check=False, direct=False, timeout=120) -> "subprocess.CompletedProcess[str]":
        """Run a shell command there, in a unit of its own. @direct: in none, for what asks systemd alone."""
        argv = ["bash", "-c", command]
        if not direct:
            told = ("--quiet", "--pipe", "--wait", "--collect", "--service-type=exec", "--setenv=HOME=/root", "--setenv=LC_ALL=C.UTF-8")
            argv = [
                "systemd-run",
                *told,
                "--setenv=DEBIAN_FRONTEND=noninteractive",
                "--setenv=PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                "--working-directory=/root",
                *argv,
            ]
        enter = ("nsenter", f"--target={self.init}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd=/")
        done = subprocess.run((*enter, *argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout * SLOWNESS)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done

    def told(self, command: str) -> str:
        """What a command prints, whose status has to be 0."""
        return self.run(command, check=True).stdout

    def start(self, unit: str, command: str) -> None:
        """Start a shell command as the unit @unit; its output goes to /root/UNIT.out."""
        where = f"-p StandardOutput=truncate:/root/{unit}.out -p StandardError=inherit"
        self.run(f"systemd-run --quiet --collect --unit={unit} {where} bash -c {shlex.quote(command)}", check=True)

    def write(self, path: str, text: str) -> None:
        """Write a file there."""
        Path(f"/proc/{self.init}/root{path}").write_text(text)

    def property(self, unit: str, name: str) -> str:
        """A property of a unit (systemctl show)."""
        return self.run(f"systemctl show --value -p {name} {unit}", check=True, direct=True).stdout.strip()

    def journal(self, *words: str) -> list[dict[str, Any]]:
        """The journal's entries that match, with all fields."""
        self.run("journalctl --sync", direct=True)
        told = self.run(f"journalctl -o json --no-pager {shlex.join(words)}", direct=True).stdout
        return [json.loads(line) for line in told.splitlines()]

    def end(self) -> None:
        """End all of its processes, and remove its cgroups."""
        with contextlib.suppress(OSError):
            if init := self.init:
                os.kill(init, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        wait_for(lambda: "populated 0" in (self.cgroup / "cgroup.events").read_text(), "its processes' end", 30)
        for path, _, _ in os.walk(self.cgroup, topdown=False):
            Path(path).rmdir()
        self.work.rmdir()
        self.log.close()
        self.work.with_suffix(".log").unlink()


def listing(system: System) -> set[str]:
    """What is there, but for what changes by itself: files, links, groups, addresses, rules, programs.

    A bpffs that is mounted stays so, with the two files that each has.
    """
    places = "/etc /usr /var/lib /root /opt /home /srv /run /dev/shm /sys/fs/bpf /sys/fs/cgroup"
    found = system.told(
        f"find {places} \\( -path /root -o -path '/sys/fs/cgroup/*.slice/run-*' -o -path '/run/systemd/*' -o -path '/run/user*' -o -name '*.debug' \\) -prune -o -printf '%p %y\n'; getent group | cut -d: -f1,4; ip address show lo; ip rule; ip -6 rule"
    )
    return {re.sub(r"\d+sec|forever", "", line) for line in found.splitlines()}
