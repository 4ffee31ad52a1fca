"""The command is its own process: status, signals, users, forks, threads, descriptors, and what /sys shows."""

import os
import pty
import signal
import subprocess

import pytest

from graft.bench.lab import GRAFT, HOST4, wait_for
from tests.conftest import python


@pytest.mark.parametrize("status", [0, 1, 7, 125])
def test_exit_status(lab, status):
    assert lab.graft("run", "sh", "-c", f"exit {status}").returncode == status


def test_killed_by_a_signal(lab):
    assert lab.host("sh", "-c", f"{GRAFT} run sh -c 'kill -9 $$'; echo $?").stdout == "137\n"


def test_signals_reach_the_command(lab):
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(42)); print('up', flush=True); signal.pause()"
    process = lab.spawn_graft(*python(code), stdout=-1)
    process.stdout.readline()
    assert lab.end(process, signal.SIGTERM) == 42


def test_sigpipe_is_as_a_program_expects(lab):
    assert lab.host("sh", "-c", f"{GRAFT} run sh -c 'yes; echo $? >&2' | head -1").stderr.strip() == "141"


def test_the_terminal_is_the_commands(lab):
    """Under a pty the command is in the foreground: it is a tty, and ^C interrupts it."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ.update(lab.env)
        os.execvp(
            "nsenter", ["nsenter", f"--net=/run/netns/{lab.host_ns}", str(GRAFT), "run", "sh", "-c", "tty; sleep 60"]
        )
    output = b""
    while b"/dev/pts" not in output:
        output += os.read(master, 999)
    os.write(master, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (-signal.SIGINT, 130)
    os.close(master)


def test_sys_and_proc_show_the_namespace(lab):
    result = lab.graft(
        "run", "sh", "-c", "ls /sys/class/net; tail -n +3 /proc/net/dev | cut -d: -f1; ls /sys/fs/cgroup | head -1"
    )
    assert result.stdout.split()[:2] == ["lo", "lo"]
    assert len(result.stdout.split()) == 3
    assert "veth0" in lab.host("sh", "-c", "cat /proc/net/dev").stdout


def test_user(lab):
    code = "import os, socket; s = socket.socket(); s.bind(('', 80)); print(os.getuid(), os.getgid(), os.getgroups(), os.environ['HOME'])"
    result = lab.graft("run", "-p", "88:80", "--user", "nobody", *python(code))
    assert result.stdout == "65534 65534 [65534] /nonexistent\n", result.stderr
    assert lab.graft("run", "--user", "1234:5678", "id", "-u").stdout == "1234\n"
    assert lab.graft("run", "--user", "1234:5678", "id", "-g").stdout == "5678\n"
    refused = lab.graft("run", "--user", "nosuchuser", "id")
    assert (refused.returncode, refused.stderr) == (1, "graft: --user nosuchuser: no user 'nosuchuser'\n")


def test_forks_threads_and_descriptors(lab):
    code = """
import os, socket, threading
def check(n):
    s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()
    c = socket.create_connection(s.getsockname()); p = s.accept()[0]
    c.sendall(b'x'); assert p.recv(1) == b'x'
children = []
for _ in range(40):
    pid = os.fork()
    if pid == 0:
        check(0); os._exit(0)
    children.append(pid)
assert all(os.waitpid(p, 0)[1] == 0 for p in children)
failed = []
def many():
    try: kept.extend(socket.socket(socket.AF_INET6 if i % 2 else socket.AF_INET) for i in range(20))
    except Exception as e: failed.append(e)
kept = []
threads = [threading.Thread(target=many) for _ in range(50)]
[t.start() for t in threads]; [t.join() for t in threads]
print(len(kept), len({s.fileno() for s in kept}), failed)
"""
    assert lab.graft("run", *python(code)).stdout == "1000 1000 []\n"


def test_descriptor_limit(lab):
    code = """
import errno, resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)); kept = []
try:
    while True: kept.append(socket.socket())
except OSError as e: print(errno.errorcode[e.errno], len(kept) > 10)
kept.pop().close(); print(socket.socket().fileno() > 0)
"""
    assert lab.graft("run", *python(code)).stdout == "EMFILE True\nTrue\n"


def test_all_descriptors_closed(lab):
    code = """
