"""127.0.0.1 and ::1 inside are the container's own, for TCP and UDP, and nobody else's."""

import ipaddress
import json
import re

import pytest

from graft.bench.lab import GRAFT, HOST4, HOST6, ROOT
from tests.conftest import need, python

SERVE = """
import socket, sys
family, kind, address, port, word = socket.AF_INET6 if ':' in {address!r} else socket.AF_INET, {kind}, {address!r}, {port}, {word!r}
s = socket.socket(family, kind)
if kind == socket.SOCK_STREAM:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind((address, port))
if kind == socket.SOCK_STREAM:
    s.listen()
    print('ready', flush=True)
    while True:
        c, peer = s.accept(); c.sendall((word + ' ' + peer[0]).encode()); c.close()
else:
    print('ready', flush=True)
    while True:
        data, peer = s.recvfrom(99); s.sendto((word + ' ' + peer[0]).encode(), peer)
"""
ASK = """
import socket
family = socket.AF_INET6 if ':' in {address!r} else socket.AF_INET
s = socket.socket(family, {kind}); s.settimeout(3)
s.connect(({address!r}, {port})) if {connect} else s.sendto(b'?', ({address!r}, {port}))
if {connect} and {kind} == socket.SOCK_DGRAM: s.send(b'?')
data, peer = s.recvfrom(99)
print(data.decode(), (peer or s.getpeername())[:2], s.getpeername()[:2] if {connect} else '')
"""


def serve(lab, where, address, kind, word, port=5000):
    process = lab.spawn(*where, *python(SERVE.format(address=address, kind=kind, word=word, port=port)), stdout=-1)
    assert process.stdout.readline() == "ready\n"
    return process


def ask(lab, where, address, kind, connect, port=5000):
    return lab.host(*where, *python(ASK.format(address=address, kind=kind, connect=connect, port=port)))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize(("kind", "connect"), [pytest.param(1, True, marks=pytest.mark.core), (2, True), (2, False)])
def test_two_containers_and_the_host_on_one_port(lab, address, kind, connect):
    graft = str(GRAFT)
    serve(lab, (), address, kind, "host")
    for name in ("one", "two"):
        serve(lab, (graft, "run", "--name", name), address, kind, name)
    for name in ("one", "two"):
        result = ask(lab, (graft, "run", "--netns", str(pid_of(lab, name))), address, kind, connect)
        assert result.stdout.split()[:2] == [name, address], result.stderr
        assert f"('{address}', 5000)" in result.stdout
    assert ask(lab, (), address, kind, connect).stdout.split()[0] == "host"


def pid_of(lab, name):
    return next(c["pid"] for c in json.loads(lab.graft("ps", "-j").stdout) if c["name"] == name)


@pytest.mark.parametrize("kind", [1, 2])
def test_the_host_reaches_no_slice(lab, kind):
    serve(lab, (str(GRAFT), "run", "--name", "hidden"), "127.0.0.1", kind, "hidden")
    block = json.loads(lab.graft("inspect", "hidden").stdout)["loopback"]
    low = block["ipv4"].split("/")[0].split(".")
    index, real = 5000 >> 12, 61440 | 5000 & 4095
    address = ".".join([*low[:3], str((int(low[3]) & ~31) + index)])
    assert lab.host("ss", "-lnH", "-t" if kind == 1 else "-u", f"src {address}:{real}").stdout.strip(), address
    for target in (address, f"::ffff:{address}"):
        result = ask(lab, (), target, kind, True, real)
        assert "ConnectionRefusedError" in result.stderr
    if kind == 2:
        assert "ConnectionRefusedError" in ask(lab, (), address, kind, False, real).stderr
    other = ask(lab, (str(GRAFT), "run"), address, kind, True, real)
    assert "Error" in other.stderr
    assert "hidden" not in other.stdout


