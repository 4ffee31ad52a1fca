"""A laboratory whose host has ordinary users: alice and bob with subordinate ids, carol without.

Their accounts are in files of a mount namespace, which graftd and the users' commands have in common.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft import __version__
from graft.bench.lab import GRAFT, ROOT, Lab
from graft.bench.user import open_to_all

UIDS = {"alice": 2001, "bob": 2002, "carol": 2003}
SUBORDINATE = {"alice": 300000, "bob": 400000}
GROUP = "graft-team"  # of bob
# What a program of a user says to graftd, byte by byte
AGENT = f"""
import array, ctypes, errno, json, os, signal, socket, struct, sys, time
sys.path.insert(0, {str(ROOT)!r})
RUN = os.environ['GRAFT_RUN_DIR']
def connect(door='user'):
    s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(f'{{RUN}}/{{door}}.sock')
    return s
def exchange(s, fds=(), **fields):
    socket.send_fds(s, [json.dumps(dict(version={__version__!r}, **fields)).encode() + b'\\n'], fds)
    text = b''
    while not text.endswith(b'\\n') and (piece := s.recv(65536)): text += piece
    return json.loads(text) if text else {{'error': {{'code': 'EOF', 'message': 'closed'}}}}
def order(fds=(), door='user', **fields):
    s = connect(door)
    hello = exchange(s, op='hello')
    return exchange(s, fds, **fields) if 'ok' in hello else hello
def listener(program=None):
    from graft.kernel import linux
    from graft.trap import filter
    linux.no_new_privs(); return linux.seccomp_listener(program or filter.program(), wait_killable=False)
def own_netns():
    user = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    assert user.unshare(0x10000000 | 0x40000000) == 0, ctypes.get_errno()
    open('/proc/self/setgroups', 'w').write('deny')
    open('/proc/self/uid_map', 'w').write(f'0 {{uid}} 1'); open('/proc/self/gid_map', 'w').write(f'0 {{gid}} 1')
def told(answer): print(answer['error']['code'] if 'error' in answer else 'OK', flush=True); return answer
"""
FILES = 'for f in passwd group subuid subgid; do touch /etc/$f; mount --bind "$0/$f" /etc/$f; done\n'


def program(code):
    return (sys.executable, "-I", "-c", AGENT + code)


class UserLab(Lab):
    """A Lab with these users. Everything on its host runs in the mount namespace that has their accounts."""

    def __init__(self, tag: str = "users") -> None:
        self.holder: subprocess.Popen[str] | None = None
        super().__init__(tag)

    def _build(self) -> None:
        super()._build()
        self._write_accounts()
        script = f"set -e\n{open_to_all(self.work)}\n{FILES}echo ready; exec sleep infinity"
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(self.work)]
        self.holder = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout
        assert self.holder.stdout.readline() == "ready\n"

    def _write_accounts(self) -> None:
        lines = {name: Path("/etc", name).read_text() for name in ("passwd", "group")}
        for name, uid in UIDS.items():
            home = self.work / name
            home.mkdir(mode=0o755)
            os.chown(home, uid, uid)
            lines["passwd"] += f"{name}:x:{uid}:{uid}::{home}:/bin/sh\n"
            lines["group"] += f"{name}:x:{uid}:\n"
        lines["group"] += f"{GROUP}:x:2100:bob\n"
        for name in ("subuid", "subgid"):
            lines[name] = "".join(f"{owner}:{first}:65536\n" for owner, first in SUBORDINATE.items())
        for name, text in lines.items():
            (self.work / name).write_text(text)

    def _in(self, ns: str, argv: tuple[Any, ...]) -> list[str]:
        inside = [f"--mount=/proc/{self.holder.pid}/ns/mnt", f"--wd={self.work}"] if self.holder else []
        return ["nsenter", f"--net=/run/netns/{ns}", *inside, *map(str, argv)]

    def command(self, user: str, *argv: Any) -> list[str]:
        """The argv that runs a command as @user, a name of UIDS."""
        ids = f"--reuid={UIDS[user]}", f"--regid={UIDS[user]}", "--init-groups"
        return ["setpriv", *ids, "env", f"HOME={self.work / user}", f"USER={user}", *map(str, argv)]

    def by(self, user: str, *argv: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `graft ...` as @user, and wait for its end."""
        return self.host(*self.command(user, GRAFT, *argv), **options)

    def spawn_by(self, user: str, *argv: Any, **options: Any) -> subprocess.Popen[str]:
        """Start `graft run ...` as @user."""
        return self.spawn(*self.command(user, GRAFT, "run", *argv), **options)

    def grant(self, text: str) -> None:
        """Write users.toml, and wait until it is in force, or refused."""
        path = self.config.with_name("users.toml")
        log = self.run_dir / "graftd.log"
        before = log.read_text().count(str(path)) if log.exists() else 0
        path.write_text(text)
        path.chmod(0o644)
        if (self.run_dir / "graftd.sock").exists():
            from graft.bench.lab import wait_for

            wait_for(lambda: log.read_text().count(str(path)) > before, "users.toml read")

    def close(self) -> list[str]:
        """As Lab.close()."""
        left = super().close()
        if self.holder:
            self.holder.kill()
            self.holder.wait()
        return left


@contextlib.contextmanager
def users_laboratory(tag: str = "users") -> Iterator[UserLab]:
    """Open a UserLab and close it afterwards. Raises AssertionError if something is left behind."""
    lab = UserLab(tag)
    try:
        yield lab
    finally:
        left = lab.close()
    assert not left, f"left behind: {left}"
