"""The Python API, inside and outside containers, without any trap: the program is under no filter of graft's."""

import os
import shutil
import subprocess

import pytest

from graft.bench.lab import CLIENT4, HOST4, HOST6, ROOT, wait_for
from tests.conftest import python


@pytest.fixture(scope="module")
def package(lab):
    """A copy of the package where any user may read it, and nothing beside it: the API needs no other."""
    tree = lab.work / "api"
    shutil.copytree(ROOT / "graft", tree / "graft")
    return tree


@pytest.fixture
def table(lab):
    """Endpoints in the client's namespace, which has no graft container."""
    words = {
        "ep-http": f"type ipv4 addr {HOST4} port 8301",
        "ep-six": f"type ipv6 addr {HOST6} port 8302",
        "ep-unix": f"type unix path {lab.work}/api.sock",
        "ep-out": f"type ipv4 addr {HOST4} port dynamic",
        "ep-far": f"type ipv4 addr {CLIENT4} port 8303 netns {lab.client_ns}",
        "ep-udp": f"type ipv4 addr {HOST4} port 8304",
        "ep-six2": f"type ipv6 addr {HOST6} port 8312",
        "ep-lo": "type ipv4 addr 127.0.0.1 port 8305",
    }
    lab.add_endpoints(words, lab.client_ns)
    yield
    lab.delete_endpoints(words, lab.client_ns)


def program(package, code):
    return python(f"import sys; sys.path.insert(0, {str(package)!r})\n{code}")


def user(*command):
    return ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command)


@pytest.mark.parametrize(("name", "family"), [("ep-http", "AF_INET"), ("ep-six", "AF_INET6"), ("ep-unix", "AF_UNIX"), ("ep-far", "AF_INET"), ("ep-lo", "AF_INET")])
def test_serve_and_connect_by_name(lab, package, table, name, family):
    """By an unprivileged user; the server's socket is the host's, whatever its kind."""
    code = f"""
import graft, socket
s = graft.create_server({name!r})
print(s.family == socket.{family}, s.endpoint, flush=True)
c, peer = s.accept()
c.sendall(c.recv(99).upper()); c.close()
"""
    server = lab.spawn(*user(*program(package, code)), client=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert server.stdout.readline() == f"True {name}\n", server.stderr.read()
    client = lab.client(*user(*program(package, f"import graft\nc = graft.connect({name!r}, timeout=10); c.sendall(b'hello'); print(c.recv(99))")))
    assert client.stdout == "b'HELLO'\n", client.stderr
    assert server.communicate(timeout=10)[1] == ""


def test_real_clients_see_the_hosts_address(lab, package, table):
    code = "import graft\ns = graft.create_server('ep-http'); print('up', flush=True)\nc, peer = s.accept(); c.sendall(peer[0].encode()); c.close()"
    server = lab.spawn(*program(package, code), client=True, stdout=subprocess.PIPE)
    assert server.stdout.readline() == "up\n"
    assert lab.client(*python(f"import socket; print(socket.create_connection(('{HOST4}',8301),10).recv(99).decode())")).stdout == f"{CLIENT4}\n"


def test_users_share_nothing(lab, package, table):
    """Neither a port by SO_REUSEPORT, where one would get the other's connections, nor limits."""
    code = """
import graft, socket, sys
s = graft.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
try: s.bind('ep-six2'); s.listen(); print('up', flush=True)
except OSError as e: print(e.errno, flush=True)
sys.stdin.read()
"""
    started = []
    for uid, told in (65534, "up"), (65534, "up"), (65533, "98"):
        other = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *program(package, code))
        started.append(lab.spawn(*other, client=True, stdin=-1, stdout=-1))
        assert started[-1].stdout.readline() == f"{told}\n", uid
    for each in started:
        lab.end(each)


def test_options_wait_for_the_endpoint(lab, package, table):
    code = """
import graft, socket
s = graft.socket(); s.settimeout(7)
number = s.fileno()
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
s.bind('ep-six2')
print(s.fileno() == number, s.gettimeout() >= 7, s.get_inheritable())
print(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
print(s.getsockname()[:2])
try: s.bind('ep-six2')
except OSError as e: print(e.errno)
try: s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'lo')
except OSError as e: print(e.errno)
"""
    result = lab.client(*program(package, code))
    assert result.stdout.splitlines() == ["True True False", "1 1", f"('{HOST6}', 8312)", "22", "1"], result.stderr


