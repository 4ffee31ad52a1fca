"""contrib/kubernetes: what this API server knows of it, it takes, and the rest says what graft itself says."""

import json
import re

import pytest

from graft.bench.lab import ROOT, wait_for
from graft.engines import trust
from graft.engines.container import POLICY, Container
from graft.errors import Refused
from graft.rules.configuration import Configuration
from graft.rules.limits import Limits
from graft.rules.request import LABELS
from tests.kubernetes.cluster import idle, pod

PLACE = ROOT / "contrib/kubernetes"
VALUES = {"egress": "10.0.0.0/8=x", "publish": "80:80", "limit": "sockets=1", "interface": "net0", "sysctl": "ignore"}


def documents(cluster, name):
    """The documents of a file, as kubectl reads them, whether or not the API server knows their kinds."""
    told = cluster.kubectl("label", "--local", "-f", PLACE / name, "a=b", "-o", "json").stdout
    found, at, decoder = [], 0, json.JSONDecoder()
    while at < len(told.rstrip()):
        one, at = decoder.raw_decode(told, at)
        found.append(one)
        at += len(told[at:]) - len(told[at:].lstrip())
    return found


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


def test_the_policy_says_what_graft_says(cluster):
    """Its list of annotations that take nothing is graft's, and it binds itself."""
    policy, binding = documents(cluster, "policy.yaml")
    variables = {one["name"]: one["expression"] for one in policy["spec"]["variables"]}
    told = set(re.findall(r"'graft\.(\w+)'", variables["harmless"]))

    def takes(key):
        container = Container("cri", "c", "c", {f"graft.{key}": VALUES.get(key, "on")})
        try:
            trust.check_believed(container, Configuration(), Limits(sockets=9, udp=9, ports=9), "")
        except Refused:
            return True
        return False

    assert told == {key for key in (*LABELS, POLICY, "family", "netadmin") if key not in ("ip", "resolver", "ingress") and not takes(key)}
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
