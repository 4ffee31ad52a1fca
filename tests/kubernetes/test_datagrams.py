"""Services over UDP by kube-proxy, by both back ends of iptables: what asks the cluster's DNS, and how."""

import subprocess

import pytest

from graft.bench.lab import HOST4, wait_for
from tests.conftest import need, python
from tests.kubernetes.cluster import DIRECT, Document, container, idle, pod, service
from tests.kubernetes.test_services import names

pytestmark = pytest.mark.usefixtures("back_end")
PLACES = ("node", "graft", "direct", "bridge", "client")
# Answers who it is, and who asks
ANSWER = """
import socket
sock = socket.socket(type=socket.SOCK_DGRAM)
sock.bind(('', 53))
while True:
    data, peer = sock.recvfrom(100)
    sock.sendto(b'%s %s %s' % (socket.gethostname().encode(), peer[0].encode(), data), peer)
"""
# Asks a number of questions by `connect` or by `sendto`, from a socket for `each` or from `one` for all; tells who answered
ASK = """
import collections, socket, sys
address, port, way, count, each = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5] == 'each'
told, sock = collections.Counter(), None
for n in range(count):
    if sock is None or each:
        if sock: sock.close()
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.settimeout(5)
        if way == 'connect': sock.connect((address, port))
    asked = b'%d' % n
    if way == 'connect': sock.send(asked)
    else: sock.sendto(asked, (address, port))
    data, peer = sock.recvfrom(100)
    name, _, answered = data.split()
    assert (answered, peer) == (asked, (address, port)), (answered, asked, peer)
    told[name.decode()] += 1
print(*(f'{name}={n}' for name, n in told.items()))
"""
# Asks by one connected socket until somebody else answers; tells both. A question may be lost meanwhile
FOLLOW = """
import socket, sys, time
sock = socket.socket(type=socket.SOCK_DGRAM)
sock.settimeout(.3)
sock.connect((sys.argv[1], 53))
told = []
for _ in range(300):
    time.sleep(.1)
    try:
        sock.send(b'x')
        name = sock.recv(100).split()[0].decode()
    except OSError: continue
    if name not in told:
        print(name, flush=True)
        told.append(name)
    if len(told) == 2: break
"""


def endpoint(name):
    """A pod that answers: `a` of graft, `b` of graft and direct, `c` of the bridge."""
    probe = {"exec": {"command": [*python(ASK), "127.0.0.1", "53", "connect", "1", "each"]}}
    answers = container("main", python(ANSWER), readinessProbe=probe)
    return pod(name, answers, labels={"app": "served"}, notes=DIRECT if name == "b" else {}, graft=name != "c")


@pytest.fixture
def served(cluster):
    """A Service of UDP whose pods are two of graft, one of them direct, and one of the bridge, and pods that ask."""
    cluster.start(
        *map(endpoint, ("a", "b", "c")),
        pod("asks", idle()),
        pod("asks-direct", idle(), notes=DIRECT),
        pod("asks-bridged", idle(), graft=False),
    )
    return cluster.serve(service("served", 53, 53, ("UDP",), type="NodePort"))


def asked(cluster, host, place, *argv):
    """What the questions come to at a place: the output, or why there is none."""
    command = (*python(ASK), *map(str, argv))
    if place in ("node", "client"):
        done = (host.host if place == "node" else host.client)(*command)
    else:
        pod_of = {"graft": "asks", "direct": "asks-direct", "bridge": "asks-bridged"}
        done = cluster.kubectl("exec", pod_of[place], "--", *command, check=False)
    return done.stdout or done.stderr


@pytest.mark.parametrize("way", ["connect", "sendto"])
def test_a_service(cluster, host, served, way):
    """At its cluster address and at the node's port; the answer comes from where the question went to."""
    at, node = (served["clusterIP"], 53), (HOST4, served["ports"][0]["nodePort"])
    everyone = {"a", "b", "c"}
    wait_for(lambda: names(asked(cluster, host, "node", *at, way, 30, "each")) == everyone, "all endpoints", 30)
    for place in PLACES:
        for address in (node,) if place == "client" else (at, node):
            told = asked(cluster, host, place, *address, way, 40, "each")
            assert names(told) == everyone, (place, address, told)
            told = asked(cluster, host, place, *address, way, 10, "one")
            assert told.strip() in {f"{name}=10" for name in everyone}, (place, address, told)


def test_the_clusters_dns(cluster, host):
    """A name server behind a Service of UDP and TCP at port 53, asked by the C library and by dig, from pods of all kinds."""
    need("dnsmasq", "dig")
    options = ("--no-resolv", "--no-hosts", "--user=root", "--pid-file=", "--address=/web.lab/192.0.2.7")
    cluster.start(pod("dns", container("main", ["/usr/sbin/dnsmasq", "-k", "-C", "/dev/null", *options])))
    address = cluster.serve(service("dns", 53, 53, ("UDP", "TCP")))["clusterIP"]
    resolved: Document = {"dnsPolicy": "None", "dnsConfig": {"nameservers": [address]}}
    kinds: dict[str, Document] = {"asks": {}, "asks-direct": {"notes": DIRECT}, "asks-bridged": {"graft": False}}
    cluster.start(*(pod(name, idle(), **kind, **resolved) for name, kind in kinds.items()))
    dig = ("dig", "+short", "+tries=1", f"@{address}", "web.lab")
    wait_for(lambda: host.host(*dig).stdout == "192.0.2.7\n", "the Service")
    for name in kinds:
        assert cluster.exec(name, "getent", "ahostsv4", "web.lab").split()[0] == "192.0.2.7", name
        for more in ("+notcp", "+tcp"):
            assert cluster.exec(name, *dig, more) == "192.0.2.7\n", (name, more)


def test_an_endpoint_ends(cluster, host, served):
    """Who asks again by the connected socket that it has is answered by another endpoint."""
    for place in ("asks", "asks-direct"):
        command = cluster.command("exec", place, "--", *python(FOLLOW), served["clusterIP"])
        process = host.spawn(*command, stdout=subprocess.PIPE)
        first = process.stdout.readline().strip()
        cluster.kubectl("delete", "pod", first, "--wait=false")
        second = process.stdout.readline().strip()
        assert process.wait(20) == 0
        assert {first, second} < {"a", "b", "c"}, place
