"""What a direct container shares with the host beside sockets: files that tell of a netns or change it, namespaces, cgroups,
processes.
"""

import contextlib
import ctypes
import errno
import glob
import itertools
import os
import signal
import socket
import struct
import subprocess
from pathlib import Path

from .common import HOST, TCP, V4, attack, libc
from .netns import (
    CLONE_NEWCGROUP,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    NR_BPF,
    attribute,
    call,
    header,
    in_a_child,
    netlink,
    outcome,
    unshare,
    wrong,
)

MNT_DETACH = 2
NR_PIDFD_OPEN, NR_PIDFD_GETFD, NR_CLONE3 = 434, 438, 435
CLONE_INTO_CGROUP = 0x200000000
LOCAL_NAME = ("127.0.0.1", 9101)  # of the witness: who reaches it is on the host's loopback


def reaches_the_hosts_loopback():
    """Connect to a server that only the host's programs may reach."""
    with socket.socket(V4, TCP) as s:
        s.settimeout(2)
        s.connect(LOCAL_NAME)


# -- files --


@attack
def sysctls_of_the_hosts():
    told = {}
    for path in ("ipv4/ip_forward", "ipv4/conf/veth0/rp_filter", "core/somaxconn", "ipv4/ip_local_port_range"):
        for top in ("/proc/sys/net", "/proc/self/root/proc/sys/net", "/proc/thread-self/root/proc/sys/net"):
            found = Path(f"{top}/{path}")
            told[f"{top}/{path}"] = outcome(lambda one: one.write_text(one.read_text()) and None, found)
    return wrong(told, "EROFS", "EACCES", "ENOENT", "EPERM") or "REFUSED"


def filesystems(kind):
    return [line.split()[4].encode().decode("unicode_escape") for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" - {kind} " in line]


