"""Binds of UDP sockets on a network of this host: which are in each other's way, who shares a port, what they take and give back."""

import json

from graft.bench.lab import CLIENT4, wait_for
from graft.kernel.programs import Kernel
from tests.conftest import python
from tests.system.networks import ANY, FAMILIES, FAR, LOOPBACK, OWN, refusals

BINDS = """
import errno, itertools, socket
own = {own!r}
A, P = socket.SO_REUSEADDR, socket.SO_REUSEPORT
def bound(family, at, option):
    s = socket.socket(family, socket.SOCK_DGRAM)
    if option: s.setsockopt(socket.SOL_SOCKET, option, 1)
    try: s.bind((at, 5060)); return s, 'bound'
    except OSError as error: return s, errno.errorcode[error.errno]
kinds = [(socket.AF_INET, ''), (socket.AF_INET, own[4]), (socket.AF_INET6, '::'), (socket.AF_INET6, own[6])]
for one, two in itertools.product(kinds, kinds):
    for options in ((None, None), (P, P), (A, A), (P, None), (None, A)):
        first, told = bound(*one, options[0]); second, tells = bound(*two, options[1])
        print(one, two, options, told, tells); first.close(); second.close()
for one in kinds:
    s, told = bound(*one, None)
    for again in (5060, 5062):
        try: s.bind((one[1], again))
        except OSError as error: print(one, told, errno.errorcode[error.errno])
"""


def test_what_is_in_the_way(lab, network, mine):
    """Which binds of one program are in each other's way: as on a host that has the address."""
    for family, bits in ((4, 32), (6, 128)):
        lab.client("ip", "address", "add", f"{OWN[family]}/{bits}", "dev", "lo", check=True)
    there = lab.client(*python(BINDS.format(own=OWN)), check=True).stdout
    for family, bits in ((4, 32), (6, 128)):
        lab.client("ip", "address", "del", f"{OWN[family]}/{bits}", "dev", "lo", check=True)
    assert "EADDRINUSE" in there
    assert lab.graft("run", "--netns", mine, *python(BINDS.format(own=OWN)), check=True).stdout == there


@FAMILIES
def test_sockets_that_share_a_port(network, mine, neighbour, far, family):
    """A server with a socket for each thread (SO_REUSEPORT): each has its share of the neighbours, and can go beyond."""
    own = network.container(mine)
    names = [f"s{n}" for n in range(4)]
    for name in names:
        own.opened(name, (ANY[family], 53), "A", "P")
    far.opened("f", (FAR[family], 53))
    for name in names:
        own.sent(name, name, (FAR[family], 53))
        text, peer = far.heard("f")
        far.sent("f", f"{text} again", peer)
        assert own.heard(name)[0] == f"{name} again"

    def shares():
        had = dict.fromkeys(names, 0)
        for _ in range(64):
            neighbour.opened("n", six=family == 6)
            neighbour.sent("n", "query", (OWN[family], 53))
            (name,) = own.waiting([n for n in names if n in left])
            had[name] += 1
        return [had[name] for name in left]

    left = list(names)
    assert min(shares()) > 2
    own.shut(left.pop(0))
    assert min(shares()) > 2
    own.shut(left.pop())
    own.shut(left.pop())
    assert shares() == [64]
    own.opened("c", six=family == 6)
    own.sent("c", "inside", (LOOPBACK[family], 53))
    assert own.heard(left[0])[0] == "inside"


def tables(lab):
    """How many entries each table has that binds of this kind make."""
    kernel = Kernel(lab.pins())
    kernel._open_pinned()
    return {
        name: len(list(kernel.maps[name].keys(size)))
        for name, size in (("abroad", 24), ("claims", 24), ("dynamic_ports", 8), ("udp_ports", 8))
    }


def test_all_is_given_back(lab, network, mine, far):
    own = network.container(mine, "--name", "sip")
    before = tables(lab)
    far.opened("f", (CLIENT4, 7))
    assert own.many(6000, 20000, (CLIENT4, 7)) is None  # more than a container may have at a time
    for name, at in (("a", ("", 5060)), ("b", ("::", 5061)), ("c", (OWN[4], 5062)), ("d", (OWN[6], 0))):
        own.opened(name, at)
    within = tables(lab)
    assert within["abroad"] - before["abroad"] == 4  # one of IPv4, two of both families, one at the address
    assert json.loads(lab.graft("inspect", "sip").stdout)["limits"]["ports"]["used"] == 4
    for name in "abcd":
        own.shut(name)
    assert tables(lab) == before
    assert json.loads(lab.graft("inspect", "sip").stdout)["limits"]["ports"]["used"] == 0
    own.opened("a", ("", 5060))
    own.end()
    wait_for(lambda: tables(lab) == before, "that all is given back")


def test_the_host_keeps_its_ports(lab, network, mine, neighbour):
    """A container's port and the host's of the same number are not in each other's way, whichever comes first."""
    own, host = network.container(mine), network.elsewhere(client=False)
    own.opened("s", ("", 5060))
    assert host.opened("h", ("", 5060)) == ("0.0.0.0", 5060)
    host.opened("t", ("", 5061))
    assert own.opened("t", ("", 5061)) == ("0.0.0.0", 5061)
    assert neighbour.opened("t", ("", 5061)) == ("0.0.0.0", 5061)
    for to in (5060, 5061):
        neighbour.opened("n")
        neighbour.sent("n", "x", (OWN[4], to))
    assert (own.heard("s")[0], own.heard("t")[0]) == ("x", "x")
    assert (host.waiting(["h", "t"]), neighbour.waiting(["t"])) == ([], [])


def test_as_many_as_a_container_may_have(lab, network, mine, neighbour):
    """Nobody else loses by it."""
    own = network.container(mine, "--name", "greedy", "--limit", "ports=20")
    assert [own.opened(f"s{n}", ("", 5000 + n)) for n in range(20)] == [("0.0.0.0", 5000 + n) for n in range(20)]
    assert own.opened("more", ("", 6000)) == "EADDRINUSE"
    assert own.opened("more", (OWN[4], 0)) == "EADDRINUSE"
    assert neighbour.opened("n", ("", 6000)) == ("0.0.0.0", 6000)
    assert refusals(lab, "greedy") == {("bind", "no port is left that the kernel may choose"): 2}
    own.shut("s0")
    assert own.opened("more", ("", 6000)) == ("0.0.0.0", 6000)