def test_a_hosts_wildcard_server_is_not_the_containers(lab):
    serve(lab, (), "0.0.0.0", 1, "host", port=7001)
    inside = ask(lab, (str(GRAFT), "run"), "127.0.0.1", 1, True, 7001)
    assert "ConnectionRefusedError" in inside.stderr
    assert ask(lab, (str(GRAFT), "run"), HOST4, 1, True, 7001).stdout.startswith("host")


def test_private_ports_do_not_stand_in_the_hosts_way(lab):
    """A container on 0.0.0.0:80, unpublished, beside a host's and another container's wildcard port 80."""
    graft = str(GRAFT)
    serve(lab, (graft, "run", "--name", "private"), "0.0.0.0", 1, "private", port=80)
    serve(lab, (), "0.0.0.0", 1, "host", port=80)
    serve(lab, (graft, "run", "--name", "third"), "0.0.0.0", 1, "third", port=80)
    for name in ("private", "third"):
        found = ask(lab, (graft, "run", "--netns", str(pid_of(lab, name))), "127.0.0.1", 1, True, 80)
        assert found.stdout.startswith(name), found.stderr
    assert ask(lab, (), "127.0.0.1", 1, True, 80).stdout.startswith("host")


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_unpublished_wildcard_is_private(lab, address):
    name = "wild4" if address == "0.0.0.0" else "wild6"
    serve(lab, (str(GRAFT), "run", "--name", name), address, 1, name, port=8123)
    inside = (str(GRAFT), "run", "--netns", str(pid_of(lab, name)))
    for target in ("127.0.0.1", "127.9.9.9", "0.0.0.0") if address == "0.0.0.0" else ("127.0.0.1", "::1", "::"):
        assert ask(lab, inside, target, 1, True, 8123).stdout.startswith(name), target
    assert lab.client(*python(ASK.format(address=HOST4, kind=1, connect=True, port=8123))).returncode
    assert "Refused" in ask(lab, (), "127.0.0.1", 1, True, 8123).stderr


@pytest.mark.parametrize("target", ["127.0.0.1", "::1", "localhost"])
def test_health_check_of_a_published_server(lab, target):
    """`curl localhost:80` inside reaches the server that is published as 8080."""
    lab.spawn_graft(
        "--name",
        "web",
        "-p",
        "8080:80",
        *python(
            "import http.server as h; from socket import *\n"
            "class S(h.ThreadingHTTPServer): address_family = AF_INET6\n"
            "S(('::', 80), h.SimpleHTTPRequestHandler).serve_forever()"
        ),
        stderr=-3,
    )
    lab.wait_listening(8080)
    url = f"http://{f'[{target}]' if ':' in target else target}:80/"
    result = lab.graft(
        "run", "--netns", pid_of(lab, "web"), "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", url
    )
    assert result.stdout == "200", result.stderr


def test_a_server_bound_to_loopback_is_not_published(lab):
    process = lab.spawn_graft(
        "--name",
        "shy",
        "-p",
        "8080:80",
        *python(SERVE.format(address="127.0.0.1", kind=1, word="shy", port=80)),
        stdout=-1,
    )
    assert process.stdout.readline() == "ready\n"
    assert ask(lab, (str(GRAFT), "run", "--netns", str(pid_of(lab, "shy"))), "127.0.0.1", 1, True, 80).stdout
    assert not lab.listening(8080)
    assert lab.client(*python(ASK.format(address=HOST4, kind=1, connect=True, port=8080))).returncode


def test_listen_without_bind_is_private(lab):
    code = """
import socket, subprocess
s = socket.socket(); s.listen(); port = s.getsockname()[1]
c = socket.create_connection(('127.0.0.1', port)); print(c.getpeername()[1] == port)
d = socket.socket(socket.AF_INET6); d.listen(); print(socket.create_connection(('::1', d.getsockname()[1])) is not None)
input()
"""
    process = lab.spawn_graft("--name", "unbound", *python(code), stdout=-1, stdin=-1)
    assert [process.stdout.readline(), process.stdout.readline()] == ["True\n", "True\n"]
    for line in lab.host("ss", "-tlnH").stdout.splitlines():
        assert "127." in line.split()[3], line
    process.stdin.close()


