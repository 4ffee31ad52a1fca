"""contrib/kubernetes: what this API server knows of it, it takes. tests/unit/engines/test_admission_policy.py: the rest."""

import pytest

from graft.bench.lab import ROOT, wait_for
from tests.kubernetes.cluster import idle, pod

PLACE = ROOT / "contrib/kubernetes"


@pytest.mark.parametrize("name", ["runtimeclass.yaml", "daemonset.yaml"])
def test_the_server_takes_it(cluster, name):
    told = cluster.kubectl("apply", "--dry-run=server", "--validate=true", "-f", PLACE / name)
    assert "(server dry run)" in told.stdout


def test_the_runtime_class(cluster):
    """A pod gets its overhead, and waits for a node that has the label."""
    cluster.kubectl("delete", "runtimeclass", "graft")
    cluster.kubectl("apply", "-f", PLACE / "runtimeclass.yaml")
    try:
        cluster.apply(pod("counted", idle()))
        text = "node(s) didn't match Pod's node affinity"
        wait_for(lambda: text in cluster.events("counted"), "its event", 20)
        cluster.kubectl("label", "node", "node", "graft=on")
        cluster.wait_ready("counted", timeout=60)
        assert cluster.get("pod", "counted")["spec"]["overhead"] == {"memory": "1Mi"}
    finally:
        cluster.kubectl("label", "node", "node", "graft-")
        cluster.delete("pod", "counted")
        cluster.kubectl("delete", "runtimeclass", "graft")
        cluster.start_class()