@attack
def sysctls_by_every_procfs():
    """There may be other mounts of it, for a chroot; also such that others have, who may be looked at."""
    tops = filesystems("proc") + [f"/proc/{pid}/root/proc" for pid in os.listdir("/proc") if pid.isdigit()]
    told = {}
    for top in tops:
        with contextlib.suppress(OSError):
            if os.stat(f"{top}/self/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino:
                continue
            told[top] = outcome(lambda one: os.close(os.open(one, os.O_WRONLY)), f"{top}/sys/net/ipv4/ip_forward")
    return wrong(told, "EROFS", "EACCES", "ENOENT", "EPERM") or "REFUSED"


@attack
def sysctls_by_a_new_procfs():
    """In a user and PID namespace of one's own, where uid 0 is the host's as well."""

    def tries():
        unshare(CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        unshare(CLONE_NEWNS | CLONE_NEWPID)
        return in_a_child(inside)

    def inside():
        if libc.mount(b"proc", b"/mnt", b"proc", 0, None):
            raise OSError(ctypes.get_errno(), "mount")
        os.close(os.open("/mnt/sys/net/ipv4/ip_forward", os.O_WRONLY))

    uid = os.geteuid()
    return in_a_child(tries)


def unmounts(path):
    def tries():
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        if libc.umount2(path.encode(), MNT_DETACH):
            raise OSError(ctypes.get_errno(), "umount")

    return lambda: in_a_child(tries)


for _name, _path in {"net": "/proc/net", "sysctls": "/proc/sys/net", "sys": "/sys"}.items():
    _tries = unmounts(_path)
    _tries.__name__ = f"mount_over_{_name}_is_taken_away"
    attack(_tries)


@attack
def mount_of_another_sysfs():
    def tries():
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        if libc.mount(b"sysfs", b"/mnt", b"sysfs", 0, None):
            raise OSError(ctypes.get_errno(), "mount")

    return in_a_child(tries)


@attack
def mounts_by_the_network():
    told = {}
    for kind in (b"nfs", b"nfs4", b"cifs", b"9p", b"ceph", b"afs"):
        if libc.mount(f"{HOST}:/".encode(), b"/mnt", kind, 0, f"addr={HOST}".encode()):
            told[kind.decode()] = errno.errorcode[ctypes.get_errno()]
        else:
            told[kind.decode()] = "OK"
    return wrong(told, "EPERM", "ENODEV") or "EPERM"


@attack
def sysfs_shows_the_hosts_devices():
    return ",".join(name for name in sorted(os.listdir("/sys/class/net")) if name in ("veth0", "spare0")) or "OWN"


@attack
def proc_net_shows_the_hosts():
    """By the usual name it is the container's."""
    return "HOSTS" if "veth0" in Path("/proc/net/dev").read_text() else "OWN"


@attack
def files_of_the_hosts_firewall():
    """A list of the firewall's that root may write, where the kernel shows one."""
    told = {}
    name = os.path.basename(os.environ["GRAFT_RUN_DIR"])  # of this laboratory
    for path in glob.glob(f"/proc/net/xt_recent/{name}") + glob.glob(f"/proc/[0-9]*/net/xt_recent/{name}"):
        told[path] = outcome(lambda one: Path(one).write_text("+192.0.2.99\n") and None, path)
    return wrong(told, "EACCES", "EPERM", "EROFS", "ENOENT") or "REFUSED"


# -- namespaces --


@attack
def netns_of_the_host_by_setns():
    """By a path, by a pidfd, and back again from a netns of one's own."""
    told = {"path": outcome(lambda: enter(os.open("/proc/1/ns/net", os.O_RDONLY)))}
    told["pidfd"] = outcome(lambda: enter(call(NR_PIDFD_OPEN, 1, 0)))

    def back():
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        unshare(CLONE_NEWUSER | CLONE_NEWNET)
        enter(home)

    told["back"] = in_a_child(back)
    return wrong(told, "EPERM", "EACCES") or "EPERM"


def enter(fd):
    if libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@attack
def device_of_ones_own_to_the_host():
    """From a netns of one's own, whose root one is, into the one that one came from."""

    def tries():
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        unshare(CLONE_NEWUSER | CLONE_NEWNET)
        peer = attribute(1, bytes(16) + attribute(3, b"intruder0\0") + attribute(28, struct.pack("=I", home)))
        kind = attribute(18, attribute(1, b"veth") + attribute(2, peer))
        list(netlink(0, header(16, 0x605, bytes(16) + attribute(3, b"x0\0") + kind)))

    return in_a_child(tries)


# -- cgroups --


def cgroup_files(name):
    """The files of this name in each cgroup that this process finds a path to."""
    mounts = filesystems("cgroup2")
    roots = {""} | {f"/proc/{pid}/root" for pid in os.listdir("/proc") if pid.isdigit()} | {f"/proc/{pid}/cwd" for pid in os.listdir("/proc") if pid.isdigit()}
    for root, mount in itertools.product(sorted(roots), sorted(set(mounts) | {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"})):
        for up in ("", "/..", "/../.."):
            yield f"{root}{mount}{up}/{name}"


@attack
def cgroup_is_left_by_every_path():
    """By each path that leads to a cgroup; then there is nothing that keeps its sockets to the policy."""

    def tries():
        for path in cgroup_files("cgroup.procs"):
            with contextlib.suppress(OSError):
                Path(path).write_text("0")
                reaches_the_hosts_loopback()
                return f"LEFT {path}"
        reaches_the_hosts_loopback()
        return None

    return in_a_child(tries)


@attack
def cgroup_is_left_by_clone3():
    for path in cgroup_files(""):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            arguments = struct.pack("=11Q", CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, fd)
            child = libc.syscall(NR_CLONE3, arguments, len(arguments))
            if not child:
                os._exit(outcome(reaches_the_hosts_loopback) == "OK")
            os.close(fd)
            if child > 0 and os.waitpid(child, 0)[1]:
                return f"LEFT {path}"
    reaches_the_hosts_loopback()
    return None


def nested(kind):
    """A cgroup of one's own below, which may be threaded."""

    def tries():
        tops = [top for top in filesystems("cgroup2") if os.access(f"{top}/cgroup.procs", os.W_OK)]
        if not tops:
            reaches_the_hosts_loopback()
        inner = Path(tops[0]) / f"inner-{os.getpid()}"
        inner.mkdir()
        home = f"{tops[0]}/cgroup.procs"
        try:
            if kind == "threaded":
                (inner / "cgroup.type").write_text(kind)
                (inner / "cgroup.threads").write_text("0")
            else:
                (inner / "cgroup.procs").write_text("0")
            reaches_the_hosts_loopback()
        finally:
            Path(home).write_text("0")
            inner.rmdir()

    return lambda: in_a_child(tries)


for _kind in ("nested", "threaded"):
    _tries = nested(_kind)
    _tries.__name__ = f"cgroup_that_is_{_kind}"
    attack(_tries)


@attack
def cgroup2_in_a_user_namespace():
    """A new mount shows the cgroup namespace, which is the container's."""

    def tries():
        unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWCGROUP)
        if libc.mount(b"none", b"/mnt", b"cgroup2", 0, None):
            raise OSError(ctypes.get_errno(), "mount")
        for up in ("", "/..", "/../.."):
            with contextlib.suppress(OSError):
                Path(f"/mnt{up}/cgroup.procs").write_text("0")
        reaches_the_hosts_loopback()

    return in_a_child(tries)


@attack
def others_are_moved_into_the_cgroup():
    """A process of the host's would lose its network, and could be frozen and killed by the cgroup's files."""
    hosts = [pid for pid in os.listdir("/proc") if pid.isdigit() and "witness.py" in outcome(lambda p: Path(f"/proc/{p}/cmdline").read_text(), pid)]
    told = {}
    for path in {f"{top}/cgroup.procs" for top in filesystems("cgroup2")}:
        for pid in hosts:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # another laboratory's, which has just ended
                before = Path(f"/proc/{pid}/cgroup").read_text()
                done = outcome(lambda p, one: Path(p).write_text(one) and None, path, pid)
                if not Path(f"/proc/{pid}/cmdline").read_text():  # nor has one that is ending just now anything to be moved
                    continue
                if Path(f"/proc/{pid}/cgroup").read_text() != before:
                    return "MOVED"
                told[path] = done
    return wrong(told, "EACCES", "EPERM", "ENOENT", "EROFS") or "REFUSED"


@attack
def vfork_and_threads_stay():
    """Whatever is started from here makes its sockets under the policy."""
    code = f"import socket; socket.create_connection({LOCAL_NAME}, 2)"
    done = subprocess.run(("/usr/bin/python3", "-I", "-c", code), capture_output=True, text=True)
    return "LEFT" if done.returncode == 0 else "HELD"


# -- processes --


@attack
def descriptors_of_the_hosts_processes():
    """pidfd_getfd() of each process that is not the container's."""
    for pid in os.listdir("/proc"):
        if pid.isdigit() and "witness.py" in outcome(lambda p: Path(f"/proc/{p}/cmdline").read_text(), pid):
            pidfd = call(NR_PIDFD_OPEN, int(pid), 0)
            told = {number: outcome(call, NR_PIDFD_GETFD, pidfd, number, 0) for number in range(3, 12)}
            return wrong(told, "EPERM", "EBADF", "ESRCH") or "EPERM"
    return "EPERM"


@attack
def processes_of_grafts_are_entered():
    """What is outside of the container for its sake has a root directory and memory like others."""
    told = {}
    for pid in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name.startswith("graft"):
                told[f"{name} root"] = outcome(os.listdir, f"/proc/{pid}/root")
                told[f"{name} ns"] = outcome(os.open, f"/proc/{pid}/ns/net", os.O_RDONLY)
                told[f"{name} mem"] = outcome(os.open, f"/proc/{pid}/mem", os.O_RDWR)
    return wrong(told, "EACCES", "EPERM", "ENOENT", "ESRCH") or "EPERM"


@attack
def pinned_programs_and_maps():
    """By each bpffs that is mounted here: whoever has a map's descriptor needs no capability to write to it."""
    tops = [*filesystems("bpf"), "/sys/fs/bpf", "/proc/self/root/sys/fs/bpf"]
    for top in tops:
        for path in glob.glob(f"{top}/graft*/**", recursive=True):
            name = ctypes.create_string_buffer(path.encode())
            attr = struct.pack("=QII", ctypes.addressof(name), 0, 0)
            if os.path.isfile(path) and libc.syscall(NR_BPF, 7, attr, len(attr)) >= 0:
                return f"OK {path}"
    return "EPERM"