def test_the_wire_reaches_no_slice(lab):
    """A neighbour that routes the slices' prefix to this host gets no answer, neither family."""
    serve(lab, (str(GRAFT), "run", "--name", "wired"), "::1", 1, "wired", port=8124)
    block = json.loads(lab.graft("inspect", "wired").stdout)["loopback"]["ipv6"].split("/")[0]
    real = 61440 | 8124 & 4095
    address = str(ipaddress.ip_address(int(ipaddress.ip_address(block)) >> 32 << 32 | 8124 >> 12))
    assert f"[{address}]:{real}" in lab.host("ss", "-tlnH").stdout
    lab.client("ip", "-6", "route", "replace", "fd67:7261:6674::/64", "via", HOST6, check=True)
    lab.host("sysctl", "-qw", "net.ipv6.conf.all.forwarding=0")
    reached = lab.client(*python(ASK.format(address=address, kind=1, connect=True, port=real)))
    assert reached.returncode
    assert "wired" not in reached.stdout


def test_udp_client_bound_to_port_0_talks_to_its_own_servers(lab):
    code = """
import socket
for family, loopback, wild in ((2, '127.0.0.1', '0.0.0.0'), (10, '::1', '::')):
    for server_address in (loopback, wild):
        s = socket.socket(family, 2); s.settimeout(3)
        if family == 10: s.setsockopt(41, 26, 1)
        s.bind((server_address, 5300 if server_address == loopback else 53))
        c = socket.socket(family, 2); c.settimeout(3); c.bind((wild, 0)); c.connect((loopback, s.getsockname()[1]))
        c.send(b'q'); data, peer = s.recvfrom(9); s.sendto(b'a', peer); print(c.recv(9), peer[0])
"""
    result = lab.graft("run", "-p", "5355:53/udp", *python(code))
    assert result.stdout.splitlines() == ["b'a' 127.0.0.1"] * 2 + ["b'a' ::1"] * 2, result.stderr


# One socket of both families where the container has a place for IPv4 alone, and binds of one family beside a port
# that is published: docs/differences.md.
BOTH_FAMILIES = r"(:: |.* by :: 5301|itself, :: 5301)"
BESIDE = r"both, "


DATAGRAMS = ROOT / "tests/programs/datagrams.py"


@pytest.fixture(scope="module")
def datagrams_of_the_host(lab):
    return lab.host(*python(DATAGRAMS.read_text()), check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ((), None),
        (("-p", "5300:5300/udp"), BESIDE),
        (("-p", "5399:5300/udp"), BESIDE),
        (("-p", f"{HOST4}:5300:5300/udp"), f"{BOTH_FAMILIES}|{BESIDE}"),
        (("-p", "127.0.0.1:5399:5300/udp"), f"{BOTH_FAMILIES}|{BESIDE}"),
        (("--ip", "10.88.0.5"), f"{BOTH_FAMILIES}|{BESIDE}"),
        (("--ip", "10.88.0.5", "-p", "5399:5300/udp"), f"{BOTH_FAMILIES}|{BESIDE}"),
    ],
)
def test_datagrams_over_the_loopback_are_the_hosts(lab, datagrams_of_the_host, options, differs):
    """Every pair of binds and destinations, and what both see; wherever the server really is."""
    inside = lab.graft("run", *options, *python(DATAGRAMS.read_text()))
    assert inside.returncode == 0, inside.stderr
    told = inside.stdout.splitlines()
    assert len(told) == len(datagrams_of_the_host) > 400
    wrong = [
        (seen, right)
        for seen, right in zip(told, datagrams_of_the_host, strict=True)
        if seen != right and not (differs and re.match(differs, right))
    ]
    assert wrong == []