def test_errors_are_oserrors(lab, package, table):
    code = """
import graft, os
def told(call):
    try: call(); print('done')
    except OSError as e: print(type(e).__name__, e.errno, isinstance(e, graft.GraftOSError), e.strerror)
told(lambda: graft.bind('nope'))
told(lambda: graft.connect('nope'))
a = graft.create_server('ep-http')
told(lambda: graft.create_server('ep-http'))
told(lambda: graft.connect('ep-unix'))
told(lambda: graft.socket(3))
os.environ['GRAFT_RUN_DIR'] = '/nowhere'
told(lambda: graft.bind('ep-http'))
"""
    lines = lab.client(*user(*program(package, code))).stdout.splitlines()
    assert lines[0] == "UnknownEndpoint 2 True endpoint 'nope' does not exist in this namespace"
    assert lines[1].startswith("UnknownEndpoint 2 True")
    assert lines[2].startswith("AddressInUse 98 True")
    assert lines[3].split()[1] == "111"
    assert lines[4].split()[:2] == ["OSError", "94"]
    assert lines[5].startswith("Unavailable 111 True graftd is not running")


def test_what_a_named_socket_may_reach(lab, package, table):
    """As in AF_GRAFT it goes from its endpoint's address wherever that routes, but not to the host's loopback."""
    lab.spawn(*python(f"import socket,time\na=socket.create_server(('127.0.0.1',8306)); b=socket.create_server(('{HOST4}',8307)); time.sleep(60)"))
    lab.wait_listening(8307)
    code = f"""
import graft, errno
for to in (('{HOST4}', 8307), ('127.0.0.1', 8306)):
    s = graft.bind('ep-out'); s.settimeout(10)
    print(errno.errorcode.get(s.connect_ex(to), 'connected'), s.getsockname()[0])
s = graft.bind('ep-out'); print(s.connect_ex('ep-lo') in (0, 111))
try: graft.socket().connect(('{HOST4}', 8307))
except graft.UnknownEndpoint as e: print(e.strerror)
try: graft.socket().bind(('{HOST4}', 8307))
except OSError as e: print(e.errno)
"""
    result = lab.client(*program(package, code))
    assert result.stdout.splitlines() == [f"connected {HOST4}", f"ENETUNREACH {HOST4}", "True", "endpoint 'default-source' does not exist in this namespace", "97"], result.stderr


def test_datagrams_by_name(lab, package, table):
    code = """
import graft, socket
s = graft.bind('ep-udp', socket.SOCK_DGRAM)
c = graft.bind('ep-out', socket.SOCK_DGRAM); c.settimeout(10)
c.sendto(b'question', c.permit('ep-udp'))
data, peer = s.recvfrom(99); s.sendto(data + b' answered', peer)
print(*c.recvfrom(99))
"""
    assert lab.client(*program(package, code)).stdout == f"b'question answered' ('{HOST4}', 8304)\n"


@pytest.mark.parametrize("name", ["ep-http", "ep-unix", "ep-six"])
def test_asyncio(lab, package, table, name):
    code = f"""
import asyncio, graft
async def handle(reader, writer):
    writer.write((await reader.readline()).upper()); await writer.drain(); writer.close()
async def main():
    server = await graft.asyncio.start_server(handle, {name!r})
    async with server:
        for _ in range(3):
            reader, writer = await graft.asyncio.open_connection({name!r})
            writer.write(b'streams\\n'); print(await reader.readline()); writer.close()
    try: await graft.asyncio.open_connection('nope')
    except graft.UnknownEndpoint as e: print(e)
asyncio.run(main())
"""
    result = lab.client(*program(package, code))
    assert result.stdout.splitlines() == ["b'STREAMS\\n'"] * 3 + ["[Errno 2] endpoint 'nope' does not exist in this namespace"], result.stderr


def test_inside_a_container(lab, package):
    """graft run's policy holds for these sockets as well: no way round --egress none."""
    lab.graft("endpoint", "add", "ep-in", "type", "ipv4", "addr", HOST4, "port", "8308", check=True)
    code = f"""
import graft, errno
s = graft.create_server('ep-in'); print(s.getsockname())
d = graft.socket()
try: d.bind('ep-other')
except graft.UnknownEndpoint as e: print('unknown')
import socket
b = graft.bind('ep-in', socket.SOCK_DGRAM)
print(errno.errorcode[b.connect_ex(('{CLIENT4}', 9))])
"""
    result = lab.graft("run", "-i", "0.0.0.0:1=ep-in", "--egress", "none", *program(package, code))
    assert result.stdout.splitlines() == [f"('{HOST4}', 8308)", "unknown", "ENETUNREACH"], result.stderr
    lab.graft("endpoint", "del", "ep-in", check=True)


