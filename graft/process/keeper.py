"""The keeper: graftd's parent where no service manager runs. It holds what must not die with graftd.

Theory of operation

Goal: containers keep their network when graftd, its keeper, or both are killed.

The keeper makes graftd.sock, agent.sock and user.sock, and starts graftd with them (the LISTEN_FDS protocol of
sd_listen_fds(3)). It keeps the descriptors that graftd stores (FDSTORE=1 of sd_notify(3)), and when graftd dies it
starts another one with all of them. It never reads from what it keeps, and hears its own child alone: they have a
pair of sockets, and no path leads to it. Under systemd the service manager does all that, and there is no keeper.

If graftd exits with status 0, it has cleaned up, and the keeper ends as well. After any other end the keeper starts
it again. After START_LIMIT starts within START_INTERVAL seconds it pauses for PAUSE seconds before each.

A graftd that is stopped or hangs does not end. So it gives a sign of life every few seconds (WATCHDOG=1), and one
that has given none for SILENCE_SECONDS is killed. The keeper looks once a second and counts its looks, not the time:
while the machine is suspended, or has no time for the keeper either, nothing is counted. The sign comes from graftd's
loop, which does not block; 30 s are far more than the longest order takes (100,000 rules: half a second).

If the keeper dies, graftd sees the end of a pipe, becomes a keeper itself by execve(2), and that starts a graftd.

If both are killed together, the guard is left. It is a shell that reads from a pipe whose writing ends the keeper and
graftd have. When both are gone it reads the end of the file, and executes a keeper. The graft-sups still have the
listeners and journals, and bring them to the new graftd (graft/trap/orphans.py).

What still fails: if the guard is killed as well, somebody has to start graftd.
"""

import array
import contextlib
import errno
import fcntl
import grp
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from graft.errors import Failure, Refused
from graft.interpreter import python_command
from graft.kernel.cgroup import cgroup2_root, check_run_dir, leave_cgroup, run_dir
from graft.log import log
from graft.process import cage
from graft.process.store import KEEPER_ENTRY, Store, exec_with
from graft.process.title import GUARD, KEEPER, set_title

START_LIMIT = 10
START_INTERVAL = 10.0
PAUSE = 1.0
STORE_MAX = 131072  # seven of each tenant
FDS_MAX = 16
BACKLOG = 1024
LOOK_SECONDS = 1.0
SILENCE_SECONDS = 30  # GRAFT_WATCHDOG in the environment says otherwise; 0: never
START_SILENCE_SECONDS = 300  # until graftd is ready; it takes seconds to write thousands of rules again
# /proc/PID/comm of a shell is sh, whatever its argv[0]; printf is a builtin, so that it names the shell itself
NAME_IT = f"{{ printf {GUARD} >/proc/self/comm; }} 2>/dev/null"
WATCH = f'{NAME_IT}; read -r end || exec "$GRAFT_PYTHON" -I -c "$GRAFT_ENTRY" "$GRAFT_TREE"'


