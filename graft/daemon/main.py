"""graftd: the daemon's start, its sockets, its periodic work, and its end.

Theory of operation

The loop is one thread around epoll(7) (graft/process/loop.py). It owns the registry and serves every socket:

    graftd.sock         requests of `graft` by root and the group graft (graft/daemon/admin.py)
    agent.sock          seccomp listeners from OCI runtimes and wrappers, requests of the API (graft/daemon/agent.py)
    user.sock           requests of `graft` by any user, about what is theirs (graft/daemon/users.py)
    helpers.sock        each graft-sup that has outlived its graftd (graft/trap/orphans.py)
    graft.sock of Docker's plugins directory    network and IPAM driver (graft/engines/docker.py)
    port 53, UDP and TCP, at 127.0.0.11, fd67:7261:6674::b and the gateways of CNI networks    names
        (graft/engines/resolver.py)
    192.0.0.8 in each container's netns    who dials the container's servers there (graft/daemon/forwards.py)

Trapped calls (seccomp_unotify(2)) may block, so the loop does not answer them. Up to 512 threads do, and up to 512
more receive from listeners that root did not hand over (graft/trap/listeners.py, graft/process/workers.py). The
resolver answers each TCP client in a thread, graft/process/closing.py closes descriptors in threads, and
graft/tenants/interfaces.py adds addresses in containers' netns in threads. `Tenant` in graft/tenants/tenant.py says
which thread may touch what.

Listeners, their journals, network namespaces, and the sockets at which engines' containers ask for names must outlive
graftd. Their descriptors are in the descriptor store of systemd or of the keeper (graft/process/store.py), and
state.json says what they are for. Without a store they are lost: the targets' next trapped call fails with ENOSYS,
unless a graft-sup still answers.
"""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from graft import __version__
from graft.daemon.admin import Admin
from graft.daemon.agent import Agent
from graft.daemon.callers import Callers
from graft.daemon.files import Files
from graft.daemon.pages import Pages
from graft.daemon.planning import Planner
from graft.daemon.tenancy import Tenancy
from graft.daemon.users import Users
from graft.engines.docker import Docker
from graft.engines.resolver import Resolver
from graft.errors import Failure, GraftError
from graft.interpreter import python_command
from graft.kernel import addresses, diag
from graft.kernel.cgroup import cgroup2_root, enter_cgroup, leave_cgroup, mount_bpffs, pin_dir, run_dir
from graft.kernel.direct import directory_of
from graft.kernel.foreign import end_long_closes, watch_closes
from graft.kernel.netns import CLAIM, claim_netns, netns_cookie, netns_cookie_of, processes_by_netns
from graft.kernel.programs import Kernel
from graft.kernel.stamps import OWN_TENANT
from graft.log import check_level, log, trim
from graft.process import cage, keeper
from graft.process.loop import Loop
from graft.process.store import KEEPER_ENTRY, Store, exec_with
from graft.process.sweeper import leave_sweeper
from graft.process.title import GRAFTD, set_title
from graft.rules.address import parse_address
from graft.rules.configuration import Configuration
from graft.rules.limits import default_limits
from graft.rules.slices import dynamic_address
from graft.tenants import attachments, endpoint_file
from graft.tenants.direct import lives
from graft.tenants.registry import Registry
from graft.tenants.tenant import CONTAINER, Tenant
from graft.text import listed, plain
from graft.trap.orphans import Orphans

IDLE_EXIT_SECONDS = 5.0
TICK_SECONDS = 1.0
PURGE_SECONDS = 30.0
ORPHAN_SECONDS = 3.0  # a graft-sup without a graftd looks for a new one every 50 ms

Steps: TypeAlias = list[tuple[str, Callable[[], object]]]


