"""Direct containers of engines: their cgroups are their runtimes', and their processes come in two steps.

A hook of the runtime's (graft/engines/direct.py) tells of the first process, which waits: take(). Then comes its
listener, and those of what is executed later. What is kept in between is the container's netns, in which nobody
lives.

Where a runtime puts a container into no cgroup2, graft has made one before (prepare()), in which no socket is made
until take().
"""

import os
from pathlib import Path

from graft.errors import Refused
from graft.kernel import direct, linux
from graft.kernel.cgroup import cgroup_of
from graft.kernel.programs import Kernel
from graft.tenants.direct import DirectContainers, low_ports
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant

MADE = "engine-"  # what the names of cgroups begin with that graft makes for an engine's containers


class EngineContainers(DirectContainers):
    """As DirectContainers, with those of engines. @directory: run_dir()."""

    def __init__(self, registry: Registry, kernel: Kernel, directory: Path) -> None:
        super().__init__(registry, kernel, directory)
        self.marks = directory / "direct"  # csrc/runtime.c, is_direct()
        self.kept: dict[str, int] = {}  # descriptors of netns, by the engine's ids of containers that are to come

    def take(self, tenant: Tenant, pid: int) -> None:
        """Attach the policy to the cgroup in which a runtime has put the first process @pid of a container.

        It is that process's alone, or one that prepare() has made. Raises Refused, OSError.
        """
        path = cgroup_of(pid)
        cgroup = direct.directory_of(path)
        if linux.netns_inode(pid) != self.registry.home:
            raise Refused("the runtime's network namespace is not graftd's", code="EINVAL")
        inside = self.registry.direct_of(pid)
        if inside and (inside is not tenant or path not in tenant.cgroups):
            raise Refused(f"its cgroup is in that of container '{inside.name}'", code="EBUSY")
        if path in ("", "/") or (not self.is_made(path) and direct.processes(cgroup) != [pid]):
            raise Refused(
                "the runtime has not put it into a cgroup2 of its own",
                hint="runc from 1.1 on does, and crun where cgroup2 is alone",
                code="EOPNOTSUPP",
            )
        if direct.roots_own(cgroup) != cgroup:
            raise Refused("its cgroup is one in which a user may move processes", hint="run it as root", code="EPERM")
        direct.guard(self.kernel.for_direct(), cgroup, tenant.id, low_ports(tenant))
        if not tenant.cgroup:
            tenant.cgroup = path
            self.begun(tenant)
        elif path not in tenant.cgroups:
            tenant.more_cgroups.append(path)

    def prepare(self, number: str, pid: int) -> None:
        """Let the process @pid, which is about to become a runtime, enter a new cgroup, that of its container.

        @number: the engine's id of the container. No socket is made there before take(). Raises Refused, OSError.
        """
        cgroup = direct.make(direct.directory_of(""), f"{MADE}{number}", 0)
        if not cgroup.name.endswith(number):
            cgroup.rmdir()
            raise Refused("a container with this id has processes yet", hint="wait for its end", code="EBUSY")
        direct.guard(self.kernel.for_direct(), cgroup, 0, 0)
        direct.enter(cgroup, pid)

    def enter(self, tenant: Tenant, number: str, pid: int) -> None:
        """Let the process @pid, which is about to become a runtime and to execute a program in the container with the
        engine's id @number, enter the cgroup that prepare() has made for it. A runtime's own it enters itself.

        Raises OSError.
        """
        for path in tenant.cgroups:
            if Path(path).name == f"{self.directory.parent.name}-{MADE}{number}":
                direct.enter(direct.directory_of(path), pid)

    def keep(self, number: str, netns_fd: int) -> str:
        """Keep the netns of a container that an engine is creating until its first process is there.

        Returns a path of it for hooks. @netns_fd belongs to graftd from now on.
        """
        self.forget(number)
        self.kept[number] = netns_fd
        return f"/proc/{os.getpid()}/fd/{netns_fd}"

    def mark(self, number: str) -> None:
        """Let graft-runtime know that the container with the engine's id @number is direct. Raises OSError."""
        if "/" not in number:
            self.marks.mkdir(parents=True, exist_ok=True)
            (self.marks / number).touch()  # the hook writes the PID of the netns's holder into it

    def forget(self, number: str) -> None:
        """Close what keep() has kept for a container that is there, or will not come."""
        fd = self.kept.pop(number, -1)
        if fd >= 0:
            os.close(fd)

    def unmark(self, number: str) -> None:
        """Undo mark(), because the container has ended."""
        (self.marks / number.replace("/", "_")).unlink(missing_ok=True)

    def end(self, tenant: Tenant) -> None:
        for number in tenant.members:
            self.unmark(number)
        super().end(tenant)

    def check(self) -> None:
        known = self.registry
        for number in [n for n in self.kept if n not in known.expected and known.by_container(n) is None]:
            self.forget(number)
            self.sweep()
        super().check()

    def sweep(self) -> None:
        """Remove the cgroups that prepare() has made for containers whose start has failed."""
        taken = {path for tenant in self.registry.tenants.values() for path in tenant.cgroups}
        before = f"{self.directory.parent.name}-{MADE}"
        for path in direct.directory_of("").glob(f"{before}*"):
            waits = path.name.removeprefix(before) in self.kept
            if not waits and f"/{path.name}" not in taken and path not in self.leaving:
                self.leaving.append(path)
