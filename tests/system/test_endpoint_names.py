"""NAME.graft: programs that know nothing of graft connect and bind to endpoints of their namespace's table, by name."""

import contextlib
import subprocess
import uuid
from functools import partial

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, HOST6, ROOT, SECOND4, wait_for
from graft.rules.endpoint import EndpointWords, make_endpoint
from graft.rules.endpoint_names import address_of
from tests.conftest import need, python
from tests.system.outside import CALLS, GREETER, NAMESERVER, outsides


def standing(name, kind="ipv4"):
    """The address that stands for an endpoint's name."""
    words = {"ipv4": EndpointWords("ipv4", "192.0.2.1", "1"), "ipv6": EndpointWords("ipv6", "2001:db8::1", "1")}
    return str(address_of(make_endpoint(name, words[kind])))


class Box:
    """A netns with a table, and what is run in it with names."""

    def __init__(self, lab):
        self.lab, self.netns = lab, f"{lab.tag}-{uuid.uuid4().hex[:4]}"
        lab.ip("netns", "add", self.netns)

    def add(self, **endpoints):
        self.lab.add_endpoints({name.replace("_", "-"): words for name, words in endpoints.items()}, self.netns)

    def delete(self, *names):
        self.lab.delete_endpoints(names, self.netns)

    def command(self, *argv, options=("--names",)):
        return ("--netns", self.netns, *options, *argv)

    def run(self, *argv, **options):
        return self.lab.graft("run", *self.command(*argv, **options))

    def spawn(self, *argv, **settings):
        return self.lab.spawn_graft(*self.command(*argv), **settings)

    def calls(self, *targets, options=("--names",)):
        done = self.run(*python(CALLS), *targets, options=options)
        assert done.returncode == 0, done.stderr
        return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.fixture
def box(lab):
    one = Box(lab)
    yield one
    for process in lab.started:
        lab.end(process)
    wait_for(lambda: not lab.containers(), "the containers to end")
    lab.ip("netns", "del", one.netns)


def greet(lab, *ports):
    lab.spawn(*python(GREETER), *map(str, ports))
    for port in ports:
        wait_for(partial(greets, lab, port), "a server")


def greets(lab, port):
    return lab.host("ss", "-tlnH", f"sport = :{port}").stdout.count("\n") == 2


SHOWN = """
import socket, sys
for host in sys.argv[1:]:
    with socket.create_connection((host, 1), 5) as s: print(s.recv(99).decode(), s.getpeername()[:2])
"""


def test_clients_of_both_families(lab, box):
    """The endpoint's port is the endpoint's, whatever was asked; getpeername() shows what was; and live changes."""
    greet(lab, 8100)
    box.add(
        ep_lo="type ipv4 addr 127.0.0.1 port 8100",
        ep_four=f"type ipv4 addr {SECOND4} port 8100",
        Ep_Six=f"type ipv6 addr {HOST6} port 8100",
        ep_out=f"type ipv4 addr {HOST4} port dynamic",
    )
    done = box.run(*python(SHOWN), "ep-lo.graft", "EP-four.graft", "ep-six.graft")
    assert done.stdout.splitlines() == [
        f"127.0.0.1 ('{standing('ep-lo')}', 1)",
        f"{SECOND4} ('{standing('ep-four')}', 1)",
        f"{HOST6} ('{standing('ep-six', 'ipv6')}', 1)",
    ], done.stderr
    assert box.calls("ep-lo.graft:8100", "ep-out.graft:8100", "ep-none.graft:1", "127.0.0.1:8100") == {
        "ep-lo.graft:8100": "127.0.0.1",
        "ep-out.graft:8100": "ECONNREFUSED",
        "ep-none.graft:1": "EAI_-2",
        "127.0.0.1:8100": "ECONNREFUSED",
    }


HOLDS = """
import socket, sys
address = socket.getaddrinfo('ep-a.graft', 80, type=socket.SOCK_STREAM)[0][4]
print('ready', flush=True)
for line in sys.stdin:
    try:
        with socket.create_connection(address, 5) as s: print(s.recv(99).decode(), flush=True)
    except OSError as error: print(error.errno, flush=True)
    try: print(socket.getaddrinfo('ep-a.graft', 80)[0][4] == address, flush=True)
    except socket.gaierror as error: print(error.errno, flush=True)
"""


