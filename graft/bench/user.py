"""Ordinary users of a laboratory's host, whom the machine does not know.

They exist in a mount namespace alone: there the account databases name them, with subordinate ids (subuid(5)), /run
has their runtime directories and the laboratory's graftd at /run/graft, /dev/net/tun and /dev/fuse are anybody's, as
udev has them, and everybody can execute this interpreter, also one below root's home. User.command() starts a process
of a user's from outside. All of a user's processes are in one cgroup, which belongs to the user as systemd delegates
one, so that close() can end them, whatever they have become.
"""

import contextlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.bench.lab import GRAFTD, ROOT, TIMEOUT, Lab, wait_for
from graft.kernel.cgroup import cgroup2_root

IDS = 65536  # subordinate ids of a user
USERS_MAX = 16  # of a laboratory
FIRST_UID, FIRST_ID = 30000, 1_000_000
DEVICES = {"/dev/net/tun": (10, 200), "/dev/fuse": (10, 229)}  # devices.txt of Linux
CGROUP2_ALONE = "umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; "
ENTER = 'echo $$ >"$0/cgroup.procs"; exec "$@"'


def open_to_all(place: Path) -> str:
    """The shell commands that let all users reach this interpreter and graft, in a mount namespace of one's own.

    A directory on the way that is closed has them alone then. @place: a directory for mounts.
    """
    steps: list[tuple[Path, Path, Path]] = []
    for needed in (Path(sys.base_prefix), ROOT):
        closed = next((up for up in reversed(needed.parents) if not up.stat().st_mode & stat.S_IXOTH), None)
        if closed is None:
            continue
        aside = place / f"open-{len(steps)}"
        aside.mkdir()
        steps.append((needed, aside, closed))
    bound = "".join(f"mount --rbind {needed} {aside}; " for needed, aside, _ in steps)
    empty = "".join(f"mount -t tmpfs -o mode=755 none {up}; " for up in dict.fromkeys(up for *_, up in steps))
    back = "".join(f"mkdir -p {needed}; mount --move {aside} {needed}; " for needed, aside, _ in steps)
    return bound + empty + back


