"""UDP sockets that connect again: no datagram goes where parts of two peers lead, and who has reason to connect may."""

import json

import pytest

from graft.bench.lab import CLIENT4, CLIENT6, GRAFT, HOST4, SECOND4
from tests.attack.test_attacks import PROGRAMS
from tests.conftest import need, python

STEPS = """
import errno, socket, sys
s = socket.socket(socket.AF_INET6 if sys.argv[1] == '6' else socket.AF_INET, socket.SOCK_DGRAM)
for word in sys.argv[2:]:
    address, port = word.rsplit(',', 1)
    try:
        s.connect((address, int(port) or s.getsockname()[1]))
        print('OK', *([] if port == '0' else [s.send(b'x')]), end=' ')
    except OSError as error:
        print(errno.errorcode[error.errno], end=' ')
"""
WITNESS = """
import select, socket, sys
servers = []
for word in sys.argv[1:]:
    address, port = word.rsplit(',', 1)
    servers.append(socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET, socket.SOCK_DGRAM))
    servers[-1].bind((address, int(port)))
print('up', flush=True)
seen = set()
while True:
    ready = select.select([sys.stdin, *servers], [], [])[0]
    for s in ready[ready[0] is sys.stdin:]:
        _, peer = s.recvfrom(64)
        seen.add(f'{s.getsockname()[0]},{s.getsockname()[1]} from {peer[0]}')
    if ready[0] is sys.stdin:
        print(*sorted(seen), sep='; ', flush=True)
        sys.exit()
"""


@pytest.fixture
def witness(lab):
    """Servers of the host's; calling it ends them, and returns who has been there."""
    started = []

    def serve(*where):
        started.append(lab.spawn(*python(WITNESS), *where, stdin=-1, stdout=-1))
        assert started[-1].stdout.readline() == "up\n"

        def told():
            return started[-1].communicate("\n", timeout=20)[0].strip()

        return told

    yield serve
    for process in started:
        lab.end(process)


def compiled(lab, name):
    """One of the programs in C."""
    need("gcc")
    program = lab.work / name
    if not program.exists():
        lab.host("gcc", "-O2", "-pthread", PROGRAMS / f"{name}.c", "-o", program, check=True)
    return program


def connects(lab, family, options, *words):
    """What came of each connect() of one socket."""
    return lab.graft("run", *options, *python(STEPS), family, *words, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("options", "peers", "right", "wrong"),
    [
        (
            ("--allow", f"{HOST4}:9201", "--allow", f"{SECOND4}:9202"), ((HOST4, 9201), (SECOND4, 9202)), (f"{HOST4},9201", f"{SECOND4},9202"),
            (f"{HOST4},9202", f"{SECOND4},9201"),
        ),
        (
            ("--egress", "host"), (("127.0.0.1", 7000), (HOST4, 9201)), (f"{HOST4},9201",),
            ("127.0.0.1,9201",),
        ),
    ],
    ids=("allowed", "loopback"),
)  # fmt: skip
def test_parts_of_two_peers_are_no_destination(lab, witness, options, peers, right, wrong):
    program = compiled(lab, "peers")
    told = witness(*right, *wrong)
    words = [word for peer in peers for word in peer]
    allowed, sent = map(int, lab.graft("run", *options, program, 2, *words, check=True).stdout.split())
    been = {line.split(" from ")[0] for line in told().split("; ")}
    assert been
    assert not been & set(wrong)
    assert allowed > 100
    assert sent > 100


def test_other_peers_are_reached_one_after_the_other(lab, witness):
    told = witness(f"{HOST4},9201", f"{SECOND4},9202", f"{HOST4},9203")
    assert (
        connects(lab, "4", ("--egress", "host"), f"{HOST4},9201", f"{SECOND4},9202", f"{HOST4},9203", f"{HOST4},9201")
        == "OK 1 OK 1 OK 1 OK 1"
    )
    assert told().count("from") == 3


def test_as_many_as_one_likes(lab):
    words = [f"10.77.0.{40 + n},{9300 + n}" for n in range(30)]
    told = connects(lab, "4", ("--egress", "host"), *words)
    assert told.count("OK") == 30


