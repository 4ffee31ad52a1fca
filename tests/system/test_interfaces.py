"""The addresses and the device that a container has in its own netns: who looks there finds them, nothing leaves there."""

import ctypes
import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from graft.bench.lab import CLIENT4, GRAFT, GRAFTD, HOST4, HOST6, SECOND4, SLOWNESS, wait_for
from graft.engines.joined import foreign_devices
from graft.rules.address import parse_address
from tests.conftest import need, python

OWN4, OWN6 = "10.88.0.5", "2001:db8:88::5"
NO_WAY = ("--egress", "none", "--interface", "eth0")
LOOPBACK = {("lo", "127.0.0.1"), ("lo", "::1")}
LOOKUP = """
import socket
for family, text in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):
    try: print(socket.getaddrinfo(text, 80, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)[0][4][0])
    except socket.gaierror as e: print(e.errno == socket.EAI_NONAME)
"""
EACH = """
import errno, json, socket, subprocess
kept = []
for link in json.loads(subprocess.run(('ip', '-j', 'address'), capture_output=True).stdout):
    for entry in link['addr_info']:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            kept.append(socket.socket(socket.AF_INET if entry['family'] == 'inet' else socket.AF_INET6, kind))
            try:
                kept[-1].bind((entry['local'], 53))
                if kind == socket.SOCK_STREAM: kept[-1].listen()
                print(kept[-1].getsockname()[0])
            except OSError as e: print(errno.errorcode[e.errno])
"""
READERS = """
import array, fcntl, socket, struct
s = socket.socket(); room = array.array('B', bytes(4000))
told = fcntl.ioctl(s, 0x8912, struct.pack('=i4xQ', len(room), room.buffer_info()[0]))
data = room.tobytes()[:struct.unpack_from('=i', told)[0]]
for at in range(0, len(data), 40): print(data[at:at + 16].rstrip(b'\\0').decode(), socket.inet_ntoa(data[at + 20:at + 24]))
flags = struct.unpack_from('H', fcntl.ioctl(s, 0x8913, struct.pack('16s24x', b'eth0')), 16)[0]
print('up, running, not loopback', flags & 0x49 == 0x41)
routes = [line.split() for line in open('/proc/net/route')][1:]
print([r[0] for r in routes if r[1] == r[7] == '00000000' and r[2] != '00000000'])
"""
SENDERS = """
import errno, socket, struct, time
def tell(what, call):
    begun = time.monotonic()
    try: call(); said = 'sent'
    except OSError as e: said = errno.errorcode[e.errno]
    print(what, said, 'at once' if time.monotonic() - begun < 0.5 else 'late')
def bound(family, option, level):
    s = socket.socket(family, socket.SOCK_RAW, 1 if family == socket.AF_INET else 58)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0'); s.setsockopt(level, option, 1)
    return s
echo = b'\\x08\\0\\xf7\\xff\\0\\0\\0\\0'
tell('raw', lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).sendto(echo, ('8.8.8.8', 0)))
tell('raw6', lambda: socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58).sendto(echo, ('2001:4860::8888', 0)))
tell('neighbour', lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).sendto(echo, ('10.88.0.6', 0)))
tell('bound', lambda: bound(socket.AF_INET, 11, socket.IPPROTO_IP).sendto(echo, ('8.8.8.8', 0)))
for name in socket.if_nameindex():
    if name[1] != 'lo':
        packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); packet.bind((name[1], 0x800))
        tell('packet', lambda: packet.send(bytes(64)))
"""


def inside(lab, name):
    """The addresses in a container's netns, with their devices; none of one that is not there yet."""
    rows = json.loads(lab.graft("ps", "-j").stdout or "[]")
    path = next((row["netns_path"] for row in rows if row["name"] == name), "")
    return addresses(lab, path) if path else set()


def addresses(lab, netns):
    links = json.loads(lab.host("nsenter", f"--net={netns}", "ip", "-j", "address").stdout)
    return {(link["ifname"], entry["local"]) for link in links for entry in link["addr_info"]}


def sleeper(lab, name, *options):
    process = lab.spawn_graft("--name", name, *options, "sleep", "100")
    wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "its command, which comes after its addresses")
    return process


