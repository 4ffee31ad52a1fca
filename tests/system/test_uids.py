"""No thread of graft's has a target's uid, and what hostile programs can do to graft's processes: who, what, to whom."""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from graft.bench.lab import wait_for
from graft.process.cage import NOBODYS
from graft.trap import deputy
from graft.trap.target import Owner
from tests.attack.test_attacks import DOCKER, capabilities
from tests.conftest import need, need_root, python

USER = 1234
CALLS = """
import ctypes, os, socket, struct, sys
libc = ctypes.CDLL(None)
def name(text): return struct.pack('=H16s', 4, text.encode())
for n in range(100):
    for kind in (1, 2):
        s = libc.socket(4, kind, 0)
        assert s >= 0
        libc.setsockopt(s, 254, 1, struct.pack('=i', 1), 4)
        libc.setsockopt(s, 6, 1, struct.pack('=i', 1), 4)
        libc.setsockopt(s, 254, 2, None, 0)
        if kind == 1: libc.connect(s, name('uids-stream'), 18)
        else: libc.sendto(s, b'x', 1, 0, name('uids-dgram'), 18)
        os.close(s)
"""
CHANGES = """
import errno, os, socket, tempfile
def tries(act):
    try: act()
    except OSError as e: return errno.errorcode[e.errno]
    return 'OK'
for family, kind in ((2, 1), (2, 2), (10, 1), (10, 2)):
    s = socket.socket(family, kind); here = f'/proc/self/fd/{s.fileno()}'
    if kind == 2 and sys.argv[1] == 'direct': s.bind(('', 7000))  # which gives it the uid
    if kind == 1 and sys.argv[1] == 'direct': s.bind(('', 7000))
    print(tries(lambda: os.fchown(s.fileno(), 0, -1)), tries(lambda: os.chown(here, 5, -1)), tries(lambda: os.fchown(s.fileno(), -1, 5)), tries(lambda: os.fchmod(s.fileno(), 0o600)))
with tempfile.TemporaryFile() as f, socket.socket(1) as u, socket.socket(16, 3) as n:
    print(*(tries(lambda: os.fchown(x.fileno(), 5, -1)) for x in (f, u, n)))
""".replace("import errno", "import sys, errno")

HUNTER = """
import os, signal, sys, time
end, found, caught = time.monotonic() + float(sys.argv[1]), set(), 0
while time.monotonic() < end:
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            if open(f'/proc/{pid}/comm').read() not in ('graftd\\n', 'graft-deputy\\n', 'graft-keeper\\n', 'graft-sup\\n'):
                continue
            for tid in os.listdir(f'/proc/{pid}/task'):
                try: os.kill(int(tid), 0); caught += 1
                except PermissionError: pass
        except OSError: pass
print(caught)
"""


@pytest.fixture
def endpoints(lab):
    """A stream and a datagram socket on the host, by the names uids-stream and uids-dgram."""
    directory = lab.work / "uids"
    directory.mkdir()
    directory.chmod(0o755)
    servers = []
    for name, kind in (("stream", socket.SOCK_STREAM), ("dgram", socket.SOCK_DGRAM)):
        server = socket.socket(socket.AF_UNIX, kind)
        server.bind(str(directory / name))
        (directory / name).chmod(0o666)
        lab.graft("endpoint", "add", f"uids-{name}", "type", "unix", "path", directory / name, check=True)
        servers.append(server)
    servers[0].listen(4096)
    yield servers
    for server in servers:
        server.close()
    for name in ("stream", "dgram"):
        lab.graft("endpoint", "del", f"uids-{name}", check=True)
    shutil.rmtree(directory)


def ids():
    """What each thread of graft's processes has: (comm, real, effective, saved, file system uid)."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end at any moment
            comm = (process / "comm").read_text().strip()
            if comm not in ("graftd", "graft-keeper", "graft-sup", "graft-deputy"):
                continue
            for thread in os.listdir(process / "task"):
                status = (process / "task" / thread / "status").read_text()
                fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
                yield comm, tuple(int(word) for word in fields["Uid"].split())


def test_no_thread_has_a_targets_uid(lab, endpoints):
    """While a user's program connects by name, sends, and sets options late; it cannot signal any of graft's."""
    need("setpriv")
    seen, done = set(), threading.Event()

    def look():
        while not done.is_set():
            seen.update(ids())

    def drain():
        with contextlib.suppress(OSError):
            while not done.is_set():
                endpoints[1].recv(9)

    threads = [threading.Thread(target=work) for work in (look, drain)]
    for thread in threads:
        thread.start()
    user = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
    hunter = lab.spawn(*user, *python(HUNTER), "5", stdout=-1)
    try:
        for _ in range(2):
            result = lab.graft("--", *user, *python(CALLS))
            assert result.returncode == 0, result.stderr
        assert hunter.communicate(timeout=30)[0] == "0\n"
    finally:
        done.set()
        endpoints[1].shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
    assert not {(comm, uids) for comm, uids in seen if comm != "graft-deputy" and USER in uids}
    deputies = {uids for comm, uids in seen if comm == "graft-deputy"}
    assert all(real in (0, NOBODYS) and saved in (0, NOBODYS) for real, _, saved, _ in deputies), deputies


def test_the_api_lends_no_uid_either(lab, endpoints):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import socket, graft
for n in range(50): graft.connect('uids-stream').close()
"""
    user = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
    hunter = lab.spawn(*user, *python(HUNTER), "3", stdout=-1)
    result = lab.host("setpriv", f"--reuid={USER}", *python(code))
    assert hunter.communicate(timeout=30)[0] == "0\n", result.stderr