def test_a_list_with_ports(lab):
    rules = [word for n in range(3) for word in ("--allow", f"10.77.0.{40 + n}:9300")]
    rules += ["--allow", f"{SECOND4}:9401"]
    same_port = [f"10.77.0.{40 + n},9300" for n in range(3)]
    assert connects(lab, "4", rules, *same_port).count("OK") == len(same_port)
    assert connects(lab, "4", rules, "10.77.0.40,9300", "10.77.0.40,9301").split() == ["OK", "1", "ENETUNREACH"]
    assert connects(lab, "4", rules, "10.77.0.40,9300", f"{SECOND4},9401", "10.77.0.41,9300", f"{SECOND4},9401").split() == [
        "OK", "1", "EADDRNOTAVAIL", "OK", "1", "EADDRNOTAVAIL",
    ]  # fmt: skip


def test_halves_of_ipv6(lab):
    one, other = "2001:db8:77::1:7", "2001:db8:78::5"
    lab.host("ip", "route", "add", "2001:db8:78::/64", "via", CLIENT6, check=True)
    try:
        assert (
            connects(lab, "6", ("--egress", "host"), f"{one},9301", f"{one},9302", f"{other},9303").count("OK") == 3
        )
        rules = ("--allow", f"[{one}]:9301", "--allow", f"[{other}]:9301")
        assert connects(lab, "6", rules, f"{one},9301", f"{other},9301") == "OK 1 EADDRNOTAVAIL"
    finally:
        lab.host("ip", "route", "del", "2001:db8:78::/64")


def test_the_refusal_is_told(lab):
    rules = ("--allow", f"{CLIENT4}:9301", "--allow", f"{SECOND4}:9401")
    code = "import socket, sys\ns = socket.socket(2, 2); s.connect(({0!r}, 9301))\ntry: s.connect(({1!r}, 9401))\nexcept OSError: print('refused', flush=True)\nsys.stdin.read()"
    one = lab.spawn_graft("--name", "again", *rules, *python(code.format(CLIENT4, SECOND4)), stdin=-1, stdout=-1)
    assert one.stdout.readline() == "refused\n"
    (line,) = [json.loads(line) for line in lab.graft("log", "-j", "again").stdout.splitlines()]
    lab.end(one)
    assert (line["op"], line["asked"], line["errno"], line["rule"]) == (
        "connect",
        f"{SECOND4}:9401",
        "EADDRNOTAVAIL",
        "a peer beside others that the socket has had",
    )


@pytest.mark.parametrize("six", [False, True], ids=("ipv4", "mapped"))
def test_a_device_of_a_message_leads_to_no_server_of_the_hosts(lab, witness, six):
    """IP_PKTINFO's device lo would have what goes to another host arrive at this one's wildcard."""
    told = witness("0.0.0.0,9301")
    code = (
        "import socket, struct, sys; six = sys.argv[1] == '6'; s = socket.socket(10 if six else 2, 2)\n"
        f"to = ('::ffff:{CLIENT4}' if six else {CLIENT4!r}, 9301)\n"
        "for connected in (False, True):\n"
        "    if connected: s.connect(to)\n"
        "    try: print(s.sendmsg([b'p'], [(0, 8, struct.pack('i4s4s', 1, bytes(4), bytes(4)))], 0, *([] if connected else [to])))\n"
        "    except OSError as error: print(error.errno)\n"
    )
    lab.graft("run", "--allow", f"{CLIENT4}:9301", *python(code), "6" if six else "4", check=True)
    assert told() == ""


