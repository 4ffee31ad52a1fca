"""Programs written to AF_GRAFT (include/graft.h), unmodified: every call, option and errno, with and without graft."""

import itertools
import socket
import subprocess

import pytest

import graft
from graft.bench.lab import CLIENT4, GRAFT, HOST4, HOST6, ROOT, wait_for
from tests.conftest import need, python

SOL_SOCKET, SO_REUSEADDR, SO_KEEPALIVE, SO_BINDTODEVICE, SO_RCVBUF = 1, 2, 9, 25, 8
TCP, TCP_NODELAY, TCP_KEEPIDLE = 6, 1, 4
GRAFT_LEVEL, DELAYED, EXECUTE, RESULT, TRANSPARENT, NAME = 254, 1, 2, 3, 4, 5


@pytest.fixture(scope="module")
def program(lab):
    need("gcc")
    built = lab.work / "family"
    command = ("gcc", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'include'}", ROOT / "tests/programs/family.c")
    subprocess.run((*command, "-o", built), check=True)
    return built


NAMES = """
int main(void)
{
	struct sockaddr_gr gr = {.sgr_family = AF_GRAFT};
	struct sockaddr_un un = {.sun_family = AF_UNIX};
	__kernel_sa_family_t family = gr.sgr_family;

	_Static_assert(sizeof(gr.sgr_epname) == IFNAMSIZ && sizeof(un.sun_path) == UNIX_PATH_MAX && AF_GRAFT == AF_IPX, "upstream's");
	return family != PF_GRAFT || printf("%s", GRAFT_VERSION) < 0;
}
"""


@pytest.mark.parametrize("also", ["sys/un.h", "linux/un.h", "net/if.h", "linux/if.h", "linux/socket.h", "netinet/in.h"])
def test_the_header_brings_what_upstreams_brings(tmp_path, also):
    """Names that programs have from upstream's header; another header of theirs, before or after this one, is no conflict."""
    need("gcc")
    for first, second in ((also, "graft.h"), ("graft.h", also), ("graft.h", "stdio.h")):
        source = tmp_path / "names.c"
        source.write_text(f"#include <stdio.h>\n#include <{first}>\n#include <{second}>\n{NAMES}")
        for standard in ("c11", "gnu17"):
            command = ("gcc", f"-std={standard}", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'include'}", source, "-o", tmp_path / "names")
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, (first, second, result.stderr)
            assert subprocess.run((tmp_path / "names",), capture_output=True, text=True).stdout == graft.__version__


fresh_ports = itertools.count(18100)


class Table:
    """The host's endpoints: ports that no earlier test has left in TIME_WAIT."""

    def __init__(self, lab):
        self.path = lab.work / "family.sock"
        self.port, self.port6, self.low, self.port15 = (next(fresh_ports) for _ in range(4))
        inet = {
            "ep-test": ("127.0.0.1", self.port),
            "ep-low": (HOST4, self.low - 18000),
            "ep-dyn": (HOST4, "dynamic"),
            "ep-gone": ("203.0.113.9", 80),
            "ep-client": (CLIENT4, 9001),
            "a-name-of-15-by": (HOST4, self.port15),
        }
        self.words = {name: f"type ipv4 addr {address} port {port}" for name, (address, port) in inet.items()}
        self.words["ep-six"] = f"type ipv6 addr {HOST6} port {self.port6}"
        self.words["ep-unix"] = f"type unix path {self.path}"


@pytest.fixture
def table(lab):
    """Endpoints of every kind; taken back at the end."""
    made = Table(lab)
    lab.add_endpoints(made.words)
    yield made
    lab.delete_endpoints([line.split()[0] for line in lab.graft("endpoint", "show").stdout.splitlines()])


