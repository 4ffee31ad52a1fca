"""UDP sockets of a container on a network of this host: neighbours find them at its address, and they go beyond it from the host's."""

import pytest

from graft.bench.lab import CLIENT4, HOST4
from graft.kernel.programs import Kernel
from tests.system.networks import ANY, FAMILIES, FAR, FORMS, HOST, LOOPBACK, NEIGHBOUR, OWN, STRANGER, refusals


@FORMS
@FAMILIES
def test_one_socket_for_all(network, mine, neighbour, far, family, form):
    """SIP: from one port it registers beyond the network, and is called by neighbours, by the host and by its own container."""
    own = network.container(mine)
    host = network.elsewhere(client=False)
    assert own.opened("s", (form[family], 5060)) == (form[family], 5060)
    far.opened("f", (FAR[family], 5070))
    own.sent("s", "register", (FAR[family], 5070))
    text, (address, port) = far.heard("f")
    assert (text, address) == ("register", HOST[family])
    assert port != 5060
    far.sent("f", "welcome", (HOST[family], port))
    assert own.heard("s") == ("welcome", (FAR[family], 5070))
    neighbour.opened("n", (NEIGHBOUR[family], 5080))
    neighbour.sent("n", "call", (OWN[family], 5060))
    assert own.heard("s") == ("call", (NEIGHBOUR[family], 5080))
    own.sent("s", "ring", (NEIGHBOUR[family], 5080))
    assert neighbour.heard("n") == ("ring", (OWN[family], 5060))
    own.sent("s", "first", (NEIGHBOUR[family], 5081))  # nobody is there
    neighbour.opened("fresh", (ANY[family], 5082))
    own.sent("s", "unasked", (NEIGHBOUR[family], 5082))
    assert neighbour.heard("fresh") == ("unasked", (OWN[family], 5060))
    neighbour.sent("fresh", "so it is", (OWN[family], 5060))
    assert own.heard("s") == ("so it is", (NEIGHBOUR[family], 5082))
    for agent, name in ((neighbour, "joined"), (host, "joined")):
        agent.opened(name, six=family == 6)
        assert agent.joined(name, (OWN[family], 5060))[1] in ((OWN[family], 5060), (OWN[family], port))
        agent.said(name, "joined")
        text, peer = own.heard("s")
        own.sent("s", "answer", peer)
        assert (text, agent.heard(name)[0]) == ("joined", "answer")
    host.opened("h", six=family == 6)
    host.sent("h", "from the host", (OWN[family], 5060))
    text, peer = own.heard("s")
    own.sent("s", "to the host", peer)
    assert (text, host.heard("h")) == ("from the host", ("to the host", (OWN[family], 5060)))
    own.opened("c", six=family == 6)
    own.sent("c", "inside", (OWN[family], 5060))
    text, peer = own.heard("s")
    own.sent("s", "in here", peer)
    assert (text, own.heard("c")) == ("inside", ("in here", (OWN[family], 5060)))
    own.sent("c", "to the loopback", (LOOPBACK[family], 5060))
    if form is ANY:
        text, peer = own.heard("s")
        assert (text, peer[0]) == ("to the loopback", LOOPBACK[family])
        own.sent("s", "by the loopback", peer)
        assert own.heard("c") == ("by the loopback", (LOOPBACK[family], 5060))
    assert own.called("s") == (form[family], 5060)
    far.sent("f", "still there", (HOST[family], port))
    assert own.heard("s") == ("still there", (FAR[family], 5070))


@FORMS
@FAMILIES
@pytest.mark.parametrize("port", [0, 5061, 40123])
def test_connected(network, mine, neighbour, far, family, form, port):
    """unbound: a socket for each query, bound and connected, to a server beyond or to a neighbour, which answer it."""
    own = network.container(mine)
    for agent, there in ((far, FAR), (neighbour, NEIGHBOUR)):
        agent.opened("f", (there[family], 53))
        bound = own.opened("s", (form[family], port))
        name, peer = own.joined("s", (there[family], 53))
        shown = (OWN if form is OWN or agent is neighbour else HOST)[family]
        assert (name[0], peer) == (shown, (there[family], 53))
        assert not port or name[1] == port
        assert bound[1] == name[1]
        own.said("s", "query")
        text, asker = agent.heard("f")
        assert (text, asker[0]) == ("query", HOST[family] if agent is far else OWN[family])
        assert agent is far or asker[1] == name[1]
        agent.sent("f", "answer", asker)
        assert own.heard("s") == ("answer", (there[family], 53))


