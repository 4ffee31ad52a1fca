"""`graft run --allow`: what a container reaches by name and by address, in both modes."""

import ctypes
import json
import os
import subprocess
import time

import pytest

from graft.bench.lab import CLIENT4, CLIENT6, GRAFT, HOST4, SECOND4, wait_for
from graft.kernel.maps import BPF_OBJ_GET, Map, ObjAttr, bpf
from graft.rules.tables import PINNED_KEY
from tests.conftest import need, python
from tests.system.outside import AGAIN, CALLS_ONCE, NAMESERVER, NONAME, greeting, outsides

REFUSED = "ENETUNREACH"


@pytest.fixture
def outside(lab):
    yield from greeting(lab)


def inspected(lab, name):
    return json.loads(lab.graft("inspect", name, check=True).stdout)


def test_names_and_addresses(outside):
    """A name at one port or at all, a wildcard, an address, a prefix; and nothing else."""
    outside.write(
        {
            "all.test": {"A": [CLIENT4]},
            "x.wild.test": {"A": [CLIENT4]},
            "x.y.wild.test": {"A": [CLIENT4]},
            "wild.test": {"A": [CLIENT4]},
            "other.test": {"A": [CLIENT4]},
            "xn--bcher-kva.test": {"A": [CLIENT4]},
        }
    )
    targets = ("www.test:8000", "other.test:8000", "wild.test:8000", "x.wild.test:8000", "x.y.wild.test:8000")
    assert outside.calls(*targets, f"{CLIENT4}:8001", allow=("www.test:8000", "*.wild.test:8000")) == {
        "www.test:8000": CLIENT4,
        "other.test:8000": NONAME,
        "wild.test:8000": NONAME,
        "x.wild.test:8000": CLIENT4,
        "x.y.wild.test:8000": CLIENT4,
        f"{CLIENT4}:8001": REFUSED,
    }
    assert "other.test A" not in outside.queries()
    assert outside.calls("all.test:8000", "all.test:8001", "bücher.test:8000", allow=("all.test", "BÜCHER.test")) == {
        "all.test:8000": CLIENT4,
        "all.test:8001": CLIENT4,
        "bücher.test:8000": CLIENT4,
    }
    addresses = (f"{CLIENT4}:8000", f"{CLIENT4}:8001", f"{HOST4}:8000", f"[{CLIENT6}]:8000")
    assert outside.calls(*addresses, allow=("10.77.0.2/31:8000",)) == {
        f"{CLIENT4}:8000": CLIENT4,
        f"{CLIENT4}:8001": REFUSED,
        f"{HOST4}:8000": REFUSED,
        f"[{CLIENT6}]:8000": REFUSED,
    }
    assert outside.calls(*addresses[:2], addresses[3], allow=("2001:db8::/32", "10.0.0.0/8")) == {
        f"{CLIENT4}:8000": CLIENT4,
        f"{CLIENT4}:8001": CLIENT4,
        f"[{CLIENT6}]:8000": CLIENT6,
    }


def test_raw_addresses_before_and_after_a_name(outside):
    """An address is open because a name was answered, to this container, at the name's port."""
    assert list(outside.calls(f"{CLIENT4}:8000", "www.test:8000", f"{CLIENT4}:8000", f"{CLIENT4}:8001", allow=("www.test:8000",)).items())[-2:] == [
        ("www.test:8000", CLIENT4),
        (f"{CLIENT4}:8001", REFUSED),
    ]
    first = outside.calls(f"{CLIENT4}:8000", allow=("www.test:8000",))
    assert first == {f"{CLIENT4}:8000": REFUSED}


def test_a_nameserver_on_a_link(lab):
    """Its address means something with its device alone (fe80::1%eth0)."""
    shown = ("ip", "-6", "-br", "address", "show", "dev", "veth0", "scope", "link")
    wait_for(lambda: not lab.host(*shown, "tentative").stdout.strip(), "an address that nobody else has")
    link = lab.host(*shown).stdout.split()[2].partition("/")[0]
    for outside in outsides(lab, f"{link}%veth0"):
        for listed in (("--names",), ("--allow", "www.test")):
            done = lab.graft("run", *listed, "--resolver", f"{link}%veth0", "getent", "hosts", "www.test")
            assert done.stdout.split() == [CLIENT4, "www.test"], done.stderr
        done = lab.graft("run", "--names", "--resolver", "fe80::1%none", "getent", "hosts", "www.test")
        assert done.returncode == 2, "SERVFAIL at once"
        assert "www.test A" in outside.queries()