def calls(lab, program, *ops, wrapper=("--",), **options):
    result = lab.graft(*wrapper, program, *ops, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def add_default(lab, address="127.0.0.1", kind="ipv4", port="dynamic"):
    lab.graft("endpoint", "add", "default-source", "type", kind, "addr", address, "port", port, check=True)


def test_without_graft_the_family_is_not_there(lab, program):
    result = lab.host(program, "socket:stream")
    assert (result.returncode, result.stdout) == (1, "socket EAFNOSUPPORT\n")


def test_under_graft_run_as_well(lab, program, table):
    lines = calls(lab, program, "socket:stream", "bind:ep-test", "getsockname", wrapper=("run", "-i", "0.0.0.0:1=ep-test"))
    assert lines == ["socket 0", "bind 0", "getsockname graft ep-test 18"]
    lines = calls(lab, program, "socket:stream", "bind:ep-test", wrapper=("run",))
    assert lines == ["socket 0", "bind ENOENT"], "a new namespace has a table of its own"


def test_raw_is_not_of_the_family(lab, program):
    result = lab.graft("--", program, "socket:raw")
    assert (result.returncode, result.stdout) == (1, "socket EAFNOSUPPORT\n")


def test_bind_and_its_errnos(lab, program, table):
    ops = ("bindshort:ep-test", f"bindinet:{HOST4}:80:long", f"bindinet:{HOST4}:80", "bind:nope", "bind:", "bind:ep-gone", "bind:ep-test", "bind:ep-test")
    assert calls(lab, program, "socket:stream", *ops) == [
        "socket 0",
        "bindshort EINVAL",
        "bindinet EAFNOSUPPORT",
        "bindinet EINVAL",  # 16 bytes are shorter than a sockaddr_gr
        "bind ENOENT",
        "bind ENOENT",
        "bind EADDRNOTAVAIL",  # the address is not this host's
        "bind 0",
        "bind EINVAL",
    ]


def test_before_bind_there_is_no_host_socket(lab, program):
    ops = ("listen", f"set:{TCP}:{TCP_NODELAY}:1", f"get:{TCP}:{TCP_NODELAY}", f"trans:{SOL_SOCKET}:{SO_REUSEADDR}:1")
    assert calls(lab, program, "socket:stream", *ops, f"set:{SOL_SOCKET}:{SO_KEEPALIVE}:1") == [
        "socket 0",
        "listen EADDRNOTAVAIL",
        "set EADDRNOTAVAIL",
        "get EADDRNOTAVAIL",
        "trans EADDRNOTAVAIL",
        "set 0",  # SOL_SOCKET is the socket layer's own
    ]


def test_a_port_in_use_is_said(lab, program, table):
    server = lab.spawn(*python(f"import socket,time; s=socket.create_server(('127.0.0.1',{table.port})); time.sleep(60)"))
    lab.wait_listening(table.port)
    assert calls(lab, program, "socket:stream", "bind:ep-test") == ["socket 0", "bind EADDRINUSE"]
    lab.end(server)


@pytest.mark.parametrize("name", ["ep-test", "ep-six", "a-name-of-15-by"])
def test_serve_and_connect_by_name(lab, program, table, name):
    """bind, listen, accept, getsockname in both modes; the client's connect to the name."""
    host = {
        "ep-test": f"inet 127.0.0.1 {table.port} 16",
        "ep-six": f"inet6 {HOST6} {table.port6} 28",
        "a-name-of-15-by": f"inet {HOST4} {table.port15} 16",
    }[name]
    six = name == "ep-six"
    add_default(lab, HOST6 if six else "127.0.0.1", "ipv6" if six else "ipv4")
    ops = (f"bind:{name}", "listen", "getsockname", f"set:{GRAFT_LEVEL}:{NAME}:1", "getsockname", "serve:HELLO")
    server = lab.spawn(GRAFT, "--", program, "socket:stream", *ops, stdout=subprocess.PIPE)
    lab.wait_listening(int(host.split()[2]))
    client = calls(lab, program, "socket:stream", f"connect:{name}", "getsockname", "getpeername", "recv")
    assert client[:5] == ["socket 0", "connect 0", "getsockname graft default-source 18", f"getpeername {host}", "recv HELLO"]
    out, _ = server.communicate(timeout=20)
    lines = out.splitlines()
    assert lines[:6] == ["socket 0", "bind 0", "listen 0", f"getsockname graft {name} 18", "set 0", f"getsockname {host}"]
    assert lines[6].startswith("accept inet")
    assert lines[7] == f"accepted {host}", "an accepted socket is the host's"


def test_a_privileged_port_needs_no_capability(lab, program, table):
    lines = calls(lab, program, "socket:stream", "bind:ep-low", "listen", wrapper=("run", "-u", "65534", "-i", "0.0.0.0:1=ep-low"))
    assert lines == ["socket 0", "bind 0", "listen 0"]


def test_dynamic_takes_a_free_port(lab, program, table):
    ops = ("bind:ep-dyn", "listen", f"set:{GRAFT_LEVEL}:{NAME}:1", "getsockname")
    ports = {calls(lab, program, "socket:stream", *ops)[-1].split()[-2] for _ in range(3)}
    assert "0" not in ports


def test_connect_and_its_errnos(lab, program, table):
    assert calls(lab, program, "socket:stream", "connect:ep-test") == ["socket 0", "connect ENOENT"], "no default-source"
    assert calls(lab, program, "socket:stream", f"connectinet:{CLIENT4}:9") == ["socket 0", "connectinet ENOENT"]
    add_default(lab)
    ops = ("connect:nope", "connectshort:ep-test", "connect:ep-six", "connect:ep-test", "send:x")
    assert calls(lab, program, "socket:stream", *ops) == [
        "socket 0",
        "connect ENOENT",
        "connectshort EINVAL",
        "connect EAFNOSUPPORT",
        "connect ECONNREFUSED",
        "send EPIPE",
    ]
    assert calls(lab, program, "socket:stream", "connect:ep-test", "getsockname") == [
        "socket 0",
        "connect ECONNREFUSED",
        "getsockname graft default-source 18",
    ]


def test_connecting_again_says_what_tcp_says(lab, program, table):
    add_default(lab)
    again = ("connect:ep-test", "connect:ep-test")
    assert calls(lab, program, "socket:stream", *again)[1:] == ["connect ECONNREFUSED"] * 2
    server = lab.spawn(*python(f"import socket,time; s=socket.create_server(('127.0.0.1',{table.port})); time.sleep(60)"))
    lab.wait_listening(table.port)
    assert calls(lab, program, "socket:stream", *again)[1:] == ["connect 0", "connect EISCONN"]
    lab.end(server)


def test_connect_to_an_address_leaves_from_the_endpoint(lab, program, table):
    add_default(lab, HOST4, port="41234")
    server = lab.spawn(*python(f"import socket; s=socket.create_server(('{CLIENT4}',9001)); c,a=s.accept(); c.sendall(repr(a).encode()); c.close()"), client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :9001").stdout, "the server")
    # it reads to the end: the server has closed first then, so that the port is not in TIME_WAIT here for who is next
    what = (f"connectinet:{CLIENT4}:9001", "recv", "recv", f"set:{GRAFT_LEVEL}:{NAME}:1", "getsockname")
    lines = calls(lab, program, "socket:stream", *what)
    assert lines[1:3] == ["connectinet 0", f"recv ('{HOST4}', 41234)"]
    assert lines[-1] == f"getsockname inet {HOST4} 41234 16"
    lab.end(server)


def test_a_bound_socket_connects_from_its_endpoint(lab, program, table):
    server = lab.spawn(*python(f"import socket; s=socket.create_server(('{CLIENT4}',9001)); c,a=s.accept(); c.sendall(a[0].encode()); c.close()"), client=True)
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :9001").stdout, "the server")
    lines = calls(lab, program, "socket:stream", "bind:ep-dyn", "connect:ep-client", "recv", "getpeername")
    assert lines[:4] == ["socket 0", "bind 0", "connect 0", f"recv {HOST4}"]
    lab.end(server)


def test_an_endpoint_elsewhere_is_no_way_to_the_hosts_loopback(lab, program, table):
    """In another namespace than the host's: only an endpoint on the loopback leads there."""
    server = lab.spawn(*python(f"import socket,time; s=socket.create_server(('127.0.0.1',{table.port})); time.sleep(60)"))
    lab.wait_listening(table.port)
    for name, words in (("ep-any", (HOST4, "dynamic")), ("ep-lo", ("127.0.0.1", "dynamic"))):
        lab.graft("endpoint", "add", name, "type", "ipv4", "addr", words[0], "port", words[1], "--netns", lab.client_ns, check=True)
    for name, says in (("ep-any", "connectinet ENETUNREACH"), ("ep-lo", "connectinet 0")):
        result = lab.client(GRAFT, "--", program, "socket:stream", f"bind:{name}", f"connectinet:127.0.0.1:{table.port}")
        assert result.stdout.splitlines() == ["socket 0", "bind 0", says]
        lab.graft("endpoint", "del", name, "--netns", lab.client_ns, check=True)
    lab.end(server)


def test_datagrams(lab, program, table):
    """sendto a name and an address, replies; a server by name that answers."""
    add_default(lab, HOST4)
    lab.graft("endpoint", "add", "ep-udp", "type", "ipv4", "addr", HOST4, "port", "5300", check=True)
    server = lab.spawn(GRAFT, "--", program, "socket:dgram", "bind:ep-udp", "answer", "answer", stdout=subprocess.PIPE)
    lab.wait_listening(5300, udp=True)
    lines = calls(lab, program, "socket:dgram", "sendto:nope:x", "sendto:ep-udp:by-name", "recv")
    assert lines[1:4] == ["sendto ENOENT", "sendto 7", "recv by-name"]
    assert lines[4] == f"from inet {HOST4} 5300 16"
    lines = calls(lab, program, "socket:dgram", f"sendtoinet:{HOST4}:5300:by-address", "recv")
    assert lines[1:4] == ["sendtoinet 10", "recv by-address", f"from inet {HOST4} 5300 16"]
    assert server.communicate(timeout=20)[0].splitlines() == ["socket 0", "bind 0", "answer 7", "answer 10"]


def test_datagrams_without_default_source(lab, program, table):
    assert calls(lab, program, "socket:dgram", f"sendtoinet:{CLIENT4}:53:x", "sendto:ep-test:x") == [
        "socket 0",
        "sendtoinet ENOENT",
        "sendto ENOENT",
    ]


def test_unix_endpoint(lab, program, table):
    server = lab.spawn(GRAFT, "--", program, "socket:stream", "bind:ep-unix", "listen", "getsockname", "serve:HI", stdout=subprocess.PIPE)
    wait_for(table.path.exists, "the socket")
    with socket.socket(socket.AF_UNIX) as peer:
        wait_for(lambda: peer.connect_ex(str(table.path)) == 0, "the server")
        assert peer.recv(9) == b"HI"
    assert server.communicate(timeout=20)[0].splitlines()[:4] == ["socket 0", "bind 0", "listen 0", "getsockname graft ep-unix 18"]
    wait_for(lambda: not table.path.exists(), "the socket to go with its program")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(table.path))
        listener.listen()
        listener.settimeout(20)
        client = lab.spawn(GRAFT, "--", program, "socket:stream", "connect:ep-unix", "send:hello", stdout=subprocess.PIPE)
        connection, _ = listener.accept()
        assert connection.recv(9) == b"hello"
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        assert int.from_bytes(credentials[4:8], "little") == 0
        client.wait(10)
        connection.close()
    table.path.unlink()
    assert calls(lab, program, "socket:stream", "connect:ep-unix") == ["socket 0", "connect ECONNREFUSED"]


def test_the_peer_of_a_unix_endpoint_is_the_program_and_not_graftd(lab, program, table):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(table.path))
        table.path.chmod(0o666)
        listener.listen()
        listener.settimeout(20)
        user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        client = lab.spawn(GRAFT, "--", *user, program, "socket:stream", "connect:ep-unix")
        connection, _ = listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        assert int.from_bytes(credentials[4:8], "little") == 65534
        connection.close()
        client.wait(10)
        table.path.chmod(0o600)
        refused = lab.graft("--", *user, program, "socket:stream", "connect:ep-unix")
        assert refused.stdout.splitlines() == ["socket 0", "connect EACCES"]
    table.path.unlink()


