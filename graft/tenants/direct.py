"""Direct containers: the cgroup with the policy in which their programs make sockets, begun, kept and ended.

The order of a start, whose first step that fails ends it: the cgroup is made, the policy is attached and the tenant
written there (graft/kernel/direct.py), and then the container's process enters. Before it executes the command,
`graft run` asks a first socket of its own for the cookie of its netns, which the policy alone answers with that of
the container's.
"""

import contextlib
import os
import threading
import time
from pathlib import Path

from graft.errors import Failure, Refused
from graft.kernel import direct, linux
from graft.kernel.addresses import add_slice_address
from graft.kernel.cgroup import cgroup_of, delegate
from graft.kernel.netns import processes_in_netns
from graft.kernel.programs import Kernel
from graft.log import log
from graft.process.title import SUP
from graft.rules.slices import dynamic_address
from graft.rules.sysctl import parse_sysctls
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant

FINISH_SECONDS = 2.0
PORT_START, PRIVILEGED = "net.ipv4.ip_unprivileged_port_start", 1024


class DirectContainers:
    """Those of one graftd. Only the loop's thread calls it, but for let_listen(). @directory: run_dir()."""

    def __init__(self, registry: Registry, kernel: Kernel, directory: Path) -> None:
        self.registry = registry
        self.kernel = kernel
        self.directory = directory / "net"
        self.leaving: list[Path] = []  # cgroups that are to be removed
        self.listening: set[tuple[int, str]] = set()  # tenants and their cgroups whose sockets may listen
        self._lock = threading.Lock()  # guards what changes `listening`

    def begin(self, tenant: Tenant, pid: int) -> None:
        """Let the process @pid enter the cgroup of @tenant, which is made if need be.

        Raises Refused, Failure, OSError. The tenant is direct from then on, and end() undoes what has been done.
        """
        if not tenant.cgroup:
            if self.registry.direct_of(pid):
                raise Refused("a direct container starts no direct one", code="EBUSY")
            parent = direct.roots_own(direct.directory_of(cgroup_of(pid)))
            delegate()
            cgroup = direct.make(parent, tenant.name, tenant.id)
            tenant.cgroup = "/" + str(cgroup.relative_to(direct.directory_of("")))
            direct.guard(self.kernel.for_direct(), cgroup, tenant.id, low_ports(tenant))
            self.begun(tenant)
        direct.enter(direct.directory_of(tenant.cgroup), pid)

    def begun(self, tenant: Tenant) -> None:
        """Give a tenant that is direct from now on what it has on the host. Raises OSError."""
        if self.registry.ipv6:
            address = dynamic_address(tenant.slice_number)
            add_slice_address(address)
            self.registry.added.add(address)

    def let_listen(self, number: int) -> None:
        """Let sockets of the tenant with this number listen, if it is direct. From any thread. Raises OSError."""
        tenant = self.registry.tenants.get(number)  # of one that has ended nobody reaches a listener
        if tenant is None or all((number, path) in self.listening for path in tenant.cgroups):
            return
        with self._lock:
            programs = self.kernel.for_direct()
            for path in tenant.cgroups:
                with contextlib.suppress(FileNotFoundError):  # of several containers in one netns one has ended
                    if (number, path) not in self.listening:
                        direct.let_listen(programs, direct.directory_of(path))
                        self.listening.add((number, path))

    def end(self, tenant: Tenant) -> None:
        """Remove what begin() has made, and the link of follow(). Sockets that live on keep the policy."""
        if not tenant.cgroup:
            return
        with self._lock:
            self.listening -= {(tenant.id, path) for path in tenant.cgroups}
        with contextlib.suppress(OSError):
            direct.forget(self.kernel.maps["direct_cgroups"], tenant.id)
        self.leaving += [direct.directory_of(path) for path in tenant.cgroups if self.is_made(path)]
        self.tick()
        self.registry.remove_address(dynamic_address(tenant.slice_number))
        for name in ("link", "now"):
            self._link(tenant, name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._link(tenant, "now").parent.rmdir()

    def tick(self) -> None:
        """Remove the cgroups of containers that have ended. A listener hangs up before its last process has left."""
        if not self.leaving:
            return
        used = {direct.directory_of(path) for t in self.registry.tenants.values() for path in t.cgroups}
        for cgroup in set(self.leaving) - used:
            direct.remove(cgroup)
        self.leaving = [cgroup for cgroup in self.leaving if cgroup.exists() and cgroup not in used]

    def finish(self) -> None:
        """Remove them at graftd's end, which waits for that a moment."""
        until = time.monotonic() + FINISH_SECONDS
        while self.leaving and time.monotonic() < until:
            time.sleep(0.01)
            self.tick()

    def check(self) -> None:
        """Attach what a graftd with other programs had attached, or what somebody has taken away."""
        tenants = [tenant for tenant in self.registry.tenants.values() if tenant.cgroup]
        if not tenants:
            return
        try:
            delegate()  # whoever mounts cgroup2 without the option takes it away from all mounts
        except (OSError, Refused) as error:
            log.error("%s", error)
        try:
            programs = self.kernel.for_direct()
        except OSError as error:
            log.error("the policy of direct containers cannot be looked at: %s", error)
            return
        for tenant in tenants:
            self._forget_ended(tenant)
            for path in tenant.cgroups:
                self._check(tenant, path, programs)

    def _check(self, tenant: Tenant, path: str, programs: direct.Programs) -> None:
        cgroup = direct.directory_of(path)
        try:
            if not direct.is_guarded(programs, cgroup, tenant.id):
                direct.guard(programs, cgroup, tenant.id, low_ports(tenant))
                log.warning("container %s: the policy was attached to its cgroup anew", tenant.name)
            if (tenant.id, path) in self.listening and direct.let_listen(programs, cgroup):
                log.warning("container %s: what its listeners need was attached to its cgroup anew", tenant.name)
        except FileNotFoundError:  # the cgroup: its last process has left
            pass
        except OSError as error:
            log.error("container %s: its cgroup cannot be looked at: %s", tenant.name, error)

    def _forget_ended(self, tenant: Tenant) -> None:
        """Forget the cgroups of those of several containers in one netns that have ended."""
        if tenant.more_cgroups:
            there = [path for path in tenant.cgroups if direct.directory_of(path).exists()]
            if there and there != tenant.cgroups:
                tenant.cgroup, *tenant.more_cgroups = there
                self.registry.save()

    def is_made(self, path: str) -> bool:
        """Has graft made the cgroup @path, and not a runtime?"""
        return Path(path).name.startswith(f"{self.directory.parent.name}-")

    def follow(self, tenant: Tenant) -> None:
        """Let the /proc/net of @tenant's programs lead to that of a graft-sup, which lives in the tenant's netns.

        It stays with the one that it leads to while that lives.
        """
        if not tenant.cgroup or _is_sup(self._followed(tenant), tenant.netns):
            return
        pid = next((pid for pid in processes_in_netns(tenant.netns) if _is_sup(pid, tenant.netns)), 0)
        if not pid:
            return
        new = self._link(tenant, "new")
        new.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        new.symlink_to(f"/proc/{pid}/net")
        new.rename(self._link(tenant, "now"))

    def procfs(self, tenant: Tenant) -> str:
        """The path of a symbolic link for /proc/net of @tenant's programs. Raises Failure."""
        if not tenant.cgroup:
            return ""
        link = self._link(tenant, "link")
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(self._link(tenant, "now"))
        except OSError as error:
            raise Failure(f"cannot make {link}: {error.strerror}") from None
        return str(link)

    def netns_path(self, tenant: Tenant) -> str:
        """A path of the netns of @tenant, for root: this process's descriptor. "" if it has none any more."""
        return f"/proc/{os.getpid()}/fd/{tenant.netns_fd}" if tenant.cgroup and tenant.netns_fd >= 0 else ""

    def _followed(self, tenant: Tenant) -> int:
        """The PID of the process to which follow() has led; 0: none."""
        with contextlib.suppress(OSError):
            return int(self._link(tenant, "now").readlink().parent.name)
        return 0

    def _link(self, tenant: Tenant, name: str) -> Path:
        return self.directory / str(tenant.id) / name


def low_ports(tenant: Tenant) -> int:
    """The first port that its programs may bind without CAP_NET_BIND_SERVICE (ip_unprivileged_port_start, ip(7))."""
    asked = parse_sysctls(tenant.asked.sysctl).get(PORT_START)
    if asked is not None or tenant.netns_fd < 0:
        return int(asked or PRIVILEGED)
    with linux.inside_netns(tenant.netns_fd):
        return int(Path("/proc/sys", *PORT_START.split(".")).read_text())


def _is_sup(pid: int, netns: int) -> bool:
    """Is the process @pid a graft-sup in the netns with this inode? One that has ended is in none."""
    try:
        return linux.netns_inode(pid) == netns and linux.comm(pid) == SUP
    except OSError:
        return False


def is_inside(tenant: Tenant, pid: int) -> bool:
    """Is the process @pid in the cgroup of the direct container @tenant? False if it has ended."""
    try:
        path = cgroup_of(pid)
        return any(direct.contains(outer, path) for outer in tenant.cgroups)
    except OSError:
        return False


def lives(tenant: Tenant) -> bool:
    """Has the direct container @tenant a process, in its cgroups?"""
    return any(direct.is_populated(direct.directory_of(path)) for path in tenant.cgroups)


def first_process(tenant: Tenant) -> int:
    """The PID of a process of the direct container @tenant; 0 if it has none."""
    return next((pid for path in tenant.cgroups for pid in direct.processes(direct.directory_of(path))), 0)
