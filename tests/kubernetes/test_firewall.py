"""What the node's firewall sees of graft's pods, which is what a NetworkPolicy can be made of (docs/kubernetes.md)."""

import contextlib
import json

from graft.bench.lab import CLIENT4, wait_for
from tests.conftest import python
from tests.kubernetes.cluster import idle, pod, web
from tests.kubernetes.test_pods import tried
from tests.system.engines import CURL

REJECT = ("-j", "REJECT", "--reject-with", "tcp-reset")
LISTEN = "import socket; s = socket.create_server(('', 9100))\nwhile True: s.accept()[0].close()"


@contextlib.contextmanager
def rule(host, chain, *match):
    host.host("iptables", "-I", chain, "-p", "tcp", *match, *REJECT, check=True)
    try:
        yield
    finally:
        host.host("iptables", "-D", chain, "-p", "tcp", *match, *REJECT, check=True)


def test_who_comes_in(cluster, host):
    """By the pod's address, in INPUT: from another machine, and from another pod by that pod's address."""
    at = cluster.start(pod("server", web()), pod("asks", idle()), pod("other", idle()))
    url = f"http://{at['server']}/"
    with rule(host, "INPUT", "-d", at["server"], "-s", CLIENT4):
        assert host.client(*CURL, url).returncode == 7
        assert cluster.exec("asks", *CURL, url).startswith("server")
    with rule(host, "INPUT", "-d", at["server"], "-s", at["asks"]):
        assert cluster.exec("asks", *tried(at["server"], 80)).strip() == "ECONNREFUSED"
        assert cluster.exec("other", *CURL, url).startswith("server")
        assert host.client(*CURL, url).stdout == f"server {CLIENT4}"
    with rule(host, "FORWARD", "-d", at["server"]):  # where a bridge's pods are seen
        assert host.client(*CURL, url).stdout == f"server {CLIENT4}"


def test_who_goes_out(cluster, host):
    """Connections leave from the node's address. Their owner is a uid that all pods of graft share, and nobody else has."""
    cluster.start(pod("held", idle()), pod("other", idle()))
    host.spawn(*python(LISTEN), client=True)
    wait_for(lambda: host.client("ss", "-tlnH", "sport = :9100").stdout, "the server")
    uid = json.loads(host.graft("inspect", "default_held").stdout)["uid"]
    with rule(host, "OUTPUT", "-d", CLIENT4, "-m", "owner", "--uid-owner", str(uid)):
        assert cluster.exec("held", *tried(CLIENT4, 9100)).strip() == "ECONNREFUSED"
        assert cluster.exec("other", *tried(CLIENT4, 9100)).strip() == "ECONNREFUSED"
        assert host.host(*tried(CLIENT4, 9100)).stdout.strip() == "connected None"
    assert cluster.exec("held", *tried(CLIENT4, 9100)).strip() == "connected None"