def test_delayed_options(lab, program, table):
    ops = (
        f"get:{GRAFT_LEVEL}:{DELAYED}",
        f"set:{GRAFT_LEVEL}:{DELAYED}:1",
        f"get:{GRAFT_LEVEL}:{DELAYED}",
        f"set:{TCP}:{TCP_NODELAY}:1",
        f"trans:{SOL_SOCKET}:{SO_REUSEADDR}:1",
        f"trans:{SOL_SOCKET}:{SO_BINDTODEVICE}:1",  # refused when its time comes
        "results",
        "bind:ep-test",
        "results:12",  # room for one
        "results",
        "results",
        f"set:{GRAFT_LEVEL}:{DELAYED}:0",
        f"get:{GRAFT_LEVEL}:{DELAYED}",
        f"get:{TCP}:{TCP_NODELAY}",
        f"get:{SOL_SOCKET}:{SO_REUSEADDR}",
    )
    assert calls(lab, program, "socket:stream", *ops)[1:] == [
        "get 0",
        "set 0",
        "get 1",
        "set 0",
        "trans 0",
        "trans 0",
        "results 0",
        "bind 0",
        f"results ENOBUFS {TCP}:{TCP_NODELAY}:0",
        f"results 0 {SOL_SOCKET}:{SO_REUSEADDR}:0 {SOL_SOCKET}:{SO_BINDTODEVICE}:-1",
        "results 0",
        "set 0",
        "get 0",
        "get 1",
        "get 1",
    ]


