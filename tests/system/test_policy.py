"""What no rule allows is refused in the kernel, counted, and leaves the host untouched; rules change live."""

import json
import os
import signal

import pytest

from graft.bench.lab import CLIENT4, CLIENT6, GRAFT, HOST4, SECOND4, wait_for
from tests.conftest import python

TRY = """
import errno, socket, sys
def tell(name, call):
    try: call(); print(name, 'done')
    except OSError as e: print(name, errno.errorcode[e.errno])
def sock(family=socket.AF_INET, kind=socket.SOCK_STREAM):
    s = socket.socket(family, kind); s.settimeout(3); return s
v6, udp = socket.AF_INET6, socket.SOCK_DGRAM
"""


def attempt(lab, body, *options):
    """Run @body in a container; the words it told, and what `graft inspect` counts after it."""
    process = lab.spawn_graft("--name", "tried", *options, *python(TRY + body + "\ninput()"), stdout=-1, stdin=-1)
    lines = []
    for line in process.stdout:
        lines.append(line.split())
        if len(lines) == body.count("tell("):
            break
    seen = json.loads(lab.graft("inspect", "tried").stdout)
    process.stdin.close()
    lab.end(process)
    wait_for(lambda: not lab.containers(), "the end")
    return dict(lines), {(r["op"], r["reason"]): r["count"] for r in seen["refused"]}, seen


@pytest.mark.core
def test_bind_without_a_rule(lab):
    told, counted, seen = attempt(
        lab,
        f"""
tell('tcp', lambda: sock().bind(({CLIENT4!r}, 80)))
tell('udp', lambda: sock(kind=udp).bind(({CLIENT4!r}, 80)))
tell('six', lambda: sock(v6).bind(({CLIENT6!r}, 80)))
tell('mapped', lambda: sock(v6).bind(('::ffff:{CLIENT4}', 80)))
tell('other', lambda: sock().bind(('192.0.2.9', 0)))
""",
    )
    assert set(told.values()) == {"EADDRNOTAVAIL"}, told
    assert counted == {("bind", "no ingress rule"): 5}
    last = seen["last_refused"][-1]
    assert (last["op"], last["errno"], last["address"]) == ("bind", "EADDRNOTAVAIL", "192.0.2.9:0")
    assert last["command"] == "python3"


@pytest.mark.parametrize("options", [("--egress", "none"), ()])
def test_egress_none_and_host(lab, options):
    lab.spawn(
        *python(f"""
import socket, time
for family, address in ((2, {CLIENT4!r}), (10, {CLIENT6!r})):
    globals()[f's{{family}}'] = s = socket.socket(family, 1); s.setsockopt(1, 2, 1); s.bind((address, 9000)); s.listen()
time.sleep(60)"""),
        client=True,
    )
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :9000").stdout.count("\n") == 2, "the servers")
    told, counted, _ = attempt(
        lab,
        f"""
tell('tcp', lambda: sock().connect(({CLIENT4!r}, 9000)))
tell('tcp6', lambda: sock(v6).connect(({CLIENT6!r}, 9000)))
tell('mapped', lambda: sock(v6).connect(('::ffff:{CLIENT4}', 9000)))
tell('udp', lambda: sock(kind=udp).sendto(b'x', ({CLIENT4!r}, 9000)))
tell('udp6', lambda: sock(v6, udp).sendto(b'x', ({CLIENT6!r}, 9000)))
tell('udpmapped', lambda: sock(v6, udp).sendto(b'x', ('::ffff:{CLIENT4}', 9000)))
tell('fastopen', lambda: socket.socket().sendto(b'x', socket.MSG_FASTOPEN, ({CLIENT4!r}, 9000)))
""",
        *options,
    )
    if options:
        assert set(told.values()) == {"ENETUNREACH"}, told
        assert counted == {("connect", "outside the egress rules"): 4, ("send", "outside the egress rules"): 3}
        assert not lab.host("ss", "-tnH", "exclude", "time-wait", f"dst {CLIENT4} or dst [{CLIENT6}]").stdout
    else:
        assert set(told.values()) == {"done"}, told
        assert counted == {}


ASK = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.settimeout(3)
    s.connect((sys.argv[1], 53))
    s.send(b'name?')
    print(s.recv(99).decode())