@pytest.mark.parametrize(
    "options", [pytest.param((), marks=pytest.mark.core), ("--ip", OWN4), ("--egress", "none", "--ip", OWN6), ("--user", "nobody")]
)
def test_lookups_for_the_families_that_there_are(lab, options):
    assert lab.graft("run", *options, *python(LOOKUP)).stdout == "127.0.0.1\n::1\n"
    need("getent")
    assert "127.0.0.1" in lab.graft("run", *options, "getent", "ahostsv4", "127.0.0.1").stdout


def test_without_a_way_out_there_is_a_name_for_the_loopback(lab):
    """127.0.0.2 is an address like another for getaddrinfo(3), and the container's to bind."""
    assert lab.graft("run", "--egress", "none", *python(LOOKUP)).stdout == "127.0.0.1\nTrue\n"


def test_each_address_can_be_bound_beside_the_others(lab):
    """By a server that binds one socket for each, at a port that nobody publishes: they are in no other's way."""
    for options, own in (((), HOST4), (("--egress", "none"), "127.0.0.2"), (NO_WAY, "127.0.0.2"), (("--ip", OWN4), OWN4)):
        told = lab.graft("run", *options, *python(EACH)).stdout.split()
        assert "127.0.0.1" in told
        assert own in told
        assert "EADDRINUSE" not in told
        assert "EADDRNOTAVAIL" not in told


def test_without_an_interface_there_are_none(lab):
    assert lab.graft("run", "--interface", "none", *python(LOOKUP)).stdout == "True\nTrue\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {("lo", HOST4), ("lo", HOST6)}),
        (("--interface", "net0"), {("net0", HOST4), ("net0", HOST6)}),
        (("--ip", OWN4), {("eth0", OWN4), ("lo", HOST6)}),
        pytest.param(("--ip", OWN4, "--ip", OWN6), {("eth0", OWN4), ("eth0", OWN6)}, marks=pytest.mark.core),
        (("--ip", OWN4, "--interface", "net0"), {("net0", OWN4), ("lo", HOST6)}),
        (("--ip", OWN4, "--interface", "lo"), {("lo", OWN4), ("lo", HOST6)}),
        (("--ip", OWN4, "--interface", "none"), set()),
        (("--egress", "none"), {("lo", "127.0.0.2")}),
        (NO_WAY, {("eth0", "127.0.0.2")}),
        (("--egress", "none", "--ip", OWN6), {("eth0", OWN6), ("lo", "127.0.0.2")}),
    ],
)
def test_which_address_is_where(lab, options, expected):
    links = json.loads(lab.graft("run", *options, "ip", "-j", "address").stdout)
    found = {(link["ifname"], entry["local"]) for link in links for entry in link["addr_info"]}
    assert found == LOOPBACK | expected
    assert all(entry["prefixlen"] in (8, 32, 128) for link in links for entry in link["addr_info"])


@pytest.mark.core
def test_those_who_look_for_a_device_find_it(lab):
    told = lab.graft("run", "--ip", OWN4, *python(READERS)).stdout.splitlines()
    assert told == ["lo 127.0.0.1", f"eth0 {OWN4}", "up, running, not loopback True", "['eth0']"]
    assert lab.graft("run", "--ip", OWN4, "--ip", OWN6, "hostname", "-I").stdout.split() == [OWN4, OWN6]
    routes = lab.graft("run", "--ip", OWN4, "ip", "route").stdout
    assert routes.startswith("default via 169.254.1.1 dev eth0 ")


@pytest.mark.core
def test_what_is_sent_into_it_is_refused_at_once(lab):
    told = lab.graft("run", "--ip", OWN4, "--ip", OWN6, *python(SENDERS)).stdout.splitlines()
    unreachable = [f"{what} ENETUNREACH at once" for what in ("raw", "raw6", "neighbour")]
    packets = told[4:]
    assert told[:4] == [*unreachable, "bound ENOBUFS at once"]
    assert packets
    assert set(packets) == {"packet ENOBUFS at once"}


def test_ping(lab):
    need("busybox")
    lab.graft("run", "true")  # graftd is there
    for options in ((), ("--ip", OWN4)):
        begun = time.monotonic()
        result = lab.graft("run", *options, "busybox", "ping", "-c", "3", "192.0.2.1")
        assert "Network is unreachable" in result.stderr
        assert time.monotonic() - begun < 5  # without an answer it would be 12
    assert ", 0% packet loss" in lab.graft("run", "--ip", OWN4, "busybox", "ping", "-c", "1", OWN4).stdout


