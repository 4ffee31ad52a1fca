"""graft-sup and the preload library: they answer what graftd would, and nothing is lost without them."""

import json
import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from graft.bench.lab import GRAFT, GRAFTD, HOST4, ROOT, wait_for
from graft.kernel import linux
from tests.conftest import python, quick_calls
from tests.system.traffic import WORKER, another, server_on_client

SHIM = ROOT / "graft" / "graft-shim.so"


def helper_of(lab):
    return wait_for(lab.helper_pids, "graft-sup")[0]


@pytest.mark.core
def test_a_helper_lives_as_long_as_its_container(own_lab):
    process = own_lab.spawn_graft("--name", "web", *python("import socket\nwhile True: socket.socket().close()"))
    pid = helper_of(own_lab)
    assert Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:2] == ["graft-sup", "web"]
    before = quick_calls(own_lab)
    wait_for(lambda: quick_calls(own_lab) > before + 100, "calls that graft-sup answers")
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == 1 << 39 | 1 << 19  # CAP_BPF, CAP_SYS_PTRACE
    own_lab.end(process)
    wait_for(lambda: not own_lab.helper_pids(), "its end")


UNTIL_TOLD = """
import select, socket, sys
while not select.select([sys.stdin], [], [], .005)[0]: socket.socket().close()
"""
LOOK = f"""
{UNTIL_TOLD}
import os
uids = set()
for family in (socket.AF_INET, socket.AF_INET6):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_STREAM | socket.SOCK_NONBLOCK):
        s = socket.socket(family, kind)
        v6 = [s.getsockopt(41, n) for n in (26, 78)] if family == socket.AF_INET6 else None
        uids.add(os.fstat(s.fileno()).st_uid)
        print(s.getblocking(), s.type, s.proto, os.get_inheritable(s.fileno()), v6)
print(len(uids), min(uids) > 1 << 30)
"""


def told_by_a_helper(lab, *argv):
    """The output of a container of which @argv has UNTIL_TOLD in its program, told once graft-sup answers it."""
    before = quick_calls(lab)
    process = lab.spawn_graft(*argv, stdin=-1, stdout=-1)
    wait_for(lambda: quick_calls(lab) > before + 10, "calls that graft-sup answers")
    output = process.communicate("\n", timeout=20)[0]
    assert process.returncode == 0
    return output


def without_helper(tmp_path):
    """This tree, but for graft-sup."""
    tree = tmp_path / "graft"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv", ".git", "build", "dist", "graft-sup", "__pycache__", ".*cache"))
    os.symlink(ROOT / ".venv", tree / ".venv")
    return tree / "bin" / "graft"


def test_its_sockets_are_as_graftd_makes_them(own_lab, tmp_path):
    """Owner and options are the same whoever answers; and a graftd that has no graft-sup says nothing of it."""
    alone = own_lab.host(without_helper(tmp_path), "run", *python(LOOK), input="\n")
    assert (alone.returncode, alone.stderr) == (0, "")
    own_lab.host(GRAFTD, "--stop", check=True)
    wait_for(lambda: not own_lab.pins().exists(), "graftd's end")
    own_lab.spawn_graft("--name", "hold", "sleep", "60")
    helper_of(own_lab)
    assert told_by_a_helper(own_lab, *python(LOOK)) == alone.stdout
    assert alone.stdout.endswith("1 True\n")


REBIND = f"""
{UNTIL_TOLD}
import os
os.sched_setaffinity(0, [0])
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    for _ in range(1000):
        s = socket.socket(socket.AF_INET, kind); s.bind(("127.0.0.1", 7000)); s.close()
print("free")
"""


def test_a_port_is_free_once_its_socket_is_closed(own_lab):
    """As on any host: graft-sup has no copy of a socket any more when its program gets it, which runs before it here."""
    process = own_lab.spawn_graft(*python(REBIND), stdin=-1, stdout=-1, stderr=-1)
    before = quick_calls(own_lab)
    helper = helper_of(own_lab)
    wait_for(lambda: quick_calls(own_lab) > before + 10, "calls that graft-sup answers")
    for thread in os.listdir(f"/proc/{helper}/task"):
        os.sched_setaffinity(int(thread), [0])
    told, errors = process.communicate("\n", timeout=60)
    assert told == "free\n", errors


