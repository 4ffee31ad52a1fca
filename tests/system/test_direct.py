"""Direct containers: their programs make TCP and UDP sockets themselves, and what else there is belongs to them.

That everything means what it does in other containers is for the files of BOTH_MODES (tests/conftest.py) to show.
"""

import errno
import json
import os
import signal
import socket
import subprocess

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, wait_for
from graft.kernel import direct, linux
from graft.kernel.cgroup import cgroup2_root
from tests.conftest import in_cgroup, kill_graftd, python
from tests.system.told import Told

STEPS = """
import errno, os, socket, sys
def tell(call):
    try: print(call() or 'OK', flush=True)
    except OSError as e: print(errno.errorcode[e.errno], flush=True)
def reach(address, port):
    socket.create_connection((address, int(port)), 5).close()
def many(count):
    for _ in range(int(count)): kept.append(socket.socket())
def open_close(count):
    for n in range(int(count)):
        with socket.socket() as s:
            s.setblocking(False)
            s.connect_ex((sys.argv[1], 9000))
def drop():
    global listener, peer
    kept.clear()
    listener = peer = None
def listen(address, port):
    global listener
    listener = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET)
    kept.append(listener); listener.bind((address, int(port))); listener.listen()
def accept():
    global peer
    peer, _ = listener.accept()
def again(how):
    import struct
    family = peer.family
    libc = __import__('ctypes').CDLL(None, use_errno=True)
    if libc.connect(peer.fileno(), struct.pack('=H', 0) + bytes(26), 28): raise OSError(__import__('ctypes').get_errno(), '')
    if how == 'bind': peer.bind(('0.0.0.0', 0) if family == socket.AF_INET else ('::', 0))
    if how == 'connect': peer.connect((sys.argv[1] if family == socket.AF_INET else '::ffff:' + sys.argv[1], 9000))
    if how == 'listen': peer.listen()
def cookie():
    return int.from_bytes(socket.socket().getsockopt(socket.SOL_SOCKET, 71, 8), 'little')
def devices():
    return ','.join(line.split(':')[0].strip() for line in open('/proc/net/dev').readlines()[2:])
kept = []
print('up', flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    tell(lambda: globals()[word](*rest))
"""


class Program(Told):
    """A direct container that does one thing at a time, when it is told."""

    def __init__(self, lab, *options):
        super().__init__(lab, STEPS.replace("sys.argv[1]", repr(CLIENT4)), "--direct", *options)
        assert self.hear() == "up"


@pytest.fixture
def server(lab):
    """The client machine's server at port 9000."""
    lab.spawn(*python("import socket; s = socket.create_server(('0.0.0.0', 9000))\nwhile True: s.accept()[0].close()"), client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :9000").stdout, "the server")


def inspect(lab, name):
    return json.loads(lab.graft("inspect", name, check=True).stdout)


def attached(lab, name):
    """The programs that are attached to a container's cgroup, their ids by their names."""
    cgroup = direct.directory_of(inspect(lab, name)["cgroup"])
    done = subprocess.run(("bpftool", "-j", "cgroup", "show", cgroup), capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    found = {entry["name"]: entry["id"] for entry in shown}
    assert len(found) == len(shown), "each is there once"
    return found


def calls(lab):
    from graft.client import exchange

    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(lab.run_dir / "graftd.sock"))
        return exchange(sock, "status", {})["calls"]


def test_its_sockets_are_not_trapped(lab, server):
    program = Program(lab, "--name", "web")
    before = calls(lab)
    for _ in range(20):
        assert program.does("reach", CLIENT4, 9000) == "OK"
    assert calls(lab) == before
    assert "direct" in lab.graft("ps").stdout
    assert inspect(lab, "web")["cgroup"].endswith("-web")
    program.end()


def test_where_it_lives(lab):
    """In the host's netns, with its own behind it; in a cgroup, which ends with it."""
    program = Program(lab, "--name", "web")
    found = inspect(lab, "web")
    home = os.stat(f"/run/netns/{lab.host_ns}").st_ino
    assert linux.netns_inode(found["pid"]) == home != found["netns"]
    assert os.stat(found["netns_path"]).st_ino == found["netns"]
    cgroup = direct.directory_of(found["cgroup"])
    assert found["pid"] in direct.processes(cgroup)
    assert program.does("devices") == "lo"
    inner = lab.host("nsenter", f"--net={found['netns_path']}", *python("import socket; print(int.from_bytes(socket.socket().getsockopt(1, 71, 8), 'little'))"))
    assert program.does("cookie") == inner.stdout.strip()
    slices = lab.host("ip", "-6", "-o", "address", "show", "dev", "lo", "to", "fd67:7261:6674::/64").stdout
    assert slices.count("fd67:7261:6674:") == 1
    program.end()
    wait_for(lambda: not cgroup.exists(), "the end of the cgroup")
    shows = ("ip", "-6", "-o", "address", "show", "dev", "lo", "to", "fd67:7261:6674::/64")
    wait_for(lambda: not lab.host(*shows).stdout, "the end of its address")
    wait_for(lambda: not (lab.run_dir / "net" / str(found["id"])).exists(), "the end of its links")


def test_nobody_outside_reaches_the_address_of_its_loopback(lab):
    """It is there to be bound, and a route of the host's alone leads there."""
    program = Program(lab, "--name", "web")
    shown = json.loads(lab.host("ip", "-6", "-j", "address", "show", "dev", "lo").stdout)[0]["addr_info"]
    (address,) = (entry["local"] for entry in shown if entry["local"].startswith("fd67"))
    lab.client("ip", "-6", "route", "add", "fd67:7261:6674::/64", "via", "2001:db8:77::1", check=True)
    try:
        code = f"import socket; print(socket.socket(socket.AF_INET6).connect_ex(({address!r}, 1)))"
        refused = lab.client(*python("import socket; socket.setdefaulttimeout(1); " + code), check=True)
        assert int(refused.stdout) in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EAGAIN, errno.EACCES), refused
    finally:
        lab.client("ip", "-6", "route", "del", "fd67:7261:6674::/64")
    program.end()