@pytest.mark.parametrize("options", [("--allow", f"{CLIENT4}:9301"), ("--egress", "host")], ids=("allowed", "host"))
def test_what_is_corked_for_the_loopback_stays_there(lab, witness, options):
    """MSG_MORE keeps the route of the first destination; a connection changes the address."""
    told = witness("0.0.0.0,9301")
    code = (
        "import errno, socket\nr = socket.socket(2, 2); r.bind(('127.0.0.1', 5000)); s = socket.socket(2, 2)\n"
        f"s.sendto(b'a', socket.MSG_MORE, ('127.0.0.1', 5000))\ntry: s.connect(({CLIENT4!r}, 9301)); s.send(b'b')\n"
        "except OSError as error: print(errno.errorcode[error.errno])"
    )
    assert lab.graft("run", *options, *python(code), check=True).stdout.strip() in ("EADDRNOTAVAIL", "EPERM", "")
    assert told() == ""


def test_a_destination_that_is_named_counts_as_a_peer(lab):
    """The kernel keeps it where it reads the peer from, if it is sent with MSG_MORE."""
    code = (
        "import errno, socket, sys\ndef told(call, *words):\n    try: return call(*words) or 'OK'\n"
        "    except OSError as error: return errno.errorcode[error.errno]\n"
        f"s = socket.socket(2, 2); print(told(s.connect, ({HOST4!r}, 9201)), told(s.sendto, b'x', ({HOST4!r}, 9201)), told(s.sendto, b'x', ({SECOND4!r}, 9202)))\n"
        f"s = socket.socket(2, 2); print(told(s.sendto, b'x', ({HOST4!r}, 9201)), told(s.connect, ({HOST4!r}, 9201)), told(s.connect, ({SECOND4!r}, 9202)))\n"
        f"s = socket.socket(2, 2); print(told(s.sendto, b'x', ({SECOND4!r}, 9202)), told(s.sendto, b'x', ({HOST4!r}, 9201)), told(s.connect, ({HOST4!r}, 9201)))\n"
    )
    rules = ("--allow", f"{HOST4}:9201", "--allow", f"{SECOND4}:9202")
    assert lab.graft("run", *rules, *python(code), check=True).stdout.split("\n")[:3] == [
        "OK 1 EADDRNOTAVAIL",
        "1 OK EADDRNOTAVAIL",
        "1 1 EADDRNOTAVAIL",
    ]
    assert lab.graft("run", "--egress", "host", *python(code), check=True).stdout.split("\n")[1:3] == [
        "1 OK OK",
        "1 1 OK",
    ]


SEEN = """
import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)); s.settimeout(0.2)
server = socket.socket(10, 2); server.bind(('', 9301))
print('up', flush=True)
sys.stdin.read()
try:
    while True:
        packet = s.recv(2048)
        if packet[0] >> 4 == 6 and packet[6] == 17: print(socket.inet_ntop(10, packet[24:40]), int.from_bytes(packet[42:44], 'big'))
        if packet[0] >> 4 == 4 and packet[9] == 17: print(socket.inet_ntop(2, packet[16:20]), int.from_bytes(packet[22:24], 'big'))
except TimeoutError: pass
"""


@pytest.mark.parametrize(
    ("steps", "told", "reached"),
    [
        ("connect six, send more, connect four, send", "OK 1 OK EPERM", set()),
        ("name six more, connect four, send", "1 OK EPERM", set()),
        ("connect four, send more, leave, connect six, send", "OK 1 OK OK 1", {f"{CLIENT4} 9301"}),
        ("name four more, connect six, send", "1 OK 1", {f"{CLIENT4} 9301"}),
        ("connect six, send, leave, connect four, send, leave, connect six, send", "OK 1 OK OK 1 OK OK 1", {"2001:db8:78::5 9301", f"{CLIENT4} 9301"}),
        ("name six, connect four, send, leave, name six", "1 OK 1 OK 1", {"2001:db8:78::5 9301", f"{CLIENT4} 9301"}),
    ],
)  # fmt: skip
def test_what_one_family_has_corked_is_not_read_by_the_other(lab, steps, told, reached):
    """A connection writes where the kernel keeps the destination of what is corked."""
    code = (
        "import ctypes, errno, socket, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"at = dict(six=('2001:db8:78::5', 9301), four=('::ffff:{CLIENT4}', 9301)); s = socket.socket(10, 2)\n"
        "for step in sys.argv[1].split(', '):\n"
        "    do, to, more = [*step.split(), '', ''][:3]; flags = socket.MSG_MORE if 'more' in (to, more) else 0\n"
        "    try:\n"
        "        if do == 'connect': print(s.connect(at[to]) or 'OK', end=' ')\n"
        "        elif do == 'leave': print('OK' if not libc.connect(s.fileno(), bytes(16), 16) else ctypes.get_errno(), end=' ')\n"
        "        elif do == 'name': print(s.sendto(b'a', flags, at[to]), end=' ')\n"
        "        else: print(s.send(b'b', flags), end=' ')\n"
        "    except OSError as error: print(errno.errorcode[error.errno], end=' ')\n"
    )
    lab.host("ip", "route", "add", "2001:db8:78::/64", "via", CLIENT6, check=True)
    watching = lab.spawn("ip", "netns", "exec", lab.client_ns, *python(SEEN), stdin=-1, stdout=-1)
    try:
        assert watching.stdout.readline() == "up\n"
        rules = ("--allow", "[2001:db8:78::5]:9301", "--allow", f"{CLIENT4}:9301")
        assert lab.graft("run", *rules, *python(code), steps, check=True).stdout.strip() == told
        assert set(watching.communicate("", timeout=20)[0].splitlines()) == reached
    finally:
        lab.end(watching)
        lab.host("ip", "route", "del", "2001:db8:78::/64")