def test_both_families(network, mine, neighbour, far):
    """One socket on [::] goes everywhere, by IPv4 as well."""
    own = network.container(mine)
    own.opened("s", ("::", 5060))
    for family, mapped in ((4, "::ffff:"), (6, "")):
        for agent, there in ((far, FAR), (neighbour, NEIGHBOUR)):
            agent.opened("f", (there[family], 5070))
            own.sent("s", "out", (mapped + there[family], 5070))
            text, peer = agent.heard("f")
            assert (text, peer[0]) == ("out", HOST[family] if agent is far else OWN[family])
            assert agent is far or peer[1] == 5060
            agent.sent("f", "in", peer)
            assert own.heard("s") == ("in", (mapped + there[family], 5070))
        neighbour.opened("n", six=family == 6)
        neighbour.sent("n", "asked first", (OWN[family], 5060))
        assert own.heard("s")[0] == "asked first"


@FORMS
@FAMILIES
def test_no_stranger_gets_in(lab, network, mine, neighbour, far, family, form):
    """Neither at the host's port, from beyond and from the host, nor from another network, nor by a route to the address."""
    own = network.container(mine)
    host = network.elsewhere(client=False)
    other = network.container(network.attach("other", "10.89.0.5/24", "fd89::5/64"))
    own.opened("s", (form[family], 5060))
    own.sent("s", "x", (FAR[family], 7)) if far.opened("f", (FAR[family], 7)) else None
    port = far.heard("f")[1][1]
    far.opened("stranger", (STRANGER[family], 7))
    for name, where in (("stranger", HOST), ("stranger", OWN)):
        far.sent(name, "stranger", (where[family], port))
    lab.client("ip", "route", "add", OWN[family], "via", HOST[family], check=True)
    try:
        for to in (port, 5060):
            far.sent("stranger", "by a route", (OWN[family], to))
    finally:
        lab.client("ip", "route", "del", OWN[family], check=True)
    for agent, there in ((host, HOST), (host, LOOPBACK)):
        agent.opened("h", six=family == 6)
        agent.sent("h", "from the host", (there[family], port))
    for agent in (other, network.container(None)):
        agent.opened("o", six=family == 6)
        assert agent.sent("o", "another's", (OWN[family], 5060)) == "ENETUNREACH"
        assert agent.sent("o", "another's", (OWN[family], port)) == "ENETUNREACH"
        agent.sent("o", "another's", (HOST[family], port))
    far.sent("f", "the peer", (HOST[family], port))
    assert own.heard("s") == ("the peer", (FAR[family], 7))
    neighbour.opened("n", six=family == 6)
    neighbour.sent("n", "the neighbour", (OWN[family], 5060))
    assert own.heard("s")[0] == "the neighbour"
    assert own.waiting(["s"]) == []


@FORMS
@FAMILIES
def test_a_server_that_starts_again(network, mine, neighbour, family, form):
    """statsd: a neighbour has connected for good, and its datagrams arrive at the server's successor."""
    for other in (False, True):
        neighbour.opened("n", six=family == 6)
        server = network.container(mine)
        for life in range(3):
            if other and life:
                server.end()
                server = network.container(mine)
            assert server.opened("s", (form[family], 8125)) == (form[family], 8125)
            if not life:
                neighbour.joined("n", (OWN[family], 8125))
            neighbour.said("n", f"count {life}")
            text, peer = server.heard("s")
            server.sent("s", "noted", peer)
            assert (text, neighbour.heard("n")) == (f"count {life}", ("noted", (OWN[family], 8125)))
            server.shut("s")
        server.end()


def remembered(lab):
    """The ports of the host's that neighbours have connected to."""
    kernel = Kernel(lab.pins())
    kernel._open_pinned()
    return {
        int.from_bytes(kernel.maps["abroad_ports"].get(key) or b"", "little")
        for key in kernel.maps["abroad_ports"].keys(24)
    }