def test_a_server_for_each_address(lab):
    """dnsmasq's listener of each address, and its wildcard one, which takes TCP at addresses that it has seen alone."""
    need("dnsmasq")
    options = ("-d", "-C", "/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--address=/x.test/1.2.3.4", "-x", "")
    query = "b'\\0\\x18\\x12\\x34\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\1x\\4test\\0\\0\\1\\0\\1'"
    ask = f"import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5); s.send({query}); print(s.recv(512)[-4:])"
    answer = "b'\\x01\\x02\\x03\\x04'\n"
    lab.spawn_graft("--ip", OWN4, "dnsmasq", "--bind-interfaces", *options, stderr=-3)
    wait_for(lambda: lab.host(*python(ask), OWN4, 53).stdout == answer, "an answer")
    lab.spawn_graft("-p", "5354:53", "dnsmasq", *options, stderr=-3)
    lab.wait_listening(5354)
    assert lab.client(*python(ask), HOST4, 5354).stdout == answer


@pytest.mark.parametrize("name", ["", "a/b", "..", "all", "sixteen-letters-", "graft-peer", "e th0", "lö"])
def test_a_name_that_is_none(lab, name):
    told = lab.refused((GRAFT, "run", "--interface", name, "true"), 2, f"--interface: interface '{name}' is not a name")
    assert len(told.stderr.splitlines()) == 1


def test_who_joins_asks_for_the_same(lab):
    process = sleeper(lab, "one", "--interface", "net0")
    try:
        lab.refused((GRAFT, "run", "--netns", "one", "--interface", "eth0", "true"), 1, "runs with interface net0")
        assert lab.graft("run", "--netns", "one", "--interface", "net0", "true").returncode == 0
        assert lab.graft("run", "--netns", "one", "true").returncode == 0
        assert json.loads(lab.graft("inspect", "one").stdout)["inside"] == {HOST4: "net0", HOST6: "net0"}
    finally:
        lab.end(process)


def state_of(lab, path):
    """All that a netns has of addresses, routes and rules."""
    words = (("address",), ("route", "show", "table", "all"), ("-6", "route", "show", "table", "all"), ("rule",), ("-6", "rule"))
    return [lab.host("nsenter", f"--net={path}", "ip", *one).stdout for one in words]


@pytest.fixture
def named(lab):
    """A netns with a name, which outlives the containers in it."""
    name = f"{lab.tag}-n"
    lab.ip("netns", "add", name)
    lab.ip("-n", name, "link", "set", "lo", "up")
    yield f"/run/netns/{name}"
    lab.ip("netns", "del", name)


@pytest.mark.parametrize("options", [(), pytest.param(("--ip", OWN4, "--ip", OWN6), marks=pytest.mark.core), ("--interface", "net0")])
def test_a_named_namespace_is_left_as_it_was(lab, named, options):
    before = state_of(lab, named)
    for _ in range(2):
        process = sleeper(lab, "one", "--netns", named, *options)
        assert len(addresses(lab, named)) == 4
        lab.end(process)
        wait_for(lambda: "one" not in lab.containers(), "its end")
        wait_for(lambda: state_of(lab, named) == before, "what was there before")


