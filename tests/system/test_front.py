"""graft-front does what the program in Python does: the same container, the same words, the same process."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from graft.bench.lab import GRAFT, HOST4, ROOT, wait_for
from tests.conftest import python

FRONT = ROOT / "graft/graft-front"
PROCESS = """
import os, resource, signal, socket, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print({name: status[name].split() for name in ("Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters",
    "SigBlk", "SigIgn", "SigCgt", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Cpus_allowed", "THP_enabled")})
print(os.getcwd(), os.getsid(0) == int(sys.argv[1]), os.getppid() == int(sys.argv[2]), os.getpriority(0, 0))
print(*map(ascii, sorted((name, value) for name, value in os.environ.items() if name not in ("GRAFT_FRONT", "_"))))
print([(n, resource.getrlimit(n)) for n in range(16)])
print(sorted(os.listdir("/proc/self/fd")), open("/proc/self/cgroup").read(), open("/proc/self/oom_score_adj").read())
print(open("/proc/self/timerslack_ns").read(), {k: os.readlink(f"/proc/self/ns/{k}") for k in ("user", "pid", "ipc", "uts", "time")})
mounts = [line.split()[4:6] + line.split(" - ")[1].split()[:1] for line in open("/proc/self/mountinfo")]
print([mount for mount in mounts if mount[0].startswith(("/sys", "/proc", "/dev", "/run/nscd")) or mount[0] == "/"])  # others' end with their files
devices = sorted(os.listdir("/sys/class/net"))  # those of the namespace: a module of a tunnel that is loaded meanwhile adds one
print("lo" in devices, devices == sorted(name for _, name in socket.if_nameindex()), open("/proc/self/comm").read(), sys.argv)
"""


@pytest.fixture(scope="module")
def served(lab):
    """A laboratory whose graftd runs and stays: the program in C starts none."""
    holder = lab.spawn_graft("--name", "stays", "sleep", "1000")
    wait_for(lambda: "stays" in lab.containers(), "a container")
    yield lab
    lab.end(holder)


def both(lab, *words, env=None, **options):
    """What `graft run` with @words comes to by the program in C, and by the one in Python."""
    done = []
    for way in ("on", "off"):
        result = lab.graft("run", *words, env={**(env or lab.env), "GRAFT_FRONT": way}, **options)
        done.append((result.returncode, result.stdout, result.stderr))
    return done


@pytest.fixture
def alone(tmp_path):
    """The program in C without a program in Python to leave anything to."""
    path = tmp_path / "graft/graft-front"
    path.parent.mkdir()
    shutil.copy(FRONT, path)
    return path


def test_it_needs_no_python(own_lab, alone):
    own_lab.start_daemon()
    (alone.parent / "graft-shim.so").touch()
    for mode in MODES:
        assert own_lab.host(alone, "run", *mode, "sh", "-c", "echo $LD_PRELOAD works").stdout.endswith("works\n")
    assert own_lab.host(alone, "run", "--name", "web", "-p", "8080:80", "echo", "works").stdout == "works\n"
    for words in (("ps",), ("run",), ("run", "--help"), ("run", "--user", "nobody", "true"), ("run", "not-there")):
        own_lab.refused((alone, *words), 125, "graft: no Python for ")
    elsewhere = {**own_lab.env, "GRAFT_RUN_DIR": "/run/not-there"}
    own_lab.refused((alone, "run", "true"), 125, "graft: no Python for ", env=elsewhere)


MODES = [(), ("--direct",), ("--accel",)]


@pytest.mark.core
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_the_same_process(served, mode):
    """Privileges, limits, signals, descriptors, environment, mounts: what the command is given."""
    code = python(PROCESS)
    sid, limits = str(os.getsid(0)), "ulimit -n 777; ulimit -c 0; umask 027; trap '' USR1; exec 7</dev/null"
    command = f"{limits}; exec {GRAFT} run --egress none {' '.join(mode)} \"$@\""
    done = []
    for way in ("on", "off"):
        told = served.host("sh", "-c", command, "sh", *code, sid, str(os.getpid()), env={**served.env, "GRAFT_FRONT": way, "ODD": "\udcff", "LD_PRELOAD": "libm.so.6"})
        done.append((told.returncode, told.stdout, told.stderr))
    for one, other in zip(done[0][1].splitlines(), done[1][1].splitlines(), strict=False):
        assert one == other
    assert done[0] == done[1]
    assert done[0][0] == 0, done[0][2]
    assert "\nTrue True python3" in done[0][1]
    assert "'Umask': ['0027']" in done[0][1]
    assert "True True 0" in done[0][1]
    assert ("graft-shim.so:libm.so.6" in done[0][1]) == ("--accel" in mode)


@pytest.mark.parametrize(
    "words",
    [
        ("sh", "-c", "echo out; echo err >&2; exit 7"), ("sh", "-c", "kill -9 $$"), ("nonsense-not-there",), ("/",), ("/etc/passwd",), ("",),
        ("--help",), ("--nonsense", "true"), ("-p", "99999:1", "true"), ("-p", "8080:80", "-p", "8080:81", "--name", "a", "true"),
        ("-i", "0.0.0.0:80=nobody", "true"), ("--allow", ":", "true"), ("--name", "ü/x", "true"), ("--netns", "nobody", "true"),
        ("--limit", "sockets=0", "true"), ("--user", "nobody", "id", "-u"), ("--sysctl", "net.core.somaxconn=7", "cat", "/proc/sys/net/core/somaxconn"),
        ("--allow", "192.0.2.9:80", "--egress", "host", "ip", "-br", "address"), ("--interface", "eth7", "ls", "/sys/class/net"), ("--direct", "--accel", "true"), ("--direct", "--no-direct", "true"),
        ("--direct", "ls", "/proc/net/", "/sys/class/net", "/sys/fs/cgroup"), ("--direct", "nonsense-not-there"), ("--direct", "/etc/passwd"),
        ("--", "echo", "--help"), ("echo", b"\xff\xfe", ""),
    ],
)  # fmt: skip
def test_the_same_words(served, words):
    one, other = both(served, *words, text=False) if any(isinstance(word, bytes) for word in words) else both(served, *words)
    assert one == other


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
@pytest.mark.parametrize("kind", ["script", "garbage", "directory"])
def test_commands_that_are_none(served, tmp_path, kind, mode):
    path = tmp_path / "command"
    if kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(b"echo script $0 $1\n" if kind == "script" else b"#!/not/there\n")
        path.chmod(0o755)
    one, other = both(served, *mode, str(path), "word")
    assert one == other
    assert (one[0] == 0) == (kind == "script")
    one, other = both(served, *mode, "command", "word", env={**served.env, "PATH": f"{tmp_path}:/bin:/usr/bin"})
    assert one == other


def test_the_mode_that_is_the_default(served):
    for default in ("on", "off", "nonsense"):
        one, other = both(served, "readlink", "/proc/self/ns/cgroup", env={**served.env, "GRAFT_DIRECT": default})
        assert (one[0], one[2]) == (other[0], other[2])
        if default != "nonsense":
            there = f"{os.readlink('/proc/self/ns/cgroup')}\n"
            assert (one[1] != there, other[1] != there) == (default == "on",) * 2


@pytest.mark.parametrize("cgroups", ["mount -t cgroup2 none '/mnt/a b/c'", "mount -t cgroup2 none /sys/fs/cgroup; mount -t cgroup2 none '/mnt/a b/c'", "umount -R -l /sys/fs/cgroup"])
def test_what_is_done_in_the_hosts_netns(served, cgroups):
    """More of cgroup2 and procfs than at their usual places, one with a space in its name, one that covers another; or no cgroup2 at all."""
    mounted = cgroups.startswith("mount")
    before = f"mount -t tmpfs none /mnt; mkdir -p '/mnt/a b/c' '/mnt/a b/p'; {cgroups}; mount -t proc none '/mnt/a b/p'"
    look = "ls '/mnt/a b/c'; grep -c . /proc/self/cgroup; echo 1 >'/mnt/a b/p/sys/net/core/somaxconn'"
    done = []
    for way in ("on", "off"):
        command = ("unshare", "-m", "sh", "-c", f'{before}; exec {GRAFT} run --direct sh -c "$@"', "sh", look)
        told = served.host(*command, env={**served.env, "GRAFT_FRONT": way})
        done.append((told.returncode, told.stdout, told.stderr))
    assert done[0] == done[1]
    if mounted:
        assert "cgroup.procs" in done[0][1]
        assert "Read-only file system" in done[0][2]
    else:
        assert (done[0][0], done[0][1]) == (125, "")
        assert done[0][2].startswith("graft: no cgroup2 is mounted (mount -t cgroup2 "), done[0]


def test_a_refusal_has_the_same_words(served):
    """graftd refuses when the listener is there already: the program in C has no words of its own then."""
    holder = served.spawn_graft("--name", "holder", "-p", "8123:80", "sleep", "100")
    wait_for(lambda: "holder" in served.containers(), "the holder")
    for words in (("-p", "8123:80", "true"), ("--name", "holder", "true"), ("--direct", "-p", "8123:80", "true")):
        one, other = both(served, *words)
        assert one == other
        assert (one[0], "holder" in one[2]) == (1, True)
    served.end(holder)


def test_endpoints(served, alone):
    served.add_endpoints({"ep-front": f"type ipv4 addr {HOST4} port 8125", "ep-path": f"type unix path {served.work / 'front.sock'}"})
    code = "import socket; s = socket.socket(); s.bind(('0.0.0.0', 80)); s.listen(); print(s.getsockname(), flush=True); c = s.accept()[0]; c.sendall(b'hi')"
    for rule, ask in (
        ("0.0.0.0:80=ep-front", f"socket.create_connection(('{HOST4}', 8125), 3)"),
        ("0.0.0.0:80=ep-path", f"socket.socket(socket.AF_UNIX); s.settimeout(3); s.connect('{served.work / 'front.sock'}')"),
    ):
        process = served.spawn(alone, "run", "-i", rule, *python(code), stdout=-1)
        assert process.stdout.readline() == "('0.0.0.0', 80)\n", rule
        assert served.host(*python(f"import socket; s = {ask}; print(s.recv(9))")).stdout == "b'hi'\n", rule
        assert process.wait(10) == 0
    served.graft("endpoint", "del", "ep-front", check=True)
    served.graft("endpoint", "del", "ep-path", check=True)


def test_a_server(served):
    code = "import socket; s = socket.socket(); s.bind(('0.0.0.0', 80)); s.listen(); print(flush=True); s.accept()[0].sendall(b'hi')"
    process = served.spawn_graft("--name", "hi", "-p", "8124:80", *python(code), stdout=-1)
    process.stdout.readline()
    ask = f"import socket; print(socket.create_connection(('{HOST4}', 8124), 3).recv(9))"
    assert served.client(*python(ask)).stdout == "b'hi'\n"
    assert process.wait(10) == 0


@pytest.mark.parametrize(("closed", "left"), [("<&- 2>&-", "1"), ("<&-", "1 2"), ("2>&-", "0 1")])
def test_closed_descriptors(served, closed, left):
    """None of the program's own takes the place of one that the caller has closed."""
    for way in ("on", "off"):
        told = served.host("sh", "-c", f"{GRAFT} run sh -c 'ls /proc/$$/fd' {closed}", env={**served.env, "GRAFT_FRONT": way})
        assert (told.returncode, told.stdout.split()) == (0, left.split())


def test_a_graftd_that_is_stopped_is_waited_for(served):
    """And an interrupt meanwhile ends it, as any program."""
    pid = served.daemon_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        process = served.spawn_graft("true", stderr=subprocess.PIPE)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) in (-signal.SIGINT, 130)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert served.graft("run", "true").returncode == 0


@pytest.mark.alone
def test_it_is_fast(served):
    """It adds less than a third of what the program in Python does; in pairs, because machines differ."""
    took: dict[str, list[float]] = {"on": [], "off": []}
    for _ in range(15):
        for way, those in took.items():
            began = time.perf_counter()
            served.graft("run", "true", env={**served.env, "GRAFT_FRONT": way}, check=True)
            those.append(time.perf_counter() - began)
    assert sorted(took["on"])[7] < sorted(took["off"])[7] / 2