def test_its_sockets_are_counted(lab, server):
    """Whether they are closed, refused, accepted or disconnected: the number is that of what is open."""
    program = Program(lab, "--name", "web", "--limit", "sockets=40", "-p", "8080:80")
    open_before = inspect(lab, "web")["limits"]["sockets"]["used"]
    assert program.does("many", 30) == "OK"
    assert inspect(lab, "web")["limits"]["sockets"]["used"] == open_before + 30
    assert program.does("many", 30) == "ENFILE"
    assert program.does("drop") == "OK"
    assert program.does("open_close", 2000) == "OK"
    assert program.does("listen", "0.0.0.0", 80) == "OK"
    flood = f"import socket\nfor _ in range(500): socket.create_connection(({HOST4!r}, 8080), 5).close()"
    client = lab.spawn(*python(flood), client=True)
    for _ in range(300):
        assert program.does("accept") == "OK"
    assert inspect(lab, "web")["limits"]["sockets"]["used"] == open_before + 1
    lab.end(client)
    assert program.does("drop") == "OK"
    wait_for(lambda: inspect(lab, "web")["limits"]["sockets"]["used"] == open_before, "all to be given back")
    program.end()


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
@pytest.mark.parametrize("how", ["bind", "connect", "listen"])
def test_an_accepted_socket_is_no_made_one(lab, server, address, how):
    """It has no stamp either, and may not begin anew."""
    program = Program(lab, "--name", "web", "-p", "8080:80")
    assert program.does("listen", address, 80) == "OK"
    client = lab.spawn(*python(f"import socket, time; s = socket.create_connection(({HOST4!r}, 8080)); time.sleep(30)"), client=True)
    assert program.does("accept") == "OK"
    assert program.does("again", how) in ("EPERM", "EADDRNOTAVAIL", "EACCES", "EINVAL")
    lab.end(client)
    program.end()


def test_joined_by_name_and_by_pid(lab):
    program = Program(lab, "--name", "web")
    assert program.does("listen", "127.0.0.1", 80) == "OK"
    ask = python("import socket; socket.create_connection(('127.0.0.1', 80), 5); print('reached')")
    for name in ("web", inspect(lab, "web")["pid"]):
        assert lab.graft("run", "--direct", "--netns", name, *ask).stdout == "reached\n"
    lab.refused((GRAFT, "run", "--netns", "web", "true"), 1, "container 'web' is direct")
    assert program.does("devices") == "lo"
    program.end()


def test_a_container_that_is_not_direct_is_not_joined_so(lab):
    lab.spawn_graft("--name", "trap", "sleep", "30", env={**lab.env, "GRAFT_DIRECT": "off"})
    wait_for(lambda: "trap" in lab.containers(), "the container")
    lab.refused((GRAFT, "run", "--direct", "--netns", "trap", "true"), 1, "container 'trap' is not direct")


