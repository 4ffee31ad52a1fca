"""Attacks on direct containers that no program can do alone: of the host's, of other cgroups, between two steps.

A hole here is one in the host's network: who is free of the policy in the host's netns has it whole.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import threading
import time

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, SLOWNESS, wait_for
from graft.kernel import direct, linux
from graft.kernel.cgroup import cgroup2_root
from tests.attack.test_attacks import PROFILES
from tests.conftest import in_cgroup, kill_graftd, need, need_root, python
from tests.system.told import Told

STEPS = """
import array, ctypes, errno, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def tell(call):
    try: print(call() or 'OK', flush=True)
    except OSError as e: print(errno.errorcode.get(e.errno, str(e)), flush=True)
def pid(): return str(os.getpid())
def make(family, kind):
    kept.append(socket.socket(int(family), int(kind)))
def reach(address, port):
    socket.create_connection((address, int(port)), 5).close()
def send(address, port):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', (address, int(port)))
def bind(kind, address, port):
    kept.append(socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET, int(kind))); kept[-1].bind((address, int(port)))
def listen():
    kept[-1].listen()
def where(): return socket.socket().getsockopt(1, 71, 8).hex()
def pair():
    a, b = socket.socketpair(); a.send(b'x'); assert b.recv(2) == b'x'
def pairs(count):
    before = len(os.listdir('/proc/self/fd'))
    for n in range(int(count)):
        try: a, b = socket.socketpair()
        except OSError as e: told.add(errno.errorcode[e.errno]); continue
        told.add('OK'); a.send(b'x'); assert b.recv(2) == b'x'; assert a.fileno() > 2 < b.fileno(); a.close(); b.close()
    return f"{len(os.listdir('/proc/self/fd')) - before} {' '.join(sorted(told))}"
def new_cgroups():
    if libc.unshare(0x10000000 | 0x02000000): raise OSError(ctypes.get_errno(), '')
def admin():
    s = socket.socket(socket.AF_UNIX); s.connect(os.environ['GRAFT_RUN_DIR'] + '/graftd.sock')
    s.sendall(b'{"op":"ps","version":"0.1.0"}\\n'); got = s.recv(65536)
    return 'EPERM' if b'"EPERM"' in got else f'OK {got!r}'
def churn(count):
    '''Sockets that come and go in every way.'''
    server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen(64)
    six = socket.socket(socket.AF_INET6); six.bind(('::', 0)); six.listen(64)
    for n in range(int(count)):
        s = socket.socket(); s.close()
        u = socket.socket(socket.AF_INET6 if n % 2 else socket.AF_INET, socket.SOCK_DGRAM); u.close()
        s = socket.socket(); s.setsockopt(1, 2, 1); s.close()
        for family, listener, address in ((2, server, '127.0.0.1'), (10, six, '::1'), (10, six, '::ffff:127.0.0.1'), (2, six, '127.0.0.1')):
            c = socket.socket(family); c.connect((address, listener.getsockname()[1])); a, _ = listener.accept()
            if n % 3 == 0: a.setsockopt(1, 13, struct.pack('ii', 1, 0))
            if n % 3 == 1: libc.connect(a.fileno(), bytes(16), 16); libc.connect(c.fileno(), bytes(16), 16)
            if n % 5 == 0:
                child = os.fork()
                if not child: os._exit(0)
                os.waitpid(child, 0)
            a.close(); c.close()
        x = socket.socket(); x.setblocking(False); x.connect_ex((sys.argv[1], 9)); x.close()
        try: socket.socket(2, 1, 132).close()
        except OSError: pass