def test_both_families_and_chains(outside):
    outside.write(
        {
            "both.test": {"A": [CLIENT4], "AAAA": [CLIENT6]},
            "alias.test": {"CNAME": ["cdn.elsewhere"]},
            "cdn.elsewhere": {"CNAME": ["edge.elsewhere"], "TTL": 0},
            "edge.elsewhere": {"A": [CLIENT4], "AAAA": [CLIENT6], "TTL": 0},
        }
    )
    assert outside.calls("six.test:8000", "both.test:8000", "edge.elsewhere:8000", "alias.test:8000", allow=("six.test", "both.test", "alias.test")) == {
        "six.test:8000": CLIENT6,
        "both.test:8000": CLIENT6,
        "edge.elsewhere:8000": NONAME,
        "alias.test:8000": CLIENT6,
    }


def test_resolvers_that_follow_aliases_themselves(outside):
    """unbound, BIND and PowerDNS ask for each name of a chain in turn: at the allowed name's ports, and for no other name."""
    outside.write({"alias.test": {"CNAME": ["cdn.elsewhere"]}, "cdn.elsewhere": {"CNAME": ["edge.elsewhere"]}})
    outside.write({"edge.elsewhere": {"A": [CLIENT4]}, "other.elsewhere": {"A": [CLIENT4]}})
    targets = ("alias.test:8000", "cdn.elsewhere:8000", "edge.elsewhere:8000", "edge.elsewhere:8001", "other.elsewhere:8000")
    assert outside.calls(*targets, allow=("alias.test:8000",)) == {
        **dict.fromkeys(targets[:3], CLIENT4),
        "edge.elsewhere:8001": REFUSED,
        "other.elsewhere:8000": NONAME,
    }
    assert "other.elsewhere A" not in outside.queries()


DIG = ("dig", "+tries=1", "+time=3")


@pytest.mark.parametrize(("allowed", "peer"), [(CLIENT4, CLIENT4), ("2001:db8:77::/64", CLIENT6)], ids=("ipv4", "ipv6"))
def test_nobody_asks_in_anothers_name(lab, allowed, peer):
    """A socket whose source the kernel has chosen for another peer, at a port from which somebody else has asked."""
    asks = "import socket, sys\nfor n in range(1500): s = socket.socket(2, 2); s.bind(('', 0)); s.connect(('8.8.8.8', 53)); s.close()\nprint('asked', flush=True)\nsys.stdin.read()"
    other = lab.spawn_graft("--name", "other", "--allow", "www.test:8000", *python(asks), stdin=-1, stdout=-1)
    assert other.stdout.readline() == "asked\n"
    code = (
        "import socket, struct, sys\nquery = struct.pack('>HHHHHH', 7, 0x100, 1, 0, 0, 0) + b'\\x06secret\\x04test\\0' + struct.pack('>HH', 1, 1)\n"
        "six = ':' in sys.argv[1]; resolver = ('2001:db8:77::53' if six else '8.8.8.8', 53)\n"
        "for n in range(1500): s = socket.socket(10 if six else 2, 2); s.bind(('', 0)); s.connect((sys.argv[1], 9)); s.sendto(query, resolver); s.close()\n"
        "print('tried', flush=True); sys.stdin.read()\n"
    )
    one = lab.spawn_graft("--name", "one", "--allow", allowed, *python(code), peer, stdin=-1, stdout=-1)
    assert one.stdout.readline() == "tried\n"
    try:
        wait_for(lambda: inspected(lab, "one")["policy"]["refused_names"], "a refused name")
        assert [each["name"] for each in inspected(lab, "one")["policy"]["refused_names"]] == ["secret.test"]
        assert inspected(lab, "other")["policy"]["refused_names"] == []
    finally:
        lab.end(one)
        lab.end(other)


def test_whatever_goes_to_port_53(outside):
    """Other resolvers, of both families, over UDP and TCP, on the loopback: all of it is graft's."""
    need("dig")
    asked = (
        "@192.0.2.9", "@2001:db8:9::9", "@127.0.0.1", "@127.0.0.53", "@::1", "@10.77.0.1", f"@{CLIENT4}",
    )  # fmt: skip
    for server in asked:
        for over in ("+notcp", "+tcp"):
            done = outside.run(*DIG, over, server, "www.test", "A", allow=("www.test",))
            assert f"{CLIENT4}\n" in done.stdout, done.stdout
            assert f"SERVER: {server[1:]}#53({server[1:]})" in done.stdout
    for server in asked[:2]:
        done = outside.run(*DIG, server, "evil.test", allow=("www.test",), options=("--name", "digs"))
        assert "status: NXDOMAIN" in done.stdout
        assert ": 15 (Blocked): (graft: evil.test is refused to digs: not on the list)" in done.stdout
    assert "evil.test A" not in outside.queries()