class User:
    """A user of a laboratory's host."""

    def __init__(self, among: "Users", name: str, number: int) -> None:
        self.among, self.lab, self.name = among, among.lab, name
        self.uid = FIRST_UID + int(self.lab.tag[-6:], 16) % 1000 * USERS_MAX + number
        self.first_id = FIRST_ID + (self.uid - FIRST_UID) * IDS
        self.home, self.runtime = among.place / name, Path("/run/user", str(self.uid))
        self.home.mkdir()
        os.chown(self.home, self.uid, self.uid)
        self.cgroup = cgroup2_root() / f"{self.lab.tag}-of-{name}"
        for path in (self.cgroup, self.cgroup / "session"):
            path.mkdir()
            for each in (path, path / "cgroup.procs", path / "cgroup.subtree_control"):
                os.chown(each, self.uid, self.uid)

    def command(self, *argv: Any, **env: str) -> list[str]:
        """The command line that runs @argv as the user on the laboratory's host, in their home; @env is added."""
        told = {"HOME": self.home, "USER": self.name, "LOGNAME": self.name, "XDG_RUNTIME_DIR": self.runtime, **env}
        settings = [f"{name}={value}" for name, value in told.items()]
        uids = (f"--reuid={self.uid}", f"--regid={self.uid}", "--init-groups")
        return [
            *("sh", "-c", ENTER, str(self.cgroup / "session"), *self.among.command()),
            *("setpriv", *uids, "env", "-C", str(self.home), "-u", "DBUS_SESSION_BUS_ADDRESS", *settings),
            *map(str, argv),
        ]

    def __call__(self, *argv: Any, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command as the user and wait for its end, which has to be a success if @check."""
        settings = {"capture_output": True, "text": True, "timeout": TIMEOUT, "env": self.lab.env, **options}
        done: subprocess.CompletedProcess[str] = subprocess.run(self.command(*argv), **settings)
        assert not check or done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
        return done

    def spawn(self, *argv: Any, **options: Any) -> "subprocess.Popen[str]":
        """Start a command as the user."""
        settings = {"text": True, "env": self.lab.env, "stdin": subprocess.DEVNULL, **options}
        process: subprocess.Popen[str] = subprocess.Popen(self.command(*argv), **settings)
        self.lab.started.append(process)
        return process

    def end(self) -> None:
        """End everything that the user runs. Raises TimeoutError."""
        (self.cgroup / "cgroup.kill").write_text("1")
        wait_for(self._empty, f"the end of what {self.name} runs")
        for path in sorted(self.cgroup.rglob("*/"), reverse=True):
            path.rmdir()
        self.cgroup.rmdir()

    def _empty(self) -> bool:
        return "populated 0" in (self.cgroup / "cgroup.events").read_text()


class Users:
    """Users of @lab's host, by their names. `close()` ends all that they run, and leaves nothing of them."""

    def __init__(
        self, lab: Lab, *names: str, first: int = 0, subordinate: bool = True, unified: bool = False
    ) -> None:
        """@first: below USERS_MAX; those of another Users of the laboratory are others. @subordinate: have they ids?

        @unified: they see cgroup2 alone, also on a machine that has cgroup v1 beside it.
        """
        self.lab = lab
        self.place = lab.work / f"users-{first}"
        self.place.mkdir()
        self.users = {name: User(self, name, first + number) for number, name in enumerate(names)}
        people = self.users.values()
        ids = "".join(f"{user.name}:{user.first_id}:{IDS}\n" for user in people) if subordinate else ""
        steps = [
            self._appended(
                "passwd", [f"{user.name}:x:{user.uid}:{user.uid}::{user.home}:/bin/bash" for user in people]
            ),
            self._appended("group", [f"{user.name}:x:{user.uid}:" for user in people]),
            *(self._replaced(name, ids) for name in ("subuid", "subgid")),
            *(self._device(path, numbers) for path, numbers in DEVICES.items() if Path(path).exists()),
            self._run(),
            *(f"install -d -m 700 -o {user.uid} -g {user.uid} {user.runtime}; " for user in people),
            open_to_all(self.place),
            CGROUP2_ALONE if unified and Path("/sys/fs/cgroup/unified").is_dir() else "",
            "mount --make-rshared /; exec sleep 100000",
        ]
        command = ("unshare", "--mount", "--propagation", "private", "sh", "-e", "-c", "".join(steps))
        self.holder = lab.spawn(*command)
        wait_for(self._ready, "the users' namespace")

    def __getitem__(self, name: str) -> User:
        return self.users[name]

    def command(self, *argv: Any) -> list[str]:
        """The command line that runs @argv as root on the laboratory's host, where the users are known."""
        spaces = (f"--net=/run/netns/{self.lab.host_ns}", f"--mount=/proc/{self.holder.pid}/ns/mnt")
        return ["nsenter", *spaces, *map(str, argv)]

    def start_daemon(self) -> None:
        """Start the laboratory's graftd where the users are known."""
        with (self.lab.run_dir / "graftd.log").open("ab") as log:
            self.lab.daemon = subprocess.Popen(
                self.command(GRAFTD), stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True, env=self.lab.env
            )
        wait_for((self.lab.run_dir / "graftd.sock").exists, "graftd's start")

    def close(self) -> None:
        """End everything that the users run. Raises TimeoutError."""
        for user in self.users.values():
            user.end()
        self.lab.end(self.holder)
        shutil.rmtree(self.place, ignore_errors=True)

    def _replaced(self, name: str, text: str) -> str:
        """Write a file of /etc; the command that puts it in its place."""
        path = self.place / f"etc-{name}"
        path.write_text(text)
        return f"[ -e /etc/{name} ] || touch /etc/{name}; mount --bind {path} /etc/{name}; "

    def _appended(self, name: str, lines: Sequence[str]) -> str:
        before = Path("/etc", name).read_text()
        return self._replaced(name, "".join(f"{line}\n" for line in [*before.splitlines(), *lines]))

    def _device(self, path: str, numbers: tuple[int, int]) -> str:
        node = self.place / f"dev-{Path(path).name}"
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(*numbers))
        node.chmod(0o666)
        return f"mount --bind {node} {path}; "

    def _run(self) -> str:
        """The command that makes a /run of their own, with the run directory of the laboratory's graftd."""
        own, aside = self.lab.run_dir, self.place / "run"
        for path in (own, aside):
            path.mkdir(mode=0o755, exist_ok=True)
        bound = "".join(f"mkdir -p {path}; mount --bind {aside} {path}; " for path in (own, "/run/graft"))
        return (
            f"mount --bind {own} {aside}; mount -t tmpfs -o mode=755 none /run; mkdir -p /run/user /run/lock; {bound}"
        )

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            return Path("/proc", str(self.holder.pid), "comm").read_text() == "sleep\n"
        return False