def test_changes_while_it_runs(lab, box):
    """Who holds the address reaches the endpoint as it is now, and nothing while there is none."""
    greet(lab, 8100)
    box.add(ep_a="type ipv4 addr 127.0.0.1 port 8100")
    program = box.spawn(*python(HOLDS), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout.readline() == "ready\n"

    def told():
        program.stdin.write("\n")
        program.stdin.flush()
        return program.stdout.readline().strip(), program.stdout.readline().strip()

    assert told() == ("127.0.0.1", "True")
    box.delete("ep-a")
    assert told() == ("101", "-2")
    line = f"connect tcp {standing('ep-a')}:80: refused ENETUNREACH, a name's address, and no endpoint to go to"
    assert line in lab.graft("log").stdout
    box.add(ep_a=f"type ipv4 addr {SECOND4} port 8100")
    assert told() == (SECOND4, "True")


SERVES = """
import socket, sys
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    s = socket.socket(type=kind); s.bind(('ep-in.graft', 80)); print(s.getsockname(), flush=True)
    if kind == socket.SOCK_DGRAM:
        data, peer = s.recvfrom(99); s.sendto(data + b' back', peer); break
    s.listen(); c, a = s.accept(); print(c.getsockname()[1], a[0], flush=True); c.sendall(b'tcp')
"""


def test_a_server(lab, box):
    """A bind to the name is one to the endpoint: of TCP and UDP, with the client's address."""
    box.add(ep_in=f"type ipv4 addr {HOST4} port 8101")
    server = box.spawn(*python(SERVES), stdout=subprocess.PIPE)
    assert server.stdout.readline() == f"('{standing('ep-in')}', 80)\n"
    lab.wait_listening(8101)
    get = f"import socket\nwith socket.create_connection(({HOST4!r}, 8101), 5) as s: print(s.recv(9))"
    assert lab.client(*python(get)).stdout == "b'tcp'\n"
    assert server.stdout.readline() == f"80 {CLIENT4}\n"
    assert server.stdout.readline() == f"('{standing('ep-in')}', 80)\n"
    ask = f"import socket\ns = socket.socket(2, 2); s.settimeout(5); s.sendto(b'udp', ({HOST4!r}, 8101)); print(s.recvfrom(99))"
    assert lab.client(*python(ask)).stdout == f"(b'udp back', ('{HOST4}', 8101))\n"


DATAGRAMS = """
import socket
for name in ('ep-lo', 'ep-four', 'ep-six'):
    for connected in (False, True):
        where = socket.getaddrinfo(name + '.graft', 9, type=socket.SOCK_DGRAM)[0]
        s = socket.socket(where[0], socket.SOCK_DGRAM); s.settimeout(5)
        if connected: s.connect(where[4]); s.send(b'x')
        else: s.sendto(b'x', where[4])
        data, peer = s.recvfrom(9); print(name, data, peer[:2] == where[4][:2])
"""
ECHO6 = f"""
import socket
u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); u.bind(({HOST6!r}, 8102))
while True: u.sendto(b'udp', u.recvfrom(99)[1])
"""


def test_datagrams(lab, box):
    """Connected and not; the answer comes from what was asked."""
    greet(lab, 8100)
    lab.spawn(*python(ECHO6))
    lab.wait_listening(8102, udp=True)
    box.add(
        ep_lo="type ipv4 addr 127.0.0.1 port 8100",
        ep_four=f"type ipv4 addr {HOST4} port 8100",
        ep_six=f"type ipv6 addr {HOST6} port 8102",
    )
    done = box.run(*python(DATAGRAMS))
    assert done.stdout.splitlines() == [f"{name} b'udp' True" for name in ("ep-lo", "ep-four", "ep-six") for _ in "12"], done.stderr


@pytest.fixture
def redis(lab, box):
    need("redis-server", "redis-cli")
    path = lab.work / "redis.sock"
    options = ("--port", "6390", "--bind", "127.0.0.1", "--unixsocket", path, "--unixsocketperm", "777", "--save", "")
    lab.spawn("redis-server", *options, stdout=subprocess.DEVNULL)
    lab.wait_listening(6390)
    return path


def test_redis_cli(lab, box, redis):
    """By an endpoint of the host's loopback, and by a socket file."""
    box.add(ep_db="type ipv4 addr 127.0.0.1 port 6390", ep_file=f"type unix path {redis}")
    for name in ("ep-db.graft", "ep-file.graft"):
        done = box.run("redis-cli", "-h", name, "ping")
        assert (done.stdout, done.stderr) == ("PONG\n", ""), name


def test_a_local_endpoint(lab, box):
    """A server and a client in two containers of one namespace's table, as programs of TCP, without TCP."""
    need("redis-server", "redis-cli")
    box.add(cache="type local")
    options = ("--bind", "cache.graft", "--protected-mode", "no", "--save", "")
    box.spawn("redis-server", *options, stdout=subprocess.DEVNULL)
    done = wait_for(lambda: (d := box.run("redis-cli", "-h", "cache.graft", "ping")).returncode == 0 and d, "redis")
    assert done.stdout == "PONG\n"
    assert box.run("redis-cli", "-h", "cache.graft", "ping", options=()).stdout == "PONG\n", "who joins is told as well"
    assert not lab.host("ss", "-tlnH", "sport = :6379").stdout


NGINX = """
daemon off; worker_processes 2; pid {dir}/nginx.pid; error_log stderr warn; events {{ }}
http {{
    access_log {dir}/access.log;
    client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
    server {{ listen ep-http.graft:80; return 200 "named $remote_addr\\n"; }}
    server {{ listen ep-file.graft:80; return 200 "filed\\n"; }}
    server {{ listen ep-front.graft:80; location / {{ proxy_pass http://ep-back.graft; }} }}
}}
"""


def test_nginx_and_curl(lab, box):
    """Listens by three names, on a socket file too, and is a proxy to a fourth."""
    need("nginx", "curl")
    directory = lab.work / "nginx"
    directory.mkdir(exist_ok=True)
    (directory / "nginx.conf").write_text(NGINX.format(dir=directory))
    box.add(
        ep_http=f"type ipv4 addr {HOST4} port 8103",
        ep_file=f"type unix path {directory}/nginx.sock",
        ep_front=f"type ipv4 addr {HOST4} port 8104",
        ep_back=f"type ipv4 addr {HOST4} port 8103",
    )
    box.spawn("nginx", "-c", directory / "nginx.conf")
    lab.wait_listening(8104)
    assert lab.client("curl", "-s", f"http://{HOST4}:8103/").stdout == f"named {CLIENT4}\n"
    assert lab.client("curl", "-s", f"http://{HOST4}:8104/").stdout == f"named {HOST4}\n"
    assert lab.host("curl", "-s", "--unix-socket", directory / "nginx.sock", "http://x/").stdout == "filed\n"
    assert box.run("curl", "-s", "http://ep-http.graft/").stdout == f"named {HOST4}\n"
    assert box.run("curl", "-s", "http://ep-file.graft/").stdout == "filed\n"


def test_static_go(lab, box, httpgo):
    """Its own resolver, its own system calls: a server and a client."""
    box.add(ep_go=f"type ipv4 addr {HOST4} port 8105")
    box.spawn(httpgo, "serve", "ep-go.graft:80")
    lab.wait_listening(8105)
    done = box.run(httpgo, "get", "http://ep-go.graft/", "20", "false")
    assert done.returncode == 0, done.stdout
    assert int(done.stdout) > 1
    assert lab.client(httpgo, "get", f"http://{HOST4}:8105/", "1", "true").returncode == 0


JAVA = """
import java.net.*;
public class Named {
    public static void main(String[] args) throws Exception {
        try (Socket s = new Socket("ep-lo.graft", 80)) {
            System.out.println(new String(s.getInputStream().readAllBytes()) + " " + s.getInetAddress().getHostName());
        }
        try (ServerSocket s = new ServerSocket()) {
            s.bind(new InetSocketAddress("ep-in.graft", 80));
            System.out.println("bound " + s.getLocalPort());
        }
    }
}
"""


def test_java(lab, box):
    """Java makes sockets of IPv6, which speak IPv4 by mapped addresses."""
    need("java", "javac")
    greet(lab, 8100)
    if not (lab.work / "Named.class").exists():
        (lab.work / "Named.java").write_text(JAVA)
        lab.host("javac", "-d", lab.work, lab.work / "Named.java", check=True)
    box.add(ep_lo="type ipv4 addr 127.0.0.1 port 8100", ep_in=f"type ipv4 addr {HOST4} port 8106")
    done = box.run("java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", "-cp", lab.work, "Named")
    assert done.stdout == "127.0.0.1 ep-lo.graft\nbound 80\n", done.stderr


def test_an_endpoint_of_another_namespace(lab, box):
    need("curl")
    lab.spawn(*python(GREETER), "8100", client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :8100").stdout.count("\n") == 2, "a server")
    box.add(ep_away=f"type ipv4 addr 127.0.0.1 port 8100 netns {lab.client_ns}")
    assert box.calls("ep-away.graft:1") == {"ep-away.graft:1": "127.0.0.1"}


def test_what_needs_another_socket_has_to_be_there_at_the_start(lab, box, redis):
    """Without the traps that it needs a name is not told, and the address leads nowhere."""
    box.add(ep_x=f"type ipv4 addr {HOST4} port 8107")
    program = box.spawn(*python(HOLDS.replace("ep-a", "ep-x")), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout.readline() == "ready\n"
    box.delete("ep-x")
    box.add(ep_x=f"type unix path {redis}")
    program.stdin.write("\n")
    program.stdin.flush()
    assert [program.stdout.readline(), program.stdout.readline()] == ["101\n", "-2\n"]


def test_with_a_list(lab, box):
    """An endpoint of the table needs no entry; what is on no list is refused as without endpoints."""
    greet(lab, 8100)
    box.add(ep_lo="type ipv4 addr 127.0.0.1 port 8100")
    for options in (("--allow", "192.0.2.1"), ("--learn",)):
        told = box.calls("ep-lo.graft:1", "other.graft:1", options=options)
        assert told == {"ep-lo.graft:1": "127.0.0.1", "other.graft:1": "EAI_-2"}


def test_which_addresses_stand_for_it(lab, box):
    """Of one family, by type; the other is answered empty; the address has the name."""
    need("dig")
    box.add(ep_four=f"type ipv4 addr {HOST4} port 1", ep_six=f"type ipv6 addr {HOST6} port 1", ep_file="type unix path /run/x.sock")
    four, six = standing("ep-four"), standing("ep-six", "ipv6")
    asked = ("ep-four.graft A", "ep-four.graft AAAA", "ep-six.graft AAAA", "ep-six.graft A", "ep-file.graft AAAA", "ep-none.graft A", f"-x {four}", f"-x {six}")
    digs = "; ".join(f"dig +tries=1 +time=3 +noall +answer +comments @192.0.2.9 {words}; echo" for words in asked)
    told = []
    for part in box.run("sh", "-c", digs).stdout.split("Got answer:")[1:]:
        answers = [line.split()[-1] for line in part.splitlines() if line and not line.startswith(";")]
        told.append((part.split("status: ")[1].split(",")[0], *answers))
    assert told == [
        ("NOERROR", four), ("NOERROR",), ("NOERROR", six), ("NOERROR",), ("NOERROR",), ("NXDOMAIN",),
        ("NOERROR", "ep-four.graft."), ("NOERROR", "ep-six.graft."),
    ]  # fmt: skip


def test_an_endpoints_name_comes_before_a_containers(lab, box):
    """Whoever starts a container of that name does not get what is meant for the endpoint."""
    greet(lab, 8100)
    lab.spawn_graft("--name", "db", "--ip", "10.88.0.9", *python("import socket\ns = socket.socket(); s.bind(('', 1)); s.listen()\nwhile True: s.accept()[0].sendall(b'container')"))
    wait_for(lambda: "db" in lab.containers(), "the container")
    told = wait_for(lambda: (t := box.calls("db.graft:1")) != {"db.graft:1": "ECONNREFUSED"} and t, "its server")
    assert told == {"db.graft:1": "container"}
    box.add(db="type ipv4 addr 127.0.0.1 port 8100")
    assert box.calls("db.graft:1") == {"db.graft:1": "127.0.0.1"}


def test_a_wrapper_by_a_hosts_file(lab, box):
    """Which no resolver of graft's answers: the addresses stay, so that they may stand in a file."""
    need("curl")
    greet(lab, 8100)
    box.add(ep_lo="type ipv4 addr 127.0.0.1 port 8100", ep_in=f"type ipv4 addr {HOST4} port 8110", Ep_Six=f"type ipv6 addr {HOST6} port 1")
    lines = lab.graft("endpoint", "show", "--netns", box.netns, "--hosts").stdout
    assert lines.splitlines() == [
        f"{standing('ep-six', 'ipv6')} ep-six.graft", f"{standing('ep-in')} ep-in.graft", f"{standing('ep-lo')} ep-lo.graft",
    ]  # fmt: skip
    both = (GRAFT, "endpoint", "show", "--json", "--hosts")
    lab.refused(both, 2, "--json and --hosts are two forms")
    (lab.work / "hosts").write_text(lines)
    code = """
import socket
with socket.create_connection(('ep-lo.graft', 80), 5) as s: print(s.recv(9), s.getpeername())
s = socket.socket(); s.bind(('ep-in.graft', 80)); print(s.getsockname())
try: socket.create_connection(('127.0.0.1', 8100), 5)
except OSError as error: print(error.errno)
"""
    script = 'mount --make-rprivate / && mount --bind "$1" /etc/hosts && shift && exec "$@"'
    inside = ("nsenter", f"--net=/run/netns/{box.netns}", "unshare", "-m", "sh", "-c", script, "sh", lab.work / "hosts")
    done = lab.host(*inside, GRAFT, "--", *python(code))
    assert done.stdout.splitlines() == [f"b'127.0.0.1' ('{standing('ep-lo')}', 80)", f"('{standing('ep-in')}', 80)", "101"], done.stderr


def test_bad_input(lab, box):
    for words in ("ipv4 addr 250.64.0.1", "ipv6 addr fd67:7261:6674:1::5"):
        lab.refused((ROOT / "bin/graft", "endpoint", "add", "x", "type", *words.split(), "port", "1"), 2, "stands for the name of an endpoint")
    lab.refused((ROOT / "bin/graft", "run", "--ip", "fd67:7261:6674:1::5", "true"), 2, "stands for the name of an endpoint")


def test_what_a_hostile_program_gets(lab, box):
    """Raw addresses of the block, a neighbour's endpoint, a client's place to serve, answers from outside that lie there."""
    greet(lab, 8100)
    other = Box(lab)
    try:
        other.add(ep_secret="type ipv4 addr 127.0.0.1 port 8100")
        lab.add_endpoints({"nm-out": f"type ipv4 addr {HOST4} port 8108", "nm-in": f"type ipv4 addr {HOST4} port 8109"})
        rules = ("--names", "-e", "192.0.2.7/32=nm-out", "-i", "0.0.0.0:9=nm-in")
        code = """
import errno, socket, sys
def tell(call):
    try: call(); print('done')
    except OSError as error: print(errno.errorcode[error.errno])
secret, out, into = sys.argv[1:]
for where in (secret, '250.64.0.0', '250.127.255.255', into):
    tell(lambda: socket.create_connection((where, 80), 3))
    tell(lambda: socket.socket(2, 2).sendto(b'x', (where, 80)))
    tell(lambda: socket.socket(2, 2).connect((where, 80)))
for where in (secret, '250.64.0.0', out):
    tell(lambda: socket.socket().bind((where, 80)))
    tell(lambda: socket.socket(2, 2).bind((where, 80)))
tell(lambda: socket.socket(10).connect(('fd67:7261:6674:1::1', 80)))
tell(lambda: socket.socket(10).bind(('fd67:7261:6674:1::1', 80)))
tell(lambda: socket.socket(10).connect(('::ffff:' + secret, 80)))
s = socket.socket(); s.bind(('127.0.0.1', 0)); tell(lambda: s.connect((sys.argv[2], 80)))
"""
        with contextlib.ExitStack() as after:
            after.callback(lab.delete_endpoints, ("nm-out", "nm-in"))
            done = lab.graft("run", *rules, "--name", "hostile", *python(code), standing("ep-secret"), standing("nm-out"), standing("nm-in"))
        assert done.stdout.split() == ["ENETUNREACH"] * 12 + ["EADDRNOTAVAIL"] * 6 + ["ENETUNREACH", "EADDRNOTAVAIL", "ENETUNREACH", "EADDRNOTAVAIL"], done.stderr
    finally:
        wait_for(lambda: not lab.containers(), "the container to end")
        other.delete("ep-secret")
        lab.ip("netns", "del", other.netns)


def test_answers_from_outside(lab, box):
    """Whoever owns a name cannot lead a program to its own endpoints by it, with a list or without."""
    greet(lab, 8100)
    box.add(ep_lo="type ipv4 addr 127.0.0.1 port 8100")
    for outside in outsides(lab):
        outside.write({"evil.test": {"A": [standing("ep-lo")]}, "six.evil.test": {"AAAA": ["fd67:7261:6674:1::1"]}})
        named = ("--names", "--resolver", NAMESERVER)
        for options in (named, ("--learn", *named[1:]), ("--allow", "evil.test", "--allow", "250.64.0.0/10", *named[1:])):
            assert box.calls("evil.test:1", "six.evil.test:1", options=options) == {
                "evil.test:1": "EAI_-2",
                "six.evil.test:1": "EAI_-2",
            }