# Sockets on the loopback and on a wildcard, in turn, of which the kernel knows nothing common. Each is asked by the
# name that it has, and by the one that others have seen.
PORT_0 = """
import socket
def make(family, address=None):
    s = socket.socket(family, 2); s.settimeout(3)
    if address: s.bind((address, 0))
    return s
loopback = {2: '127.0.0.1', 10: '::1'}
for family, wild in ((2, '0.0.0.0'), (10, '::')):
    server = make(family, loopback[family])
    made = []
    for n in range(100):
        made.append(make(family, loopback[family]))
        made.append(make(family, wild))
        made.append(make(family)); made[-1].sendto(b'-', server.getsockname()); server.recv(9)
    names = [s.getsockname()[1] for s in (server, *made)]
    print(len(set(names)))
    for n, s in enumerate(made):
        server.sendto(b'%d' % n, (loopback[family], s.getsockname()[1])); assert s.recv(9) == b'%d' % n
        s.sendto(b'?', server.getsockname()); seen = server.recvfrom(9)[1]; assert seen[1] == s.getsockname()[1]
        server.sendto(b'!', seen); assert s.recv(9) == b'!'
    for s in made:
        s.close()
"""


def test_port_0_is_no_port_of_another_socket(own_lab):
    """The kernel chooses on the wildcard, and graft on the loopback: 301 sockets of some 1000 ports are not in each other's way."""
    own_lab.host("sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 43000", check=True)
    for _ in range(3):
        done = own_lab.graft("run", "--sysctl", "net.ipv4.ip_local_port_range=40000 41023", *python(PORT_0))
        assert done.stdout == "301\n" * 2, done.stderr


@pytest.mark.parametrize("options", [(), ("-p", "5399:5300/udp"), ("--ip", "10.88.0.5")])
def test_java_datagrams(lab, options):
    """DatagramSocket is a socket of AF_INET6 that connects to IPv4 addresses."""
    need("java", "javac")
    lab.host("javac", "-d", lab.work, ROOT / "tests/programs/Datagrams.java", check=True)
    done = lab.graft("run", *options, "java", "-cp", lab.work, "Datagrams", "5300")
    assert done.stdout.splitlines() == ["127.0.0.1 5300 answer of 127.0.0.1"] * 2, done.stderr


REDIS = """
redis-server {bind} --save "" --daemonize no >/dev/null & trap "kill $!" EXIT
for n in $(seq 100); do redis-cli -h {first} ping 2>/dev/null | grep -q . && break; sleep 0.1; done
for host in {hosts}; do redis-cli -h $host ping 2>&1 | tr '\\n' ' '; done; echo
"""
WHERE = [(), ("-p", "6379:6379"), ("-p", f"{HOST4}:6379:6379"), ("-p", "7379:6379"), ("--ip", "10.88.0.5"), ("--ip", "10.88.0.5", "-p", "6379:6379")]


@pytest.mark.parametrize("options", WHERE, ids=" ".join)
def test_redis_is_asked_from_the_loopback(lab, options):
    """Its protected mode answers the loopback alone: both families, wherever the server is bound."""
    dual = () if any(HOST4 in word for word in options) else ("::1",)  # one rule of IPv4 takes a dual-stack bind
    script = REDIS.format(bind="", first="127.0.0.1", hosts=" ".join(("127.0.0.1", *dual)))
    done = lab.graft("run", *options, "sh", "-c", script)
    assert done.stdout.split() == ["PONG"] * (1 + len(dual)), done.stdout + done.stderr


def test_redis_on_its_address_alone(lab):
    """`redis-server --bind ADDR`: as on any host it is not at 127.0.0.1, and denies who is not of the loopback."""
    script = REDIS.format(bind="--bind 10.88.0.5", first="10.88.0.5", hosts="10.88.0.5 127.0.0.1")
    done = lab.graft("run", "--ip", "10.88.0.5", "-p", "6379:6379", "sh", "-c", script)
    assert done.stdout.startswith("DENIED Redis is running in protected mode"), done.stdout
    assert "Could not connect to Redis at 127.0.0.1:6379: Connection refused" in done.stdout
    script = REDIS.format(bind="--bind 127.0.0.1 10.88.0.5 --protected-mode no", first="127.0.0.1", hosts="10.88.0.5 127.0.0.1")
    assert lab.graft("run", "--ip", "10.88.0.5", "sh", "-c", script).stdout.split() == ["PONG", "PONG"]