UNCONNECTED = """
import socket, struct
query = struct.pack('>6H', 7, 256, 1, 0, 0, 0) + b'\\3www\\4test\\0' + struct.pack('>HH', 1, 1)
for family, server, bind in ((2, '192.0.2.9', None), (2, '192.0.2.9', ''), (10, '2001:db8:9::9', None), (10, '2001:db8:9::9', ''), (10, '::ffff:192.0.2.9', '')):
    s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(5)
    if bind is not None: s.bind((bind, 0))
    s.sendto(query, (server, 53))
    reply, peer = s.recvfrom(999)
    print(reply[3] & 15, reply[7], peer[0], peer[1])
    s.connect((server, 53)); s.send(query); print(s.recv(999)[7], s.getpeername()[:2])
"""


def test_resolvers_that_do_not_connect(outside):
    """musl's asks all servers by one socket, and takes answers from those alone that it has asked."""
    done = outside.run(*python(UNCONNECTED), allow=("www.test",))
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:2] == ["0 1 192.0.2.9 53", "1 ('192.0.2.9', 53)"]
    assert lines[2:4] == lines[:2]
    assert lines[4:6] == ["0 1 2001:db8:9::9 53", "1 ('2001:db8:9::9', 53)"]
    assert lines[6:8] == lines[4:6]
    assert lines[8:] == ["0 1 ::ffff:192.0.2.9 53", "1 ('::ffff:192.0.2.9', 53)"]


def test_a_server_for_names_inside(outside):
    """The container's own server at its own loopback is the container's."""
    code = """
import socket, threading
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.0.0.1', 53))
c = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); c.settimeout(5); c.connect(('127.0.0.1', 53)); c.send(b'hello')
print(u.recv(99).decode())
"""
    assert outside.run(*python(code), allow=("www.test",), options=("--sysctl", "net.ipv4.ip_unprivileged_port_start=0")).stdout == "hello\n"


def test_what_is_counted_and_shown(outside, lab):
    targets = ("www.test:8000", "www.test:8001", "evil.test:80", "evil.test:80", "192.0.2.66:443")
    run = lab.spawn_graft("--name", "shown", "--resolver", NAMESERVER, "--allow", "www.test:8000", *python(CALLS_THEN_WAIT), *targets, stdout=subprocess.PIPE)
    for _ in targets:
        run.stdout.readline()
    told = inspected(lab, "shown")
    policy = told["policy"]
    assert policy["allow"] == ["www.test:8000"]
    assert "allow www.test:8000\negress default host\n" in lab.graft("rule", "show", "shown").stdout
    (pin,) = policy["pinned"]
    assert (pin["name"], pin["address"], pin["port"]) == ("www.test", CLIENT4, 8000)
    assert 120 < pin["seconds"] <= 180
    (refused,) = policy["refused_names"]
    assert (refused["name"], refused["why"]) == ("evil.test", "not on the list")
    assert refused["count"] >= 2
    assert [(r["op"], r["reason"], r["count"]) for r in told["refused"]] == [("connect", "a destination that it is not allowed", 2)]
    assert [(r["address"], r.get("name")) for r in told["last_refused"]] == [(f"{CLIENT4}:8001", "www.test"), ("192.0.2.66:443", None)]
    lab.end(run)


CALLS_THEN_WAIT = """
import socket, sys, time
for each in sys.argv[1:]:
    host, port = each.split(':')
    try: socket.create_connection((host, int(port)), 5).close(); print('ok', flush=True)
    except OSError as error: print(error, flush=True)
time.sleep(60)
"""


def test_reverse_look_ups(outside):
    """An address that a name was answered with has that name; no other is asked for, but what is allowed itself."""
    outside.write({"2.0.77.10.in-addr.arpa": {"PTR": ["client.outside."]}})
    code = f"""
import socket
def name(a):
    try: return socket.gethostbyaddr(a)[0]
    except socket.herror: return 'none'
print(name('{CLIENT4}'), socket.gethostbyname('www.test'), name('{CLIENT4}'), name('192.0.2.1'))
"""
    assert outside.run(*python(code), allow=("www.test",)).stdout == f"none {CLIENT4} www.test none\n"
    assert not any("in-addr" in line for line in outside.queries())
    assert outside.run(*python(code), allow=("www.test", "10.77.0.0/16")).stdout.startswith(f"client.outside {CLIENT4} ")


