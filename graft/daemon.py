"""graftd: the registry behind two sockets, and the loop that answers trapped calls.

One thread, one epoll loop. A trapped call that is decided from registers alone is answered on the spot; one
that touches the target's memory (ioctl) goes to a thread of its own, at most SLOW_CALLS of a tenant at a
time, because another program may serve that memory and never come back. Whatever graftd holds that must not
die with it, listeners, namespaces and the journal, is in the store (graft/store.py).
"""

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from graft import __version__, host, linux
from graft.actions import Action, Answer, Inject, Replace
from graft.admin import Admin
from graft.agent import Agent
from graft.bpf import CONVERTED, Denial, Kernel, Stamper
from graft.connection import Connection
from graft.errors import Failure, GraftError
from graft.log import log
from graft.loop import Loop
from graft.notify import ANSWER_NUMBER, ANSWER_PROCEED, SLOTS, Journal, Listener, Notification, parse
from graft.protocol import complete
from graft.registry import API, WRAPPER, Registry, Tenant
from graft.scope import SCOPE_SLACK
from graft.store import Store, exec_with, python_command
from graft.supervisor import Supervisor
from graft.target import watch_again
from graft.verbose import Teller

SLOW_CALLS = 4
SLOW_CALLS_ALL = SLOTS - 8  # the journal keeps room for quick ones
DENIALS_KEPT = 32
CONNECTIONS_MAX = 512
CONNECTIONS_OF_A_USER = 64
IDLE_EXIT_SECONDS = 5.0
TICK_SECONDS = 1.0
PURGE_SECONDS = 30.0
SCOPE_GRACE_SECONDS = 10.0