"""


def test_a_resolver_that_it_may_ask(lab):
    """--resolver opens port 53 of one address of the host's loopback, also where nothing else leaves."""
    server = lab.spawn(
        *python("""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('127.0.0.54', 53)); print('ready', flush=True)
while True: s.sendto(b'address', s.recvfrom(99)[1])"""),
        stdout=-1,
    )
    server.stdout.readline()
    narrow = ("--egress", "none")
    assert lab.graft("run", *narrow, "--resolver", "127.0.0.54", *python(ASK), "127.0.0.54").stdout == "address\n"
    assert "ConnectionRefused" in lab.graft("run", *narrow, *python(ASK), "127.0.0.54").stderr
    other = lab.graft("run", *narrow, "--resolver", "127.0.0.55", *python(ASK), "127.0.0.54")
    assert "ConnectionRefused" in other.stderr
    running = lab.spawn_graft("--name", "asks", "--resolver", "127.0.0.54", "sleep", "60")
    wait_for(lambda: "asks" in lab.containers(), "the container")
    seen = json.loads(lab.graft("inspect", "asks").stdout)
    assert (seen["asked"]["resolver"], seen["resolvers"]) == (["127.0.0.54"], ["127.0.0.54"])
    lab.end(running)
    refused = lab.graft("run", "--resolver", "192.0.2.1", "true")
    assert (refused.returncode, "--resolver: resolver 192.0.2.1 is not on" in refused.stderr) == (2, True)


def test_a_second_command_has_the_policy_that_is_there(lab):
    """What it repeats is fine; what would be another policy is refused, not passed over."""
    lab.spawn_graft("--name", "first", "--limit", "udp=9", "--resolver", "127.0.0.54", "sleep", "60")
    wait_for(lambda: "first" in lab.containers(), "the container")
    join = (GRAFT, "run", "--netns", "first")
    assert lab.host(*join, "--limit", "udp=9", "--resolver", "127.0.0.54", "true").returncode == 0
    lab.refused((*join, "--limit", "udp=10", "true"), 1, "runs with limits sockets=65536,udp=9 (one namespace has one policy; omit --limit)")
    lab.refused((*join, "--resolver", "127.0.0.55", "true"), 1, "may not ask that resolver (one namespace has one policy; omit --resolver)")
    lab.refused((*join, "--egress", "none", "true"), 1, "runs with egress host (one namespace has one policy; omit --egress)")


def test_egress_rules_choose_the_source(lab):
    lab.graft("endpoint", "add", "ep-out", "type", "ipv4", "addr", SECOND4, "port", "dynamic", check=True)
    code = """
import socket, time
t = socket.socket(); t.setsockopt(1, 2, 1); t.bind(('0.0.0.0', 9000)); t.listen()
u = socket.socket(2, 2); u.bind(('0.0.0.0', 9000))
print('ready', flush=True)
print(t.accept()[1][0], u.recvfrom(9)[1][0], flush=True); print(u.recvfrom(9)[1][0], flush=True)
"""
    server = lab.spawn(*python(code), client=True, stdout=-1)
    server.stdout.readline()
    told, counted, _ = attempt(
        lab,
        f"""
tell('tcp', lambda: sock().connect(({CLIENT4!r}, 9000)))
tell('udp', lambda: sock(kind=udp).sendto(b'x', ({CLIENT4!r}, 9000)))
c = sock(kind=udp)
tell('connected', lambda: (c.connect(({CLIENT4!r}, 9000)), c.send(b'x')))
tell('outside', lambda: sock().connect(('192.0.2.1', 9000)))
tell('six', lambda: sock(v6).connect(({CLIENT6!r}, 9000)))
""",
        "-e",
        f"{CLIENT4}/32=ep-out",
    )
    lab.graft("endpoint", "del", "ep-out", check=True)
    assert told == {"tcp": "done", "udp": "done", "connected": "done", "outside": "ENETUNREACH", "six": "ENETUNREACH"}
    assert counted == {("connect", "outside the egress rules"): 2}
    assert server.stdout.readline() == f"{SECOND4} {SECOND4}\n"
    assert server.stdout.readline() == f"{SECOND4}\n"


def test_a_published_udp_server_answers_without_egress(lab):
    code = """
import socket
s = socket.socket(2, 2); s.bind(('0.0.0.0', 53)); print('ready', flush=True)
while True:
    data, peer = s.recvfrom(99); s.sendto(data.upper(), peer)
"""
    server = lab.spawn_graft("-p", "5353:53/udp", "--egress", "none", *python(code), stdout=-1)
    server.stdout.readline()
    ask = f"import socket; s = socket.socket(2, 2); s.settimeout(3); s.sendto(b'q', ({HOST4!r}, 5353)); print(s.recvfrom(9))"
    assert lab.client(*python(ask)).stdout == f"(b'Q', ('{HOST4}', 5353))\n"