ALLOWED = """
daemon off; pid {dir}/nginx.pid; error_log stderr crit; events {{ }}
http {{
    access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
    uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
    server {{ listen 8094; listen [::]:8094; allow 127.0.0.1; allow ::1; deny all; add_header X-Names "$remote_addr $server_addr"; location / {{ empty_gif; }} }}
}}
"""


@pytest.mark.parametrize("options", [("-p", "8094:8094"), ("-p", "8095:8094"), ("--ip", "10.88.0.5"), ("--ip", "10.88.0.5", "-p", "8094:8094")], ids=" ".join)
def test_nginx_allows_the_loopback(lab, options):
    """`allow 127.0.0.1; deny all`: for the container's own client of both families, and for nobody else."""
    config = lab.work / "allowed.conf"
    config.write_text(ALLOWED.format(dir=lab.work))
    script = f"""
nginx -c {config} & trap "kill $!" EXIT
for n in $(seq 100); do curl -s -o /dev/null 127.0.0.1:8094 && break; sleep 0.1; done
for host in 127.0.0.1 '[::1]' localhost; do curl -s -o {lab.work}/gif -w '%{{http_code}} %header{{x-names}}\\n' $host:8094; done
echo ready; read line
"""
    process = lab.spawn_graft(*options, "sh", "-c", script, stdout=-1, stdin=-1)
    told = [process.stdout.readline() for _ in range(4)]
    assert told[:2] == ["200 127.0.0.1 127.0.0.1\n", "200 ::1 ::1\n"]
    assert told[2] in told[:2]
    if "-p" in options:
        port = options[-1].split(":")[0]
        done = lab.client("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://{HOST4}:{port}")
        assert done.stdout == "403"
    process.stdin.close()
    process.wait(20)


def test_a_client_of_one_family_reaches_a_dual_stack_server(lab):
    """V6ONLY, bound to ::1, and bound to the wildcard; the server sees the loopback of the same family."""
    code = """
import socket
for published in (8096, 8097):
    s = socket.socket(socket.AF_INET6); s.bind(('::', published)); s.listen()
    for only, bound in ((1, None), (1, '::1'), (0, '::1'), (0, '::ffff:127.0.0.1'), (0, '::')):
        c = socket.socket(socket.AF_INET6); c.settimeout(5); c.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        if bound: c.bind((bound, 0))
        try: c.connect(('::1', published))
        except OSError as error: print(bound, error); continue
        a, peer = s.accept(); print(c.getsockname()[0], c.getpeername()[0], a.getsockname()[0], peer[0], a.getsockname()[1] == published)
"""
    done = lab.graft("run", "-p", "8098:8097", *python(code))
    same = "::1 ::1 ::1 ::1 True"
    other = "::ffff:127.0.0.1 [Errno 97] Address family not supported by protocol"  # as on any host
    assert done.stdout.splitlines() == [same, same, same, other, same] * 2, done.stderr


@pytest.mark.core
def test_an_address_of_the_hosts_is_in_no_way_of_the_loopback(lab):
    """A server at each, at one port that nobody publishes; a client of the loopback reaches that of the loopback."""
    code = (
        "import socket\n"
        "there = [socket.create_server((a, 5000)) for a in ('127.0.0.1', '10.77.0.1')]\n"
        "six = [socket.create_server((a, 5000), family=socket.AF_INET6) for a in ('::1', '2001:db8:77::1')]\n"
        "for server, address in ((there[0], '127.0.0.1'), (six[0], '::1')):\n"
        "    client = socket.create_connection((address, 5000), 5)\n"
        "    print(server.accept()[1][1] == client.getsockname()[1], [s.getsockname()[0] for s in there + six])\n"
    )
    names = ["127.0.0.1", "10.77.0.1", "::1", "2001:db8:77::1"]
    result = lab.graft("run", *python(code))
    assert result.stdout == f"True {names}\n" * 2, result.stderr