def test_delayed_options_go_to_the_socket_that_bind_makes(lab, program, table):
    """An IPv6 endpoint takes another socket than the stand-in; one of type unix has no TCP options."""
    delayed = (f"set:{GRAFT_LEVEL}:{DELAYED}:1", f"set:{TCP}:{TCP_KEEPIDLE}:77", f"trans:{SOL_SOCKET}:{SO_KEEPALIVE}:1")
    ops = (*delayed, "bind:ep-six", "results", f"get:{TCP}:{TCP_KEEPIDLE}", f"get:{SOL_SOCKET}:{SO_KEEPALIVE}")
    assert calls(lab, program, "socket:stream", *ops)[4:] == ["bind 0", f"results 0 {TCP}:{TCP_KEEPIDLE}:0 {SOL_SOCKET}:{SO_KEEPALIVE}:0", "get 77", "get 1"]
    lines = calls(lab, program, "socket:stream", *delayed, "bind:ep-unix", "results")
    assert lines[4] == "bind 0"
    assert lines[5].startswith(f"results 0 {TCP}:{TCP_KEEPIDLE}:-")


def test_options_of_the_socket_layer_survive_bind(lab, program, table):
    ops = (f"set:{SOL_SOCKET}:{SO_KEEPALIVE}:1", f"set:{SOL_SOCKET}:{SO_RCVBUF}:65536", "bind:ep-six", f"get:{SOL_SOCKET}:{SO_KEEPALIVE}", f"get:{SOL_SOCKET}:{SO_RCVBUF}")
    assert calls(lab, program, "socket:stream", *ops)[1:] == ["set 0", "set 0", "bind 0", "get 1", "get 131072"]