IN_TURN_AND_AT_ONCE = """
import socket, sys, threading
def work(over):
    for _ in range(400):
        if over.is_set(): break
        socket.socket().close()
    over.set()
for line in sys.stdin:
    over = threading.Event()
    threads = [threading.Thread(target=work, args=(over,)) for _ in range(int(line))]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print('done', flush=True)
"""


def test_as_many_threads_wait_as_calls_come_at_once(own_lab):
    """Callers end together, for one that is left alone calls in turn; a busy machine may run them so, so again."""
    program = own_lab.spawn_graft(*python(IN_TURN_AND_AT_ONCE), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    helper = helper_of(own_lab)

    def receiving():
        calls = [Path(f"/proc/{helper}/task/{task}/syscall").read_text() for task in os.listdir(f"/proc/{helper}/task")]
        return sum(call.split()[0] == "16" for call in calls)  # ioctl(2), SECCOMP_IOCTL_NOTIF_RECV

    def receive(wanted, callers):
        program.stdin.write(f"{callers}\n")
        program.stdin.flush()
        assert program.stdout.readline() == "done\n"
        deadline = time.monotonic() + 0.5
        while receiving() != wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        return receiving() == wanted

    for callers, threads in ((1, 1), (12, 2), (1, 1)):
        wait_for(partial(receive, threads, callers), f"{threads} for {callers} at once", 30)
    own_lab.end(program)


def test_kill_helpers_under_load(own_lab):
    """kill -9 of graft-sup, again and again: graftd answers what it had, and then in its place."""
    server_on_client(own_lab)
    code = WORKER.format(seconds=5, address="10.77.0.2", port=9000)
    workers = [own_lab.spawn_graft("--name", f"w{i}", *python(code), stdout=-1) for i in range(4)]
    wait_for(lambda: len(own_lab.helper_pids()) == 4, "the helpers")
    killed = 0
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        for pid in own_lab.helper_pids():
            os.kill(pid, signal.SIGKILL)
            killed += 1
        time.sleep(0.05)
    assert killed > 20
    for worker in workers:
        done, failed = worker.communicate(timeout=20)[0].split()
        assert failed == "0"
        assert int(done) > 10
    wait_for(lambda: own_lab.containers() == [], "their end")


def test_kill_helper_and_graftd_at_once(own_lab):
    server_on_client(own_lab)
    code = WORKER.format(seconds=5, address="10.77.0.2", port=9000)
    workers = [own_lab.spawn_graft("--name", f"w{i}", *python(code), stdout=-1) for i in range(2)]
    wait_for(lambda: len(own_lab.helper_pids()) == 2, "the helpers")
    for _ in range(4):
        daemon = wait_for(own_lab.daemon_pid, "graftd")
        for pid in (*own_lab.helper_pids(), daemon):
            os.kill(pid, signal.SIGKILL)
        wait_for(partial(another, own_lab.daemon_pid, daemon), "the next graftd")
        time.sleep(0.3)
    for worker in workers:
        done, failed = worker.communicate(timeout=20)[0].split()
        assert failed == "0"
        assert int(done) > 10


def test_a_helper_that_may_have_no_threads(own_lab):
    """A limit of processes: it ends and says so, and graftd answers the calls."""
    lab = own_lab
    words = ("endpoint", "add", "x", "type", "ipv4", "addr", HOST4, "port", "dynamic")
    lab.host("prlimit", "--nproc=1:1", GRAFT, *words, check=True)  # it starts graftd, which hands the limit on
    code = "import socket\nfor _ in range(200): s = socket.socket(); s.listen(); s.close()\nprint('served')"
    assert lab.graft("run", "--name", "short", *python(code), timeout=30).stdout == "served\n"
    log = lab.run_dir / "graftd.log"
    wait_for(lambda: "graft-sup short: cannot start a thread" in log.read_text(), "its word")


def test_a_helper_outlives_graftd(own_lab):
    """graftd is away: socket() goes on at graft-sup's pace, and what graftd decides waits for the next one."""
    code = "import socket\nwhile True:\n s = socket.socket(); s.listen(); s.close()"
    own_lab.spawn_graft("--name", "w", *python(code))
    helper = helper_of(own_lab)
    assert quick_calls(own_lab) >= 0  # graftd has done with starting it
    daemon = own_lab.daemon_pid()
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: another(own_lab.daemon_pid, daemon), "the next graftd")
    before = quick_calls(own_lab)
    wait_for(lambda: quick_calls(own_lab) > before + 50, "calls")
    assert own_lab.helper_pids() == [helper]