@pytest.mark.core
def test_options_that_reach_around(lab):
    told, counted, seen = attempt(
        lab,
        """
tell('device', lambda: sock().setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'veth0'))
tell('index', lambda: sock().setsockopt(socket.SOL_SOCKET, 62, 1))
tell('mark', lambda: sock().setsockopt(socket.SOL_SOCKET, 36, 1))
tell('transparent', lambda: sock().setsockopt(0, 19, 1))
tell('freebind', lambda: sock().setsockopt(0, 15, 1))
tell('freebind6', lambda: sock(v6).setsockopt(41, 78, 1))
tell('repair', lambda: sock().setsockopt(6, 19, 1))
tell('member', lambda: sock(kind=udp).setsockopt(0, 35, socket.inet_aton('224.0.0.5') + bytes(4)))
tell('pktinfo6', lambda: sock(v6, udp).setsockopt(41, 50, bytes(16) + bytes([1, 0, 0, 0])))
tell('ulp', lambda: sock().setsockopt(6, 31, b'smc'))
""",
    )
    assert told.pop("ulp") == "ENOENT", told
    assert set(told.values()) == {"EPERM"}, told
    assert counted == {("setsockopt", "forbidden socket option"): 10}
    assert {"op": "setsockopt", "level": 1, "option": 36}.items() <= seen["last_refused"][2].items()


def test_a_published_udp_server_may_connect_to_who_asked(lab):
    """As socat and some servers do: a socket a client. Nobody else can be connected to."""
    code = """
import errno, socket
s = socket.socket(2, 2); s.bind(('0.0.0.0', 53)); print('ready', flush=True)
data, peer = s.recvfrom(99)
try: s.connect(('10.77.0.2', 1))
except OSError as e: print(errno.errorcode[e.errno], flush=True)
s.connect(peer); s.send(data.upper()); input()
"""
    server = lab.spawn_graft("-p", "5353:53/udp", "--egress", "none", *python(code), stdout=-1, stdin=-1)
    server.stdout.readline()
    ask = f"import socket; s = socket.socket(2, 2); s.settimeout(3); s.sendto(b'q', ({HOST4!r}, 5353)); print(s.recvfrom(9))"
    assert lab.client(*python(ask)).stdout == f"(b'Q', ('{HOST4}', 5353))\n"
    assert server.stdout.readline() == "ENETUNREACH\n"
    server.stdin.close()


def test_options_that_do_not(lab):
    told, counted, _ = attempt(
        lab,
        """
tell('nodelay', lambda: sock().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))
tell('reuse', lambda: sock().setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1))
tell('buffer', lambda: sock().setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16))
tell('tos', lambda: sock().setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 16))
tell('v6only', lambda: sock(v6).setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1))
tell('pktinfo', lambda: sock(kind=udp).setsockopt(0, 8, 1))
tell('congestion', lambda: sock().setsockopt(6, socket.TCP_CONGESTION, b'reno'))
""",
    )
    assert set(told.values()) == {"done"}
    assert counted == {}


def test_source_spoofing_by_control_message(lab):
    """IP_PKTINFO cannot make a datagram look like the container's, or another container's, neighbour."""
    code = f"""
import socket, struct
s = socket.socket(2, 2)
info = struct.pack('=I4s4s', 0, socket.inet_aton('127.0.0.1'), bytes(4))
s.sendmsg([b'spoof'], [(0, 8, info)], 0, ({HOST4!r}, 9001))
s.connect(({HOST4!r}, 9001)); s.sendmsg([b'spoof'], [(0, 8, info)])
"""
    server = lab.spawn(
        *python(
            "import socket; s = socket.socket(2, 2); s.bind(('0.0.0.0', 9001)); print(flush=True)\n"
            "print(s.recvfrom(9)[1][0], s.recvfrom(9)[1][0], flush=True)"
        ),
        stdout=-1,
    )
    server.stdout.readline()
    assert lab.graft("run", *python(code)).returncode == 0
    assert "127." not in server.stdout.readline()


def test_identity_of_the_host_is_not_shown(lab):
    code = (
        "import socket; print(*(int.from_bytes(s.getsockopt(1, 71, 8), 'little') for s in "
        "(socket.socket(), socket.socket(socket.AF_UNIX))))"
    )
    grafted, own = lab.graft("run", *python(code)).stdout.split()
    assert grafted == own