import os, socket
out = os.dup(1); os.set_inheritable(out, True)
os.closerange(0, out); os.closerange(out + 1, 4096)
s = socket.socket(); os.write(out, b'%d' % s.fileno())
"""
    assert lab.graft("run", *python(code)).stdout == "0"


def test_exec_chain_and_inherited_socket(lab):
    code = """
import os, socket, sys
if len(sys.argv) > 2:
    s = socket.socket(fileno=int(sys.argv[1])); print(s.getsockname(), s.accept()[1][0]) if sys.argv[2] == '0' else \\
        os.execv(sys.executable, [sys.executable, __file__, sys.argv[1], str(int(sys.argv[2]) - 1)])
else:
    s = socket.socket(); s.bind(('127.0.0.1', 80)); s.listen(); os.set_inheritable(s.fileno(), True)
    if os.fork() == 0: socket.create_connection(('127.0.0.1', 80)); os._exit(0)
    os.execv(sys.executable, [sys.executable, __file__, str(s.fileno()), '5'])
"""
    script = lab.work / "chain.py"
    script.write_text(code)
    assert lab.graft("run", "/usr/bin/python3", script).stdout == "('127.0.0.1', 80) 127.0.0.1\n"


def test_outlives_its_parent(lab):
    code = """
import os, socket, time
parent = os.getpid()
if os.fork(): os._exit(0)
os.setsid()
while os.getppid() == parent: time.sleep(.01)
s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('0.0.0.0', 80)); s.listen()
c, _ = s.accept(); c.sendall(b'orphan')
"""
    lab.graft(
        "run", "--name", "orphan", "-p", "8080:80", *python(code), capture_output=False, stdout=subprocess.DEVNULL
    )
    assert lab.containers() == ["orphan"]
    lab.wait_listening(8080)
    ask = f"import socket; print(socket.create_connection(({HOST4!r}, 8080)).recv(9))"
    assert lab.client(*python(ask)).stdout == "b'orphan'\n"
    wait_for(lambda: lab.containers() == [], "the orphan's end")


def test_flags_of_socket(lab):
    code = """
import fcntl, os, socket
for flags in (0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC):
    import ctypes
    fd = ctypes.CDLL(None).socket(2, 1 | flags, 0)
    print(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK), bool(fcntl.fcntl(fd, fcntl.F_GETFD)))
"""
    assert lab.graft("run", *python(code)).stdout == "False False\nTrue False\nFalse True\nTrue True\n"


def test_raw_sockets_stay_in_the_container(lab):
    code = """
import os, socket
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
try: s.sendto(bytes(8), ('10.77.0.2', 0))
except OSError as e: print(os.strerror(e.errno))
"""
    assert lab.graft("run", *python(code)).stdout == "Network is unreachable\n"


def test_a_namespace_below_gets_its_own_sockets(lab):
    """unshare -n inside: those sockets are not grafted."""
    code = "import socket; s = socket.socket(); s.settimeout(2); s.connect(('10.77.0.2', 9))"
    result = lab.graft("run", "unshare", "-n", *python(code))
    assert "Network is unreachable" in result.stderr


def test_nested_run_is_refused(lab):
    result = lab.graft("run", GRAFT, "run", "true")
    assert result.returncode == 1
    assert "inside a graft container" in result.stderr


def test_io_uring_and_32_bit_calls_are_refused(lab):
    code = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall(425, 8, bytes(200)); print(errno.errorcode[ctypes.get_errno()])
libc.syscall(0x40000000 | 41, 2, 1, 0); print(errno.errorcode[ctypes.get_errno()])
"""
    assert lab.graft("run", *python(code)).stdout == "EPERM\nENOSYS\n"


def test_joining_a_named_namespace(lab):
    name = f"{lab.tag}-n"
    lab.ip("netns", "add", name)
    try:
        code = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 80)); s.listen(); print('up', flush=True); s.accept()"
        process = lab.spawn_graft("--netns", name, "--name", "first", *python(code), stdout=-1)
        process.stdout.readline()
        second = lab.graft(
            "run", "--netns", name, *python("import socket; socket.create_connection(('127.0.0.1', 80))")
        )
        assert second.returncode == 0, second.stderr
        assert process.wait(20) == 0
        third = lab.graft("run", "--netns", "first", "true")
        assert "does not exist" in third.stderr
    finally:
        lab.ip("netns", "del", name)
