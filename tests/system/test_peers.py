"""UDP sockets that connect again: no datagram goes where parts of two peers lead, and who has reason to connect may."""

import json

import pytest

from graft.bench.lab import CLIENT4, CLIENT6, GRAFT, HOST4, HOST6, SECOND4
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
    need("gcc")
    program = lab.work / "peers"
    if not program.exists():
        lab.host("gcc", "-O2", "-pthread", PROGRAMS / "peers.c", "-o", program, check=True)
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
    assert connects(lab, "4", ("--egress", "host"), f"{HOST4},9201", f"{SECOND4},9202", f"{HOST4},9203", f"{HOST4},9201") == "OK 1 OK 1 OK 1 OK 1"
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
    """The upper half of an IPv4 address, and the lower of an address that ends in ::1, are ::1."""
    one, other = "2001:db8:77::1:7", "2001:db8:78::5"
    lab.host("ip", "route", "add", "2001:db8:78::/64", "via", CLIENT6, check=True)
    try:
        assert connects(lab, "6", ("--egress", "host"), f"{one},9301", f"{one},9302", f"{other},9303").count("OK") == 3
        assert HOST6.endswith("::1")
        assert connects(lab, "6", ("--egress", "host"), f"{HOST6},9301", "::ffff:10.77.0.40,9301") == "OK 1 EADDRNOTAVAIL"
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
    assert (line["op"], line["asked"], line["errno"], line["rule"]) == ("connect", f"{SECOND4}:9401", "EADDRNOTAVAIL", "a peer beside others that the socket has had")


def test_getaddrinfo_sorts_addresses(lab):
    """glibc connects one UDP socket to each address that a name has (RFC 6724)."""
    hosts = lab.work / "hosts"
    hosts.write_text("".join(f"10.9.{n}.7 many.example\n2001:db8:{n:x}::7 many.example\n" for n in range(1, 13)))
    need("unshare")
    code = "import socket; print(len({a[4][0] for a in socket.getaddrinfo('many.example', 443, type=socket.SOCK_STREAM)}))"
    inside = ("unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh")
    told = lab.host(*inside, GRAFT, "run", "--egress", "host", *python(code))
    assert told.stdout.strip() == "24", told.stderr