@pytest.mark.core
def test_a_namespace_with_a_device_of_its_own_is_not_touched(lab, named):
    lab.ip("-n", named.rpartition("/")[2], "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    before = state_of(lab, named)
    process = sleeper(lab, "one", "--netns", named, "--ip", OWN4, "--ip", OWN6)
    assert state_of(lab, named) == before
    lab.wait_logged("container one: its namespace has the device")
    lab.end(process)


def test_the_hosts_own_namespace_is_not_touched(lab):
    """A container in graftd's own netns: it may be root's wish, and the addresses there are the host's."""
    before = state_of(lab, f"/run/netns/{lab.host_ns}")
    lab.graft("run", "--netns", f"/run/netns/{lab.host_ns}", "--interface", "net0", "true")
    assert state_of(lab, f"/run/netns/{lab.host_ns}") == before


def test_a_namespace_without_ipv6(lab, named):
    """An engine may have switched it off: then it stays off on lo, and the device has what the container owns."""
    off = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6"
    lab.host("nsenter", f"--net={named}", "sh", "-c", off, check=True)
    process = sleeper(lab, "one", "--netns", named)
    assert addresses(lab, named) == {("lo", "127.0.0.1"), ("lo", HOST4)}
    lab.end(process)
    wait_for(lambda: "one" not in lab.containers(), "its end")
    process = sleeper(lab, "one", "--netns", named, "--ip", OWN6)
    assert addresses(lab, named) == {("lo", "127.0.0.1"), ("lo", HOST4), ("eth0", OWN6)}
    lab.end(process)


def test_ipv6_that_the_container_switches_off(lab):
    """By a sysctl, which acts on no socket, but on what is seen inside: neither lo nor the device has IPv6 then."""
    off = ("--sysctl", "net.ipv6.conf.all.disable_ipv6=1", "--sysctl", "ignore")
    links = json.loads(lab.graft("run", "--ip", OWN4, "--ip", OWN6, *off, "ip", "-j", "address").stdout)
    assert {(link["ifname"], entry["local"]) for link in links for entry in link["addr_info"]} == {("lo", "127.0.0.1"), ("eth0", OWN4)}


@pytest.fixture
def host(own_lab):
    """A host whose second address stays when the first goes."""
    own_lab.host("sysctl", "-qw", "net.ipv4.conf.veth0.promote_secondaries=1", check=True)
    return own_lab


def test_the_hosts_addresses_change(host):
    """Also after graftd was killed; what a container owns stays."""
    lab = host
    sleeper(lab, "plain")
    sleeper(lab, "device", "--interface", "eth0")
    sleeper(lab, "owner", "--ip", OWN4)
    assert inside(lab, "plain") == LOOPBACK | {("lo", HOST4), ("lo", HOST6)}

    def moved(host4, host6):
        wait_for(lambda: inside(lab, "plain") == LOOPBACK | {("lo", a) for a in (host4, host6) if a}, "lo")
        wait_for(lambda: inside(lab, "device") == LOOPBACK | {("eth0", a) for a in (host4, host6) if a}, "eth0")
        own = LOOPBACK | {("eth0", OWN4)} | ({("lo", host6)} if host6 else set())
        wait_for(lambda: inside(lab, "owner") == own, "the owner")

    lab.ip("-n", lab.host_ns, "address", "del", f"{HOST4}/24", "dev", "veth0")
    lab.ip("-n", lab.host_ns, "-6", "address", "flush", "dev", "veth0", "scope", "global")
    moved(SECOND4, "")
    pid = lab.daemon_pid()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: lab.daemon_pid() not in (0, pid) and lab.containers(), "the next graftd")
    lab.ip("-n", lab.host_ns, "address", "add", f"{HOST4}/24", "dev", "veth0")
    lab.ip("-n", lab.host_ns, "address", "add", f"{HOST6}/64", "dev", "veth0", "nodad")
    lab.ip("-n", lab.host_ns, "address", "del", f"{SECOND4}/24", "dev", "veth0")
    moved(HOST4, HOST6)
    lab.ip("-n", lab.host_ns, "address", "add", f"{SECOND4}/24", "dev", "veth0")
    lab.ip("-n", lab.host_ns, "route", "add", "default", "via", CLIENT4, "src", SECOND4)
    lab.ip("-n", lab.host_ns, "address", "add", "10.77.0.9/24", "dev", "veth0")  # a change of routes alone is seen in 30 s
    moved(SECOND4, HOST6)


def test_a_containers_root_spoils_it(host):
    """It has CAP_NET_ADMIN over its netns. It may take the device; it gets what is new, and graftd goes on."""
    lab = host
    spoil = "ip link del eth0; ip link add eth0 type veth peer name x; ip link set eth0 group 26470; exec sleep 100"
    lab.spawn_graft("--name", "bad", "--interface", "eth0", "sh", "-c", spoil)
    last = "ip link add sit0 index 2147483647 type veth peer name gre0"  # down, by names of the kernel's: nobody minds it
    lab.spawn_graft("--name", "last", "--interface", "eth0", "sh", "-c", f"ip link del eth0; {last}; exec sleep 100")
    lab.spawn_graft("--name", "none", "--interface", "eth0", "sh", "-c", "ip link del eth0; exec sleep 100")
    sleeper(lab, "good")
    wait_for(lambda: inside(lab, "bad") == inside(lab, "none") == inside(lab, "last") == LOOPBACK, "the end of their devices")
    lab.ip("-n", lab.host_ns, "address", "del", f"{HOST4}/24", "dev", "veth0")
    wait_for(lambda: ("lo", SECOND4) in inside(lab, "good"), "the next address")
    wait_for(lambda: ("eth0", SECOND4) in inside(lab, "none"), "a device again")
    wait_for(lambda: ("eth0", SECOND4) in inside(lab, "last"), "a device with another number")
    assert ("eth0", SECOND4) not in inside(lab, "bad")
    lab.ip("-n", lab.host_ns, "address", "add", f"{HOST4}/24", "dev", "veth0")
    lab.ip("-n", lab.host_ns, "address", "del", f"{SECOND4}/24", "dev", "veth0")
    lab.host(GRAFTD, "--replace", check=True)
    wait_for(lambda: ("lo", HOST4) in inside(lab, "good"), "the address for the next graftd")
    assert ("eth0", HOST4) not in inside(lab, "bad")