def test_device_ioctls_ask_the_containers_own_namespace(lab):
    told, _, _ = attempt(
        lab,
        """
import fcntl, struct
def ask(number, name=b'lo'):
    return fcntl.ioctl(sock(), number, struct.pack('16s24x', name))
tell('flags', lambda: ask(0x8913))
tell('veth', lambda: ask(0x8913, b'veth0'))
tell('bridge', lambda: ask(0x89a0, b'br0'))
tell('up', lambda: ask(0x8914))
tell('netns', lambda: ask(0x894c))
tell('atmark', lambda: fcntl.ioctl(sock(), 0x8905, bytes(4)))
""",
    )
    assert (
        told
        == {"flags": "done", "veth": "ENODEV", "bridge": "EPERM", "up": "EPERM", "netns": "EPERM", "atmark": "EINVAL"}
        or told["atmark"] == "done"
    ), told


def test_rules_change_while_it_runs(lab):
    serve = """
import http.server as h, socket, sys, threading
for port in (80, 81):
    class S(h.ThreadingHTTPServer): pass
for line in sys.stdin:
    port = int(line)
    s = socket.socket(); s.setsockopt(1, 2, 1)
    s.bind(('0.0.0.0', port)); s.listen(); print('bound', flush=True)
    threading.Thread(target=lambda s=s: [s.accept()[0].sendall(b'hello') for _ in range(9)], daemon=True).start()
"""
    process = lab.spawn_graft("--name", "live", "-p", "8080:80", *python(serve), stdin=-1, stdout=-1)

    def bind(port):
        process.stdin.write(f"{port}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "bound\n"

    def reach(port):
        code = f"import socket; s = socket.create_connection(({HOST4!r}, {port}), 3); print(s.recv(9))"
        return lab.client(*python(code)).returncode == 0

    bind(80)
    assert reach(8080)
    bind(81)
    assert not reach(8081)
    assert lab.graft("rule", "add", "live", "-p", "8082:82").returncode == 0
    bind(82)
    assert reach(8082)
    assert "8082:82/tcp" in lab.graft("rule", "show", "live").stdout
    assert lab.graft("rule", "del", "live", "-p", "8080:80").returncode == 0
    assert reach(8080), "what is bound stays open"
    assert "8080" not in lab.graft("endpoint", "show", "--netns", "live").stdout
    assert lab.graft("rule", "del", "live", "-p", "8080:80").returncode == 1
    assert (
        lab.graft(
            "endpoint", "add", "ep", "type", "ipv4", "addr", HOST4, "port", "8083", "--netns", "live"
        ).returncode
        == 0
    )
    assert lab.graft("rule", "add", "live", "-i", "0.0.0.0:83=ep").returncode == 0
    bind(83)
    assert reach(8083)
    assert lab.graft("endpoint", "del", "ep", "--netns", "live").returncode == 0
    assert reach(8083), "a deleted endpoint keeps open sockets"


def test_a_rule_without_its_endpoint_is_no_way_round(lab):
    """What it matches does not fall to a wider rule, nor to the host's way out."""
    for name in ("narrow", "wide"):
        lab.graft("endpoint", "add", name, "type", "ipv4", "addr", HOST4, "port", "dynamic", check=True)
    lab.graft("endpoint", "add", "served", "type", "ipv4", "addr", HOST4, "port", "8390", check=True)
    lab.graft("endpoint", "add", "one", "type", "ipv4", "addr", HOST4, "port", "8391", check=True)
    code = """
import errno, socket, sys
def tell(call, *words):
    try: call(*words); return 'done'
    except OSError as error: return errno.errorcode[error.errno]
for _ in sys.stdin:
    s = socket.socket(); u = socket.socket(2, 2); b = socket.socket()
    print(tell(s.connect, ('10.77.0.2', 1)), tell(u.sendto, b'', ('10.77.0.2', 9)), tell(b.bind, ('0.0.0.0', 80)), tell(b.listen), flush=True)
"""
    wide = [("--egress", "host"), ("-e", "0.0.0.0/0=wide")]
    for n, rules in enumerate(wide):
        words = ("--name", f"round{n}", *rules, "-e", "10.77.0.0/24=narrow", "-i", "0.0.0.0:80=one", "-i", "0.0.0.0:80-89=served")
        container = lab.spawn_graft(*words, *python(code), stdin=-1, stdout=-1)

        def ask(process=container):
            process.stdin.write("\n")
            process.stdin.flush()
            return process.stdout.readline().split()

        assert ask() == ["ECONNREFUSED", "done", "done", "done"]
        assert f"{HOST4}:8391" in lab.host("ss", "-Hltn").stdout
        for name in ("narrow", "one"):
            lab.graft("endpoint", "del", name, "--netns", f"round{n}", check=True)
        assert ask() == ["ENETUNREACH", "ENETUNREACH", "done", "done"]
        assert f"{HOST4}:839" not in lab.host("ss", "-Hltn").stdout, "a bind is private"
        shown = lab.graft("rule", "show", f"round{n}")
        assert "endpoint 'narrow' is not there: what its rules match has no rule\n" in shown.stdout
        assert json.loads(lab.graft("rule", "show", f"round{n}", "-j").stdout)["dangling"] == ["narrow", "one"]
        lab.graft("endpoint", "add", "narrow", "type", "ipv4", "addr", HOST4, "port", "dynamic", "--netns", f"round{n}", check=True)
        assert ask() == ["ECONNREFUSED", "done", "done", "done"]
        container.stdin.close()
        container.wait(20)
    for name in ("narrow", "wide", "served", "one"):
        lab.graft("endpoint", "del", name, check=True)


def test_all_rules_or_none(lab):
    lab.spawn_graft("--name", "whole", "-p", "8080:80", "sleep", "60")
    wait_for(lambda: "whole" in lab.containers(), "the container")
    before = lab.graft("rule", "show", "whole", "-j").stdout
    result = lab.graft("rule", "add", "whole", "-p", "8081:81", "-p", "8080:82")
    assert result.returncode == 1
    assert "published by container 'whole'" in result.stderr
    assert "unknown endpoint" in lab.graft("rule", "add", "whole", "-i", "0.0.0.0:1=nope").stderr
    assert lab.graft("rule", "show", "whole", "-j").stdout == before


def test_dynamic_endpoint(lab):
    lab.graft("endpoint", "add", "ep-dyn", "type", "ipv4", "addr", HOST4, "port", "dynamic", check=True)
    code = """
import socket
s = socket.socket(); s.bind(('0.0.0.0', 80)); s.listen(); print(*s.getsockname(), flush=True)
c = socket.create_connection(('127.0.0.1', 80)); print(c.getpeername()[1], s.accept()[0].getsockname(), flush=True); input()
"""
    process = lab.spawn_graft("-i", "0.0.0.0:80=ep-dyn", *python(code), stdout=-1, stdin=-1)
    assert process.stdout.readline() == "0.0.0.0 80\n"
    assert process.stdout.readline() == "80 ('127.0.0.1', 80)\n"
    assert lab.host("ss", "-tlnH", f"src {HOST4}").stdout.count("LISTEN") == 1
    process.stdin.close()
    lab.graft("endpoint", "del", "ep-dyn", check=True)


def rules(lab, name):
    return json.loads(lab.graft("rule", "show", name, "-j").stdout)


def test_deleting_is_all_or_none(lab):
    process = lab.spawn_graft("--name", "whole", "-p", "8182:80", *python("input()"), stdin=-1)
    wait_for(lambda: lab.containers() == ["whole"], "the container")
    before = rules(lab, "whole")
    lab.refused((GRAFT, "rule", "del", "whole", "-p", "8182:80", "-p", "8182:80"), 1, "not published")
    assert rules(lab, "whole") == before
    lab.graft("endpoint", "add", "ep-w", "type", "ipv4", "addr", HOST4, "port", "99", check=True)
    assert lab.graft("rule", "add", "whole", "-i", "0.0.0.0:1=ep-w", "-i", "0.0.0.0:1=ep-w").returncode == 2
    assert rules(lab, "whole") == before
    assert lab.graft("rule", "add", "whole", "-i", "0.0.0.0:1=ep-w").returncode == 0, "from the host's table"
    lab.graft("endpoint", "del", "ep-w", check=True)
    process.stdin.close()


def test_a_container_whose_first_process_is_gone_can_be_joined(lab):
    lab.graft("run", "--name", "daemonized", "sh", "-c", "setsid sleep 20 & exit 0", stdout=-3, capture_output=False)
    assert lab.graft("run", "--netns", "daemonized", "echo", "inside").stdout == "inside\n"
    pid = json.loads(lab.graft("ps", "-j").stdout)[0]["pid"]
    os.kill(pid, signal.SIGKILL)


def test_one_namespace_has_one_egress(lab):
    process = lab.spawn_graft("--name", "open", *python("input()"), stdin=-1)
    wait_for(lambda: lab.containers() == ["open"], "the container")
    argv = (GRAFT, "run", "--netns", "open", "--egress", "none", "true")
    joined = lab.refused(argv, 1, "runs with egress host")
    assert joined.stderr.count("\n") == 1
    assert lab.graft("run", "--netns", "open", "--egress", "host", "true").returncode == 0
    process.stdin.close()
