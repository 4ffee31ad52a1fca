"""Thirty pods at once, of graft and of the bridge, and how long each kind takes until all are ready."""

import json
import statistics
import time

from graft.bench.lab import wait_for
from tests.kubernetes.cluster import is_ready, pod, web

COUNT = 30
ROUNDS = 2


def seconds(cluster, *, graft):
    """From their creation until all are ready."""
    pods = [pod(f"{'graft' if graft else 'bridge'}-{n}", web(), labels={"many": "yes"}, graft=graft) for n in range(COUNT)]
    began = time.monotonic()
    cluster.apply(*pods)
    wait_for(lambda: sum(map(is_ready, cluster.pods("many=yes"))) == COUNT, "all pods", 120)
    took = time.monotonic() - began
    cluster.clear()
    return took


def test_thirty_pods_at_once(cluster, host, record_property):
    """In turn, so that both kinds find the same machine; the bound is that of a machine with other work."""
    taken = [(seconds(cluster, graft=True), seconds(cluster, graft=False)) for _ in range(ROUNDS)]
    ratio = statistics.median(ours / theirs for ours, theirs in taken)
    print(f"{COUNT} pods: {taken} s, {ratio:.2f} times the bridge's")
    record_property("ratio", ratio)
    wait_for(lambda: json.loads(host.graft("ps", "-j").stdout) == [], "the end of all")
    assert ratio < 2