def test_which_device_is_grafts_to_who_joins(lab):
    """By group, kind, name and addresses: a tunnel that the netns's root calls so is told of, behind any number of others."""
    process = sleeper(lab, "one", "--ip", OWN4)
    path, known = f"/proc/{process.pid}/ns/net", {parse_address(OWN4), parse_address(HOST6)}

    def change(*words):
        lab.host("nsenter", f"--net={path}", "ip", *words, check=True)

    assert foreign_devices(path, "eth0", known) == []
    assert foreign_devices(path, "net0", known)[:1] == ["eth0"]
    assert foreign_devices(path, "eth0", set()) == ["eth0"]
    for number in range(40):
        change("link", "add", f"a{number}", "type", "veth", "peer", "name", f"b{number}")
    assert foreign_devices(path, "eth0", known) == []  # they are down
    change("link", "add", "wg0", "type", "bridge")
    change("link", "set", "wg0", "up", "group", "26470")
    assert foreign_devices(path, "eth0", known) == ["wg0"]
    change("link", "del", "wg0")
    change("address", "add", "10.9.9.9/24", "dev", "eth0")
    assert foreign_devices(path, "eth0", known) == ["eth0"]
    change("link", "del", "eth0")
    change("link", "add", "eth0", "type", "bridge")
    change("link", "set", "eth0", "up", "group", "26470")
    assert foreign_devices(path, "eth0", known) == ["eth0"]
    lab.end(process)


def told_inside(lab, name):
    """What `graft inspect` says of the addresses inside; {} of a container that is not there yet."""
    told = lab.graft("inspect", name)
    return json.loads(told.stdout)["inside"] if not told.returncode else {}


def has_inside(lab, name, address):
    return address in told_inside(lab, name)


def test_many_are_saved_at_once(host):
    """A state.json has all containers: to write it for each of them would be quadratic."""
    lab, names = host, [f"c{n}" for n in range(12)]
    for name in names:
        lab.spawn_graft("--name", name, "sleep", "100")
    wait_for(lambda: all(told_inside(lab, name) for name in names), "their addresses", 30)
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, bytes(lab.run_dir), 0x180) > 0  # IN_MOVED_TO, and IN_CREATE between two of them
    lab.ip("-n", lab.host_ns, "address", "del", f"{HOST4}/24", "dev", "veth0")
    for name in names:
        wait_for(partial(has_inside, lab, name, SECOND4), "the next address")
    wait_for(lambda: SECOND4 in (lab.run_dir / "state.json").read_text(), "the state")
    time.sleep(1.2)  # graftd's next tick
    assert 1 <= os.read(watch, 65536).count(b"state.json\0") <= 6
    os.close(watch)


HOG = """
import subprocess, sys, time
names = ''.join(f'link add v{i} group 7 type veth peer name w{i}\\n' for i in range(2500))
until = time.monotonic() + 5
while time.monotonic() < until:
    subprocess.run(('ip', '-batch', '-'), input=names, text=True)
    print(flush=True)
    subprocess.run(('ip', 'link', 'del', 'group', '7'))
"""


@pytest.mark.alone
def test_who_holds_the_kernels_lock_does_not_hold_graftd(host):
    """Any user may, who has a user namespace. A container's start waits for its own devices, and nobody else does."""
    lab = host
    sleeper(lab, "one")
    hog = lab.spawn("unshare", "-Urn", *python(HOG), stdout=-1)
    assert hog.stdout.readline() == "\n"
    started: list[subprocess.Popen[str]] = []
    longest = 0.0
    while hog.poll() is None:
        if not started or started[-1].poll() is not None:
            started.append(lab.spawn_graft("--interface", "eth0", "true"))
        begun = time.monotonic()
        assert "one" in lab.containers()
        longest = max(longest, time.monotonic() - begun)
    assert all(process.wait(60) == 0 for process in started)
    assert longest < 0.5 * SLOWNESS, f"{longest:.3f} s, {len(started)} starts"