@pytest.mark.parametrize("order", [b"", b"short", deputy.ORDER.pack(0, 0, 1, 0, 5, 1, b"/tmp/")])
def test_a_deputy_fails_closed(order):
    need_root()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, socket.socket(socket.AF_UNIX) as sock:
        ours.send(order)
        assert subprocess.run((deputy.PROGRAM,), stdin=sock.fileno(), stdout=theirs.fileno(), timeout=20).returncode == 1


@pytest.mark.parametrize(("who", "owner"), [((USER, USER), 0), ((0, 0), USER), ((USER, 0), 0)])
def test_a_deputy_has_neither_capabilities_nor_groups(tmp_path, who, owner):
    """Root without CAP_DAC_OVERRIDE may not enter another's directory."""
    need_root()
    tmp_path.chmod(0o755)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as sock:
        server.bind(str(closed / "s"))
        (closed / "s").chmod(0o666)
        server.listen()
        os.chown(closed, owner, owner)
        with pytest.raises(PermissionError):
            deputy.connect(Owner(*who), sock, str(closed / "s"))


TOUCH = """
import ctypes, errno, os, resource, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    if libc.syscall(*words) < 0: raise OSError(ctypes.get_errno(), 'syscall')
def trace(pid):
    call(101, 0x4206, pid, 0, 0)
    call(101, 17, pid, 0, 0)
def memory(pid):
    with open(f'/proc/{pid}/mem', 'rb'): pass
def vm(pid):
    room = ctypes.create_string_buffer(8)
    one = (ctypes.c_void_p * 2)(ctypes.addressof(room), 8)
    call(310, pid, one, ctypes.c_ulong(1), one, ctypes.c_ulong(1), ctypes.c_ulong(0))
def getfd(pid): call(438, os.pidfd_open(pid), 0, 0)
def kcmp(pid): call(312, os.getpid(), pid, 1, ctypes.c_ulong(0), ctypes.c_ulong(0))
def migrate(pid):
    nodes = ctypes.c_ulong(1)
    call(256, pid, 64, ctypes.byref(nodes), ctypes.byref(nodes))
TRIES = dict(
    stop=lambda pid: os.kill(pid, 0), limit=lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE), trace=trace,
    memory=memory, vm=vm, link=lambda pid: os.readlink(f'/proc/{pid}/fd/0'), cwd=lambda pid: os.readlink(f'/proc/{pid}/cwd'),
    environ=lambda pid: open(f'/proc/{pid}/environ').close(), getfd=getfd, kcmp=kcmp, migrate=migrate,
    renice=lambda pid: os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid)),
    affinity=lambda pid: os.sched_setaffinity(pid, os.sched_getaffinity(pid)),
)
for name, work in TRIES.items():
    for which, pid in zip(('graftd', 'keeper', 'sup', 'guard'), map(int, sys.argv[1:])):
        try: work(pid); print(name, which)
        except OSError as e: assert e.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS), (name, which, e)
"""
WITHOUT_KILL = DOCKER.replace("kill,", "")
# The guard, a shell, cannot be kept from a change of its limits; it holds nothing but a pipe
ALLOWED = {
    "user": set(),
    "root without kill": {"stop graftd", "stop keeper", "stop guard", "limit guard"},
    "root": {"stop graftd", "stop keeper", "stop sup", "stop guard", "limit guard"},
}
WHO = {
    "user": ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
    "root without kill": capabilities(WITHOUT_KILL),
    "root": capabilities(DOCKER),
}


@pytest.mark.parametrize("who", WHO)
def test_what_a_program_in_reach_can_do_to_graft(own_lab, who):
    """`graft run` shares the host's PIDs. CAP_KILL is among Docker's capabilities, and means any process."""
    need("setpriv")
    lab = own_lab
    other = lab.spawn_graft("--name", "other", "sleep", "60")
    pids = wait_for(lab.helper_pids, "graft-sup")
    pids = (lab.daemon_pid(), lab.keeper_pid(), pids[0], lab.guard_pid())
    assert all(pids)
    result = lab.graft("run", *WHO[who], *python(TOUCH), *map(str, pids))
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.splitlines()) == ALLOWED[who]
    lab.end(other)


@pytest.mark.core
@pytest.mark.parametrize("mode", ["trap", "direct"])
def test_the_uid_of_a_socket_stays(lab, mode):
    if "the uid of a container's socket stays" not in lab.graft("doctor").stdout:
        pytest.skip("it takes a kernel with BPF_MODIFY_RETURN, which 'make test-kernel' has")
    options = ("--direct",) if mode == "direct" else ("--no-direct",)
    told = lab.graft("run", *options, *capabilities(DOCKER), *python(CHANGES), mode, check=True).stdout
    assert told == "EPERM EPERM OK OK\n" * 4 + "OK OK OK\n"