def test_containers_that_end_while_graftd_is_away(own_lab):
    """The keeper is left with nothing of theirs."""
    for _ in range(3):
        started = [own_lab.spawn_graft("--name", f"c{n}", "sleep", "60") for n in range(3)]
        wait_for(lambda: len(own_lab.helper_pids()) == 3, "the helpers")
        daemon = own_lab.daemon_pid()
        for pid in (daemon, *(process.pid for process in started)):
            os.kill(pid, signal.SIGKILL)
        wait_for(partial(another, own_lab.daemon_pid, daemon), "the next graftd")
        wait_for(lambda: own_lab.containers() == [], "their end")
        for process in started:
            process.wait(5)

    def kept():
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{own_lab.keeper_pid()}/fd")]
        return [link for link in links if "graft-journal" in link or "notify" in link or link.startswith("net:")]

    wait_for(lambda: not kept(), "an empty store")


# -- the preload library --

MANY = "import socket\nfor _ in range({count}): socket.socket({arguments}).close()\n"


STOCKED = """
import os, socket, time
def waiting():
    links = [f'/proc/self/fd/{n}' for n in os.listdir('/proc/self/fd')]
    return sum(os.path.islink(link) and os.readlink(link).startswith('socket:') for link in links)
def stocked():
    "Make sockets until graft-sup answers and the library has some in store, beside its channel."
    while 'LD_PRELOAD' in os.environ and waiting() < 2: socket.socket().close(); time.sleep(.01)
stocked()
"""


def accelerated(lab, code, *options, **settings):
    return lab.graft("run", "--accel", *options, *python(STOCKED + code), **settings)


@pytest.mark.alone
@pytest.mark.parametrize("arguments", ["", "socket.AF_INET6", "type=socket.SOCK_DGRAM", "socket.AF_INET6, socket.SOCK_DGRAM"])
def test_accel_saves_the_traps(lab, arguments):
    lab.spawn_graft("--name", "hold", "sleep", "60")
    helper_of(lab)
    code = MANY.format(count=3000, arguments=arguments)
    before = quick_calls(lab)
    assert accelerated(lab, code).returncode == 0
    assert quick_calls(lab) - before < 2000


def test_accel_gives_the_same_sockets(lab):
    code = """
import fcntl, os, socket
for _ in range(50): socket.socket().close()
stocked()
def look(kind):
    s = socket.socket(socket.AF_INET, kind)
    return s, (s.type, s.proto, s.getblocking(), fcntl.fcntl(s, fcntl.F_GETFD), fcntl.fcntl(s, fcntl.F_GETFL), os.fstat(s.fileno()).st_uid > 1 << 30)
print(*(look(k)[1] for k in (1, 1 | socket.SOCK_NONBLOCK, 1 | socket.SOCK_CLOEXEC)))
"""
    assert accelerated(lab, code, check=True).stdout == lab.graft("run", *python(STOCKED + code), check=True).stdout


@pytest.mark.core
def test_accel_is_under_the_same_policy(lab):
    """Whatever came by the channel may do what a trapped socket may."""
    code = """
import errno, socket
for _ in range(100): socket.socket().close()
def tried(what):
    try: what(socket.socket()); return 'done'
    except OSError as e: return errno.errorcode[e.errno]
print(*(tried(w) for w in (lambda s: s.connect(('10.77.0.2', 9)), lambda s: s.connect(('127.0.0.1', 22)),
    lambda s: s.bind(('10.77.0.1', 7777)), lambda s: s.setsockopt(1, 25, b'veth0'))))
"""
    out = accelerated(lab, code, "--egress", "none").stdout
    assert out == "ENETUNREACH ECONNREFUSED EADDRNOTAVAIL EPERM\n"