def test_proc_net_after_graft_sup_has_died(lab):
    """It is that of graft-sup, which is the container's process in its own netns."""
    program = Program(lab, "--name", "web")
    (pid,) = lab.helper_pids()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: program.does("devices") == "lo", "another one")
    program.end()


def test_a_netns_of_its_own_is_free(lab):
    """A sandbox inside the container makes one; its sockets are none of graft's."""
    code = (
        "import socket, subprocess, sys; subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True); s = socket.socket();"
        "s.bind(('127.0.0.1', 80)); s.listen(); c = socket.create_connection(('127.0.0.1', 80)); print(c.getpeername());"
        "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.9.9.9', 53)); print(u.getsockname());"
        "a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))"
    )
    done = lab.graft("run", "--direct", "unshare", "-n", *python(code))
    assert done.stdout.splitlines() == ["('127.0.0.1', 80)", "('127.9.9.9', 53)", "b'x'"], done.stderr


def test_sysctls_that_options_carry(lab):
    """Its sockets are trapped then, because the options are set on each."""
    code = "import socket; s = socket.socket(); print(s.getsockopt(6, socket.TCP_KEEPIDLE))"
    done = lab.graft("run", "--direct", "--sysctl", "net.ipv4.tcp_keepalive_time=77", *python(code))
    assert done.stdout == "77\n", done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--direct", "--accel"), "--accel spares the trap of socket(), and with --direct there is none"),
        (("--direct=on",), "--direct"),
    ],
)
def test_usage(lab, options, text):
    lab.refused((GRAFT, "run", *options, "true"), 2, text)


def test_a_default_that_is_wrong(lab):
    lab.refused((GRAFT, "run", "true"), 2, "GRAFT_DIRECT=maybe is unknown (on or off)", env={**lab.env, "GRAFT_DIRECT": "maybe"})


def test_no_wrapper_inside(lab):
    lab.refused(
        (GRAFT, "run", "--direct", GRAFT, "-i", "0.0.0.0:80=ep", "--", "true"), 1, "a direct container's programs make their sockets"
    )


def test_orders_come_from_outside(lab):
    """It lives in the host's netns, and shares its files; graftd knows it by its cgroup."""
    lab.refused((GRAFT, "run", "--direct", GRAFT, "ps"), 1, "processes inside a graft container may not use the admin socket")
    lab.refused((GRAFT, "run", "--direct", GRAFT, "run", "true"), 1, "processes inside a graft container")


def test_a_threaded_cgroup(lab):
    """It can have no cgroup of a container's below it."""
    threaded = cgroup2_root() / f"{lab.tag}-threaded"
    (threaded / "inner").mkdir(parents=True)
    try:
        (threaded / "inner" / "cgroup.type").write_text("threaded")
        lab.refused(in_cgroup(threaded, GRAFT, "run", "--direct", "true"), 1, "is threaded")
    finally:
        (threaded / "inner").rmdir()
        threaded.rmdir()


def test_a_cgroup_that_a_killed_graftd_has_left(lab):
    left = cgroup2_root() / f"{lab.tag}-web"
    left.mkdir()
    program = Program(lab, "--name", "web")
    program.end()
    wait_for(lambda: not left.exists(), "its end")


def test_it_is_in_its_callers_cgroup(lab):
    """Whose limits hold on."""
    outer = cgroup2_root() / f"{lab.tag}-outer"
    outer.mkdir()
    try:
        process = lab.spawn(*in_cgroup(outer, GRAFT, "run", "--direct", "--name", "web", "sleep", "30"))
        wait_for(lambda: "web" in lab.containers(), "the container")
        assert inspect(lab, "web")["cgroup"] == f"/{lab.tag}-outer/{lab.run_dir.name}-web"
        lab.end(process)
        wait_for(lambda: "web" not in lab.containers(), "its end")
    finally:
        wait_for(lambda: not list(outer.glob("*/cgroup.procs")), "the cgroup's end")
        outer.rmdir()


# -- what happens to graft's processes --