def test_execute_before_bind(lab, program):
    ops = (f"set:{GRAFT_LEVEL}:{DELAYED}:1", f"set:{TCP}:{TCP_NODELAY}:1", "set:6:9999:1", f"setnull:{GRAFT_LEVEL}:{EXECUTE}", "results")
    assert calls(lab, program, "socket:stream", *ops)[1:] == ["set 0", "set 0", "set 0", "setnull 0", f"results 0 {TCP}:{TCP_NODELAY}:0 6:9999:-92"]


def test_the_queue_is_64_long(lab, program):
    ops = (f"set:{GRAFT_LEVEL}:{DELAYED}:1", *[f"set:{TCP}:{TCP_NODELAY}:1"] * 65)
    assert calls(lab, program, "socket:stream", *ops)[2:] == ["set 0"] * 64 + ["set ENOBUFS"]


def test_transparent_after_bind(lab, program, table):
    ops = ("bind:ep-test", f"trans:{SOL_SOCKET}:{SO_KEEPALIVE}:1", f"get:{SOL_SOCKET}:{SO_KEEPALIVE}", f"trans:{SOL_SOCKET}:{SO_BINDTODEVICE}:1")
    assert calls(lab, program, "socket:stream", *ops)[2:] == ["trans 0", "get 1", "trans EPERM"]


@pytest.mark.parametrize(
    ("op", "says"),
    [
        (f"set:{GRAFT_LEVEL}:99:1", "set ENOPROTOOPT"),
        (f"get:{GRAFT_LEVEL}:99", "get ENOPROTOOPT"),
        (f"set:{GRAFT_LEVEL}:{RESULT}:1", "set ENOPROTOOPT"),
        (f"get:{GRAFT_LEVEL}:{EXECUTE}", "get ENOPROTOOPT"),
        (f"get:{GRAFT_LEVEL}:{TRANSPARENT}", "get ENOPROTOOPT"),
        (f"setnull:{GRAFT_LEVEL}:{DELAYED}", "setnull EINVAL"),
        (f"setnull:{GRAFT_LEVEL}:{NAME}", "setnull EINVAL"),
        (f"set:{GRAFT_LEVEL}:{NAME}:1:8", "set EINVAL"),
        (f"trans:1:2:1:{129}", "trans EINVAL"),
        (f"trans:1:2:1:{8}", "trans EINVAL"),
        (f"set:{GRAFT_LEVEL}:{NAME}:-5", "set 0"),
        (f"get:{GRAFT_LEVEL}:{NAME}", "get 0"),
    ],
)
def test_option_errnos(lab, program, op, says):
    assert calls(lab, program, "socket:stream", op) == ["socket 0", says]


