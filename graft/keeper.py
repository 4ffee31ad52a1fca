"""graftd's parent where no service manager runs: holds what must not die with graftd.

It makes the two listening sockets, starts graftd with them (the LISTEN_FDS protocol of sd_listen_fds(3)),
keeps the descriptors that graftd stores (FDSTORE=1 of sd_notify(3)) and starts it again with all of them when
it dies. It never reads what it keeps, and takes no other order. Under systemd the service manager does the
same, and there is no keeper.

An exit status of 0 means that graftd has cleaned up and wants to end; anything else starts it again, after a pause
where that has been START_LIMIT times within START_INTERVAL seconds.

The guard is a shell that waits for the end of the keeper and of graftd both, killed together, and becomes a keeper;
the graft-sups have kept what it needs (graft/orphans.py).
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
import struct
import subprocess
import sys
import time
from pathlib import Path

from graft import cage
from graft.errors import Refused
from graft.host import check_run_dir, raise_descriptor_limit, run_dir
from graft.log import log
from graft.store import KEEPER_ENTRY, Store, exec_with, python_command

START_LIMIT = 10
START_INTERVAL = 10.0
PAUSE = 1.0
STORE_MAX = 65536
FDS_MAX = 16
CREDENTIALS = struct.Struct("=iII")
GUARD = 'read -r end || exec "$GRAFT_PYTHON" -I -c "$GRAFT_ENTRY" "$GRAFT_TREE"'


class Keeper:
    """The sockets, the store and the child."""

    def __init__(self, directory: Path, command: list[str], lock: int) -> None:
        self.directory = directory
        self.command = command
        self.lock = lock  # graftd has it as well: while it lives nobody else becomes the keeper
        self.store: list[tuple[str, int]] = []
        self.sockets: list[tuple[str, socket.socket]] = []
        self.starts: list[float] = []
        self.child = 0
        self.ready = False  # has graftd come up under this keeper?
        self.poll = select.epoll()
        self.alive = os.pipe2(os.O_CLOEXEC)  # its reading end tells graftd when this process is gone
        self.guard = -1  # writing end of its standard input

    def bind(self, inherited: list[tuple[str, int]]) -> None:
        """Make the sockets, or take over those of a graftd whose keeper has died, with all it holds.

        Whatever is at their paths otherwise is a dead predecessor's.
        """
        self.notify = self._socket("notify.sock", socket.SOCK_DGRAM, 0o600)
        self.notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.poll.register(self.notify, select.EPOLLIN)
        if inherited:
            listening = ("admin", "agent")
            self.sockets = [(name, socket.socket(fileno=fd)) for name, fd in inherited if name in listening]
            self.store = [(name, fd) for name, fd in inherited if name not in (*listening, "guard", "lock")]
            self.guard = next((fd for name, fd in inherited if name == "guard"), -1)
            if self.guard >= 0:
                self._watch(self.guard)
            for _, fd in self.store:
                self._watch(fd)
            return
        admin = self._socket("graftd.sock", socket.SOCK_STREAM, 0o660)
        with contextlib.suppress(KeyError):
            os.chown(self.directory / "graftd.sock", 0, grp.getgrnam("graft").gr_gid)
        agent = self._socket("agent.sock", socket.SOCK_STREAM, 0o666)
        self.sockets = [("admin", admin), ("agent", agent)]

    def _socket(self, name: str, kind: int, mode: int) -> socket.socket:
        path = self.directory / name
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
        umask = os.umask(0o777 & ~mode)
        try:
            sock.bind(str(path))
        finally:
            os.umask(umask)
        if kind == socket.SOCK_STREAM:
            sock.listen(1024)
        return sock

    def start_guard(self) -> None:
        """A shell, with nothing of ours open but the reading end of a pipe."""
        if self.guard >= 0:
            return
        reading, self.guard = os.pipe2(os.O_CLOEXEC)
        python, *_, entry, tree = python_command(KEEPER_ENTRY)
        environment = {**os.environ, "GRAFT_PYTHON": python, "GRAFT_ENTRY": entry, "GRAFT_TREE": tree}
        with open(reading, "rb") as stdin:
            try:
                subprocess.Popen(
                    ("graft-guard", "-c", GUARD), executable="/bin/sh", stdin=stdin, cwd="/", env=environment,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:  # graftd's next start tries again
                log.error("cannot start the guard: %s", error.strerror)
                os.close(self.guard)
                self.guard = -1
                return
        self._watch(self.guard)

    def start(self) -> None:
        """Start graftd with the sockets and the store."""
        self.start_guard()
        now = time.monotonic()
        self.starts = [t for t in self.starts if now - t < START_INTERVAL] + [now]
        if len(self.starts) > START_LIMIT:
            time.sleep(PAUSE)  # containers wait for it: it is not given up
        passed = [(name, sock.fileno()) for name, sock in self.sockets] + self.store
        passed += [("keeper", self.alive[0]), ("lock", self.lock)]
        if self.guard >= 0:
            passed.append(("guard", self.guard))
        self.child = -1
        while self.child < 0:
            try:
                self.child = os.fork()
            except OSError as error:  # EAGAIN: a limit of processes; the containers wait
                log.error("cannot start graftd: %s; trying again", error.strerror)
                time.sleep(PAUSE)
        if self.child == 0:
            signal.set_wakeup_fd(-1)
            notify = str(self.directory / "notify.sock")
            exec_with(self.command, passed, NOTIFY_SOCKET=notify, GRAFT_KEEPER="1")

    def receive(self) -> None:
        """One sd_notify datagram of graftd's: FDSTORE=1 with FDNAME=, or FDSTOREREMOVE=1 with FDNAME=."""
        try:
            message, fds, sender = self._receive()
        except BlockingIOError:
            return
        if sender != self.child:
            for fd in fds:
                os.close(fd)
            return
        self.ready = self.ready or b"READY=1" in message
        fields = dict(line.partition("=")[::2] for line in message.decode(errors="replace").splitlines())
        name = fields.get("FDNAME", "stored").replace(":", "_")
        if fields.get("FDSTORE") == "1" and len(self.store) < STORE_MAX:
            self.store += [(name, fd) for fd in fds]
            for fd in fds:
                self._watch(fd)
        else:
            for fd in fds:
                os.close(fd)
        if fields.get("FDSTOREREMOVE") == "1":
            for entry in [e for e in self.store if e[0] == name]:
                self._drop(entry)

    def _receive(self) -> tuple[bytes, list[int], int]:
        """A datagram, its descriptors, and whose it is (SCM_CREDENTIALS, unix(7))."""
        fds = array.array("i")
        room = socket.CMSG_LEN(FDS_MAX * fds.itemsize) + socket.CMSG_SPACE(CREDENTIALS.size)
        message, ancillary, _, _ = self.notify.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
        sender = 0
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                sender = CREDENTIALS.unpack(data)[0]
        return message, list(fds), sender

    def _watch(self, fd: int) -> None:
        try:
            self.poll.register(fd, 0)  # EPOLLHUP and EPOLLERR are always reported
        except OSError as error:
            if error.errno != errno.EPERM:  # a file that cannot be polled stays until it is removed
                raise

    def _drop(self, entry: tuple[str, int]) -> None:
        self.store.remove(entry)
        with contextlib.suppress(OSError):
            self.poll.unregister(entry[1])
        os.close(entry[1])

    def _reap(self) -> int | None:
        """The status of graftd if it has ended; guards, and what a predecessor left, are waited for as well."""
        found = None
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                found = ended[1] if ended[0] == self.child else found
        return found

    def run(self) -> None:
        """Until graftd ends by its own will."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda caught, _frame: os.kill(self.child, caught))
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self.poll.register(wake_read, select.EPOLLIN)
        self.start()
        while True:
            for fd, _events in self.poll.poll():
                if fd == self.notify.fileno():
                    self.receive()
                elif fd == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                elif fd == self.guard:  # the guard is dead; graftd gets to know the next one's at its next start
                    self.poll.unregister(fd)
                    os.close(fd)
                    self.guard = -1
                    self.start_guard()
                else:  # all processes of a stored listener are gone
                    for entry in [e for e in self.store if e[1] == fd]:
                        self._drop(entry)
            status = self._reap()
            if status is not None:
                if os.waitstatus_to_exitcode(status) == 0:
                    return
                while select.select([self.notify], [], [], 0)[0]:
                    self.receive()
                if not self.ready:
                    sys.exit(1)  # it cannot work here; its log says why
                self.start()


def main(ready_fd: int) -> bool:
    """Run as the keeper of run_dir(); writes a byte to @ready_fd when the sockets take connections.

    Returns False at once if another keeper runs.
    """
    directory = run_dir()
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        check_run_dir(directory)
    except Refused as error:
        if ready_fd < 0:
            raise
        sys.exit(f"graftd: {error}")  # whoever starts it in the background shows the last line of the log
    raise_descriptor_limit()
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
    os.ftruncate(lock, os.pwrite(lock, f"{os.getpid()}\n".encode(), 0))
    keeper = Keeper(directory, python_command("from graft.daemon import main; main()"), lock)
    keeper.bind(inherited)
    if ready_fd >= 0:
        os.write(ready_fd, b"1")
        os.close(ready_fd)
    try:
        keeper.run()
    finally:  # also where graftd could not work: its sockets would promise one
        with contextlib.suppress(OSError):
            os.write(keeper.guard, b"end\n")
        for name in ("graftd.sock", "agent.sock", "notify.sock"):
            (directory / name).unlink(missing_ok=True)
    return True
