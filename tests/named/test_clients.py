"""Clients that bind before they go out, and servers that do so to ask others: resolvers, clocks, HTTP."""

import pytest

from graft.bench.lab import CLIENT4, CLIENT6, wait_for
from tests.named.place import Grafted

CURL = ("curl", "-sS", "--max-time", "20")
NAMES = "192.0.2.7"
LONG = "x" * 250


def nameserver(place):
    """dnsmasq on the client, which knows a name, and one with an answer of more than 512 bytes."""
    texts = [f"--txt-record=long.lab,{n}{LONG},{n}{LONG}" for n in range(4)]
    address = ("--listen-address", f"{CLIENT4},{CLIENT6}", "--bind-interfaces")
    options = ("-d", "-C", "/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--pid-file=", "--local-ttl=60", *address)
    place.serve_far("dnsmasq", *options, f"--address=/name.lab/{NAMES}", *texts, port=53)


def web(place):
    """A web server on the client with one page, and its address."""
    (place.work / "page").write_text("a page of the client's\n")
    place.serve_far("python3", "-m", "http.server", "--bind", "::", "--directory", place.work, "8000", port=8000)
    return f"http://{CLIENT4}:8000/page", f"http://[{CLIENT6}]:8000/page"


def test_dig(stage):
    """By UDP and TCP, from a port that it names, and from one that the kernel chooses."""
    stage.need("dig", "dnsmasq")

    def play(place):
        nameserver(place)
        ask = "dig +short +tries=1 +time=5"
        asked = [f"@{server}" for server in (CLIENT4, CLIENT6)]
        asked += [f"@{CLIENT4} -b {source}{port}" for source in ("0.0.0.0", place.address4) for port in ("", "#5353")]
        lines = [f"{ask} {options} {one} name.lab" for one in asked for options in ("", "+tcp")]
        return place.alone("sh", "-ec", "\n".join(lines)).splitlines()

    assert stage.same(play) == [NAMES] * 12


def test_dig_gets_a_long_answer(stage):
    """Truncated over UDP, so that it asks again over TCP."""
    stage.need("dig", "dnsmasq")

    def play(place):
        nameserver(place)
        told = place.alone("dig", "+short", "+ignore", "+noedns", "+time=5", f"@{CLIENT4}", "long.lab", "TXT")
        return told.count(LONG), sorted(place.alone("dig", "+short", "+noedns", "+time=5", f"@{CLIENT4}", "long.lab", "TXT").splitlines())

    cut, whole = stage.same(play)
    assert cut < 8
    assert sum(line.count(LONG) for line in whole) == 8


@pytest.mark.parametrize("options", [("--local-port", "40000-40010"), ("--interface", "ADDRESS"), ("--interface", "ADDRESS", "--local-port", "41000")])
def test_curl_from_a_port_or_an_address(stage, options):
    stage.need("curl", "python3")

    def play(place):
        four, six = web(place)
        return [
            place.alone(*CURL, *(address if word == "ADDRESS" else word for word in options), url)
            for address, url in ((place.address4, four), (place.address6, six))
            for _ in range(1 if "ADDRESS" in options else 2)
        ]

    assert set(stage.same(play)) == {"a page of the client's\n"}


HTTPX = """
import httpx, sys
for url, source in zip(sys.argv[1:3], sys.argv[3:]):
    with httpx.Client(transport=httpx.HTTPTransport(local_address=source), timeout=10) as client:
        print(client.get(url).text, client.get(url).status_code)
"""


@pytest.mark.tree
@pytest.mark.parametrize("source", ["wildcard", "address"])
def test_httpx_with_a_local_address(stage, source):
    stage.need("python3")

    def play(place):
        four, six = web(place)
        sources = ("0.0.0.0", "::") if source == "wildcard" else (place.address4, place.address6)
        return place.alone("python3", "-c", HTTPX, four, six, *sources)

    assert stage.same(play) == "a page of the client's\n 200\n" * 2


RESOLVED = ("dig", "+short", "+tries=2", "+time=5")