def test_search_domains(outside, tmp_path):
    """What a search list makes of a name is a name like others."""
    outside.write({"www.corp.test": {"A": [CLIENT4]}})
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("search corp.test elsewhere.test\nnameserver 192.0.2.9\noptions ndots:2\n")
    script = f'mount --bind {resolv} /etc/resolv.conf && shift 0 && exec "$@"'
    code = "import socket; print(socket.gethostbyname('www'), socket.gethostbyname('six.test') if 0 else '')"
    done = outside.run("unshare", "-m", "sh", "-c", script, "sh", *python(code), allow=("www.corp.test",))
    assert done.stdout.split() == [CLIENT4], done.stderr


def test_large_answers_edns_and_negative_ones(outside):
    need("dig")
    many = [f"192.0.2.{n}" for n in range(1, 200)]
    outside.write({"many.test": {"A": many}, "none.test": {"AAAA": []}, "fails.test": {"CODE": 2}, "text.test": {"TXT": ["hello"]}})
    allow = ("*.test",)
    small = outside.run(*DIG, "+noedns", "+ignore", "many.test", allow=allow).stdout
    assert ("ANSWER: 0" in small, " tc " in small) == (True, True)
    for options in (("+noedns",), ("+bufsize=1232",), ("+bufsize=4096",), ("+tcp",)):
        done = outside.run(*DIG, *options, "+short", "many.test", allow=allow)
        assert sorted(done.stdout.split()) == sorted(many), (options, done.stdout)
    assert "status: NXDOMAIN" in outside.run(*DIG, "absent.test", allow=allow).stdout
    empty = outside.run(*DIG, "none.test", allow=allow).stdout
    assert ("status: NOERROR" in empty, "ANSWER: 0" in empty) == (True, True)
    assert "status: SERVFAIL" in outside.run(*DIG, "fails.test", allow=allow).stdout
    assert outside.run(*DIG, "+short", "text.test", "TXT", allow=allow).stdout == '"hello"\n'
    assert "ANSWER: 0" in outside.run(*DIG, "www.test", "TYPE65", allow=allow).stdout
    assert "www.test TYPE65" not in outside.queries()


def test_several_queries_on_one_connection(outside):
    need("dig")
    done = outside.run(*DIG, "+tcp", "+keepopen", "+short", "www.test", "+tcp", "+keepopen", "six.test", "AAAA", allow=("www.test", "six.test"))
    assert done.stdout.split() == [CLIENT4, CLIENT6]


