"""What graft needs of the host beside BPF: cgroup2, bpffs, the route of the IPv6 slices, netns, /etc/resolv.conf.

The IPv6 slices are one `local` route (AnyIP) instead of addresses on `lo`, so that nothing has to be added for each
tenant. The route is in a routing table of its own, which a rule makes valid for locally generated traffic only. The
kernel protects 127.0.0.0/8 from packets of other hosts (its martian check), but not a ULA: without the rule, whoever
routes the prefix to this host would get answers.
"""

import contextlib
import os
import socket
import subprocess
from pathlib import Path

from graft import linux
from graft.endpoint import Address, parse_address
from graft.errors import Failure, Refused, UsageError
from graft.policy import SLICE6_NETWORK

BPFFS = Path("/sys/fs/bpf")
ROUTE_TABLE = "26470"
RULE_PREFERENCE = "26470"


def run_dir() -> Path:
    """The directory of graftd's sockets and state. GRAFT_RUN_DIR moves a whole instance, as the tests do."""
    return Path(os.environ.get("GRAFT_RUN_DIR", "/run/graft"))


def pin_dir() -> Path:
    """The directory of bpffs in which this instance pins its maps and links."""
    return BPFFS / run_dir().name


def enter_initial() -> None:
    """Join the network and mount namespaces of process 1, if this process is in others.

    /proc/1/ns may be unreadable, because process 1 has a capability that this root lacks (ptrace(2), access mode
    checking). Then join those of the oldest ancestor that can be read. Raises OSError if setns(2) fails.
    """
    for pid in (1, *reversed(_ancestors())):
        try:
            opened = [
                (os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), name) for name in ("net", "mnt")
            ]
        except OSError:
            continue
        for fd, name in opened:
            if os.fstat(fd).st_ino != os.stat(f"/proc/self/ns/{name}").st_ino:
                linux.setns(fd)
            os.close(fd)
        return


def _ancestors() -> list[int]:
    """The PIDs of this process's ancestors, its parent first, without process 1."""
    found = []
    pid = os.getppid()
    while pid > 1:
        found.append(pid)
        try:
            pid = linux.parent(pid)
        except OSError:
            break
    return found


def cgroup2_root() -> Path:
    """The mount point of cgroup2: /sys/fs/cgroup, or another beside cgroup v1. Raises Failure if there is none."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if kind == "cgroup2" and fields[3] == "/":
            return Path(fields[4].encode().decode("unicode_escape"))
    raise Failure("no cgroup2 is mounted", hint="mount -t cgroup2 none /sys/fs/cgroup/unified")


def own_cgroup(root: Path) -> Path:
    """The directory of this process's cgroup, in the cgroup2 mounted at @root. Raises Failure if it has none."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return root / line[4:]
    raise Failure("this process has no cgroup in cgroup2")


def enter_cgroup(root: Path, *, managed: bool) -> Path:
    """Enter the cgroup in which graftd makes sockets, and return it. Raises OSError, Failure.

    Under a service manager (@managed) that is the service's own; otherwise graftd makes one.
    """
    if managed:
        return own_cgroup(root)
    path = root / run_dir().name
    path.mkdir(exist_ok=True)
    (path / "cgroup.procs").write_text("0")
    with contextlib.suppress(OSError):  # works only with the cpu controller on; many containers wait for graftd
        (path / "cpu.weight").write_text("10000")
    return path


def leave_cgroup(root: Path, *, remove: bool) -> None:
    """Move this process to the root cgroup. @remove: remove graftd's cgroup, and with it the policy."""
    (root / "cgroup.procs").write_text("0")
    if remove:
        with contextlib.suppress(OSError):
            (root / run_dir().name).rmdir()


def join_cgroups(pid: int, model: int) -> None:
    """Put the process @pid into the CPU and memory cgroups of the process @model, so that its work is charged there.

    Only cgroup v1 allows that. In cgroup v2 a process has one cgroup: it would leave graftd's, and graftd's BPF
    programs would not run for the sockets that it makes. Best effort: errors are ignored.
    """
    roots = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        rest = fields[fields.index("-") + 1 :]
        if rest[0] == "cgroup" and fields[3] == "/":
            roots.update(dict.fromkeys(rest[2].split(","), Path(fields[4].encode().decode("unicode_escape"))))
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{model}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for name in {"cpu", "memory"}.intersection(controllers.split(",")) & roots.keys():
                with contextlib.suppress(OSError):
                    (roots[name] / path.lstrip("/") / "cgroup.procs").write_text(str(pid))


def check_run_dir(directory: Path) -> None:
    """Raise Refused if users other than root may change what is in the run directory."""
    found = directory.stat()
    if found.st_uid or found.st_mode & 0o022:
        raise Refused(
            f"{directory} must be writable by root only (uid {found.st_uid}, mode {found.st_mode & 0o777:o})",
            hint=f"remove it, or: chown root {directory}; chmod 755 {directory}",
            code="EPERM",
        )


def mount_bpffs() -> None:
    """Mount bpffs at /sys/fs/bpf, unless it is mounted there. Raises OSError."""
    if not os.path.ismount(BPFFS):
        linux.mount("bpf", str(BPFFS), "bpf", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)