class Daemon:
    """All state of a running graftd, and the callbacks of its loop. Its methods run in the loop's thread, except
    `_place`.
    """

    def __init__(self, *, idle_exit: bool, planner: Planner | None) -> None:
        self.planner = planner
        self.directory = run_dir()
        self.idle_exit = idle_exit
        self.loop = Loop()
        self.store = Store()
        self.kernel = Kernel(pin_dir())
        self.registry = Registry(self.kernel, self.directory / "state.json")
        self.last_used = time.monotonic()
        self.next_tick = 0.0
        self.next_purge = 0.0
        self.sockets: list[tuple[str, int]] = []
        self.failed = False
        self.told_to_reload = False
        self.claim_path = ""  # "": the namespace is not claimed
        self.cgroup = Path()  # without a name: it is not entered yet
        self.passed_on: list[tuple[str, int]] = []  # the keeper's descriptors

    # -- start and end --

    def start(self) -> None:
        """Take over the state and the descriptors of a predecessor, if there was one, and serve the sockets.

        Raises Failure, for instance if another graftd supervises this network namespace, and OSError.
        """
        signal.signal(signal.SIGHUP, self._on_hangup)
        watch_closes()
        check_level()
        inherited = self.store.inherited()
        self.registry.load()  # first: if it fails, nothing has been made that would be left behind
        self.files = Files(self.registry, self._configure)
        configuration = self.files.begin()
        default_limits(os.environ, configuration.limits)  # what is wrong with it is told before anything is made
        root = cgroup2_root()
        mount_bpffs()
        self.root = root
        self.managed = "GRAFT_KEEPER" not in os.environ and "NOTIFY_SOCKET" in os.environ
        self._claim_namespace()
        self.cgroup = enter_cgroup(root, managed=self.managed, program=GRAFTD)
        self.kernel.install(self.cgroup, root)
        low, high = self.registry.ephemeral
        self.kernel.configure(netns_cookie(), (high - low + 1) // 2)
        if self.registry.ipv6:
            addresses.add_slice_route()
        self.resolver = Resolver(self.loop, self.registry, self.kernel, self.store)
        self.tenancy = Tenancy(
            self.directory,
            self.loop,
            self.store,
            self.kernel,
            self.registry,
            configuration,
            self.resolver,
        )
        self.calls = self.tenancy.calls
        self.docker = Docker(
            self.directory, self.loop, self.store, self.registry, self.resolver, managed=self.managed
        )
        self.pages = Pages(self.tenancy)
        self.admin = Admin(self.tenancy, self.resolver, self.files, self.pages, managed=self.managed)
        self.admin.planner = self.planner
        self.users = Users(self.tenancy, self.resolver, self.files, self.pages, managed=self.managed)
        self.agent = Agent(self.tenancy, self.users.listeners)
        self.callers = Callers(self.loop, self.registry, self.tenancy.spare, self.users.accounts.share_of)
        self._restore(dict(inherited), inherited)
        self.pages.start(needed=not self.registry.tenants)
        self.tenancy.direct.sweep()
        for address in self.registry.sweep():
            log.warning("%s was on lo for a container that has ended: removed", address)
        self.registry.reconcile()
        self.files.endpoints.read()
        self.files.begin_users()
        self.watch = addresses.watch_addresses()
        self._read_locals(0)
        self.loop.add(self.watch.fileno(), self._read_locals)
        self.orphans = Orphans(self.loop, self.calls, self.registry)
        self.alone_until = time.monotonic() + ORPHAN_SECONDS
        self.loop.add(self.kernel.reports.open(self.tenancy.denied), lambda _events: self.kernel.reports.drain())
        for name, fd in inherited:
            if name == "keeper":
                self.loop.add(fd, lambda _events: self._keeper_gone())
            elif name in ("guard", "lock"):
                self.passed_on.append((name, fd))
            elif name in ("admin", "agent", "user"):
                self.sockets.append((name, fd))
                listening = socket.socket(fileno=fd)
                self.callers.serve(listening, self._service(listening))
        self.docker.start(next((fd for name, fd in inherited if name == "docker"), -1))
        self.resolver.inherit(inherited)
        self.resolver.allowance.restore()
        self.resolver.start()
        if not any(name == "admin" for name, _ in inherited):
            raise Failure("graftd got no socket", hint="start it with 'graftd', or by its systemd socket unit")
        for watched in list(self.calls.watched.values()):
            self.calls.dispatcher.answer_pending(watched, helper_died=not watched.helper)
        self._tell_status()
        self.store.ready()
        log.info("graftd %s ready, %d containers", __version__, len(self.registry.tenants))

    def _configure(self, configuration: Configuration) -> None:
        """Put graft.toml in force, all of it or nothing. Raises GraftError and OSError."""
        before = self.tenancy.configuration
        self.tenancy.configure(configuration)
        try:
            self.pages.change(configuration)
        except GraftError:
            self.tenancy.configure(before)
            raise

    def _service(self, listening: socket.socket) -> Admin | Agent:
        """What answers at a socket, by its path: a unit of systemd has one name for all that it listens to."""
        others: dict[str, Admin | Agent] = {"agent.sock": self.agent, "user.sock": self.users}
        return others.get(os.path.basename(listening.getsockname()), self.admin)

    def _read_locals(self, _events: int) -> None:
        """Tell the programs which addresses the host has, but for those that graft has given to containers."""
        addresses.drain(self.watch)
        found = {parse_address(text) for text in addresses.addresses()}
        self.kernel.know_locals(found - self.registry.added)
        self.resolver.allowance.know_hosts(found)
        self.tenancy.interfaces.refresh()

    def _claim_namespace(self) -> None:
        """Lock the host namespace: two graftds there would refuse each other's sockets.

        The lock file has mode 600, so that only root can hold the lock. Another graftd may have another /run, so
        there is a name in the namespace as well.
        """
        path = f"/run/graftd-netns-{netns_cookie()}.lock"
        self.claim = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self.claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, directory = os.pread(self.claim, 4096, 0).decode(errors="replace").strip().partition(" ")
            who, hint = (
                (f", pid {pid}", f"GRAFT_RUN_DIR={directory}") if directory else ("", "GRAFT_RUN_DIR names it")
            )
            raise Failure(f"another graftd supervises this network namespace{who}", hint=hint) from None
        self.claim_path = path
        os.ftruncate(self.claim, os.pwrite(self.claim, f"{os.getpid()} {self.directory}\n".encode(), 0))
        self.claimed = claim_netns()
        if self.claimed is None:
            log.warning("a process that is not root's has taken the abstract name '@%s'", CLAIM)

    def _restore(self, named: dict[str, int], inherited: list[tuple[str, int]]) -> None:
        """Give the tenants of state.json their descriptors back; drop tenants whose processes have ended."""
        places = {}
        for name, fd in inherited:
            kind, _, rest = name.partition("-")
            if kind == "place":
                places[int(rest)] = fd
            elif kind == "netns" and int(rest) in self.registry.tenants:
                self.registry.tenants[int(rest)].netns_fd = fd
            elif kind == "netns":
                self.store.remove(name)
                os.close(fd)
            elif kind in ("listener", "foreign"):
                self.calls.restore(named, name, fd)
        self.calls.forget_strays(named)
        for lost in self.registry.restore_places(places):
            log.warning("endpoint %s is lost: its namespace is gone", lost)
        self.tenancy.keep_places()
        seen: dict[int, list[int]] = {}
        for tenant in list(self.registry.tenants.values()):
            if tenant.netns_fd < 0:
                seen = seen or processes_by_netns()
                self._reopen_netns(tenant, seen)
            # the netns of a direct container has no process when graft-sup has died; its sockets are policed without
            if tenant.netns_fd < 0 and not (tenant.cgroup and lives(tenant)):
                self.registry.remove(tenant)
                self.tenancy.direct.end(tenant)
                self.store.remove(f"netns-{tenant.id}")
            elif (
                tenant.kind == CONTAINER and not tenant.listeners
            ):  # a graft-sup may bring one of several: its end is not the container's
                tenant.lost_listener = True
        self.tenancy.direct.check()
        for tenant in self.registry.tenants.values():
            self.calls.divide(tenant)  # an earlier release may have said less
        self.tenancy.forwards.restore(self.registry.tenants, inherited)
        self.registry.forget_dead()

    def _reopen_netns(self, tenant: Tenant, seen: dict[int, list[int]]) -> None:
        """Find a namespace that no store kept by a process that lives in it: its sockets still need their policy.

        @seen: the PIDs of all processes by netns.
        """
        for pid in seen.get(tenant.netns, []):
            with contextlib.suppress(OSError):
                found = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                if netns_cookie_of(found) == tenant.table.cookie:
                    tenant.netns_fd = found
                    return
                os.close(found)
        if tenant.cgroup:  # its netns may have ended, and the inode be another's
            tenant.netns = 0

    def run(self) -> None:
        """Run the loop until a signal or a request stops it; clean up if no container and no attachment is left.

        Exits with status 1 if graftd has to be started again.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.last_used = time.monotonic()  # the start took its time, and whoever asked for it is about to connect
        self.loop.run(self._tick)
        self.tenancy.interfaces.finish()
        self.tenancy.direct.finish()
        self.pages.close()
        if self.failed:
            sys.exit(1)
        if not self.registry.tenants and not self.registry.attachments:
            self.cleanup()
        elif not self.managed and not self.admin.replacing:
            self._leave_addresses()

    def _leave_addresses(self) -> None:
        """Have the addresses of containers removed that end while no graftd runs. Those for names end with it."""
        self.resolver.end()
        added = self.registry.added
        owned = {
            f"{address}/{address.bits}": str(directory_of(tenant.cgroup)) if tenant.cgroup else str(tenant.netns)
            for tenant in self.registry.tenants.values()
            for address in (*(own.address for own in tenant.owned), dynamic_address(tenant.slice_number))
            if address in added
        }
        if owned:
            leave_cgroup(self.root, remove=False)
            leave_sweeper(owned, self.directory / "graftd.sock")

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self.loop.running = False

    def _on_hangup(self, _number: int, _frame: Any) -> None:
        self.told_to_reload = True  # the next tick does it: nothing is half done then

    def _keeper_gone(self) -> None:
        """Become a new keeper that has all descriptors of this process; the keeper then starts a new graftd."""
        log.warning("the keeper has died, starting another")
        self.tenancy.interfaces.finish()
        held = [*self.sockets, *self.docker.held(), *self.resolver.held(), *self.calls.held()]
        held += self.tenancy.forwards.held()
        held += [(f"netns-{t.id}", t.netns_fd) for t in self.registry.tenants.values() if t.netns_fd >= 0]
        held += [(f"place-{p.number}", p.fd) for p in self.registry.places.values()]
        held += self.passed_on
        leave_cgroup(self.root, remove=False)
        exec_with(python_command(KEEPER_ENTRY), held)

    def give_up(self) -> None:
        """Remove what a start has made that fails, if no container or attachment waits for the next one."""
        if not self.claim_path or self.registry.tenants or self.registry.attachments:
            return
        steps: Steps = [(self.claim_path, lambda: Path(self.claim_path).unlink(missing_ok=True))]
        if self.kernel.maps:
            steps.append((f"the programs, {self.kernel.pins}", lambda: self.kernel.uninstall(self.cgroup)))
            steps.append(("the route of the IPv6 slices", addresses.remove_slice_route))
        elif self.kernel.pins.is_dir():
            steps.append((str(self.kernel.pins), self.kernel.pins.rmdir))
        if self.cgroup.name and not self.managed:
            steps.append(("the cgroup", lambda: leave_cgroup(self.root, remove=True)))
        _undo(steps)

    def cleanup(self) -> None:
        """Remove what graftd has put on the host: BPF pins, the route, the cgroup, sockets, and an empty state.

        The programs stay with sockets that containers have passed to others (graft/kernel/links.py).
        """
        steps: Steps = [
            (self.claim_path, lambda: Path(self.claim_path).unlink(missing_ok=True)),
            ("addresses on lo", self.registry.sweep),
            (str(self.calls.helpers), lambda: self.calls.helpers.unlink(missing_ok=True)),
            ("Docker's socket", self.docker.cleanup),
            (f"the programs, {self.kernel.pins}", lambda: self.kernel.uninstall(self.cgroup)),
            ("the route of the IPv6 slices", addresses.remove_slice_route),
            ("graft-relay's cgroup", self.tenancy.forwards.end),
        ]
        if not self.managed:
            steps.append(("the cgroup", lambda: leave_cgroup(self.root, remove=True)))
        if not endpoint_file.any_added(self.registry):
            steps.append((str(self.registry.state), lambda: self.registry.state.unlink(missing_ok=True)))
        _undo(steps)

    def _tell_status(self) -> None:
        names = [plain(tenant.name) for tenant in self.registry.tenants.values() if tenant.kind == CONTAINER]
        many = f"{len(names)} container{'s' * (len(names) != 1)}"
        self.store.status(f"{many}: {listed(names)}" if names else many)

    def _tick(self) -> float:
        soon = self.calls.tick()
        self.tenancy.interfaces.tick()
        self.tenancy.direct.tick()
        soon = min(soon, self.tenancy.forwards.tick())
        now = time.monotonic()
        if now < self.next_tick:
            return min(self.next_tick - now, soon)
        self.next_tick = now + TICK_SECONDS
        end_long_closes()
        self.tenancy.spare.refill()
        self.registry.leads.hold()
        self.store.alive(now)
        self.callers.expire(now)
        self.resolver.expire()
        self.tenancy.readers.tick(now)
        self.pages.tick(now)
        self._tell_status()
        self.store.flush()
        self._check_policy()
        if self.told_to_reload:
            self.told_to_reload = False
            self.files.reload()
        self.files.look()
        self.docker.tick()
        if self.tenancy.stray:
            self.tenancy.stray = False
            for cgroup in (
                self.cgroup,
                *(directory_of(path) for t in self.registry.tenants.values() for path in t.cgroups),
            ):
                with contextlib.suppress(FileNotFoundError):
                    diag.end_stray_listeners(cgroup.stat().st_ino)
        if not self.registry.saved:
            self.registry.save()
        alone = [t for t in self.registry.tenants.values() if not t.listeners]
        seen = processes_by_netns() if alone else {}
        for tenant in alone:
            if not self.tenancy.alive(tenant, now, seen):
                self.tenancy.remove(tenant)
            elif tenant.kind == CONTAINER and self.alone_until < now:
                log.warning("container %s lost its supervisor: its new sockets fail (ENOSYS)", tenant.name)
        if self.alone_until < now:
            self.alone_until = float("inf")
        if now > self.next_purge:
            self.next_purge = now + PURGE_SECONDS
            trim(self.directory / "graftd.log")
            self.tenancy.stray = True  # a report may have been lost, where the ring buffer was full
            self.registry.forget_dead()
            self.resolver.allowance.sweep()
            self.tenancy.interfaces.refresh()  # a default route may have changed, which nothing tells
            attachments.forget_dead(self.registry)
            attachments.forget_expected(self.registry)
            self.tenancy.direct.sweep()
            self.tenancy.keep_places()
        used = self.registry.tenants or self.callers.connections or self.registry.attachments
        if used or endpoint_file.any_added(self.registry):
            self.last_used = now
        elif self.idle_exit and now - max(self.last_used, self.callers.last) > IDLE_EXIT_SECONDS:
            self.loop.running = False
        return min(TICK_SECONDS, soon)

    def _check_policy(self) -> None:
        """Repair or restart where somebody removed the pins, or moved this process out of the cgroup that has the
        policy's programs.
        """
        if not self.kernel.is_pinned():
            log.error("%s was removed: its pins are put there again", self.kernel.pins)
            try:
                mount_bpffs()
                self.kernel.pin_again()
            except OSError as error:
                log.error("%s", error)
        self.tenancy.direct.check()
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                self.tenancy.sockets.stamps.stamp(probe.fileno(), OWN_TENANT, 0)
                self.tenancy.sockets.stamps.vouch(probe, OWN_TENANT)
        except OSError as error:
            if error.errno == errno.EIO:  # other errors, such as EMFILE, say nothing about the policy
                log.error("%s: no socket can be made for containers; starting again", error.strerror)
                self.failed = True
                self.loop.running = False


def _undo(steps: Steps) -> None:
    """Take each step. One that fails is logged, by what it was to remove, and the others are taken."""
    for what, step in steps:
        try:
            step()
        except (OSError, GraftError) as error:
            log.error("left behind: %s: %s", what, error)


def main(planner: Planner | None = None) -> None:
    """Run as graftd, with sockets (LISTEN_FDS) and a store from the keeper or the service manager. Exits with a
    message for a GraftError, and for a privilege that is missing. @planner: what reads the words of `graft run` for
    graft-front, if anything does.
    """
    try:
        cage.hide()
        set_title(GRAFTD)
        keeper.raise_descriptor_limit()
        cage.enter()
        daemon = Daemon(idle_exit=os.environ.get("GRAFT_IDLE_EXIT") == "1", planner=planner)
        try:
            daemon.start()
        except BaseException:
            daemon.give_up()
            raise
        daemon.run()
    except GraftError as error:
        sys.exit(f"graftd: {error}")
    except OSError as error:
        if error.errno == errno.EPERM:
            sys.exit(f"graftd: {error} (graftd needs root with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN)")
        raise