def test_other_sockets_do_not_know_the_level(lab):
    code = """
import socket, errno
for s in (socket.socket(), socket.socket(socket.AF_UNIX)):
    for call in (lambda: s.setsockopt(254, 1, 1), lambda: s.getsockopt(254, 1)):
        try: call(); print('done')
        except OSError as e: print(errno.errorcode[e.errno])
try: socket.socket().bind(('x' * 3, 1))
except OSError: pass
"""
    told = lab.graft("--", *python(code))
    assert told.stdout.split() == lab.host(*python(code)).stdout.split(), told.stderr


def test_getsockname_before_bind(lab, program):
    ops = ("getsockname", f"set:{GRAFT_LEVEL}:{NAME}:1", "getsockname")
    assert calls(lab, program, "socket:stream", *ops)[1:] == ["getsockname family 0 18", "set 0", "getsockname inet 0.0.0.0 0 16"]


def test_many_sockets_of_the_family(lab, program):
    """More than there are numbers set aside: the rest work, with the host socket's name."""
    lines = calls(lab, program, *["socket:stream"] * 70, "bind:nope")
    assert lines == ["socket 0"] * 70 + ["bind ENOENT"]


THREADS = """
import os, socket, sys, threading
kept, others, lost = [], [], []
start = threading.Barrier(9)
def make():
    start.wait()
    for _ in range(7): kept.append(socket.socket(4, socket.SOCK_STREAM))
def work():  # files come and go meanwhile
    start.wait()
    for _ in range(300):
        fd = os.open('/proc/self/stat', os.O_RDONLY); inode = os.fstat(fd).st_ino
        if os.fstat(fd).st_ino != inode or not os.readlink(f'/proc/self/fd/{fd}').endswith('stat'): lost.append(fd)
        os.close(fd)
threads = [threading.Thread(target=make) for _ in range(8)] + [threading.Thread(target=work)]
for t in threads: t.start()
for t in threads: t.join()
numbers = {s.fileno() for s in kept}
print(len(kept), len(numbers), len({os.fstat(n).st_ino for n in numbers}), lost, sum(960 <= n <= 1023 for n in numbers))
"""


def test_threads_get_sockets_of_their_own(lab):
    """Each a number and a socket that no other has, and no file of the program's is closed for it."""
    for _ in range(5):
        told = lab.graft("--", *python(THREADS))
        assert told.stdout == "56 56 56 [] 56\n", told.stdout + told.stderr


def test_a_low_limit_of_descriptors(lab, program, table):
    lines = calls(lab, "/bin/sh", "-c", f"ulimit -n 256; exec {program} socket:stream bind:ep-test listen")
    assert lines == ["socket 0", "bind 0", "listen 0"]


def test_upstreams_recipe_in_c(lab, tmp_path, table):
    """The README's program, as it stands there."""
    source = tmp_path / "readme.c"
    source.write_text("""
#include <string.h>
#include <stdio.h>
#include <graft.h>
int main(void)
{
	int sock;
	struct sockaddr_gr sgr;

	sock = socket(AF_GRAFT, SOCK_STREAM, 0);
	memset(&sgr, 0, sizeof(sgr));
	sgr.sgr_family = AF_GRAFT;
	strncpy(sgr.sgr_epname, "ep-test", 7);
	if (bind(sock, (struct sockaddr *)&sgr, sizeof(sgr)) || listen(sock, 5))
		return 1;
	puts("listening");
	return 0;
}
""")
    subprocess.run(("gcc", f"-I{ROOT / 'include'}", source, "-o", tmp_path / "readme"), check=True)
    assert lab.graft("--", tmp_path / "readme").stdout == "listening\n"
    assert lab.host(tmp_path / "readme").returncode == 1
