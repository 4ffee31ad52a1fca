"""Services of kube-proxy, by both back ends of iptables, with endpoints that are pods of graft."""

import subprocess
import time

import pytest

from graft.bench.lab import HOST4, wait_for
from tests.conftest import python
from tests.kubernetes.cluster import DIRECT, idle, is_ready, pod, pod_spec, service, web
from tests.system.engines import CURL

pytestmark = pytest.mark.usefixtures("back_end")
ASK = """
import collections, sys, urllib.request
told = collections.Counter()
for _ in range(int(sys.argv[2])):
    with urllib.request.urlopen(sys.argv[1], timeout=10) as answer: told[answer.read().split()[0].decode()] += 1
print(*(f'{name}={count}' for name, count in sorted(told.items())))
"""
# Asks without a pause, each time by a new connection, until the standard input ends
LOAD = """
import collections, select, sys, urllib.request
told, failed = collections.Counter(), []
while not select.select([sys.stdin], [], [], .01)[0]:
    try:
        with urllib.request.urlopen(sys.argv[1], timeout=10) as answer: told[answer.read().split()[0].decode()] += 1
    except OSError as error: failed.append(str(error))
print(len(told), sum(told.values()), *failed, sep='\\n')
"""


def names(text):
    """The pods that answered."""
    return {item.partition("=")[0] for item in text.split()}


def places(cluster, host):
    """From where a Service is asked: the node, pods of both kinds, another machine."""
    return {
        "node": lambda *argv: host.host(*argv, check=True).stdout,
        "graft": lambda *argv: cluster.exec("asks", *argv),
        "direct": lambda *argv: cluster.exec("asks-direct", *argv),
        "bridge": lambda *argv: cluster.exec("asks-bridged", *argv),
        "client": lambda *argv: host.client(*argv, check=True).stdout,
    }


@pytest.fixture
def served(cluster, host):
    """A Service whose pods are two of graft, one of them direct, and one of the bridge, and pods that ask."""
    labels = {"app": "served"}
    cluster.start(
        pod("a", web(), labels=labels),
        pod("b", web(), labels=labels, notes=DIRECT),
        pod("c", web(), labels=labels, graft=False),
        pod("asks", idle()),
        pod("asks-direct", idle(), notes=DIRECT),
        pod("asks-bridged", idle(), graft=False),
    )
    found = cluster.serve(service("served", 80, 80, type="NodePort"))
    url = f"http://{found['clusterIP']}/"
    wait_for(lambda: names(host.host(*python(ASK), url, "20").stdout) == {"a", "b", "c"}, "all endpoints", 30)
    return found


def test_a_cluster_address(cluster, host, served):
    asked = places(cluster, host)
    for place in ("node", "graft", "direct", "bridge"):
        told = asked[place](*python(ASK), f"http://{served['clusterIP']}/", "40")
        assert names(told) == {"a", "b", "c"}, (place, told)


def test_a_node_port(cluster, host, served):
    asked = places(cluster, host)
    for place, ask in asked.items():
        told = ask(*python(ASK), f"http://{HOST4}:{served['ports'][0]['nodePort']}/", "40")
        assert names(told) == {"a", "b", "c"}, (place, told)


def test_affinity(cluster, host, served):
    cluster.serve(service("served", 80, 80, type="NodePort", sessionAffinity="ClientIP"))
    port = served["ports"][0]["nodePort"]
    wait_for(lambda: len(names(host.client(*python(ASK), f"http://{HOST4}:{port}/", "20").stdout)) == 1, "one endpoint", 20)
    for place, ask in places(cluster, host).items():
        at = f"http://{HOST4}:{port}/" if place == "client" else f"http://{served['clusterIP']}/"
        assert len(names(ask(*python(ASK), at, "30"))) == 1, place


def test_a_pod_that_asks_itself(cluster, host):
    """By the Service of which it is the only endpoint."""
    at = cluster.start(pod("alone", web(), idle()))
    address = cluster.serve(service("alone", 8088, 80))["clusterIP"]
    wait_for(lambda: host.host(*CURL, f"http://{address}:8088/").returncode == 0, "the Service")
    assert cluster.exec("alone", *CURL, f"http://{address}:8088/", container="idle").split()[0] == "alone"
    assert at


def test_without_endpoints(cluster, host, back_end):
    """A Service refuses that has no pod which is ready, and another pod's server at that port does not answer."""
    cluster.start(pod("other", web(port=80), idle()))
    cluster.apply(pod("unready", web(readinessProbe={"exec": {"command": ["/busybox", "false"]}})), service("unready", 80, 80))
    address = cluster.get("service", "unready")["spec"]["clusterIP"]
    wait_for(lambda: "has no endpoints" in cluster.rules(back_end, "filter"), "kube-proxy")
    for ask in (lambda *argv: cluster.exec("other", *argv, container="idle", check=False), lambda *argv: host.host(*argv).stdout):
        assert ask(*CURL, "-w", "%{http_code}", f"http://{address}/") == "000"


def deployment(name, replicas, version, *, graft=True):
    """Servers that a Service may take out before they end, as any that is to lose no request."""
    before = {"preStop": {"exec": {"command": ["/busybox", "sleep", "3"]}}}
    main = web(lifecycle=before, env=[{"name": "VERSION", "value": version}])
    template = {"metadata": {"labels": {"app": name}}, "spec": pod_spec(main, graft=graft, terminationGracePeriodSeconds=20)}
    spec = {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": template}
    strategy = {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": {**spec, "strategy": strategy}}


def test_a_rolling_update_under_load(cluster, host):
    """No request is lost, while each pod is replaced."""
    cluster.apply(deployment("rolls", 3, "one"), service("rolls", 80, 80, type="NodePort"))
    cluster.kubectl("rollout", "status", "deployment/rolls", "--timeout=90s", timeout=120)
    port = cluster.get("service", "rolls")["spec"]["ports"][0]["nodePort"]
    url = f"http://{HOST4}:{port}/"
    wait_for(lambda: host.client(*CURL, url).returncode == 0, "the Service")
    before = {one["metadata"]["name"] for one in cluster.pods("app=rolls")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    loads = [host.spawn(*python(LOAD), url, client=client, **pipes) for client in (True, True, False)]
    cluster.apply(deployment("rolls", 3, "two"))
    cluster.kubectl("rollout", "status", "deployment/rolls", "--timeout=120s", timeout=150)
    wait_for(lambda: len(cluster.pods("app=rolls")) == 3 and all(map(is_ready, cluster.pods("app=rolls"))), "new pods", 30)
    assert not before & {one["metadata"]["name"] for one in cluster.pods("app=rolls")}
    time.sleep(5)  # the last of the old ones ends
    for load in loads:
        answered, count, *failed = load.communicate("\n", timeout=30)[0].split("\n")[:-1]
        assert failed == []
        assert int(answered) > 3
        assert int(count) > 100
