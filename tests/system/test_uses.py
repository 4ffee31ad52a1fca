"""What an endpoint may be used for by its name: kind of tenant, how the endpoint came there, its type, and the call.

The rule is in docs/af_graft.md. Here each cell is tried: a program makes every call on every endpoint of its table.
"""

import json
import subprocess

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, HOST6, ROOT, wait_for
from tests.conftest import python

TYPES = ("ipv4", "ipv6", "unix", "local", "away")
SERVE, LEAVE = ("bind", "listen", "bind-dgram", "api-bind"), ("connect", "send", "api-connect", "api-permit")
PROGRAM = f"""
import ctypes, errno, json, socket, struct, sys
sys.path.insert(0, {str(ROOT)!r})
import graft
libc = ctypes.CDLL(None, use_errno=True)
def name(text): return struct.pack('=H16s', 4, text.encode())
def call(what, *arguments):
    if what(*arguments) < 0: raise OSError(ctypes.get_errno(), 'x')
def bind(s, to): call(libc.bind, s.fileno(), name(to), 18)
def make(kind): return socket.socket(4, kind)
def tcp_bind(ep):
    with make(1) as s: bind(s, ep)
def listen(ep):
    with make(1) as s:
        bind(s, ep)
        call(libc.listen, s.fileno(), 1)
def dgram_bind(ep):
    with make(2) as s: bind(s, ep)
def connect(ep):
    with make(1) as s: call(libc.connect, s.fileno(), name(ep), 18)
def send(ep):
    with make(2) as s: call(libc.sendto, s.fileno(), b'x', 1, 0, name(ep), 18)
def api_bind(ep): graft.bind(ep, socket.SOCK_DGRAM).close()
def api_connect(ep): graft.socket().permit(ep)
def api_permit(ep):  # on a socket that is bound to it
    with graft.bind(sys.argv[2] if len(sys.argv) > 2 else ep) as s: s.permit(ep)
calls = {{'bind': tcp_bind, 'listen': listen, 'bind-dgram': dgram_bind, 'connect': connect, 'send': send,
         'api-bind': api_bind, 'api-connect': api_connect, 'api-permit': api_permit}}
print('up', flush=True); sys.stdin.readline()
told = {{}}
for ep in sys.argv[1].split(','):
    for what, work in calls.items():
        if what in ('bind', 'listen', 'bind-dgram', 'connect', 'send') and not FAMILY: continue
        try: work(ep); result = 'OK'
        except OSError as e: result = errno.errorcode.get(e.errno or 0, str(e))
        told.setdefault(ep, {{}})[what] = result
print(json.dumps(told), flush=True)
"""


def expected(how, kind, call):
    """May this be? @how the endpoint came into the table: own, in (-i), out (-e), both, pub (-p)."""
    serves, leaves = how != "out", how in ("own", "out", "both")
    if call in ("bind", "api-permit") and kind in ("ipv4", "ipv6", "away"):
        return leaves if call == "api-permit" else True  # TCP: to serve there, or to connect from there
    return serves if call in SERVE else leaves


class Uses:
    """A laboratory with endpoints of every type, for each way into a table."""

    def __init__(self, lab):
        self.lab = lab
        self.port = 8900
        lab.add_endpoints({"default-source": "type ipv4 addr 127.0.0.1 port dynamic"})

    def words(self, name, kind):
        self.port += 1
        return {
            "ipv4": f"type ipv4 addr 127.0.0.1 port {self.port}",
            "ipv6": f"type ipv6 addr {HOST6} port {self.port}",
            "unix": f"type unix path {self.lab.work}/{name}.sock",
            "local": "type local",
            "away": f"type ipv4 addr 127.0.0.1 port {self.port} netns {self.lab.client_ns}",
        }[kind]

    def endpoints(self, *hows):
        return {f"{how}-{kind}": self.words(f"{how}-{kind}", kind) for how in hows for kind in TYPES}

    def rules(self):
        """The options that import an endpoint for what its name says."""
        given = ["-e", "203.0.113.0/24=default-source"]
        for n, kind in enumerate(TYPES):
            server, prefix = ("[::]", "2001:db8:{}::/64") if kind == "ipv6" else ("0.0.0.0", "198.51.{}.0/24")
            given += ["-i", f"{server}:{100 + n}=in-{kind}", "-i", f"{server}:{200 + n}=both-{kind}"]
            given += ["-e", f"{prefix.format(100 + n)}=out-{kind}", "-e", f"{prefix.format(200 + n)}=both-{kind}"]
        return given