kept = []; told = set()
print('up', flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    tell(lambda: globals()[word](*rest))
"""


class Program(Told):
    """A container that does one step at a time, as root with Docker's default capabilities. It has a name of its own, so that one that a test leaves disturbs none."""

    count = 0

    def __init__(self, lab, *options):
        need_root()
        Program.count += 1
        self.name = f"web{self.count}"
        code = STEPS.replace("sys.argv[1]", repr(CLIENT4))
        super().__init__(lab, code, "--direct", "--name", self.name, *options, *PROFILES["root"])
        assert self.hear() == "up"
        self.cgroup = direct.directory_of(inspect(lab, self.name)["cgroup"])


def inspect(lab, name):
    return json.loads(lab.graft("inspect", name, check=True).stdout)


def used(lab, program):
    return inspect(lab, program.name)["limits"]["sockets"]["used"]


def listeners(lab):
    """What listens on the host beyond the containers' loopbacks, and UDP sockets."""
    return sorted(line.split()[4] for line in lab.host("ss", "-tulnH").stdout.splitlines() if "127." not in line and "[fd67:" not in line)


@contextlib.contextmanager
def host_server(lab):
    """A server of the host's own loopback."""
    code = "import socket; s = socket.create_server(('127.0.0.1', 9101)); print('up', flush=True)\nwhile True: s.accept()[0].close()"
    server = lab.spawn(*python(code), stdout=-1)
    assert server.stdout.readline() == "up\n"
    try:
        yield
    finally:
        lab.end(server)


# -- out of the cgroup --


@pytest.mark.parametrize("how", ["root", "beside"])
def test_who_is_moved_out_makes_no_sockets(lab, how):
    """As `systemd-run --scope` does, or a login by PAM. What it has goes on."""
    program = Program(lab, "--egress", "host")
    pid = int(program.does("pid"))
    outside = cgroup2_root() if how == "root" else cgroup2_root() / f"{lab.tag}-outside"
    outside.mkdir(exist_ok=True)
    try:
        with host_server(lab):
            assert program.does("make", 2, 1) == "OK"
            direct.enter(outside, pid)
            for family, kind in ((2, 1), (2, 2), (10, 1), (10, 2)):
                assert program.does("make", family, kind) == "EPERM"
            assert program.does("reach", "127.0.0.1", 9101) == "EPERM"
            assert program.does("send", "127.0.0.1", 9101) == "EPERM"
            assert program.does("admin") == "EPERM"
            assert program.does("pair") == "OK"
            assert "socket" in lab.graft("inspect", program.name).stdout
            direct.enter(program.cgroup, pid)
            assert program.does("reach", "127.0.0.1", 9101) == "ECONNREFUSED"
        program.end()
    finally:
        if how != "root":
            wait_for(lambda: not (outside / "cgroup.procs").read_text(), "the end of the program")
            outside.rmdir()


def test_who_is_moved_out_and_hides_it(lab):
    """A cgroup namespace of its own is not what it is known by."""
    program = Program(lab, "--egress", "host")
    direct.enter(cgroup2_root(), int(program.does("pid")))
    assert program.does("new_cgroups") == "OK"
    assert program.does("make", 2, 1) == "EPERM"
    assert program.does("admin") == "EPERM"
    program.end()


def test_who_is_moved_out_without_a_graftd(own_lab):
    lab = own_lab
    program = Program(lab, "--egress", "host")
    kill_graftd(lab)
    direct.enter(cgroup2_root(), int(program.does("pid")))
    assert program.does("make", 2, 1) == "EPERM"
    assert program.does("make", 2, 2) == "EPERM"
    lab.graft("run", "true", check=True)
    assert program.does("make", 2, 1) == "EPERM"
    program.end()


def test_nobody_else_is_held(lab):
    """Another container, a program of the host, and one in a netns of its own."""
    Program(lab, "--egress", "host")
    make = python("import socket; socket.socket(); print('made')")
    assert lab.host(*make).stdout == "made\n"
    assert lab.graft("run", *make, env={**lab.env, "GRAFT_DIRECT": "off"}).stdout == "made\n"
    assert lab.graft("run", "--direct", "unshare", "-n", *make).stdout == "made\n"


def test_the_leash_ends_with_the_container(own_lab):
    """The kernel gives the listener's address to another one."""
    lab = own_lab
    for _ in range(20):
        lab.graft("run", "--direct", "true", check=True)
    wait_for(lambda: not lab.containers(), "their end")
    shown = subprocess.run(("bpftool", "-j", "map", "dump", "pinned", lab.pins() / "leashes"), capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == []


def test_cgroup2_is_mounted_without_nsdelegate(own_lab):
    """A runtime that gives a container the host's cgroup namespace takes the option away from all mounts."""
    lab = own_lab
    program = Program(lab)
    linux.mount("none", str(cgroup2_root()), None, linux.MS_REMOUNT | linux.MS_RELATIME)
    wait_for(lambda: "nsdelegate" in options_of_cgroup2(), "the option")
    program.end()


def options_of_cgroup2():
    with open("/proc/self/mountinfo") as mounts:
        return next(line for line in mounts if " - cgroup2 " in line)


# -- others in the cgroup --


def test_a_process_of_the_hosts_in_the_cgroup(lab):
    """It has no filter, so that its bind() and listen() tell nobody. What it makes is the container's, or nothing."""
    program = Program(lab, "--egress", "none")
    before = listeners(lab)
    stranger = lab.spawn(*python(STEPS), stdin=-1, stdout=-1)
    assert stranger.stdout.readline() == "up\n"

    def does(*words):
        stranger.stdin.write(" ".join(map(str, words)) + "\n")
        stranger.stdin.flush()
        return stranger.stdout.readline().strip()

    with host_server(lab):
        held = lab.host("ss", "-tulnH").stdout
        assert does("reach", "127.0.0.1", 9101) == "OK"
        direct.enter(program.cgroup, int(does("pid")))
        assert does("reach", "127.0.0.1", 9101) == "ECONNREFUSED"
        assert does("send", CLIENT4, 9) == "ENETUNREACH"
        for kind in (1, 2):
            for address in ("0.0.0.0", HOST4, "::"):
                told = does("bind", kind, address, 22)
                assert told in ("OK", "EPERM", "EACCES", "EADDRNOTAVAIL", "EADDRINUSE", "EINVAL")
        assert does("make", 2, 1) == "OK"
        does("listen")
        here = [line for line in listeners(lab) if line not in before and ":9101" not in line]
        assert len(here) == 1, (held, here)  # of the kernel's choice, and nobody reaches it
        port = here[0].rpartition(":")[2]
        for asks, address in ((lab.host, "127.0.0.1"), (lab.host, HOST4), (lab.client, HOST4)):
            code = f"import socket; socket.create_connection(({address!r}, {port}), 1)"
            assert "Error" in asks(*python(code)).stderr
    lab.end(stranger)
    program.end()


# -- programs of somebody else --

BPF_PROG_LOAD, BPF_PROG_ATTACH, BPF_PROG_DETACH = 5, 8, 9
SOCK, SOCK_CREATE = 9, 2
ALLOW_OVERRIDE, ALLOW_MULTI = 1, 2


def bpf(command, attribute):
    result = linux.libc.syscall(linux.NR_BPF, command, attribute, len(attribute))
    if result < 0:
        raise OSError(ctypes.get_errno(), "bpf")
    return result


def program_that_returns(value):
    import struct

    code = struct.pack("=BBhi", 0xB7, 0, 0, value) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    text, gpl = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    attribute = struct.pack("=IIQQIIQII16sII", SOCK, 2, ctypes.addressof(text), ctypes.addressof(gpl), 0, 0, 0, 0, 0, b"others", 0, SOCK_CREATE)
    return bpf(BPF_PROG_LOAD, attribute + bytes(64))


@contextlib.contextmanager
def attached(cgroup, value, flags):
    import struct

    program, target = program_that_returns(value), os.open(cgroup, os.O_RDONLY)
    try:
        bpf(BPF_PROG_ATTACH, struct.pack("=IIIIII", target, program, SOCK_CREATE, flags, 0, 0))
        yield
        bpf(BPF_PROG_DETACH, struct.pack("=IIIIII", target, program, SOCK_CREATE, 0, 0, 0))
    finally:
        os.close(program)
        os.close(target)


@pytest.mark.parametrize("flags", [0, ALLOW_OVERRIDE, ALLOW_MULTI], ids=["alone", "override", "multi"])
@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_program_above(lab, flags, first):
    """Ours runs whatever is attached above it, or the start is refused."""
    outer = cgroup2_root() / f"{lab.tag}-outer"
    outer.mkdir()
    code = STEPS.replace("sys.argv[1]", repr(CLIENT4))
    try:
        with contextlib.ExitStack() as stack:
            if first == "theirs":
                stack.enter_context(attached(outer, 1, flags))
            process = lab.spawn(*in_cgroup(outer, GRAFT, "run", "--direct", "--egress", "none", *python(code)), stdin=-1, stdout=-1, stderr=-1)
            said = process.stdout.readline()
            if first == "theirs" and flags == 0 and not said:
                assert "attach a program to a cgroup" in process.stderr.read()
                return
            assert said == "up\n"
            if first == "ours":
                with contextlib.suppress(PermissionError):
                    stack.enter_context(attached(outer, 1, flags))
            with host_server(lab):
                for line, answer in (("reach 127.0.0.1 9101", "ECONNREFUSED"), (f"reach {CLIENT4} 9", "ENETUNREACH")):
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
                    assert process.stdout.readline() == answer + "\n"
            lab.end(process)
    finally:
        wait_for(lambda: not list(outer.glob("*/cgroup.procs")), "the end of the container's cgroup")
        wait_for(lambda: not (outer / "cgroup.procs").read_text(), "the end of its processes")
        outer.rmdir()


@pytest.mark.parametrize("flags", [0, ALLOW_OVERRIDE, ALLOW_MULTI], ids=["alone", "override", "multi"])
def test_a_program_below(lab, flags):
    """A cgroup of the container's own: with any flags ours stays in force."""
    program = Program(lab, "--egress", "none")
    inner = program.cgroup / "inner"
    inner.mkdir()
    pid = int(program.does("pid"))
    with host_server(lab), contextlib.ExitStack() as stack:
        with contextlib.suppress(PermissionError):
            stack.enter_context(attached(inner, 1, flags))
        direct.enter(inner, pid)
        assert program.does("reach", "127.0.0.1", 9101) == "ECONNREFUSED"
        assert program.does("reach", CLIENT4, 9) == "ENETUNREACH"
        direct.enter(program.cgroup, pid)
    inner.rmdir()
    program.end()


def test_all_pins_are_removed(own_lab):
    """The programs are attached without links."""
    lab = own_lab
    program = Program(lab, "--egress", "none")
    kill_graftd(lab)
    subprocess.run(("rm", "-r", lab.pins()), check=True)
    with host_server(lab):
        assert program.does("reach", "127.0.0.1", 9101) == "ECONNREFUSED"
        assert program.does("reach", CLIENT4, 9) == "ENETUNREACH"
    lab.graft("run", "true", check=True)
    with host_server(lab):
        assert program.does("bind", 1, "0.0.0.0", 22) == "OK"
        assert program.does("reach", "127.0.0.1", 9101) == "ECONNREFUSED"
        assert "0.0.0.0:22" not in listeners(lab)
    program.end()


# -- between two steps --


def test_a_supervisor_outlives_graftd(own_lab):
    """It lives in the container's netns, where no other process that gives orders does."""
    lab = own_lab
    program = Program(lab, "--egress", "none")
    kill_graftd(lab)
    program.say("bind", 1, "0.0.0.0", 22)
    lab.graft("run", "true", check=True)
    assert program.hear() == "OK"
    assert program.does("pair") == "OK"
    assert "0.0.0.0:22" not in listeners(lab)
    program.end()



@pytest.mark.parametrize("victim", ["graftd", "graft-sup", "the command"])
def test_a_start_that_is_killed(own_lab, victim):
    """At any moment of it: what is left has no process without a policy, and no cgroup stays."""
    lab = own_lab
    lab.graft("run", "true", check=True)
    rounds = 12
    for n in range(rounds):
        process = lab.spawn_graft("--direct", "--egress", "none", "--name", "web", *python(STEPS), stdin=-1, stdout=-1, stderr=subprocess.DEVNULL)
        time.sleep((0.05 + 0.4 * n / rounds) * min(SLOWNESS, 2))
        if victim == "graftd":
            with contextlib.suppress(ProcessLookupError):
                os.kill(lab.daemon_pid() or 1 << 22, signal.SIGKILL)
        elif victim == "graft-sup":
            for pid in lab.helper_pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"reach {CLIENT4} 9\n")
            process.stdin.close()
        told = process.stdout.read().split()
        assert told in ([], ["up"], ["up", "ENETUNREACH"]), told
        process.wait()
    wait_for(lambda: lab.graft("ps", "-j").stdout.strip() in ("", "[]"), "the end of all")
    wait_for(lambda: not lab.direct_cgroups(), "the end of their cgroups")


def test_pairs_while_all_is_killed(own_lab):
    """socketpair() is made by graftd: whoever is killed meanwhile, a call gives a pair that works, or an error."""
    lab = own_lab
    program = Program(lab)
    over = threading.Event()

    def kill():
        while not over.wait(0.3 * min(SLOWNESS, 2)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(lab.daemon_pid() or 1 << 22, signal.SIGKILL)
            for pid in lab.helper_pids()[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        told = program.does("pairs", 300)
    finally:
        over.set()
        killer.join()
    left, *errors = told.split()
    assert left == "0"
    assert set(errors) <= {"OK", "ENOSYS"}
    wait_for(lambda: lab.daemon_pid(), "a graftd")
    program.process.kill()
    program.process.wait()


# -- counting --


def test_the_count_is_exact(lab):
    """After every way in which a socket may come and go; never below."""
    need("ss")
    program = Program(lab, "--limit", "sockets=400")
    before = used(lab, program)
    for _ in range(3):
        assert program.does("churn", 150) == "OK"
        assert used(lab, program) == before
    program.end()