def resolved(place, *servers):
    """A name's address and the size of a long answer, from each side, over UDP and TCP."""
    seen = []
    for who, server in servers:
        seen += [who(*RESOLVED, *options, f"@{server}", "-p", "5300", "name.lab") for options in ((), ("+tcp",))]
        seen.append(str(who(*RESOLVED, f"@{server}", "-p", "5300", "long.lab", "TXT").count(LONG)))
    assert seen == [f"{NAMES}\n", f"{NAMES}\n", "8"] * len(servers), f"{type(place).__name__}: {seen}\n{place.logs()}"
    return seen


UNBOUND = """
server:
    username: ""
    chroot: ""
    directory: "{work}"
    pidfile: ""
    use-syslog: no
    logfile: ""
    interface: 0.0.0.0@5300
    interface: ::0@5300
    access-control: 0.0.0.0/0 allow
    access-control: ::0/0 allow
    do-not-query-localhost: no
    module-config: "iterator"
    {more}
forward-zone:
    name: "."
    forward-addr: {server}
remote-control:
    control-enable: no
"""


@pytest.mark.tree
@pytest.mark.parametrize("more", ["", "tcp-upstream: yes", "outgoing-interface: ADDRESS"])
@pytest.mark.parametrize("server", [CLIENT4, CLIENT6])
def test_unbound(stage, server, more):
    """It asks from ports that it chooses by itself, each query from another."""
    stage.need("unbound", "dig", "dnsmasq")

    def play(place):
        nameserver(place)
        source = place.address6 if ":" in server else place.address4
        conf = UNBOUND.format(work=place.work, server=server, more=more.replace("ADDRESS", source))
        (place.work / "conf").write_text(conf)
        place.start("unbound", "-d", "-c", place.work / "conf", publish=("5300/udp", "5300"))
        return resolved(
            place,
            (place.client, place.address4),
            (place.client, place.address6),
            (place.beside, place.address4),
            (place.inside, "127.0.0.1"),
            (place.inside, place.address4),
        )

    stage.same(play)


@pytest.mark.tree
def test_pdns_recursor(stage):
    stage.need("pdns_recursor", "dig", "dnsmasq")

    def play(place):
        nameserver(place)
        options = {
            "config-dir": place.work, "daemon": "no", "socket-dir": place.work, "local-address": "0.0.0.0,::", "local-port": 5300,
            "forward-zones-recurse": f".={CLIENT4};{CLIENT6}", "allow-from": "0.0.0.0/0,::/0", "query-local-address": "0.0.0.0,::",
            "write-pid": "no", "dnssec": "off", "dont-query": "", "security-poll-suffix": "", "threads": 2, "setuid": "", "setgid": "",
        }  # fmt: skip
        place.start("pdns_recursor", *(f"--{name}={value}" for name, value in options.items()), publish=("5300/udp", "5300"))
        return resolved(
            place, (place.client, place.address4), (place.client, place.address6), (place.beside, place.address4), (place.inside, "127.0.0.1")
        )

    stage.same(play)


CLOCK = "user root\ncmdport 0\nbindcmdaddress /\npidfile {work}/{name}.pid\ndriftfile {work}/{name}.drift\n"


def clock(place, name, *lines):
    """The command of a chronyd that leaves the clock alone, in the foreground."""
    path = place.work / f"{name}.conf"
    path.write_text(CLOCK.format(work=place.work, name=name) + "\n".join(lines) + "\n")
    return ("chronyd", "-x", "-f", str(path))


@pytest.mark.tree
@pytest.mark.parametrize("source", ["", "acquisitionport 123", "acquisitionport 1123", "bindacqaddress ADDRESS"])
def test_chrony_asks(stage, source):
    """Once, and says what it would do to the clock; also from port 123."""
    stage.need("chronyd")

    def play(place):
        place.serve_far(*clock(place, "far", "local stratum 8", "allow", "port 123"), "-d", port=123, udp=True)
        line = source.replace("ADDRESS", place.address4)
        asker = clock(place, "near", f"server {CLIENT4} iburst maxsamples 2", line)
        return "System clock wrong by" in place.alone("sh", "-c", " ".join((*asker, "-Q", "-t", "15", "2>&1")))

    assert stage.same(play)