def test_a_disconnect_leads_to_no_server_of_the_hosts_loopback(lab, witness):
    """The address of a peer that is being disconnected is 0, which the kernel takes for 127.0.0.1."""
    program = compiled(lab, "peers")
    told = witness("127.0.0.1,9301", "0.0.0.0,9302")
    for port in (9301, 9302):
        lab.graft("run", "--allow", CLIENT4, program, 3, CLIENT4, port, check=True)
    assert told() == ""


def test_another_containers_address_is_no_source(lab):
    program = compiled(lab, "taken")
    server = "import socket; s = socket.socket(2, 2); s.bind(('', int(__import__('sys').argv[1]))); print('up', flush=True)\nwhile True: d, a = s.recvfrom(99); s.sendto(f'you are {a[0]}'.encode(), a)"
    one = lab.spawn_graft("--name", "taken", "--ip", "10.88.0.5", *python(server), "9201", stdout=-1)
    host = lab.spawn(*python(server), "9203", stdout=-1)
    assert [process.stdout.readline() for process in (one, host)] == ["up\n", "up\n"]
    told = lab.graft("run", "--egress", "host", program, 6, "10.88.0.5", 9201, HOST4, 9203, check=True).stdout
    for process in (one, host):
        lab.end(process)
    assert "10.88.0.5" not in told


def test_getaddrinfo_sorts_by_what_is_reached(lab):
    """A peer that the kernel has not taken, for want of a route, stands in nobody's way."""
    hosts = lab.work / "hosts"
    for low in ("7", "1"):
        hosts.write_text(f"2001:db8:99::{low} dual.example\n{CLIENT4} dual.example\n")
        code = "import socket; print(socket.getaddrinfo('dual.example', 443, type=socket.SOCK_STREAM)[0][4][0])"
        inside = ("unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh")
        for rules in (("--egress", "host"), ("--allow", f"[2001:db8:99::{low}]:443", "--allow", f"{CLIENT4}:443")):
            told = lab.host(*inside, GRAFT, "run", *rules, *python(code), check=True)
            assert told.stdout.strip() == CLIENT4, rules


def test_getaddrinfo_sorts_addresses(lab):
    """glibc connects one UDP socket to each address that a name has (RFC 6724)."""
    hosts = lab.work / "hosts"
    hosts.write_text("".join(f"10.9.{n}.7 many.example\n2001:db8:{n:x}::7 many.example\n" for n in range(1, 13)))
    need("unshare")
    code = "import socket; print(len({a[4][0] for a in socket.getaddrinfo('many.example', 443, type=socket.SOCK_STREAM)}))"
    inside = ("unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh")
    told = lab.host(*inside, GRAFT, "run", "--egress", "host", *python(code))
    assert told.stdout.strip() == "24", told.stderr