def has_ipv6() -> bool:
    """Does `lo` of this netns have ::1? A bind() would not tell: in graftd's cgroup the policy decides on it."""
    try:
        addresses = Path("/proc/net/if_inet6").read_text()
    except OSError:
        return False
    return f"{1:032x} " in addresses


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        raise Failure("the command 'ip' is not installed", hint="apt-get install iproute2") from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = str(getattr(error, "stderr", "") or error).strip()
        raise Failure(f"ip {' '.join(arguments)}: {reason}") from None


def add_slice_route() -> None:
    """Make the IPv6 slices local addresses of this netns, for its own traffic only. Raises Failure."""
    remove_slice_route()
    _ip("-6", "route", "replace", "local", SLICE6_NETWORK, "dev", "lo", "src", "::1", "table", ROUTE_TABLE)
    _ip("-6", "rule", "add", "iif", "lo", "to", SLICE6_NETWORK, "lookup", ROUTE_TABLE, "pref", RULE_PREFERENCE)


def remove_slice_route() -> None:
    """Undo add_slice_route(); no error if there is no such route."""
    with contextlib.suppress(Failure):
        _ip("-6", "rule", "del", "pref", RULE_PREFERENCE)
    with contextlib.suppress(Failure):
        _ip("-6", "route", "flush", "table", ROUTE_TABLE)


def addresses() -> list[str]:
    """The IP addresses of this netns's devices, without the zone of a link-local one."""
    import psutil

    inet = (socket.AF_INET, socket.AF_INET6)
    found = (entry for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in inet)
    return [entry.address.partition("%")[0] for entry in found]


def has_address(address: Address) -> bool:
    """Does a device of this netns have this address?"""
    return str(address) in addresses()


def add_address(address: Address) -> bool:
    """Put a container's own address on `lo`. False, and nothing done, if a device has it already. Raises Failure.

    The address has scope host, so that the kernel does not choose it as the source of the host's own traffic. It can
    be reached all the same.
    """
    if has_address(address):
        return False
    extra = () if address.v4 else ("nodad",)
    _ip("address", "add", f"{address}/{32 if address.v4 else 128}", "dev", "lo", "scope", "host", *extra)
    return True


def remove_address(address: Address) -> None:
    """Undo an add_address() that returned True; no error if `lo` does not have the address."""
    with contextlib.suppress(Failure):
        _ip("address", "del", f"{address}/{32 if address.v4 else 128}", "dev", "lo")


def end_connections(address: Address) -> None:
    """Destroy the TCP sockets at an address that its container has lost (SOCK_DESTROY, sock_diag(7)); best effort."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(("ss", "-K", "-tanH", "src", str(address)), capture_output=True, timeout=10)


def loopback_resolvers(path: str = "/etc/resolv.conf") -> list[Address]:
    """The nameservers of resolv.conf(5) that listen on the host's own loopback, as systemd-resolved's stub does."""
    return [a for a in nameservers(path) if (a.v4 and a.raw[12] == 127) or str(a) == "::1"]


def nameservers(path: str = "/etc/resolv.conf") -> list[Address]:
    """The nameservers of resolv.conf(5), in its order; none if @path cannot be read."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        fields = line.split()
        if len(fields) < 2 or fields[0] != "nameserver":
            continue
        with contextlib.suppress(UsageError):
            found.append(parse_address(fields[1].partition("%")[0]))
    return found


def netns_cookie() -> int:
    """SO_NETNS_COOKIE of the current netns (socket(7))."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, linux.SO_NETNS_COOKIE, 8), "little")


def netns_cookie_of(fd: int) -> int:
    """SO_NETNS_COOKIE of the netns @fd. The kernel never reuses a cookie, but it reuses inodes. Raises OSError."""
    with linux.inside_netns(fd):
        return netns_cookie()


def processes_in_netns(netns: int) -> list[int]:
    """The PIDs of all processes in the netns with this inode."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if linux.netns_inode(entry.name) == netns:
                    found.append(int(entry.name))
    return found


def raise_descriptor_limit() -> None:
    """Set RLIMIT_NOFILE to its hard limit, because each listener takes two or three descriptors."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_netns(text: str) -> tuple[int, str]:
    """Open the netns that @text names by a PID, a name (ip-netns(8)) or a path.

    Returns the descriptor, which the caller closes, and the path. Raises Refused if there is no such netns.
    """
    if "/" in text:
        path = text
    elif text.isascii() and text.isdigit():
        path = f"/proc/{text}/ns/net"
    else:
        path = f"/run/netns/{text}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may be a FIFO
    except ValueError:
        raise Refused("the name of a network namespace contains a NUL byte", code="EINVAL") from None
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        if isinstance(error, ProcessLookupError):
            reason = "does not exist"
        raise Refused(
            f"network namespace '{text}' {reason}", hint="'ip netns list' shows named ones", code="ENOENT"
        ) from None
    try:
        linux.check_netns(fd)
    except OSError:
        os.close(fd)
        raise Refused(
            f"'{text}' is not a network namespace", hint="give a PID, a name or a path", code="EINVAL"
        ) from None
    return fd, path


def netns_alive(netns: int, path: str) -> bool:
    """Does the netns with this inode still exist: at @path, at another mount, or because a process is in it?"""
    try:
        if os.stat(path).st_ino == netns:
            return True
    except OSError:
        pass
    return f" net:[{netns}] " in Path("/proc/self/mountinfo").read_text() or bool(processes_in_netns(netns))