@pytest.mark.tree
def test_chrony_serves(stage):
    stage.need("chronyd")

    def play(place):
        place.start(*clock(place, "near", "local stratum 8", "allow", "port 123"), "-d", publish=("123/udp",))
        seen = []
        for who, server in (
            (place.client, place.address4),
            (place.client, place.address6),
            (place.inside, "127.0.0.1"),
        ):
            asker = clock(place, "asks", f"server {server} iburst maxsamples 2")
            seen.append("System clock wrong by" in who("sh", "-c", " ".join((*asker, "-Q", "-t", "15", "2>&1"))))
        return seen

    assert all(stage.same(play))


MY_IP = """
import socket, sys, threading
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
    asks.connect((sys.argv[1], 9)); mine = asks.getsockname()[0]
print(mine, flush=True)
listener = socket.create_server((mine, 8700)); print('ready', flush=True)
while True:
    c, _ = listener.accept(); c.sendall(c.getsockname()[0].encode()); c.close()
"""
DIAL = "import socket, sys; print(socket.create_connection((sys.argv[1], 8700), 5).recv(99).decode())"


def test_my_ip(stage):
    """connect() of a UDP socket and getsockname() tell a program its address; it listens there, where that is published."""
    stage.need("python3")

    def play(place):
        place.start("python3", "-c", MY_IP, CLIENT4, publish=("8700",))
        return [who("python3", "-c", DIAL, place.address4) for who in (place.client, place.beside, place.inside)]

    assert stage.same(play) == ["SERVER4\n"] * 3


NODE = "require('http').createServer((q, r) => r.end(q.socket.localPort + '\\n')).listen(80, '::')"
PYTHON = ("python3", "-m", "http.server", "--bind", "::", "80")


@pytest.mark.parametrize("server", ["go", "python", pytest.param("node", marks=pytest.mark.tree)])
def test_one_dual_stack_listener_at_two_loopback_addresses(stage, server, httpgo):
    """-p 127.0.0.1:8080:80 -p [::1]:8080:80, a server on [::]: both are reached from the host, and nothing from outside."""
    stage.need("curl", {"go": "curl", "node": "node", "python": "python3"}[server])

    def play(place):
        lab = place.lab
        (place.work / "httpgo").write_bytes(httpgo.read_bytes())
        (place.work / "httpgo").chmod(0o755)
        commands = {"go": (place.work / "httpgo", "serve", ":80"), "node": ("node", "-e", NODE), "python": (*PYTHON, "--directory", place.work)}
        place.start(*commands[server], publish=("127.0.0.1:8080:80", "[::1]:8080:80"))
        get = ("curl", "-s", "-o", "/dev/null", "--max-time", "5", "-w", "%{http_code},")

        def answers(host):
            return place.beside("sh", "-c", f"{' '.join(get)} 'http://{host}:8080/' || true")

        wait_for(lambda: "200" in answers("127.0.0.1"), "the server")
        seen = [answers("127.0.0.1"), answers("[::1]")]
        seen += [place.inside(*get, f"http://{host}:80/") for host in ("127.0.0.1", "[::1]")]
        outside = lab.client(*place.within(("curl", "-s", "--max-time", "5", f"http://{place.address4}:8080/")))
        return "".join(seen), outside.returncode

    assert stage.at(Grafted, play) == ("200," * 4, 7)


AGAIN = """
import socketserver, sys
class Once(socketserver.StreamRequestHandler):
    def handle(self): self.wfile.write(b'served\\n')
with socketserver.TCPServer(('', 8710), Once) as server:
    for _ in range(int(sys.argv[1])): server.handle_request()
"""
CALL = "import socket, sys; c = socket.create_connection((sys.argv[1], 8710), 5); print(c.recv(99).decode(), end=''); c.close()"


def test_a_server_without_so_reuseaddr_starts_again(stage):
    """socketserver's own default; the connections of the one before are in TIME_WAIT. Behind a bridge each start works."""
    stage.need("python3")

    def play(place):
        seen = []
        for _ in range(2):
            process = place.start("python3", "-c", AGAIN, 3, publish=("8710",))  # one call is the wait's
            seen += [who("python3", "-c", CALL, place.address4) for who in (place.client, place.beside)]
            assert process.wait(20) == 0
        return seen

    assert stage.at(Grafted, play) == ["served\n"] * 4