@pytest.fixture(scope="module")
def uses(lab):
    made = Uses(lab)
    lab.add_endpoints(made.endpoints("in", "out", "both"))
    yield made
    lab.delete_endpoints([f"{how}-{kind}" for how in ("in", "out", "both") for kind in TYPES] + ["default-source"])


def code(*, family):
    return python(PROGRAM.replace("FAMILY", str(family)))


def check(process, names):
    told, errors = process.communicate("\n", timeout=120)
    assert told, errors
    told = json.loads(told.splitlines()[-1])
    assert told.keys() == set(names)
    wrong = []
    for name, results in told.items():
        how, _, kind = name.partition("-")
        how, kind = ("pub", "ipv6" if name.endswith(".2") else "ipv4") if how == "tcp" else (how, kind)
        for call, result in results.items():
            if call == "api-permit" and kind in ("unix", "local"):
                assert result != "OK"  # a socket that is there already is of the internet
            elif (result != "EACCES") != expected(how, kind, call):
                wrong.append(f"{name} {call}: {result}")
            elif kind == "ipv4" and result not in ("EACCES", "ECONNREFUSED" if call == "connect" else "OK"):
                wrong.append(f"{name} {call}: {result}, though it is allowed")
    assert not wrong, wrong


@pytest.mark.parametrize("egress", ["none", "host"])
@pytest.mark.parametrize("who", ["container", "wrapper"])
def test_inside_a_container(lab, uses, who, egress):
    """What was imported is for what the rules say; a wrapper or the API inside it gets no more."""
    name = f"uses-{who}-{egress}"
    port = uses.port = uses.port + 2
    wrapped = (GRAFT, "-e", "203.0.113.0/24=default-source", "--") if who == "wrapper" else ()
    imported = [f"{how}-{kind}" for how in ("in", "out", "both") for kind in TYPES]
    own = uses.endpoints("own")
    names = [*imported, *own, f"tcp-{port}"]
    process = lab.spawn_graft(
        "--name", name, "--egress", egress, "-p", f"127.0.0.1:{port}:80", *uses.rules(),
        *wrapped, *code(family=True), ",".join(names), stdin=-1, stdout=-1, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    lab.add_endpoints(own, netns=name)
    check(process, names)


@pytest.mark.parametrize("who", ["wrapper", "api"])
@pytest.mark.parametrize("where", ["host", "client"])
def test_the_table_of_a_namespace(lab, uses, who, where):
    """Who is in no container has the whole table of its namespace, for everything."""
    own = uses.endpoints("own")
    netns = None if where == "host" else lab.client_ns
    lab.add_endpoints(own | ({} if netns is None else {"default-source": "type ipv4 addr 127.0.0.1 port dynamic"}), netns)
    try:
        wrapper = (GRAFT, "-e", "203.0.113.0/24=default-source", "--") if who == "wrapper" else ()
        process = lab.spawn(
            *wrapper, *code(family=bool(wrapper)), ",".join(own), client=netns is not None, stdin=-1, stdout=-1, stderr=subprocess.PIPE
        )
        assert process.stdout.readline() == "up\n"
        check(process, own)
    finally:
        lab.delete_endpoints([*own, *([] if netns is None else ["default-source"])], netns)


SERVER = "import socket, time; s = socket.create_server(('127.0.0.1', {port})); print('up', flush=True); time.sleep(60)"
SOURCE = """
import ctypes, errno, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def name(text): return struct.pack('=H16s', 4, text.encode())
def tell(*results):
    print(*(('OK' if r >= 0 else errno.errorcode[ctypes.get_errno()]) for r in results), flush=True)
s = socket.socket(4, 1)
tell(libc.bind(s.fileno(), name(sys.argv[1]), 18))
for port in sys.argv[2:]:
    to = struct.pack('=H', 2) + struct.pack('>H', int(port)) + socket.inet_aton('127.0.0.1') + bytes(8)
    tell(libc.connect(s.fileno(), to, 16))
"""


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_socket_that_is_bound_to_a_publication_stays(lab, uses, wrapped):
    """Its address is on the host's loopback: from there it does not get to the host's servers."""
    port = uses.port = uses.port + 1
    server = lab.spawn(*python(SERVER.format(port=8899)), stdout=-1)
    assert server.stdout.readline() == "up\n"
    inner = (GRAFT, "-e", "203.0.113.0/24=default-source", "--") if wrapped else ()
    told = lab.graft(
        "run", "--egress", "none", "-p", f"127.0.0.1:{port}:80", "-e", "203.0.113.0/24=default-source", *inner,
        *python(SOURCE), f"tcp-{port}", "8899",
    )  # fmt: skip
    assert told.stdout.split() in (["OK", "ENETUNREACH"], ["OK", "ECONNREFUSED"]), told.stdout + told.stderr


def test_a_rule_that_goes_takes_the_use_along(lab, uses):
    """The endpoint stays in the table, imported; without a rule it is there for nothing."""
    program = f"import errno, sys; sys.path.insert(0, {str(ROOT)!r}); import graft\n"
    program += "for line in sys.stdin:\n  try: graft.bind(line.strip()).close(); print('OK', flush=True)\n"
    program += "  except OSError as e: print(errno.errorcode[e.errno], flush=True)\n"
    process = lab.spawn_graft("--name", "rules", "-i", "0.0.0.0:100=in-ipv4", *python(program), stdin=-1, stdout=-1)
    wait_for(lambda: "rules" in lab.containers(), "it")

    def binds():
        process.stdin.write("in-ipv4\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    assert binds() == "OK"
    lab.graft("rule", "del", "rules", "-i", "0.0.0.0:100=in-ipv4", check=True)
    assert binds() == "EACCES"
    lab.graft("rule", "add", "rules", "-i", "0.0.0.0:101=in-ipv4", check=True)
    assert binds() == "OK"


def test_a_wrapper_serves_at_no_endpoint_for_connections(lab, uses):
    inside = (GRAFT, "run", "-e", "198.51.100.0/24=out-ipv4", "-i", "0.0.0.0:100=in-ipv4", GRAFT)
    lab.refused((*inside, "-i", "0.0.0.0:80=out-ipv4", "--", "true"), 1, "there to connect from, not to bind to")
    lab.refused((*inside, "-e", "10.0.0.0/8=in-ipv4", "--", "true"), 1, "there to bind to, not to connect from")
    assert lab.host(*inside, "-i", "0.0.0.0:80=in-ipv4", "-e", "10.0.0.0/8=out-ipv4", "--", "true").returncode == 0


@pytest.mark.parametrize("kind", [1, 2], ids=("tcp", "udp"))
def test_what_was_permitted_is_no_leave_for_another_peer(lab, kind):
    """A socket that may reach an endpoint goes elsewhere by a rule, and no longer when the rule has gone."""
    code = (
        f"import ctypes, errno, json, socket, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport graft\nlibc = ctypes.CDLL(None)\n"
        "def told(sock):\n    try: return sock.connect((sys.argv[1], 9301)) or 'OK'\n    except OSError as error: return errno.errorcode[error.errno]\n"
        "print('up', flush=True); sys.stdin.readline()\n"
        f"s = graft.socket({kind}); s.permit('ep-e'); print(told(s), flush=True)\n"
        "sys.stdin.readline(); libc.connect(s.fileno(), bytes(16), 16); print(told(s), flush=True); sys.stdin.read()\n"
    )
    server = lab.spawn("ip", "netns", "exec", lab.client_ns, *python("import socket\ns = socket.create_server(('', 9301)); print('up', flush=True)\nwhile True: s.accept()"), stdout=-1)
    assert server.stdout.readline() == "up\n"
    lab.graft("endpoint", "add", "ep-o", "type", "ipv4", "addr", HOST4, "port", "dynamic", check=True)
    one = lab.spawn_graft("--name", "one", "-e", f"{CLIENT4}/32=ep-o", *python(code), CLIENT4, stdin=-1, stdout=-1)
    try:
        assert one.stdout.readline() == "up\n"
        lab.graft("endpoint", "add", "ep-e", "type", "ipv4", "addr", CLIENT4, "port", "9000", "--netns", "one", check=True)
        for told in ("OK\n", "ENETUNREACH\n"):
            print(file=one.stdin, flush=True)
            assert one.stdout.readline() == told
            if told == "OK\n":
                lab.graft("rule", "del", "one", "-e", f"{CLIENT4}/32=ep-o", check=True)
    finally:
        lab.end(one)
        lab.end(server)
        lab.graft("endpoint", "del", "ep-o", check=True)