class Daemon:
    """Everything graftd is while it runs."""

    def __init__(self, *, idle_exit: bool) -> None:
        self.directory = host.run_dir()
        self.idle_exit = idle_exit
        self.loop = Loop()
        self.store = Store()
        self.kernel = Kernel(host.pin_dir())
        self.registry = Registry(self.kernel, self.directory / "state.json")
        self.admin = Admin(self)
        self.agent = Agent(self)
        self.listeners: dict[int, tuple[Listener, Tenant]] = {}
        self.next_listener = 1
        self.connections: set[Connection] = set()
        self.denials: dict[int, deque[tuple[float, Denial]]] = {}
        self.tellers: dict[int, Teller] = {}
        self.kept_places: set[int] = set()
        self.slow: Counter[int] = Counter()
        self.slow_lock = threading.Lock()
        self.paused: list[tuple[int, Callable[[int], None]]] = []
        self.last_used = time.monotonic()
        self.next_tick = 0.0
        self.next_purge = 0.0
        self.calls = 0
        self.call_ns = 0
        self.sockets: list[tuple[str, int]] = []

    # -- start and end --

    def start(self) -> None:
        """Take over what a predecessor left, or begin from nothing."""
        inherited = self.store.inherited()
        root = host.cgroup2_root()
        host.mount_bpffs()
        self.root = root
        self.managed = "GRAFT_KEEPER" not in os.environ and "NOTIFY_SOCKET" in os.environ
        self._claim_namespace()  # before anything is made that a refused graftd would leave behind
        cgroup = host.enter_cgroup(root, managed=self.managed)
        self.kernel.install(cgroup, root)
        self.kernel.configure(host.netns_cookie())
        if self.registry.ipv6:
            host.add_slice_route()
        stamper = Stamper(self.kernel.maps["stamps"])
        self.supervisor = Supervisor(stamper, self.kernel.maps["families"], self._place)
        self.registry.load()
        self._restore(dict(inherited), inherited)
        self.registry.reconcile()
        self.loop.add(self.kernel.denials(self._denied), lambda _events: self.kernel.drain())
        for name, fd in inherited:
            if name == "keeper":
                self.loop.add(fd, lambda _events: self._keeper_gone())
            elif name in ("admin", "agent"):
                self.sockets.append((name, fd))
                self._serve(socket.socket(fileno=fd), self.admin if name == "admin" else self.agent)
        if not any(name == "admin" for name, _ in inherited):
            raise Failure("graftd got no socket", hint="start it with 'graftd', or by its systemd socket unit")
        self._answer_pending()
        self.store.ready()
        log.info("graftd %s ready, %d containers", __version__, len(self.registry.tenants))

    def _claim_namespace(self) -> None:
        """One graftd a host namespace: two would refuse each other's sockets. Its abstract sockets are its own."""
        self.claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self.claim.bind("\0graftd")
        except OSError:
            raise Failure("another graftd supervises this network namespace", hint="GRAFT_RUN_DIR names it") from None

    def _restore(self, named: dict[str, int], inherited: list[tuple[str, int]]) -> None:
        """Give the tenants of state.json their descriptors back; drop those whose processes are gone."""
        if "journal" in named:
            self.journal = Journal(named["journal"])
        else:
            self.journal = Journal()
            self.store.put("journal", self.journal.fd)
        places = {}
        for name, fd in inherited:
            kind, _, rest = name.partition("-")
            if kind == "place":
                places[int(rest)] = fd
            elif kind == "netns" and int(rest) in self.registry.tenants:
                self.registry.tenants[int(rest)].netns_fd = fd
            elif kind == "listener":
                number, owner = (int(part) for part in rest.split("-"))
                self.next_listener = max(self.next_listener, number + 1)
                tenant = self.registry.tenants.get(owner)
                if tenant:
                    self._listen(Listener(fd, number), tenant)
                else:
                    os.close(fd)
        for lost in self.registry.restore_places(places):
            log.warning("endpoint %s is lost: its namespace is gone", lost)
        self.keep_places()
        for tenant in list(self.registry.tenants.values()):
            if tenant.netns_fd < 0:
                self._reopen_netns(tenant)
            if tenant.netns_fd < 0:
                self.registry.remove(tenant)
        self.registry.forget_dead()

    def _reopen_netns(self, tenant: Tenant) -> None:
        """Nobody kept the namespace: while a process lives in it, its sockets keep their policy."""
        for pid in host.processes_in_netns(tenant.netns):
            with contextlib.suppress(OSError):
                tenant.netns_fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                log.warning("container %s lost its supervisor: its new sockets fail (ENOSYS)", tenant.name)
                return

    def _answer_pending(self) -> None:
        for slot, number, call, inode, answer in self.journal.pending():
            entry = self.listeners.get(number)
            given = find_socket(call.pid, inode) if inode else None
            if entry and given is not None and answer == ANSWER_PROCEED:
                entry[0].proceed(call.id)
            elif entry and given is not None:
                value = given if answer == ANSWER_NUMBER else 0
                entry[0].answer(call.id, value, max(answer, 0))
            elif entry:
                self._dispatch(entry[0], entry[1], call, slot)
                continue
            self.journal.release(slot)

    def _place(self, number: int) -> int:
        place = self.registry.places.get(number)
        if place is None:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        return place.fd

    def keep_places(self) -> None:
        """Store the namespaces that endpoints name, and let go of those that none does any more."""
        for place in self.registry.unused_places():
            self.store.remove(f"place-{place.number}")
            self.kept_places.discard(place.number)
            os.close(place.fd)
        for number in self.registry.places.keys() - self.kept_places:
            self.store.put(f"place-{number}", self.registry.places[number].fd)
            self.kept_places.add(number)

    def run(self) -> None:
        """Until stopped."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.loop.run(self._tick)
        if not self.registry.tenants:
            self.cleanup()

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self.loop.running = False

    def _keeper_gone(self) -> None:
        """Start another keeper with everything this process holds; it starts a graftd, and this one ends."""
        log.warning("the keeper has died, starting another")
        held = [*self.sockets, ("journal", self.journal.fd)]
        held += [(f"netns-{t.id}", t.netns_fd) for t in self.registry.tenants.values()]
        held += [(f"place-{p.number}", p.fd) for p in self.registry.places.values()]
        held += [(f"listener-{each.number}-{t.id}", each.fd) for each, t in self.listeners.values()]
        host.leave_cgroup(self.root, remove=False)
        exec_with(python_command("from graft.keeper import main; main(-1)"), held)

    def cleanup(self) -> None:
        """Nothing is grafted: leave the host as it was."""
        self.kernel.uninstall()
        host.remove_slice_route()
        if not self.managed:
            host.leave_cgroup(self.root, remove=True)
        if not self.registry.tables:
            self.registry.state.unlink(missing_ok=True)

    def _tick(self) -> float:
        now = time.monotonic()
        if now < self.next_tick:
            return self.next_tick - now
        self.next_tick = now + TICK_SECONDS
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.close()
        if not self.registry.saved:
            self.registry.save()
        for tenant in [t for t in self.registry.tenants.values() if not t.listeners]:
            if not self._alive(tenant, time.time()):
                self._remove(tenant)
        if now > self.next_purge:
            self.next_purge = now + PURGE_SECONDS
            self.registry.forget_dead()
            self.keep_places()
        if self.registry.tenants or self.connections or self.registry.tables:
            self.last_used = now
        elif self.idle_exit and now - self.last_used > IDLE_EXIT_SECONDS:
            self.loop.running = False
        return TICK_SECONDS

    def _alive(self, tenant: Tenant, now: float) -> bool:
        """Has a tenant without a listener a process left?"""
        if tenant.kind == API:
            tenant.followers = {pid for pid in tenant.followers if _runs(pid, tenant.netns)}
            return bool(tenant.followers)
        if tenant.kind == WRAPPER and not tenant.scope:  # its netns is not its own: the program is what there is
            return _runs(tenant.pid, tenant.netns)
        pids = host.processes_in_netns(tenant.netns)
        if not tenant.scope:
            return bool(pids)
        return now - tenant.started < SCOPE_GRACE_SECONDS or any(_scope(pid) == tenant.scope for pid in pids)

    def _remove(self, tenant: Tenant) -> None:
        for inner in self.registry.inner(tenant):
            self._remove(inner)
        self.registry.remove(tenant)
        self.denials.pop(tenant.id, None)
        teller = self.tellers.pop(tenant.id, None)
        if teller:
            teller.connection.close()
        self.keep_places()

    def follow(self, tenant: Tenant, pid: int) -> None:
        """A process has sockets of this tenant by the API: the tenant lives as long."""
        if tenant.kind == API and pid not in tenant.followers:
            tenant.followers.add(pid)
            self.registry.save()

    def listen_in(self, tenant: Tenant, connection: Connection) -> None:
        """Tell @connection what the programs of a verbose wrapper do."""
        connection.told = True
        connection.deadline = float("inf")
        self.tellers[tenant.id] = Teller(tenant, connection)

    # -- connections --

    def _serve(self, sock: socket.socket, service: Admin | Agent) -> None:
        sock.setblocking(False)

        def accept(_events: int) -> None:
            try:
                peer, _ = sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    time.sleep(0.01)  # level-triggered: the connection waits, the loop must not spin
                    return
                raise
            if len(self.connections) >= CONNECTIONS_MAX:
                peer.close()
                return
            whole = complete if service is self.agent else lambda text: text.endswith(b"\n")
            now = time.monotonic()
            connection = Connection(self.loop, peer, whole, service.serve, self.connections.discard, now)
            self.connections.add(connection)
            if connection.uid and sum(c.uid == connection.uid for c in self.connections) > CONNECTIONS_OF_A_USER:
                connection.close()

        self.loop.add(sock.fileno(), accept)

    # -- tenants --

    def adopt(self, tenant: Tenant, listener_fd: int) -> None:
        """Put a tenant's new listener and namespace into the store, then listen."""
        number = self.next_listener
        self.next_listener += 1
        self.store.put(f"listener-{number}-{tenant.id}", listener_fd)
        if not tenant.listeners:
            self.store.put(f"netns-{tenant.id}", tenant.netns_fd)
        self._listen(Listener(listener_fd, number), tenant)

    def _listen(self, listener: Listener, tenant: Tenant) -> None:
        self.listeners[listener.number] = (listener, tenant)
        tenant.listeners.add(listener.number)

        def ready(events: int) -> None:
            if events & ~1:  # EPOLLHUP: every process of the filter is gone
                self._gone(listener, tenant)
            elif self._pause(listener, tenant, ready):
                return
            elif tenant.trusted:
                self._receive(listener, tenant)
            else:
                receive_apart()

        def receive_apart() -> None:
            """Whoever kept a copy of its listener may receive first; then RECV waits, and must not wait here."""
            self.loop.remove(listener.fd)

            def work() -> None:
                try:
                    self._receive(listener, tenant)
                finally:
                    self.loop.add(listener.fd, ready)

            threading.Thread(target=work, daemon=True).start()

        self.loop.add(listener.fd, ready)

    def _pause(self, listener: Listener, tenant: Tenant, ready: Callable[[int], None]) -> bool:
        """Leave a tenant's calls waiting in the kernel while as many slow ones of it run as may."""
        with self.slow_lock:
            if self.slow[tenant.id] < SLOW_CALLS:
                return False
            self.loop.remove(listener.fd)
            self.paused.append((listener.fd, ready))
            return True

    def _gone(self, listener: Listener, tenant: Tenant) -> None:
        self.loop.remove(listener.fd)
        os.close(listener.fd)
        del self.listeners[listener.number]
        tenant.listeners.discard(listener.number)
        self.store.remove(f"listener-{listener.number}-{tenant.id}")
        if not tenant.listeners:
            self.store.remove(f"netns-{tenant.id}")
            self.kernel.drain()  # what its last processes did is told before its end
            self._remove(tenant)
            log.info("container %s ended", tenant.name)

    def reap(self) -> None:
        """Notice containers that ended a moment ago, before a new one asks for their name or ports."""
        for fd, events in self.loop.epoll.poll(0):
            callback = self.loop.callbacks.get(fd)
            if callback and events & ~1 and any(entry[0].fd == fd for entry in self.listeners.values()):
                callback(events)

    # -- trapped calls --

    def _receive(self, listener: Listener, tenant: Tenant) -> None:
        slot = self.journal.take(listener.number)
        if slot is None:
            return  # level-triggered: again when a slow call has ended
        buffer = self.journal.slot(slot)
        try:
            received = listener.receive(buffer)
        except OSError as error:
            log.error("receive from %s: %s", tenant.name, error)
            received = False
        if not received:
            self.journal.release(slot)
            return
        self._dispatch(listener, tenant, parse(buffer), slot)

    def _dispatch(self, listener: Listener, tenant: Tenant, call: Notification, slot: int) -> None:
        owner = tenant
        if self.registry.scopes:
            inner = self.registry.scopes.get(_scope(call.pid))
            if inner and inner.netns == tenant.netns:
                tenant = inner
        if Supervisor.quick(call):
            began = time.perf_counter_ns()
            self._carry_out(listener, call, self._decide(listener, call, tenant), slot)
            self.journal.release(slot)
            self.calls += 1
            self.call_ns += time.perf_counter_ns() - began
            return
        with self.slow_lock:
            room = self.slow.total() < SLOW_CALLS_ALL
            self.slow[owner.id] += room
        if not room:
            self._carry_out(listener, call, Answer(error=errno.EAGAIN), slot)
            self.journal.release(slot)
            return

        def work() -> None:
            try:
                self._carry_out(listener, call, self._decide(listener, call, tenant), slot)
            finally:
                self.journal.release(slot)
                with self.slow_lock:
                    self.slow[owner.id] -= 1
                    self.slow += Counter()  # drops what is zero
                    paused, self.paused = self.paused, []
                for fd, ready in paused:
                    self.loop.add(fd, ready)

        threading.Thread(target=work, daemon=True).start()

    def _decide(self, listener: Listener, call: Notification, tenant: Tenant) -> Action:
        try:
            return self.supervisor.handle(call, tenant, lambda: listener.valid(call.id))
        except Exception:
            log.exception("call %d of pid %d in %s", call.nr, call.pid, tenant.name)
            return Answer(error=errno.EIO)

    def _carry_out(self, listener: Listener, call: Notification, action: Action, slot: int) -> None:
        try:
            if isinstance(action, Inject):
                try:
                    self._inject(listener, call, action, slot)
                except OSError as error:  # EMFILE: the target's table is full
                    listener.answer(call.id, error=error.errno or errno.EIO)
                finally:
                    os.close(action.fd)
            elif isinstance(action, Replace):
                try:
                    self._replace(listener, call, action, slot)
                except OSError as error:
                    listener.answer(call.id, error=error.errno or errno.EIO)
                finally:
                    os.close(action.fd)
            elif isinstance(action, Answer):
                listener.answer(call.id, action.value, action.error)
            else:
                listener.proceed(call.id)
        except OSError as error:
            log.error("answer call %d of pid %d: %s", call.nr, call.pid, error)

    def _inject(self, listener: Listener, call: Notification, action: Inject, slot: int) -> None:
        self.journal.injecting(slot, os.fstat(action.fd).st_ino)
        flags = os.O_CLOEXEC if action.cloexec else 0
        try:
            number = listener.inject(call.id, action.fd, flags, action.number)
        except OSError as error:
            if action.number is None or error.errno != errno.EBADF:
                raise
            number = listener.inject(call.id, action.fd, flags)  # beyond the target's RLIMIT_NOFILE
        if number is not None:
            listener.answer(call.id, number)

    def _replace(self, listener: Listener, call: Notification, action: Replace, slot: int) -> None:
        then = action.then
        self.journal.injecting(
            slot, os.fstat(action.fd).st_ino, then.error if isinstance(then, Answer) else ANSWER_PROCEED
        )
        with socket.socket(fileno=os.dup(action.fd)) as new:
            watch_again(call.pid, new, action.watches)
        for number, cloexec in action.numbers:
            listener.inject(call.id, action.fd, os.O_CLOEXEC if cloexec else 0, number)
        self.registry.saved = False  # a unix socket may be its tenant's to remove; the next tick writes it down
        if isinstance(then, Answer):
            listener.answer(call.id, then.value, then.error)
        else:
            listener.proceed(call.id)

    # -- denials --

    def _denied(self, denial: Denial) -> None:
        teller = self.tellers.get(denial.tenant)
        if teller:
            teller.tell(denial)
        if denial.reason == CONVERTED:
            return
        kept = self.denials.setdefault(denial.tenant, deque(maxlen=DENIALS_KEPT))
        kept.append((time.time(), denial))


def _scope(pid: int) -> int:
    """The number of the wrapper inside a container that a thread belongs to; 0 or nonsense for others."""
    try:
        return linux.timer_slack(pid) - SCOPE_SLACK
    except OSError:
        return 0


def _runs(pid: int, netns: int) -> bool:
    try:
        return linux.netns_inode(pid) == netns
    except OSError:
        return False


def find_socket(pid: int, inode: int) -> int | None:
    """The descriptor by which a thread has this socket (proc(5), /proc/PID/fd)."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path) == f"socket:[{inode}]":
                    return int(entry.name)
    return None


def raise_descriptor_limit() -> None:
    """A listener is two or three descriptors; take what the hard limit allows."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Run as graftd: the sockets and the store come from the keeper or the service manager."""
    try:
        raise_descriptor_limit()
        daemon = Daemon(idle_exit=os.environ.get("GRAFT_IDLE_EXIT") == "1")
        daemon.start()
        daemon.run()
    except GraftError as error:
        sys.exit(f"graftd: {error}")
    except OSError as error:
        if error.errno == errno.EPERM:
            sys.exit(f"graftd: {error} (graftd needs root with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN)")
        raise
