"""rtnetlink's messages and errors, and the device that leads nowhere, in a netns of the test's own."""

import errno
import os
import subprocess
import threading

import pytest

from graft.bench.lab import wait_for
from graft.errors import Failure
from graft.kernel import addresses, linux, rtnetlink
from graft.kernel.nowhere import GROUP, PEER, Order, clear, is_own, put
from graft.rules.address import parse_address
from tests.conftest import need_root

OWN4, OTHER4, OWN6 = map(parse_address, ("10.88.0.5", "10.88.0.6", "2001:db8::5"))
MULTICAST = parse_address("ff02::5")  # which no device can be given (inet6_addr_add)
OWNED = {OWN4: "eth0", OWN6: "lo"}
LAST_INDEX = (1 << 31) - 1


@pytest.fixture
def netns():
    """A descriptor of a new netns, whose lo is up."""
    need_root()
    found = []

    def make():
        linux.unshare(linux.CLONE_NEWNET)
        linux.loopback_up()
        found.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    yield found[0]
    os.close(found[0])


def test_a_list_and_an_error(netns):
    with rtnetlink.channel_in(netns) as channel:
        assert [(link.ifindex, link.name) for link in channel.links() if link.name == "lo"] == [(1, "lo")]
        assert {str(held.address) for held in channel.addresses()} == {"127.0.0.1", "::1"}
        assert channel.source(parse_address("192.0.2.1")) is None
        assert str(channel.source(parse_address("127.0.0.1"))) == "None"  # a local route, which is nobody's way out
        wrong = rtnetlink.Item("device x", rtnetlink.RTM_NEWLINK, rtnetlink.NLM_F_CREATE, bytes(16))
        with pytest.raises(OSError, match=r"device x: ") as found:
            channel.carry_out(wrong)
        assert found.value.errno in (errno.EINVAL, errno.EOPNOTSUPP)
        channel.carry_out(wrong._replace(tolerated=(found.value.errno,)))


@pytest.fixture
def lived_in(netns):
    """The same, with a process in it."""
    with subprocess.Popen(("nsenter", f"--net=/proc/self/fd/{netns}", "sleep", "100"), pass_fds=(netns,)) as process:
        wait_for(lambda: linux.netns_inode(process.pid) == os.fstat(netns).st_ino, "its being there")
        yield netns
        process.kill()


def inside(netns, *words):
    return subprocess.run(
        ("nsenter", f"--net=/proc/self/fd/{netns}", *words), pass_fds=(netns,), capture_output=True, text=True, check=True
    ).stdout


def state_of(netns):
    """What there is of devices, addresses, routes and rules."""
    ways = ("route", "show", "table", "all"), ("-6", "route", "show", "table", "all"), ("rule",), ("-6", "rule")
    return [inside(netns, "ip", *one) for one in (("address",), *ways)]


def test_a_device_and_its_end(lived_in):
    before = state_of(lived_in)
    outcome = put(lived_in, Order(OWNED, {}, "eth0"))
    assert outcome == (OWNED, "eth0", "", "", ())
    with rtnetlink.channel_in(lived_in) as channel:
        made = {link.name: link for link in channel.links() if link.name != "lo"}
        assert made.keys() in ({"eth0"}, {"eth0", PEER})
        assert all(is_own(link, "eth0") for link in made.values())
        assert not is_own(made["eth0"], "eth1")
        held = {str(h.address): h.ifindex for h in channel.addresses()}
        assert (held["10.88.0.5"], held["2001:db8::5"]) == (made["eth0"].ifindex, 1)
        assert channel.source(parse_address("192.0.2.1")) is None  # the default route is there, and not taken
    assert put(lived_in, Order({OTHER4: "eth0"}, OWNED, "eth0")) == ({OTHER4: "eth0"}, "eth0", "", "", ())
    assert "10.88.0.5" not in inside(lived_in, "ip", "address")
    assert clear(lived_in, Order({}, {}, "eth0")) == ()
    assert state_of(lived_in) == before


def test_what_fails_half_way_is_told_and_removed(lived_in):
    before = state_of(lived_in)
    outcome = put(lived_in, Order({MULTICAST: "eth0", **OWNED}, {}, "eth0"))
    assert (outcome.shown, outcome.device) == (OWNED, "eth0")
    assert [text.partition(":")[0] for text in outcome.failed] == ["add ff02"]
    inside(lived_in, "ip", "link", "del", "eth0")  # the rules stay
    assert clear(lived_in, Order({}, {}, "eth0")) == ()
    assert state_of(lived_in) == before


def test_the_last_number_is_taken(netns):
    """A netns's root chooses numbers. The pair is down and has names of the kernel's, so that nobody minds it."""
    inside(netns, "ip", "link", "add", "sit0", "index", str(LAST_INDEX), "type", "veth", "peer", "name", "gre0")
    outcome = put(netns, Order(OWNED, {}, "eth0"))
    assert (outcome.shown, outcome.device, outcome.failed) == (OWNED, "eth0", ())


@pytest.mark.parametrize("up", ["sit0", "eth0", PEER])
def test_somebody_elses_device(netns, up):
    """The group alone says nothing: with these names it is another kind, or was not made by graft."""
    inside(netns, "ip", "link", "add", up, "type", "bridge")
    inside(netns, "ip", "link", "set", up, "up", "group", str(GROUP))
    inside(netns, "ip", "address", "add", "10.88.0.6/32", "dev", "lo", "metric", str(GROUP))
    before = inside(netns, "ip", "address", "show", "lo")
    assert put(netns, Order(OWNED, {}, "eth0")) == ({}, "", up, "", ())
    assert inside(netns, "ip", "address", "show", "lo") == before  # it may be another graftd's host, which has such addresses, too


def test_what_goes_wrong_with_los_addresses_is_a_failure(monkeypatch):
    """As all that graftd's start can meet: one line, and no traceback."""

    def lost(*_):
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    for name in ("addresses", "carry_out"):
        monkeypatch.setattr(rtnetlink.Channel, name, lost)
    for work in (addresses.marked_addresses, lambda: addresses.add_slice_address(OWN6)):
        with pytest.raises(Failure, match=os.strerror(errno.ENOBUFS)):
            work()
