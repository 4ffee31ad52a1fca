"""What an ordinary user tries at the user socket, and from inside a container of theirs, against root and the others.

alice has a container, bob is hostile; then alice's own container is. Each attack is answered by a refusal, and the
others are served as before.
"""

import json
import os
import shutil
import socket
import time

import pytest

from graft.bench.lab import GRAFT, wait_for
from graft.client import exchange
from graft.daemon.users import CHANGING, OF_ENGINES, READING
from graft.protocol import AdminRequest
from tests.conftest import need, need_root, python
from tests.users import UIDS, program, users_laboratory

REFUSED = {"EPERM", "EACCES", "ENOENT", "EINVAL", "ESRCH", "EOF", "EPROTO", "EEXIST", "EADDRINUSE", "ENOSPC", ""}


@pytest.fixture(scope="module")
def users():
    need_root()
    need("setpriv", "newuidmap", "ss")
    with users_laboratory("hostile") as lab:
        lab.start_daemon()
        wait_for(lambda: "tentative" not in lab.host("ip", "-o", "address").stdout, "addresses that stay as they are")
        yield lab


def alices(users, *options):
    code = "import socket; s = socket.create_server(('127.0.0.1', 5000)); print('up', flush=True); s.accept()"
    process = users.spawn_by("alice", "--name", "svc", *options, *python(code), stdout=-1)
    assert process.stdout.readline() == "up\n"
    return process


@pytest.fixture(scope="module")
def victim(users):
    process = alices(users, "-p", "8200:5000")
    yield next(c for c in json.loads(users.graft("ps", "-j").stdout) if c["name"] == "svc@alice")
    assert process.poll() is None, "alice's container has ended"
    users.end(process)