def test_a_private_source_leaves_by_no_name(lab):
    """A server that trusts 127.0.0.0/8 would take the program for one of its own host."""
    served = f"import socket; s = socket.socket(); s.bind(('{HOST4}', 8311)); s.listen(); print('up', flush=True)\nwhile True: print(s.accept()[1][0], flush=True)"
    server = lab.spawn(*python(served), stdout=-1)
    server.stdout.readline()
    lab.add_endpoints({"ep-to": f"type ipv4 addr {HOST4} port 8311"})
    code = f"""
import ctypes, errno, json, socket
libc = ctypes.CDLL(None)
def permit(sock):
    with socket.socket(1) as agent:
        agent.settimeout(9); agent.connect({str(lab.run_dir / "agent.sock")!r})
        socket.send_fds(agent, [json.dumps(dict(op='permit', name='ep-to')).encode()], [sock.fileno()])
        print(json.loads(agent.recv(9999)).get('error', dict(code='permitted'))['code'], end=' ')
def connect(sock): print(errno.errorcode.get(sock.connect_ex(('{HOST4}', 8311)), 'connected'))
s = socket.socket(); permit(s); connect(s)
s = socket.socket(); s.bind(('127.0.0.1', 5000)); permit(s); connect(s)
s = socket.socket(); permit(s); s.bind(('127.0.0.1', 5001)); connect(s)
l = socket.socket(); l.bind(('127.0.0.1', 5002)); l.listen()
s = socket.socket(); s.connect(('127.0.0.1', 5002)); libc.connect(s.fileno(), bytes(16), 16); permit(s); connect(s)
"""
    told = lab.graft("run", "--egress", "none", "-e", "203.0.113.0/24=ep-to", *python(code))
    lab.delete_endpoints(["ep-to"])
    lab.end(server)
    assert told.stdout.splitlines() == [
        "permitted connected", "EADDRNOTAVAIL ENETUNREACH", "permitted ENETUNREACH", "permitted connected",
    ], told.stderr  # fmt: skip
    assert server.stdout.read().split() == [HOST4] * 2  # the last one has given its private source back


@pytest.mark.parametrize(
    "message",
    [
        '{"op":"open","type":1}',
        '{"op":"open","type":9,"bind":"ep-http"}',
        '{"op":"open","type":1,"bind":"ep-http","options":[{"level":99999999999,"name":2,"value":"00"}]}',
        '{"op":"open","type":1,"bind":"ep-http","options":[{"level":1,"name":2,"value":"zz"}]}',
        '{"op":"open","type":1,"bind":"ep-http","options":[{"level":1,"name":36,"value":"01000000"}]}',
        '{"op":"permit","name":"ep-http"}',
        '{"op":"x"}',
        '{"op":5}',
        '{"fds":[],"state":{"id":"x"},"metadata":"{\\"wrapper\\":true,\\"publish\\":[\\"1:1\\"]}"}',
    ],
)
def test_malformed_requests(lab, table, message):
    """An error each, with or without descriptors that do not belong; nothing is left open."""
    pid = lab.daemon_pid()
    send = """
import json, os, socket, sys
for fds in ([], [0], [socket.socket(1).detach()]):
    s = socket.socket(1); s.settimeout(9); s.connect(sys.argv[1]); socket.send_fds(s, [sys.argv[2].encode()], fds)
    print('error' in json.loads(s.recv(9999)))
"""
    before = len(os.listdir(f"/proc/{pid}/fd"))
    result = lab.client(*python(send), lab.run_dir / "agent.sock", message)
    assert result.stdout.split() == ["True"] * 3, result.stderr
    wait_for(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before + 2, "the descriptors to go")  # the API's tenant has two


def test_the_policy_of_such_programs_ends_with_them(own_lab, package):
    own_lab.graft("--netns", own_lab.client_ns, "endpoint", "add", "ep", "type", "ipv4", "addr", HOST4, "port", "8309", check=True)
    process = own_lab.spawn(*program(package, "import graft\ns = graft.create_server('ep'); print('up', flush=True); input()"), client=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    wait_for(lambda: any(name.startswith("api-") for name in own_lab.containers()), "the tenant")
    process.stdin.close()
    wait_for(lambda: own_lab.containers() == [], "its end")


def test_graftd_dies_and_the_sockets_stay(own_lab, package):
    own_lab.graft("--netns", own_lab.client_ns, "endpoint", "add", "ep", "type", "ipv4", "addr", HOST4, "port", "8310", check=True)
    code = "import graft\ns = graft.create_server('ep'); print('up', flush=True); input(); c,_ = s.accept(); c.sendall(b'x'); t = graft.connect('ep'); print('again')"
    process = own_lab.spawn(*program(package, code), client=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    pid = own_lab.daemon_pid()
    subprocess.run(("kill", "-9", str(pid)), check=True)
    wait_for(lambda: own_lab.daemon_pid() not in (0, pid), "the next graftd")
    client = own_lab.spawn(*python(f"import socket; print(socket.create_connection(('{HOST4}',8310),10).recv(9))"), client=True, stdout=subprocess.PIPE)
    process.stdin.write("\n")
    process.stdin.flush()
    assert client.communicate(timeout=20)[0] == "b'x'\n"
    assert process.communicate(timeout=20)[0] == "again\n"
