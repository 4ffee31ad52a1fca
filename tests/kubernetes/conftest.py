"""One cluster for all files, and the laboratory in which it is."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.bench.lab import CLIENT4, HOST4, Lab, laboratory, wait_for
from tests.conftest import lack, need, need_root
from tests.kubernetes.cluster import BACK_ENDS, Cluster
from tests.kubernetes.node import PODS


@pytest.fixture(scope="session")
def host() -> Iterator[Lab]:
    """The node's laboratory. Its client knows the way to the pods, as any machine of a routed network does."""
    need_root()
    with laboratory("kube") as one:
        one.client("ip", "route", "add", PODS, "via", HOST4, "src", CLIENT4, check=True)
        one.host("ip", "route", "add", "default", "via", CLIENT4, check=True)  # as a node has one
        one.config.write_text('[pods]\nannotations = ["graft.publish", "graft.direct"]\n')
        one.start_daemon()
        yield one


def programs() -> Path:
    """Where Kubernetes' programs are, if there is everything that a cluster needs."""
    place = os.environ.get("GRAFT_KUBERNETES")
    if not place:
        lack("there is no Kubernetes here (make test-kubernetes builds one)")
    need("etcd", "containerd", "ctr", "runc", "busybox", "containerd-shim-runc-v2", "iptables", "conntrack", "openssl")
    return Path(str(place))


@pytest.fixture(scope="session")
def cluster(host: Lab) -> Iterator[Cluster]:
    """etcd, the control plane, a node."""
    one = Cluster(host, programs())
    try:
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="module", params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """The one that kube-proxy's iptables has; its rules are there, and none of the other's."""
    chosen = str(request.param)
    if cluster.back_end != chosen:
        cluster.start_proxy(chosen)
    other = next(name for name in BACK_ENDS if name != chosen)
    wait_for(lambda: "KUBE-SVC" in cluster.rules(chosen, "nat"), "kube-proxy's rules", 30)
    assert "KUBE-SVC" not in cluster.rules(other, "nat")
    return chosen


@pytest.fixture(autouse=True)
def _no_pod_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        one: Cluster = request.getfixturevalue("cluster")
        one.clear()