def test_all_killed_and_none_started_again(own_lab):
    """Sockets go on being made, and policed; calls that wait for an answer fail, as when no supervisor is left."""
    lab = own_lab
    lab.spawn(*python("import socket; s = socket.create_server(('0.0.0.0', 9000))\nwhile True: s.accept()[0].close()"), client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :9000").stdout, "the server")
    program = Program(lab, "--name", "out", "--limit", "sockets=60")
    closed = Program(lab, "--name", "closed", "--egress", "none")
    helpers = lab.helper_pids()
    assert len(helpers) == 2
    kill_graftd(lab, *helpers)
    for _ in range(100):
        assert program.does("reach", CLIENT4, 9000) == "OK"
        assert closed.does("reach", CLIENT4, 9000) == "ENETUNREACH"
    assert program.does("many", 100) == "ENFILE"
    assert program.does("drop") == "OK"
    assert program.does("reach", "127.0.0.1", 1) == "ECONNREFUSED"
    assert program.does("listen", "127.0.0.1", 80) == "ENOSYS"
    lab.graft("run", "true", check=True)
    assert closed.does("reach", CLIENT4, 9000) == "ENETUNREACH"
    assert program.does("reach", CLIENT4, 9000) == "OK"
    program.end()
    closed.end()


def test_graftd_is_killed_and_started_again(own_lab):
    """The next one finds the policy attached, and goes on."""
    lab = own_lab
    program = Program(lab, "--name", "web", "-p", "8080:80")
    before = lab.daemon_pid()
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: lab.daemon_pid() not in (0, before), "another graftd")
    assert program.does("listen", "0.0.0.0", 80) == "OK"
    assert program.does("devices") == "lo"
    assert lab.client(*python(f"import socket; socket.create_connection(({HOST4!r}, 8080), 5)")).returncode == 0
    lab.graft("rule", "add", "web", "-p", "8081:81", check=True)
    assert program.does("listen", "0.0.0.0", 81) == "OK"
    assert "attached to its cgroup anew" not in (lab.run_dir / "graftd.log").read_text()
    program.end()


def test_programs_that_somebody_takes_away_are_attached_again(own_lab):
    lab = own_lab
    program = Program(lab, "--name", "web", "--egress", "none")
    cgroup = direct.directory_of(inspect(lab, "web")["cgroup"])
    number = attached(lab, "web")["graft_connect4"]
    subprocess.run(("bpftool", "cgroup", "detach", cgroup, "cgroup_inet4_connect", "id", str(number)), check=True)
    wait_for(lambda: program.does("reach", CLIENT4, 9000) == "ENETUNREACH", "the policy")
    told = "the policy was attached to its cgroup anew"
    wait_for(lambda: told in (lab.run_dir / "graftd.log").read_text(), "graftd tells it, a moment later")
    program.end()


def test_what_listeners_need_is_attached_with_the_first(own_lab):
    """Five times it would run for each connection; graftd, an administrator and another graftd leave it as it is to be."""
    lab = own_lab
    web, client = Program(lab, "--name", "web", "-p", "8080:80"), Program(lab, "--name", "client")
    cgroup = direct.directory_of(inspect(lab, "web")["cgroup"])
    assert "graft_sockops" not in attached(lab, "web")
    assert web.does("listen", "127.0.0.1", 90) == "OK"
    number = attached(lab, "web")["graft_sockops"]
    subprocess.run(("bpftool", "cgroup", "detach", cgroup, "cgroup_sock_ops", "id", str(number)), check=True)
    wait_for(lambda: "graft_sockops" in attached(lab, "web"), "it is attached anew")
    before = lab.daemon_pid()
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: lab.daemon_pid() not in (0, before), "another graftd")
    assert client.does("reach", CLIENT4, 9000) == "ECONNREFUSED"
    assert web.does("listen", "0.0.0.0", 80) == "OK"
    assert lab.client(*python(f"import socket; socket.create_connection(({HOST4!r}, 8080), 5)")).returncode == 0
    assert "graft_sockops" in attached(lab, "web")
    assert "graft_sockops" not in attached(lab, "client")
    web.end()
    client.end()


# -- out of its cgroup, and at doors of the host --