def test_a_server_whose_port_was_taken_meanwhile(lab, network, mine, neighbour):
    """A program of the host's has the kernel's port: it hears nothing from the neighbour, and the server gets another."""
    own, host = network.container(mine), network.elsewhere(client=False)
    for n in range(2):  # at ports that no other test has: what neighbours have connected to is remembered
        before = remembered(lab)
        own.opened("s", ("", 8145 + n))
        neighbour.opened("n")
        neighbour.joined("n", (OWN[4], 8145 + n))
        neighbour.said("n", "one")
        assert own.heard("s")[0] == "one"
        (port,) = remembered(lab) - before
        own.shut("s")
        host.opened("h", ("", port))
        neighbour.said("n", "two")
        assert host.waiting(["h"]) == []
        if n:  # where it is connected no hook sees it: the kernel refuses, once
            host.joined("h", (HOST4, 9))
            assert own.opened("s", ("", 8145 + n)) == "EADDRINUSE"
        assert own.opened("s", ("", 8145 + n)) == ("0.0.0.0", 8145 + n)
        neighbour.opened("n")
        neighbour.joined("n", (OWN[4], 8145 + n))
        neighbour.said("n", "three")
        assert own.heard("s")[0] == "three"
        assert host.waiting(["h"]) == []


@FAMILIES
def test_on_two_networks(network, neighbour, family):
    """Each network knows it by its address there, and one socket is on both; also after it has started again."""
    second = {4: ("10.90.0.5", "10.90.0.6"), 6: ("fd90::5", "fd90::6")}
    netns = network.attach("own", f"{OWN[4]}/24", f"{OWN[6]}/64")
    network.attach("second", *(f"{second[f][0]}/{bits}" for f, bits in ((4, 24), (6, 64))), into=netns)
    other = network.container(network.attach("second", *(f"{second[f][1]}/{bits}" for f, bits in ((4, 24), (6, 64)))))
    own = network.container(netns)
    for life in range(2):
        own.opened("s", (ANY[family], 53))
        for agent, mine in ((neighbour, OWN[family]), (other, second[family][0])):
            if not life:
                agent.opened("n", six=family == 6)
                agent.joined("n", (mine, 53))
            agent.said("n", "query")
            text, peer = own.heard("s")
            own.sent("s", "answer", peer)
            assert (text, agent.heard("n")) == ("query", ("answer", (mine, 53)))
            agent.opened("server", (ANY[family], 99))
            own.sent("s", "unasked", (peer[0], 99))
            assert agent.heard("server") == ("unasked", (mine, 53))
        assert other.sent("server", "x", (OWN[family], 53)) == "ENETUNREACH"
    own.opened("t", (second[family][0], 54))
    assert neighbour.sent("server", "x", (OWN[family], 54)) != "ENETUNREACH"
    other.sent("server", "y", (second[family][0], 54))
    assert own.heard("t")[0] == "y"


def test_the_source_that_a_program_names(network, mine, neighbour, far):
    """By IP_PKTINFO: its own address is no source beyond its network, and another's is none at all."""
    own = network.container(mine)
    far.opened("f", (CLIENT4, 7))
    for at in (("", 5060), ("", 0)):
        own.opened("s", at)
        for source in (OWN[4], NEIGHBOUR[4], "0.0.0.0"):
            assert own.sent_from("s", source, (CLIENT4, 7), source) == len(source)
            assert far.heard("f")[1][0] == HOST4


def test_where_nothing_may_leave(lab, network, mine, neighbour):
    """With egress none a socket is at the network's address alone, and what it sends beyond is refused, and counted."""
    own = network.container(mine, "--name", "inner", "--egress", "none")
    own.opened("s", ("", 5060))
    assert own.sent("s", "x", (CLIENT4, 7)) == "ENETUNREACH"
    assert own.joined("s", (CLIENT4, 7)) in ("EADDRNOTAVAIL", "ENETUNREACH")
    assert refusals(lab, "inner") == {
        ("send", "outside the egress rules"): 1,
        ("connect", "outside the egress rules"): 1,
    }
    neighbour.opened("n")
    neighbour.sent("n", "x", (OWN[4], 5060))
    assert own.heard("s")[0] == "x"
    assert lab.listening(5060, udp=True)


def test_an_address_that_is_routed(lab, network, far):
    """graft run --ip: it leaves from there, which the administrator routes here, and other machines find it there."""
    lab.client("ip", "route", "add", "10.99.0.5/32", "via", HOST4, check=True)
    try:
        own = network.container(None, "--ip", "10.99.0.5")
        far.opened("f", (CLIENT4, 7))
        for at in (("", 5060), ("10.99.0.5", 5061)):
            own.opened("s", at)
            own.sent("s", "x", (CLIENT4, 7))
            assert far.heard("f") == ("x", ("10.99.0.5", at[1]))
            far.opened("g", (STRANGER[4], 7))
            far.sent("g", "anybody", ("10.99.0.5", at[1]))
            assert own.heard("s") == ("anybody", (STRANGER[4], 7))
    finally:
        lab.client("ip", "route", "del", "10.99.0.5/32")