ABUSE = f"""
import array, errno, os, resource, select, socket
libc = __import__('ctypes').CDLL(None, use_errno=True)
fds = [libc.syscall({linux.NR_SOCKET}, 4, 1 | socket.SOCK_CLOEXEC, 0x67720000) for _ in range(200)]
opened = [fd for fd in fds if fd >= 0]
channel = socket.socket(fileno=opened[0])
for _ in range(500):
    try: channel.send(bytes([64]), socket.MSG_DONTWAIT)
    except BlockingIOError: break
select.select([channel], [], [], 20)
got = []
while True:
    try: text, control, _, _ = channel.recvmsg(4096, socket.CMSG_SPACE(4 * 64), socket.MSG_DONTWAIT)
    except BlockingIOError: break
    if not text: break
    for _, _, data in control: got += array.array('i', data[:len(data) // 4 * 4])
    if len(got) > 2000: break
s = socket.socket(fileno=got[0])
try: s.connect(('10.77.0.2', 9)); print('connected')
except OSError as e: print(errno.errorcode[e.errno])
print(len(opened))
os.write(opened[1], b'\\xff'); os.write(opened[2], b'')
"""


def test_a_channel_that_is_abused(lab):
    """More channels, or more sockets, than the library would ask for; nonsense on the channel."""
    out = accelerated(lab, ABUSE, "--egress", "none")
    refused, opened = out.stdout.split()
    assert refused == "ENETUNREACH"
    assert int(opened) <= 128
    assert lab.graft("run", "true").returncode == 0


def test_accel_and_fork(lab):
    """A child has none of its parent's sockets in waiting: a peer sees the end when the owner closes."""
    code = """
import os, socket
for _ in range(100): socket.socket().close()
stocked()
parent = waiting()
r, w = os.pipe()
if not os.fork():
    left = waiting()
    made = [socket.socket() for _ in range(100)]
    os.write(w, f'{left} {len(made)}'.encode()); os._exit(0)
os.close(w); told = os.read(r, 99).decode(); os.wait()
print(parent > 1, told, len([socket.socket() for _ in range(50)]))
"""
    assert accelerated(lab, code, check=True).stdout == "True 0 100 50\n"


def test_accel_and_programs_that_close_everything(lab):
    """close_range(), and files of their own where sockets were waiting: they are not given away."""
    code = """
import os, socket
for _ in range(100): socket.socket().close()
stocked()
os.closerange(3, 1024)
null = os.open('/dev/null', os.O_RDONLY)
for n in range(null + 1, 400): os.dup2(null, n)
made = [socket.socket() for _ in range(300)]
assert all(s.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == 1 for s in made)
assert all(os.readlink(f'/proc/self/fd/{n}') == '/dev/null' for n in range(null, 400))
print(len({s.fileno() for s in made}))
"""
    assert accelerated(lab, code, check=True).stdout == "300\n"


def test_accel_with_few_descriptors(lab):
    code = """
import errno, resource, socket
made = []
try:
    while True: made.append(socket.socket())
except OSError as e: print(errno.errorcode[e.errno], len(made))
"""
    command = ("bash", "-c", 'ulimit -n 64; exec "$@"', "bash", *python(UNTIL_TOLD + code))
    lab.graft("endpoint", "show", check=True)
    told = told_by_a_helper(lab, "--accel", *command)
    assert told == told_by_a_helper(lab, *command)
    assert told.startswith("EMFILE ")


def test_accel_in_many_threads_and_processes(own_lab):
    server_on_client(own_lab)
    code = """
import os, socket, threading
def work():
    for _ in range(200):
        with socket.create_connection(('10.77.0.2', 9000), 5) as s: s.recv(1)
for _ in range(2): os.fork()
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print('ok', flush=True)
while True:
    try: os.wait()
    except ChildProcessError: break
"""
    assert accelerated(own_lab, code, check=True).stdout == "ok\n" * 4