def test_a_process_that_the_host_has_moved_makes_no_socket(lab):
    """As a service manager does that gives a login its own cgroup: there is no policy."""
    program = Program(lab, "--name", "web")
    elsewhere = cgroup2_root() / f"{lab.tag}-elsewhere"
    elsewhere.mkdir()
    try:
        (elsewhere / "cgroup.procs").write_text(str(inspect(lab, "web")["pid"]))
        assert program.does("many", 1) == "EPERM"
        refused = {(entry["op"], entry["reason"]): entry["count"] for entry in inspect(lab, "web")["refused"]}
        assert refused == {("socket", "a process moved out of its container's cgroup"): 1}
        (direct.directory_of(inspect(lab, "web")["cgroup"]) / "cgroup.procs").write_text(str(inspect(lab, "web")["pid"]))
        assert program.does("many", 1) == "OK"
        program.end()
    finally:
        wait_for(lambda: not (elsewhere / "cgroup.procs").read_text(), "its end")
        elsewhere.rmdir()


def test_a_users_cgroup_is_no_place_for_it(lab):
    """Who may write there could move its processes out."""
    users = cgroup2_root() / f"{lab.tag}-users"
    (users / "app").mkdir(parents=True)
    os.chown(users / "cgroup.procs", 65534, -1)
    try:
        process = lab.spawn(*in_cgroup(users / "app", GRAFT, "run", "--direct", "--name", "web", "sleep", "30"))
        wait_for(lambda: "web" in lab.containers(), "the container")
        assert inspect(lab, "web")["cgroup"] == f"/{lab.run_dir.name}-web"
        lab.end(process)
        wait_for(lambda: "web" not in lab.containers(), "its end")
    finally:
        (users / "app").rmdir()
        users.rmdir()


def test_a_socket_is_never_without_its_stamp(lab):
    """It gets it at its first call that has something to note, while another thread connects."""
    lab.spawn(*python("import socket; s = socket.create_server(('127.0.0.1', 9100))\nwhile True: s.accept()"))
    wait_for(lambda: lab.host("ss", "-tlnH", "sport = :9100").stdout, "the host's server")
    code = """
import socket, threading
at, go, reached = [None], threading.Barrier(2), 0
def note():
    while True:
        go.wait(); s = at[0]
        if s is None: return
        try: s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        except OSError: pass
        go.wait()
threading.Thread(target=note).start()
for _ in range(5000):
    at[0] = socket.socket(); go.wait()
    reached += not at[0].connect_ex(('127.0.0.1', 9100))
    go.wait(); at[0].close()
at[0] = None; go.wait(); print(reached)
"""
    done = lab.graft("run", "--direct", *python(code))
    assert done.stdout == "0\n", done.stderr


def test_a_supervisor_alone_comes_back(own_lab):
    """graft-sup lives in the container's netns, and is heard all the same when it has lost its graftd."""
    lab = own_lab
    program = Program(lab, "--name", "web")
    kill_graftd(lab)
    program.say("listen", "127.0.0.1", 80)
    lab.graft("run", "true", check=True)
    assert program.hear() == "OK"
    assert program.does("devices") == "lo"
    program.end()


def test_every_procfs_and_every_cgroup2(lab):
    """Other mounts of them are no way past."""
    there = lab.work / "there"
    script = (
        f"mkdir -p {there}/proc {there}/cgroup; mount -t proc proc {there}/proc; mount --bind {cgroup2_root()} {there}/cgroup;"
        f"exec {GRAFT} run --direct sh -c '"
        f"echo 1 2>/dev/null >{there}/proc/sys/net/ipv4/ip_forward || echo refused; ls {there}/cgroup | grep -c ^{lab.tag}'"
    )
    done = lab.host("unshare", "-m", "sh", "-c", script)
    assert done.stdout == "refused\n0\n", done.stderr


PORTS_AGAIN = """
import socket, sys
with socket.socket() as server:
    server.bind(('0.0.0.0', 80))
    server.listen()
print('served', flush=True)
sys.stdin.readline()
for _ in range(10):
    with socket.create_connection((sys.argv[1], 9000), 5) as client:
        print(client.getsockname()[1], flush=True)
"""


def test_the_port_of_a_connection_out_is_no_servers(own_lab):
    """The kernel gives it a port that a server of the container had, which has been closed."""
    own_lab.spawn("python3", "-m", "http.server", "9000", client=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: own_lab.host("bash", "-c", f": < /dev/tcp/{CLIENT4}/9000", check=False).returncode == 0, "server")
    program = own_lab.spawn_graft(
        "--direct", "-p", "40001:80", *python(PORTS_AGAIN), CLIENT4, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdout.readline() == "served\n"
    own_lab.host("sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40009")
    out, _ = program.communicate("go\n", timeout=30)
    ports = {int(line) for line in out.split()}
    assert 40001 in ports
    assert min(ports) >= 40000