def test_open_connections_outlive_pins(outside, lab):
    """A pin that has ended refuses the next connection, and no open one; graftd deletes it."""
    outside.write({"echo.test": {"A": [CLIENT4], "TTL": 0}})
    lab.spawn(*python("import socket; l = socket.create_server(('', 8002)); c = l.accept()[0]; c.sendall(c.recv(9)); c.sendall(c.recv(9))"), client=True)
    code = f"""
import socket, sys
s = socket.create_connection(('echo.test', 8002)); s.sendall(b'1'); print(s.recv(9), flush=True); sys.stdin.readline()
s.sendall(b'2'); print(s.recv(9), flush=True)
try: socket.create_connection(('{CLIENT4}', 8000), 5); print('ok', flush=True)
except OSError as error: print(error.errno, flush=True)
sys.stdin.readline()
"""
    wait_for(lambda: lab.client("ss", "-tlnH", "sport = :8002").stdout, "the server")
    run = lab.spawn_graft("--name", "open", "--resolver", NAMESERVER, "--allow", "echo.test", *python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout.readline() == "b'1'\n"
    number = inspected(lab, "open")["id"]
    end_pins(lab, number)
    run.stdin.write("\n")
    run.stdin.flush()
    assert run.stdout.readline() == "b'2'\n"
    assert run.stdout.readline() == "101\n"
    lab.end(run)


def end_pins(lab, tenant):
    """Make it as if the time of a container's pins had passed."""
    path = ctypes.create_string_buffer(os.fsencode(lab.pins() / "pinned"))
    pinned = Map(bpf(BPF_OBJ_GET, ObjAttr(ctypes.addressof(path), 0, 0), "pinned"), "pinned", 8)
    mine = [key for key in pinned.keys(PINNED_KEY.size) if PINNED_KEY.unpack(key)[0] == tenant]
    assert mine
    for key in mine:
        pinned.update(key, (time.monotonic_ns() - 1).to_bytes(8, "little"))
    os.close(pinned.fd)


MANY = """
import socket, sys, threading
failed, lock = [], threading.Lock()
def each(first):
    for n in range(first, 1000, 4):
        try:
            with socket.create_connection((f'n{n}.many.test', 8000), 10) as s: got = s.recv(99).decode()
            if got != f'10.78.{n // 250}.{n % 250 + 1}': failed.append((n, got))
        except OSError as error: failed.append((n, str(error)))
threads = [threading.Thread(target=each, args=(n,)) for n in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print(failed[:5], len(failed))
"""


def test_no_connection_comes_before_its_pin(outside, lab):
    """A thousand names, each with an address of its own and a TTL of 0, connected to at once by four threads."""
    outside.write({f"n{n}.many.test": {"A": [f"10.78.{n // 250}.{n % 250 + 1}"], "TTL": 0} for n in range(1000)})
    lab.client("ip", "route", "replace", "local", "10.78.0.0/16", "dev", "lo", check=True)
    lab.host("ip", "route", "replace", "10.78.0.0/16", "via", CLIENT4, check=True)
    done = outside.run(*python(MANY), allow=("*.many.test:8000",))
    assert done.stdout == "[] 0\n", done.stderr


def test_answers_that_lead_back_are_refused(outside, lab):
    """Loopback, link-local, this host, a neighbour, a group: not by a name, unless the address is allowed itself."""
    neighbour = lab.spawn_graft("--name", "next", "--ip", "10.88.7.7", "sleep", "60")
    wait_for(lambda: "next" in lab.containers(), "the neighbour")
    bad = {
        "loop": "127.0.0.1", "loops": "127.9.9.9", "here": "0.0.0.0", "meta": "169.254.169.254", "host": HOST4, "host2": SECOND4,
        "next": "10.88.7.7", "slice": "127.64.1.1", "group": "224.0.0.1", "all": "255.255.255.255",
    }  # fmt: skip
    bad6 = {
        "loop6": "::1", "link6": "fe80::1", "host6": "2001:db8:77::1", "mapped": "::ffff:127.0.0.1", "nat64": "64:ff9b::7f00:1",
        "slice6": "fd67:7261:6674::b", "group6": "ff02::1", "any6": "::",
    }  # fmt: skip
    outside.write({f"{name}.bad.test": {"A": [address]} for name, address in bad.items()})
    outside.write({f"{name}.bad.test": {"AAAA": [address]} for name, address in bad6.items()})
    outside.write({"mixed.bad.test": {"A": ["127.0.0.1", CLIENT4, HOST4]}})
    targets = [f"{name}.bad.test:8000" for name in (*bad, *bad6)]
    assert outside.calls(*targets, "mixed.bad.test:8000", allow=("*.bad.test",)) == {
        **dict.fromkeys(targets, NONAME), "mixed.bad.test:8000": CLIENT4,
    }  # fmt: skip
    code = "import socket; print(socket.gethostbyname('host.bad.test'), socket.gethostbyname('loop.bad.test'))"
    assert outside.run(*python(code), allow=("*.bad.test", f"{HOST4}:8000", "127.0.0.0/8")).stdout == f"{HOST4} 127.0.0.1\n"
    lab.end(neighbour)


def test_a_policy_narrows_egress_rules(outside, lab):
    """A destination needs both; a container without a way out has none by a name."""
    lab.add_endpoints({"ep-out": f"type ipv4 addr {SECOND4} port dynamic"})
    try:
        rule = ("-e", "10.77.0.0/24=ep-out")
        assert outside.calls("www.test:8000", f"{CLIENT4}:8001", allow=("www.test:8000",), options=rule) == {
            "www.test:8000": CLIENT4, f"{CLIENT4}:8001": REFUSED,
        }  # fmt: skip
        outside.write({"far.test": {"A": ["192.0.2.1"]}})
        assert outside.calls("far.test:8000", allow=("far.test",), options=rule) == {"far.test:8000": REFUSED}
    finally:
        lab.delete_endpoints(["ep-out"])


def test_joining_is_under_the_same_list(outside, lab):
    first = lab.spawn_graft("--name", "first", "--resolver", NAMESERVER, "--allow", "www.test:8000", "sleep", "60")
    wait_for(lambda: "first" in lab.containers(), "the container")
    direct = ("--direct",) if lab.env["GRAFT_DIRECT"] == "on" else ()
    done = lab.graft("run", "--netns", "first", *direct, *python(CALLS_ONCE), "www.test:8000", f"{CLIENT4}:8001")
    assert done.stdout.splitlines() == ["ok", "101"], done.stderr
    lab.refused([GRAFT, "run", "--netns", "first", *direct, "--allow", "evil.test", "true"], 1, "runs with another list of destinations")
    lab.end(first)


def test_datagrams(outside):
    """Sent without a connection, a datagram needs a pin as well."""
    code = f"""
import socket
u = socket.socket(type=socket.SOCK_DGRAM); u.settimeout(5)
def ask(to):
    try: u.sendto(b'x', to); return u.recv(9).decode()
    except OSError as error: return error.errno
print(ask(('{CLIENT4}', 8000)), ask(('www.test', 8000)), ask(('{CLIENT4}', 8001)))
"""
    assert outside.run(*python(code), allow=("www.test:8000",)).stdout == "101 udp 101\n"


def test_a_nameserver_that_is_down(own_lab):
    """SERVFAIL at once, and the log says so; when it is there again, names are."""
    code = "import socket, time; t = time.monotonic()\ntry: print(socket.gethostbyname('www.test'))\nexcept OSError as e: print(e.errno, time.monotonic() - t < 2)"
    done = own_lab.graft("run", "--resolver", NAMESERVER, "--allow", "www.test", *python(code))
    assert done.stdout == f"{AGAIN.partition('_')[2]} True\n", done.stderr
    own_lab.wait_logged(f"no nameserver answers ({NAMESERVER}): container")
    for one in outsides(own_lab):
        assert one.run(*python(code), allow=("www.test",)).stdout == f"{CLIENT4}\n"


def test_nameservers_anywhere(lab):
    """--resolver says whom graft asks: of IPv6, beyond the loopback; the next one where nobody is."""
    code = "import socket; print(socket.gethostbyname('www.test'))"
    for one in outsides(lab, "::1", HOST4):
        for resolvers in (("::1",), (HOST4,), ("127.0.0.54", "192.0.2.254", HOST4), ("2001:db8:77::1", "::1")):
            named = [word for each in resolvers for word in ("--resolver", each)]
            done = lab.graft("run", *named, "--allow", "www.test", *python(code))
            assert done.stdout == f"{CLIENT4}\n", (resolvers, done.stderr)
        assert one.queries()
    lab.refused([GRAFT, "run", "--resolver", HOST4, "true"], 2, f"--resolver: resolver {HOST4} is not on the host's loopback")


def test_graftd_is_killed(outside, lab):
    """Pins and the list are the kernel's; a graftd that follows goes on with them."""
    code = """
import socket, sys
def call(host, port):
    try: socket.create_connection((host, port), 5).close(); return 'ok'
    except OSError as error: return error.errno
for line in sys.stdin: print(*(call(h, int(p)) for h, _, p in (w.rpartition(':') for w in line.split())), flush=True)
"""
    run = lab.spawn_graft("--name", "kept", "--resolver", NAMESERVER, "--allow", "www.test:8000", *python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def asked(*targets):
        run.stdin.write(" ".join(targets) + "\n")
        run.stdin.flush()
        return run.stdout.readline().split()

    assert asked("www.test:8000") == ["ok"]
    before = lab.daemon_pid()
    os.kill(before, 9)
    assert asked(f"{CLIENT4}:8000", f"{CLIENT4}:8001") == ["ok", "101"]
    wait_for(lambda: lab.daemon_pid() not in (0, before), "another graftd")
    assert asked("www.test:8000", "evil.test:80") == ["ok", "-2"]
    assert inspected(lab, "kept")["policy"]["pinned"]
    lab.end(run)


def test_what_is_pinned_ends_with_its_container(outside, lab):
    assert outside.calls("www.test:8000", allow=("www.test",)) == {"www.test:8000": CLIENT4}
    wait_for(lambda: not lab.containers(), "its end")
    dumped = subprocess.run(("bpftool", "-j", "map", "dump", "pinned", lab.pins() / "pinned"), capture_output=True, text=True)
    assert json.loads(dumped.stdout) == []