def tries(users, user, code, *words, **options):
    """The codes that @code prints as @user."""
    done = users.host(*users.command(user, *program(code), *words), **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def state(users):
    """What graftd knows, and what listens on the host."""
    shown = asked(users, "inspect", name="svc@alice")
    for changing in ("refused", "last_refused", "limits"):
        shown.pop(changing, None)
    listening = sorted(" ".join(line.split()) for line in users.host("ss", "-tulnH").stdout.splitlines())
    endpoints = asked(users, "endpoint-show", netns=str(users.daemon_pid()))
    return shown, listening, endpoints, users.host("ip", "-o", "address").stdout


def asked(users, order, **fields):
    """What root is told at the admin socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(users.run_dir / "graftd.sock"))
        return exchange(sock, order, fields)


@pytest.fixture
def unharmed(users, victim):
    before = state(users)
    yield
    assert state(users) == before


OTHERS = {
    "its rules by name": {"op": "rule-show", "netns": "svc@alice"},
    "its rules by the short name": {"op": "rule-show", "netns": "svc"},
    "its rules by pid": {"op": "rule-show", "netns": "PID"},
    "its rules by path": {"op": "rule-show", "netns": "/proc/PID/ns/net"},
    "the rules of process 1": {"op": "rule-show", "netns": "1"},
    "a port for it": {"op": "rule-add", "netns": "svc@alice", "publish": ["8201:5000"]},
    "its port taken": {"op": "rule-del", "netns": "PID", "publish": ["8200:5000"]},
    "its port moved": {"op": "rule-move", "source": "svc@alice", "target": "mine", "publish": ["8200:5000"]},
    "its port moved by pid": {"op": "rule-move", "source": "PID", "target": "PID", "publish": ["8200:5000"]},
    "an endpoint of its moved": {"op": "endpoint-move", "source": "PID", "target": "mine", "name": "tcp-8200"},
    "an endpoint in its table": {"op": "endpoint-add", "netns": "PID", "endpoints": [{"name": "e", "words": ["type", "ipv4", "addr", "10.77.0.1"]}]},
    "an endpoint of its table deleted": {"op": "endpoint-del", "netns": "svc@alice", "names": ["tcp-8200"]},
    "its table": {"op": "endpoint-show", "netns": "PID"},
    "a look at it": {"op": "inspect", "name": "svc@alice"},
    "a look at its pid": {"op": "inspect", "name": "PID"},
    "a name with a user": {"op": "inspect", "name": "svc@alice@bob"},
    "an endpoint of the host's deleted": {"op": "endpoint-del", "names": ["hosts"]},
    "a low endpoint": {"op": "endpoint-add", "endpoints": [{"name": "e", "words": ["type", "ipv4", "addr", "10.77.0.1", "port", "22"]}]},
    "an endpoint in a netns": {"op": "endpoint-add", "endpoints": [{"name": "e", "words": ["type", "ipv4", "addr", "10.77.0.1", "netns", "1"], "netns": 0}]},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_anothers(users, victim, unharmed, what):
    wish = json.dumps(OTHERS[what]).replace("PID", str(victim["pid"]))
    assert set(tries(users, "bob", "told(order(**json.loads(sys.argv[1])))", wish)) <= REFUSED


def tags():
    return {kind.__struct_config__.tag: kind for kind in AdminRequest.__subclasses__()}


@pytest.mark.parametrize("op", sorted(set(tags()) - {kind.__struct_config__.tag for kind in READING + CHANGING + OF_ENGINES} - {"hello"}))
def test_orders_that_are_roots(users, unharmed, op):
    """Each request of the admin socket that the user socket has not, whatever is in it."""
    samples: dict[str, dict[str, object]] = {
        "bundle": {"bundle": "/tmp", "id": "x"}, "hook": {"config": {}}, "exec": {"id": "x", "process": {}}, "start": {"id": "x"},
        "begin": {"metadata": "{}", "state": {"id": "x"}}, "attach": {"key": "k", "network": "n"}, "attached": {"key": "k"},
        "detach": {"key": "k"}, "stop": {"force": True}, "dashboard": {"at": "127.0.0.1:0"}, "plan": {"words": ""},
    }  # fmt: skip
    wish = json.dumps(dict(op=op, **samples.get(op, {})))
    assert tries(users, "bob", "told(order(**json.loads(sys.argv[1])))", wish) == ["EPERM"]


def test_no_hello_no_order(users, unharmed):
    code = "told(exchange(connect(), op='ps'))\ns = connect(); exchange(s, op='hello'); told(exchange(s, op='ps')); print(len(s.recv(9)))"
    assert tries(users, "bob", code)[0] != "OK"


@pytest.mark.parametrize("door", ["graftd", "helpers"])
def test_other_doors_are_closed(users, unharmed, door):
    """Also to a user that is root in its own namespace."""
    code = f"own_netns()\ntry: connect({door!r}); print('OPEN')\nexcept PermissionError: print('CLOSED')"
    assert tries(users, "bob", code) == ["CLOSED"]


def test_root_of_ones_own_namespace_is_the_user(users, victim, unharmed):
    code = "own_netns(); assert os.getuid() == 0\nprint(*(c['name'] for c in order(op='ps')['ok']), 'end')\ntold(order(op='inspect', name='svc'))"
    assert tries(users, "bob", code) == ["end", "ENOENT"]


RUN = "s = connect(); exchange(s, op='hello')\nfd = listener()\ntold(exchange(s, [fd], op='run'))"
def test_in_the_hosts_netns(users, unharmed):
    assert tries(users, "bob", RUN) == ["EPERM"]


def test_in_a_netns_of_roots(users, unharmed):
    code = program(RUN)
    done = users.host("unshare", "--net", *users.command("bob", *code))
    assert done.stdout == "EPERM\n", done.stderr


def test_in_a_netns_of_anothers(users, unharmed):
    """bob's process in a namespace of alice's, who has let it in (by a set-user-ID helper, say)."""
    code = program(RUN)
    holder = users.spawn(*users.command("alice", "unshare", "--user", "--net", "sleep", "60"))
    wait_for(lambda: os.stat(f"/proc/{holder.pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino, "its netns")
    wait_for(lambda: os.readlink(f"/proc/{holder.pid}/exe").endswith("sleep"), "sleep")
    done = users.host("nsenter", f"--net=/proc/{holder.pid}/ns/net", *users.command("bob", *code))
    assert done.stdout == "EPERM\n", done.stderr
    users.end(holder)


WISHES = {
    "direct": ("direct", "on"),
    "an address": ("ip", ["10.77.0.9"]),
    "the host's address": ("ip", ["10.77.0.1"]),
    "a low port": ("publish", ["22:22"]),
    "a low port in a range": ("publish", ["1000-1100:1000-1100"]),
    "a port of alice's": ("publish", ["8200:1"]),
    "a port of alice's at one address": ("publish", ["10.77.0.1:8200:1"]),
    "an endpoint of nobody's": ("egress", ["0.0.0.0/0=hosts"]),
    "an endpoint of alice's": ("ingress", ["0.0.0.0:80=tcp-8200"]),
    "a resolver that is none": ("resolver", ["10.77.0.2"]),
}


@pytest.mark.parametrize("what", WISHES)
def test_what_nobody_has_granted(users, victim, unharmed, what):
    field, value = WISHES[what]
    code = """
from graft.rules.request import Request
s = connect(); exchange(s, op='hello'); own_netns(); fd = listener()
fds = [fd] + ([os.open('/proc/self/ns/net', 0)] if sys.argv[1] == 'direct' else [])
wish = {sys.argv[1]: json.loads(sys.argv[2])}
told(exchange(s, fds, op='run', argv=['x'], request=list(Request(**wish))))
"""
    assert set(tries(users, "bob", code, field, json.dumps(value))) <= REFUSED - {"EOF"}
    assert not json.loads(users.by("bob", "ps", "-j").stdout)


@pytest.mark.parametrize("name", ["svc@alice", "@alice", "a/b", "../x", "", "1", "x" * 65, "a\nb"])
def test_names(users, unharmed, name):
    code = "s = connect(); exchange(s, op='hello'); own_netns(); fd = listener()\ntold(exchange(s, [fd], op='run', name=sys.argv[1]))"
    assert set(tries(users, "bob", code, name)) <= {"", "EINVAL", "EEXIST"}


@pytest.mark.parametrize("what", ["/dev/null", "/proc/self/ns/net", "/proc/self/mem", "none", "three"])
def test_descriptors_that_are_none(users, unharmed, what):
    code = """
s = connect(); exchange(s, op='hello'); own_netns()
fds = {'none': [], 'three': [0, 1, 2]}.get(sys.argv[1]) if sys.argv[1] in ('none', 'three') else [os.open(sys.argv[1], 0)]
told(exchange(s, fds, op='run'))
"""
    assert set(tries(users, "bob", code, what)) <= REFUSED


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"op": "run"}', '{"op": "hello", "version": 7}', "[" * 5000, '{"op":"ps","x":1}', "\\xff\\xfe"])
def test_malformed(users, unharmed, text):
    code = "s = connect(); s.sendall(eval(repr(sys.argv[1])).encode() + b'\\n'); told(json.loads(s.recv(65536) or b'{\"error\": {\"code\": \"EOF\"}}'))"
    assert tries(users, "bob", code, text) != ["OK"]


def test_a_message_without_end(users, unharmed):
    code = """
s = connect(); sent = 0
try:
    while sent < 1 << 24: sent += s.send(b'{' * 65536)
except (BrokenPipeError, ConnectionResetError): pass
print(sent < 1 << 23)
"""
    assert tries(users, "bob", code) == ["True"]


def test_ten_thousand_connections(users, unharmed):
    """They count against who makes them: the others are served meanwhile."""
    code = """
import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
kept = []
for n in range(10000):
    s = socket.socket(socket.AF_UNIX); s.settimeout(5)
    try: s.connect(f'{RUN}/user.sock'); kept.append(s)
    except OSError: pass
    if n == 3000: print('up', flush=True)
    if len(kept) > 3000: kept.pop(0).close()
print('done', flush=True); time.sleep(60)
"""
    flood = users.spawn(*users.command("bob", *program(code)), stdout=-1)
    assert flood.stdout.readline() == "up\n"
    for user in ("alice", "carol"):
        began = time.monotonic()
        assert users.by(user, "run", "true").returncode == 0
        assert time.monotonic() - began < 20
    assert users.graft("ps").returncode == 0
    users.end(flood)
    wait_for(lambda: users.by("bob", "ps").returncode == 0, "bob's own share")


FILTERS = {
    "everything": "[(0x06, 0, 0, 0x7fc00000)]",
    "socket": "[(0x20, 0, 0, 0), (0x15, 0, 1, 41), (0x06, 0, 0, 0x7fc00000), (0x06, 0, 0, 0x7fff0000)]",
}


@pytest.mark.parametrize("what", FILTERS)
def test_listeners_of_other_filters(users, unharmed, what):
    """Of a filter that traps every call, which nobody answers as it wants, and one whose owner takes the calls."""
    code = f"""
s = connect(); exchange(s, op='hello'); own_netns(); ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
r, w = os.pipe(); child = os.fork()
if not child:
    import fcntl
    ours, theirs = socket.socketpair()
    program = b''.join(struct.pack('=HBBI', *i) for i in {FILTERS[what]})
    from graft.kernel import linux
    pid = os.fork()
    if not pid:
        prog = linux.sock_fprog(len(program) // 8, program)
        libc = linux.libc
        fd = libc.syscall(linux.NR_SECCOMP, 1, 8, ctypes.byref(prog))
        os._exit(0)
    os.write(w, b'1'); time.sleep(1); os.kill(pid, 9); os._exit(0)
os.read(r, 1); fd = listener()
told(exchange(s, [fd], op='run'))
print(socket.socket().fileno() >= 0)
"""
    assert tries(users, "bob", code)[0] in ("OK", "EPERM")


def test_a_listener_whose_owner_takes_the_calls(users, unharmed):
    """Who keeps a copy of the listener can receive first; graftd's loop does not wait for it."""
    code = """
s = connect(); exchange(s, op='hello'); own_netns(); fd = listener()
copy = os.dup(fd)
told(exchange(s, [fd], op='run'))
import fcntl, threading
def take():
    buffer = bytearray(80)
    for _ in range(50):
        try: fcntl.ioctl(copy, 0xc0502100, buffer)
        except OSError: pass
threading.Thread(target=take, daemon=True).start()
threading.Thread(target=lambda: [socket.socket() for _ in range(20)], daemon=True).start()
time.sleep(2)
os._exit(0)
"""
    began = time.monotonic()
    assert tries(users, "bob", code) == ["OK"]
    assert time.monotonic() - began < 20


INSIDE = {
    "orders": "told(order(op='ps'))",
    "a port more": "told(order(op='rule-add', netns='cell', publish=['8300:80']))",
    "another container": "told(order([0], op='run'))",
    "by the agent socket": "s = connect('agent'); s.sendall(json.dumps(dict(ociVersion='1', fds=[], pid=1, metadata='', state=dict(id='x', pid=1))).encode()); told(json.loads(s.recv(9999) or b'{\"error\": {\"code\": \"EOF\"}}'))",
    "from a namespace in it": "own_netns(); told(order(op='ps'))",
    "from a netns in it": "own_netns(); told(order(op='rule-add', netns='cell', publish=['8300:80']))",
}


@pytest.mark.parametrize("user", ["0", "own"])
@pytest.mark.parametrize("what", INSIDE)
def test_a_container_gives_no_orders(users, unharmed, what, user):
    """Whose egress is none, and who would like to have more."""
    options = ("--user", "0") if user == "0" else ()
    done = users.by("bob", "run", "--name", "cell", "--egress", "none", *options, *program(INSIDE[what]))
    assert done.stdout in ("EPERM\n", "EACCES\n", "EINVAL\n"), done.stdout + done.stderr


HOSTS = {
    "the host's netns": "setns(f'/proc/{pid}/ns/net')",
    "the host's user namespace": "setns(f'/proc/{pid}/ns/user')",
    "a netns of alice's": "setns(f'/proc/{victim}/ns/net')",
    "the memory of graft-sup": "os.open(f'/proc/{sup}/mem', os.O_RDWR)",
    "a descriptor of graft-sup": "getfd(sup, 3)",
    "an end of graft-sup": "os.kill(sup, 9)",
    "an end of graftd": "os.kill(graftd, 9)",
    "an end of alice's": "os.kill(victim, 9)",
    "raw packets of the host": "packets()",
    "a sysctl of the host": "open(f'/proc/{pid}/root/proc/sys/kernel/core_pattern', 'w')",
    "the listener": "os.open(f'/proc/{sup}/fd/4', os.O_RDWR)",
    "a cgroup of graftd's": "open(CGROUP + '/cgroup.procs', 'w').write(str(os.getpid()))",
    "a pin": "os.listdir(PINS)",
}


@pytest.mark.parametrize("what", HOSTS)
def test_root_in_a_container_of_ones_own(users, victim, unharmed, what):
    """--user 0 is root there, with every capability, and has nothing of the host's for it."""
    sup = next(p for p in users.helper_pids())
    code = f"""
pid, victim, sup, graftd = 1, {victim["pid"]}, {sup}, {users.daemon_pid()}
CGROUP, PINS = {str(users.cgroup())!r}, {str(users.pins())!r}
libc = ctypes.CDLL(None, use_errno=True)
def check(value):
    if value < 0: raise OSError(ctypes.get_errno(), '')
def setns(path): check(libc.setns(os.open(path, 0), 0))
def getfd(target, n): check(libc.syscall(438, os.pidfd_open(target), n, 0))
def packets():
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3); s.settimeout(1)
    seen = [name for _, name in socket.if_nameindex()]
    if set(seen) <= {{'lo', 'eth0'}}: raise PermissionError(1, '')
try: {HOSTS[what]}; print('OPEN')
except (PermissionError, FileNotFoundError, ProcessLookupError, IsADirectoryError): print('CLOSED')
except OSError as e: print(errno.errorcode[e.errno])
"""
    done = users.by("bob", "run", "--user", "0", *program(code))
    assert done.stdout in ("CLOSED\n", "EINVAL\n"), done.stdout + done.stderr


def test_a_set_user_id_program_is_nobody_special(users, unharmed):
    """A file of root's with the bit gives nothing in a namespace in which root has no number."""
    helper = users.work / "helper"
    shutil.copy("/usr/bin/id", helper)
    helper.chmod(0o4755)
    for options in ((), ("--user", "0"), ("--user", "33")):
        uid = {(): "2002", ("--user", "0"): "0", ("--user", "33"): "33"}[options]
        assert users.by("bob", "run", *options, helper, "-u").stdout == f"{uid}\n"
    assert users.by("bob", "run", "--user", "0", "sh", "-c", "echo x >/etc/graft-was-here").returncode != 0


def test_unix_endpoints_have_the_users_rights(users, unharmed):
    """A path that only root may connect to, or bind at, is closed to an endpoint as well."""
    path = users.work / "roots.sock"
    server = users.spawn(*python(f"import socket, os; os.umask(0o177); s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen(); print('up', flush=True); s.accept()"), stdout=-1)
    assert server.stdout.readline() == "up\n"
    closed = users.work / "closed"
    closed.mkdir(mode=0o700)
    users.by("bob", "endpoint", "add", "roots", "type", "unix", "path", path, check=True)
    users.by("bob", "endpoint", "add", "file", "type", "unix", "path", closed / "x.sock", check=True)
    ask = "import socket, errno\ntry: socket.create_connection(('10.9.9.9', 80), 5); print('OPEN')\nexcept OSError as e: print(errno.errorcode[e.errno])"
    assert users.by("bob", "run", "-e", "10.9.9.9/32=roots", *python(ask)).stdout == "EACCES\n"
    bind = "import socket, errno\ntry: socket.create_server(('0.0.0.0', 80)); print('OPEN')\nexcept OSError as e: print(errno.errorcode[e.errno])"
    assert users.by("bob", "run", "-i", "0.0.0.0:80=file", *python(bind)).stdout == "EACCES\n"
    assert not list(closed.iterdir())
    for name in ("roots", "file"):
        users.by("bob", "endpoint", "del", name, check=True)
    users.end(server)


def test_a_path_of_anothers_is_not_looked_at(users, unharmed):
    """graftd follows no link and asks no file system for a user: it tells nothing of what bob may not see."""
    secret = users.work / "secret"
    secret.mkdir(mode=0o700)
    (secret / "link").symlink_to("/root")
    for path in (secret / "link" / "x.sock", secret / "nothing" / "x.sock"):
        users.refused(users.command("bob", GRAFT, "endpoint", "add", "peek", "type", "unix", "path", path), 1, "endpoint 'peek'")
        answer = tries(users, "bob", "told(order(op='endpoint-add', endpoints=[dict(name='peek', words=['type', 'unix', 'path', sys.argv[1]])]))", path)
        assert answer == ["OK"]
        assert str(path) in users.by("bob", "endpoint", "show", "peek").stdout
        users.by("bob", "endpoint", "del", "peek", check=True)


def test_a_share_that_is_full_is_ones_own(users, unharmed):
    users.grant("[default]\ncontainers = 3\nslices = 4\n")
    full = [users.spawn_by("bob", "sleep", "60") for _ in range(3)]
    wait_for(lambda: len(json.loads(users.by("bob", "ps", "-j").stdout)) == 3, "three")
    users.refused(users.command("bob", GRAFT, "run", "true"), 1, "you have 3 containers, of 3 that are granted to you")
    assert users.by("carol", "run", "true").returncode == 0
    users.grant("")
    for process in full:
        users.end(process)


def test_a_port_of_a_program_of_the_same_user(users, unharmed):
    """SO_REUSEPORT is for sockets of one uid: a container's are of another than its user's programs are."""
    code = "import socket; s = socket.socket(); s.setsockopt(1, 15, 1); s.bind(('10.77.0.1', {port})); s.listen(); print('up', flush=True); s.accept()"
    outside = users.spawn(*users.command("bob", *python(code.format(port=8400))), stdout=-1)
    assert outside.stdout.readline() == "up\n"
    users.refused(users.command("bob", GRAFT, "run", "-p", "8400:80", "true"), 1, "in use")
    users.end(outside)
    inside = users.spawn_by("bob", "-p", "8401:8401", *python(code.replace("10.77.0.1", "0.0.0.0").format(port=8401)), stdout=-1)
    assert inside.stdout.readline() == "up\n"
    done = users.host(*users.command("bob", *python(code.format(port=8401))), timeout=20)
    assert "Address already in use" in done.stderr
    users.end(inside)


def test_a_namespace_that_others_join(users, unharmed):
    """What runs in a container's netns without its filter has sockets of that netns, which lead nowhere."""
    process = alices(users, "--name", "joined")
    pid = next(c["pid"] for c in json.loads(users.by("alice", "ps", "-j").stdout) if c["name"] == "joined")
    probe = "import socket, errno\ntry: socket.create_connection(('10.77.0.2', 9), 2); print('OPEN')\nexcept OSError as e: print(errno.errorcode[e.errno])"
    join = ("nsenter", f"--user=/proc/{pid}/ns/user", f"--net=/proc/{pid}/ns/net", "--preserve-credentials")
    assert users.host(*users.command("alice", *join, *python(probe))).stdout == "ENETUNREACH\n"
    assert users.host(*users.command("bob", *join, "true")).returncode != 0
    users.end(process)


def test_a_pid_that_is_anothers_by_now(users, victim, unharmed):
    """The end of a container frees its name and its pid: neither leads to what comes after."""
    process = users.spawn_by("bob", "--name", "brief", "sleep", "60")
    wait_for(lambda: "brief" in users.by("bob", "ps").stdout, "it")
    pid = next(c["pid"] for c in json.loads(users.by("bob", "ps", "-j").stdout))
    users.end(process)
    for name in ("brief", str(pid)):
        assert users.by("bob", "rule", "show", name).returncode == 1


def test_forged_metadata(users, unharmed):
    """What graftd seals for engines, with a seal that is a user's own work."""
    code = """
own_netns(); fd = listener()
wish = json.dumps(dict(publish=['8500:80'], seal='0' * 64, container='c', engine='podman'))
s = connect('agent')
socket.send_fds(s, [json.dumps(dict(ociVersion='1', fds=['seccompFd'], pid=os.getpid(), metadata=wish, state=dict(id='x', pid=1))).encode()], [fd])
told(json.loads(s.recv(65536)))
"""
    assert tries(users, "bob", code) == ["EPERM"]


def test_root_is_no_user(users, unharmed):
    """Nor is an id that is delegated to root, as those of its containers in user namespaces are."""
    assert users.host(*program("told(order(op='ps'))")).stdout == "EPERM\n"
    path = users.work / "subuid"
    before = path.read_text()
    path.write_text(f"{before}root:700000:65536\n")
    try:
        done = users.host("setpriv", "--reuid=700005", "--regid=700005", "--clear-groups", *program("print(order(op='status')['ok']['user'])"))
        assert done.stdout == "700005\n", done.stderr
    finally:
        path.write_text(before)


def test_rules_have_a_limit(users, unharmed):
    """They are entries of the kernel's maps, which all containers have in common."""
    many = [word for n in range(600) for word in ("-p", f"{20000 + n}:{n + 1}")]
    users.refused(users.command("bob", GRAFT, "run", *many, "true"), 1, "graft: 600 rules are too many (at most 512 without root)")
    process = users.spawn_by("bob", "--name", "full", *many[:1000], "sleep", "60")
    wait_for(lambda: "full" in users.by("bob", "ps").stdout, "it")
    users.refused(users.command("bob", GRAFT, "rule", "add", "full", *many[1000:1030]), 1, "graft: 515 rules are too many")
    users.end(process)


def test_there_are_enough():
    assert UIDS["bob"]
    assert len(OTHERS) + len(WISHES) + len(INSIDE) + len(HOSTS) >= 25