class Keeper:
    """One keeper: its listening sockets, the descriptors it keeps, graftd as its child, and the guard."""

    def __init__(self, directory: Path, command: list[str], lock: int) -> None:
        self.directory = directory
        self.command = command
        self.lock = lock  # graftd has it too: while one of them lives, no other keeper starts
        self.store: list[tuple[str, int]] = []
        self.sockets: list[tuple[str, socket.socket]] = []
        self.starts: list[float] = []
        self.child = 0
        self.ready = False  # has graftd come up under this keeper?
        self.poll = select.epoll()
        self.alive = os.pipe2(os.O_CLOEXEC)  # graftd polls the reading end for the end of this process
        self.guard = -1  # writing end of its standard input
        self.silence = 0  # looks since the child's last sign of life
        self.up = False  # is the child ready?
        self.patience = _patience()

    def bind(self, inherited: list[tuple[str, int]]) -> None:
        """Make the listening sockets, or take them over from a graftd whose keeper has died (@inherited).

        A dead predecessor may have left files at the paths of the sockets: they are removed. Raises OSError.
        """
        self.notify, self.told = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.poll.register(self.notify, select.EPOLLIN)
        if inherited:
            listening = ("admin", "agent", "user")
            self.sockets = [(name, socket.socket(fileno=fd)) for name, fd in inherited if name in listening]
            for _, sock in self.sockets:
                sock.listen(BACKLOG)  # who connects is told the PID of the last listen() (SO_PEERCRED, unix(7))
            self.store = [(name, fd) for name, fd in inherited if name not in (*listening, "guard", "lock", "notify")]
            self.guard = next((fd for name, fd in inherited if name == "guard"), -1)
            if self.guard >= 0:
                self._watch(self.guard)
            for _, fd in self.store:
                self._watch(fd)
            return
        admin = self._socket("graftd.sock", 0o660)
        with contextlib.suppress(KeyError):
            os.chown(self.directory / "graftd.sock", 0, grp.getgrnam("graft").gr_gid)
        agent, user = self._socket("agent.sock", 0o666), self._socket("user.sock", 0o666)
        self.sockets = [("admin", admin), ("agent", agent), ("user", user)]

    def _socket(self, name: str, mode: int) -> socket.socket:
        path = self.directory / name
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        umask = os.umask(0o777 & ~mode)
        try:
            sock.bind(str(path))
        finally:
            os.umask(umask)
        sock.listen(BACKLOG)
        return sock

    def start_guard(self) -> None:
        """Start the guard, unless it runs: a shell that inherits nothing but the reading end of a pipe."""
        if self.guard >= 0:
            return
        reading, self.guard = os.pipe2(os.O_CLOEXEC)
        python, *_, entry, tree = python_command(KEEPER_ENTRY)
        environment = {**os.environ, "GRAFT_PYTHON": python, "GRAFT_ENTRY": entry, "GRAFT_TREE": tree}
        with open(reading, "rb") as stdin:
            try:
                subprocess.Popen(
                    (GUARD, "-c", WATCH), executable="/bin/sh", stdin=stdin, cwd="/", env=environment,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:  # start() tries again
                log.error("cannot start the guard: %s", error.strerror)
                os.close(self.guard)
                self.guard = -1
                return
        self._watch(self.guard)

    def start(self) -> None:
        """Start graftd, and pass it the listening sockets and all that is kept. Waits until a fork succeeds."""
        self.start_guard()
        now = time.monotonic()
        self.starts = [t for t in self.starts if now - t < START_INTERVAL] + [now]
        if len(self.starts) > START_LIMIT:
            time.sleep(PAUSE)  # the containers wait for graftd, so the keeper never gives up
        passed = [(name, sock.fileno()) for name, sock in self.sockets] + self.store
        passed += [("keeper", self.alive[0]), ("lock", self.lock), ("notify", self.told.fileno())]
        if self.guard >= 0:
            passed.append(("guard", self.guard))
        self.child = -1
        while self.child < 0:
            try:
                self.child = os.fork()
            except OSError as error:  # EAGAIN: a limit of processes; the containers wait, so try again
                log.error("cannot start graftd: %s; trying again", error.strerror)
                time.sleep(PAUSE)
        if self.child == 0:
            signal.set_wakeup_fd(-1)
            os.environ.pop("NOTIFY_SOCKET", None)
            watchdog = {"WATCHDOG_USEC": str(self.patience * 1000000), "WATCHDOG_PID": ""}
            exec_with(self.command, passed, GRAFT_KEEPER="1", **watchdog)
        self.silence, self.up = 0, False

    def receive(self) -> None:
        """Handle one sd_notify(3) datagram: FDSTORE=1 or FDSTOREREMOVE=1, both with FDNAME=, READY=1, WATCHDOG=1,
        WATCHDOG_USEC=.

        Each is a sign of life.
        """
        try:
            message, fds = self._receive()
        except BlockingIOError:
            return
        self.silence = 0
        self.up = self.up or b"READY=1" in message
        self.ready = self.ready or self.up
        fields = dict(line.partition("=")[::2] for line in message.decode(errors="replace").splitlines())
        name = fields.get("FDNAME", "stored").replace(":", "_")
        if fields.get("FDSTORE") == "1" and len(self.store) < STORE_MAX:
            self.store += [(name, fd) for fd in fds]
            for fd in fds:
                self._watch(fd)
        else:
            for fd in fds:
                os.close(fd)
        usec = fields.get("WATCHDOG_USEC", "")
        if usec.isascii() and usec.isdigit() and not os.environ.get("GRAFT_WATCHDOG"):
            self.patience = int(usec) // 1000000
        if fields.get("FDSTOREREMOVE") == "1":
            for entry in [e for e in self.store if e[0] == name]:
                self._drop(entry)

    def look(self) -> None:
        """Kill the child if it has given no sign of life for too long. To be called every LOOK_SECONDS."""
        self.silence += 1
        most = self.patience if self.up else START_SILENCE_SECONDS
        if self.patience and self.silence > most and self.child > 0:
            log.error("graftd (pid %d) has given no sign of life for %d s: starting another", self.child, most)
            self.silence = 0
            os.kill(self.child, signal.SIGKILL)

    def _receive(self) -> tuple[bytes, list[int]]:
        """Receive a datagram: its text and its descriptors."""
        fds = array.array("i")
        room = socket.CMSG_LEN(FDS_MAX * fds.itemsize)
        message, ancillary, _, _ = self.notify.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        return message, list(fds)

    def _watch(self, fd: int) -> None:
        try:
            self.poll.register(fd, 0)  # EPOLLHUP and EPOLLERR are always reported
        except OSError as error:
            if error.errno != errno.EPERM:  # epoll(7) does not support this file: it is kept until graftd removes it
                raise

    def _drop(self, entry: tuple[str, int]) -> None:
        self.store.remove(entry)
        with contextlib.suppress(OSError):
            self.poll.unregister(entry[1])
        os.close(entry[1])

    def _reap(self) -> int | None:
        """Reap all children that have ended, guards as well. Returns graftd's wait status, or None."""
        found = None
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                found = ended[1] if ended[0] == self.child else found
        return found

    def _pass_on(self, number: int, _frame: object) -> None:
        """Send a signal on to graftd. Where none is, the keeper ends: kill(2) takes -1 and 0 for many processes."""
        if self.child <= 0:
            sys.exit(128 + number)
        with contextlib.suppress(ProcessLookupError):  # it has just ended, and so does the keeper
            os.kill(self.child, number)

    def run(self) -> None:
        """Start graftd and serve it until it exits with status 0. Exits with 1 if graftd has never become ready."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self.poll.register(wake_read, select.EPOLLIN)
        self.start()
        looked = time.monotonic()
        while True:
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                self.look()
            for fd, _events in self.poll.poll(LOOK_SECONDS if self.patience else None):
                if fd == self.notify.fileno():
                    self.receive()
                elif fd == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                elif fd == self.guard:  # the guard is dead; graftd gets the new guard's pipe at its next start
                    self.poll.unregister(fd)
                    os.close(fd)
                    self.guard = -1
                    self.start_guard()
                else:  # EPOLLHUP: all processes under a stored listener are gone
                    for entry in [e for e in self.store if e[1] == fd]:
                        self._drop(entry)
            status = self._reap()
            if status is not None:
                if os.waitstatus_to_exitcode(status) == 0:
                    return
                while select.select([self.notify], [], [], 0)[0]:
                    self.receive()
                if not self.ready:
                    sys.exit(1)  # graftd cannot work on this machine; its log says why
                self.start()


def _patience() -> int:
    """The seconds without a sign of life after which graftd is killed; 0: it never is."""
    told = os.environ.get("GRAFT_WATCHDOG", "")
    if told.isascii() and told.isdigit():
        return int(told)
    if told:
        log.warning("GRAFT_WATCHDOG=%s is no number of seconds; %d is in force", told, SILENCE_SECONDS)
    return SILENCE_SECONDS


def main(ready_fd: int) -> bool:
    """Run as the keeper of run_dir(), until graftd ends.

    Returns False at once if another keeper runs, else True. Unless @ready_fd is -1, a byte is written to it: "1" when
    the sockets accept connections, "0" if another keeper runs. Exits with a message if the run directory is not safe.
    """
    cage.hide()
    directory = run_dir()
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        check_run_dir(directory)
    except Refused as error:
        if ready_fd < 0:
            raise
        sys.exit(f"graftd: {error}")  # the command that started it in the background shows the last line of the log
    raise_descriptor_limit()
    if ready_fd >= 0:  # a command has started it, whose service or session would not end before graftd
        with contextlib.suppress(OSError, Failure):
            leave_cgroup(cgroup2_root(), remove=False)
    cage.enter()
    inherited = Store.inherited()
    lock = next((fd for name, fd in inherited if name == "lock"), -1)
    if lock < 0:
        lock = os.open(directory / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if ready_fd >= 0:
            os.write(ready_fd, b"0")
        return False
    set_title(KEEPER)
    os.ftruncate(lock, os.pwrite(lock, f"{os.getpid()}\n".encode(), 0))
    keeper = Keeper(directory, python_command("from graft.commands.graftd import daemon; daemon()"), lock)
    keeper.bind(inherited)
    if ready_fd >= 0:
        os.write(ready_fd, b"1")
        os.close(ready_fd)
    try:
        keeper.run()
    finally:  # also if graftd could not work: a client must not wait at its sockets
        # the guard ends next: an interpreter that has forgotten the handler meanwhile would tell of it in the log
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        with contextlib.suppress(OSError):
            os.write(keeper.guard, b"end\n")
        for name in ("graftd.sock", "agent.sock", "user.sock", "notify.sock"):  # the last one: an earlier release's
            (directory / name).unlink(missing_ok=True)
    return True


def raise_descriptor_limit() -> None:
    """Set RLIMIT_NOFILE to its hard limit, because each listener takes two or three descriptors."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