def test_accel_survives_its_helper(own_lab):
    server_on_client(own_lab)
    code = WORKER.format(seconds=3, address="10.77.0.2", port=9000)
    worker = own_lab.spawn_graft("--name", "w", "--accel", *python(code), stdout=-1)
    for _ in range(10):
        time.sleep(0.2)
        for pid in own_lab.helper_pids():
            os.kill(pid, signal.SIGKILL)
    done, failed = worker.communicate(timeout=20)[0].split()
    assert failed == "0"
    assert int(done) > 10


def test_accel_and_another_netns(lab):
    """Who leaves for a netns of its own gets sockets of that."""
    code = """
import ctypes, socket, errno
for _ in range(100): socket.socket().close()
stocked()
print(ctypes.CDLL(None).unshare(0x40000000))
try: socket.socket().connect(('10.77.0.2', 9))
except OSError as e: print(errno.errorcode[e.errno])
"""
    assert accelerated(lab, code, check=True).stdout == "0\nENETUNREACH\n"


def test_accel_for_all_kinds_of_programs(lab, tmp_path):
    """A static program does without, a shell and what it starts do with it, and LD_PRELOAD keeps what it had."""
    source = tmp_path / "static.c"
    source.write_text("#include <sys/socket.h>\nint main(void) { return socket(2, 1, 0) < 0; }\n")
    subprocess.run(["gcc", "-static", source, "-o", tmp_path / "static"], check=True)
    assert lab.graft("run", "--accel", tmp_path / "static").returncode == 0
    env = {**lab.env, "LD_PRELOAD": "libc.so.6"}
    out = lab.graft("run", "--accel", "sh", "-c", "env | grep ^LD_PRELOAD", env=env, check=True).stdout
    assert out == f"LD_PRELOAD={SHIM}:libc.so.6\n"
    assert lab.host(*python("import socket; [socket.socket() for _ in range(50)]"), env={**lab.env, "LD_PRELOAD": str(SHIM)}).returncode == 0


def test_accel_that_the_user_may_not_read(lab):
    result = lab.graft("run", "--accel", "--user", "nobody", "true")
    if lab.host("setpriv", "--reuid=65534", "--clear-groups", "test", "-r", SHIM).returncode == 0:
        assert result.returncode == 0
        return
    assert result.returncode == 125
    assert "--accel: user nobody may not read" in result.stderr
    assert json.loads(lab.graft("ps", "-j").stdout) == []


@pytest.mark.alone
def test_a_channel_that_brings_descriptors(lab):
    """The last close of a socket waits as its SO_LINGER says. graft-sup has no time for that, nor has its end."""
    before = set(lab.helper_pids())
    code = f"""
import ctypes, os, select, socket, struct, sys
libc = ctypes.CDLL(None)
def channel():
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, libc.syscall({linux.NR_SOCKET}, 4, 1 | socket.SOCK_CLOEXEC, 0x67720000))
def lingers():
    server = socket.create_server(('127.0.0.1', 0)); one = socket.create_connection(server.getsockname()); peer = server.accept()[0]
    one.setblocking(False)
    try:
        while one.send(bytes(65536)): pass
    except BlockingIOError: pass
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('=ii', 1, 3000))
    return one.detach(), peer.detach()
for length, unread in ((1, False), (1, False), (0, False), (9, False), (1, True), (0, True)):
    child = os.fork()
    if not child:
        one = channel()
        if unread:  # a batch is left unread: what graft-sup is told first is ECONNRESET
            one.send(b'\\1'); select.select([one], [], [])
        socket.send_fds(one, [bytes([1] * length)], lingers())
        os._exit(0)  # which waits for nothing
    os.waitpid(child, 0)
one = channel()
try: one.bind('\\0graft-attack-name'); print('bound')
except OSError as error: print(error.strerror)
socket.create_server(('127.0.0.1', 80)).close(); print('served')
"""
    done = lab.graft("run", *python(code))
    assert done.stdout.splitlines() == ["Invalid argument", "served"], done.stderr
    wait_for(lambda: set(lab.helper_pids()) <= before, "the end of graft-sup", 5)
