"""What a pod's author sees: pods of graft by kubelet, beside pods of the bridge."""

import json
import subprocess

import pytest

from graft.bench.lab import CLIENT4, HOST4, wait_for
from tests.kubernetes.cluster import container, idle, is_ready, pod, restarts, service, web
from tests.system.engines import CURL

FETCH = CURL
TRY = """
import errno, socket, sys
sock = socket.socket()
sock.settimeout(5)
try: print('connected', sock.connect((sys.argv[1], int(sys.argv[2]))))
except OSError as error: print(errno.errorcode.get(error.errno, error))
"""


def tried(address, port):
    """A command that tells what connect() says."""
    return ("/usr/bin/python3", "-I", "-c", TRY, address, str(port))


def everywhere(cluster, host, address, port, pods):
    """What connect() says on the node, on another machine, and in pods, by the place."""
    told = {"node": host.host(*tried(address, port)).stdout, "client": host.client(*tried(address, port)).stdout}
    told |= {name: cluster.exec(name, *tried(address, port)) for name in pods}
    return {place: text.strip() for place, text in told.items()}


def test_a_pod_on_one_port(cluster, host):
    """It is reached at its address from wherever a pod is reached, and beside it pods that have the same port."""
    pods = (pod("one", web(), idle()), pod("two", web(), idle()), pod("bridged", web(), idle(), graft=False))
    at = cluster.start(*pods)
    for name in ("one", "two"):
        url = f"http://{at[name]}/"
        assert host.host(*CURL, url).stdout.split()[0] == name
        assert host.client(*CURL, url).stdout == f"{name} {CLIENT4}"
        for asking in at:
            told = cluster.exec(asking, *FETCH, url, container="idle").split()
            assert told == [name, at[asking]], asking
    for asking in ("one", "two"):
        assert cluster.exec(asking, *FETCH, f"http://{at['bridged']}/", container="idle").split()[0] == "bridged"
    devices = cluster.exec("one", "/busybox", "ip", "-o", "address", container="idle")
    assert f"inet {at['one']}/" in devices


def test_one_supervisor_for_each_container(cluster, host):
    """A pod's pause container has none, because it makes no call."""
    cluster.start(pod("single", web()), pod("double", web(), idle()))
    wait_for(lambda: len(host.helper_pids()) == 3, "three graft-sup for three containers")


def test_probes(cluster, host):
    """Of all three kinds; when one fails, the pod is not ready, or is started again."""
    command = {"exec": {"command": [*FETCH, "-f", "http://127.0.0.1:80/"]}, "periodSeconds": 1, "timeoutSeconds": 5}
    tcp = {"tcpSocket": {"port": 81}, "periodSeconds": 1}
    pods = (
        pod("probed", web(readinessProbe=command), web("second", 81, readinessProbe=tcp), web("third", 82)),
        pod("lively", web(livenessProbe={**command, "failureThreshold": 1}, readinessProbe=tcp | {"tcpSocket": {"port": 80}})),
        pod("deaf", idle() | {"readinessProbe": tcp}),
    )
    cluster.apply(*pods)
    at = cluster.wait_ready("probed", "lively")
    assert host.host(*CURL, f"http://{at['probed']}:82/off").returncode == 0
    wait_for(lambda: not is_ready(cluster.get("pod", "probed")), "a probe that fails", 20)
    assert host.host(*CURL, f"http://{at['lively']}/off").returncode == 0
    wait_for(lambda: restarts(cluster.get("pod", "lively")) == 1, "its start", 20)
    cluster.wait_ready("lively")
    assert not is_ready(cluster.get("pod", "deaf"))
    assert f"dial tcp {cluster.get('pod', 'deaf')['status']['podIP']}:81: connect: connection refused" in cluster.events("deaf")


def test_exec_cp_and_port_forward(cluster, host):
    at = cluster.start(pod("web", web()))
    assert cluster.exec("web", "/busybox", "hostname") == "web\n"
    assert cluster.kubectl("exec", "web", "--", "/busybox", "false", check=False).returncode == 1
    file = host.work / "copied"
    file.write_text("text\n" * 10000)
    cluster.kubectl("cp", file, "web:/tmp/copied")
    cluster.kubectl("cp", "web:/tmp/copied", host.work / "back")
    assert (host.work / "back").read_text() == file.read_text()
    process = host.spawn(*cluster.command("port-forward", "pod/web", ":80", ":81"), stdout=subprocess.PIPE)
    ports = [process.stdout.readline().split()[2].rpartition(":")[2] for _ in range(4)][::2]
    for _ in range(3):
        assert host.host(*CURL, f"http://127.0.0.1:{ports[0]}/").stdout == "web 127.0.0.1"
    assert host.host(*CURL, f"http://127.0.0.1:{ports[1]}/").returncode in (52, 56)  # where none listens
    host.end(process)
    assert at


def test_host_ports(cluster, host):
    """One that is the container's, another one, and one that is taken, which the pod's event says."""
    ports = [{"containerPort": 80, "hostPort": 8080}]
    cluster.start(pod("mapped", web(ports=ports)), pod("same", web(port=8081, ports=[{"containerPort": 8081, "hostPort": 8081}])))
    assert host.client(*CURL, f"http://{HOST4}:8080/").stdout == f"mapped {CLIENT4}"
    assert host.client(*CURL, f"http://{HOST4}:8081/").stdout == f"same {CLIENT4}"
    assert everywhere(cluster, host, HOST4, 80, []) == {"node": "ECONNREFUSED", "client": "ECONNREFUSED"}
    cluster.apply(pod("bare", web(), notes={"graft.publish": "8080:80"}))
    text = "host port is published by container 'default_mapped'"
    wait_for(lambda: text in cluster.events("bare"), "its event", 20)
    cluster.delete("pod", "mapped")
    cluster.wait_ready("bare", timeout=60)
    assert host.client(*CURL, f"http://{HOST4}:8080/").stdout == f"bare {CLIENT4}"


def test_a_host_port_behind_a_service(cluster, host):
    """The endpoint of a Service is the pod's address and the container's port, whatever port of the node it has."""
    at = cluster.start(pod("mapped", web(port=8000, ports=[{"containerPort": 8000, "hostPort": 8090}])), pod("asks", idle()))
    address = cluster.serve(service("mapped", 80, 8000))["clusterIP"]
    wait_for(lambda: host.host(*CURL, f"http://{address}/").returncode == 0, "the Service")
    assert cluster.exec("asks", *FETCH, f"http://{address}/") == f"mapped {HOST4}"  # outside of the pods' network
    assert host.client(*CURL, f"http://{HOST4}:8090/").stdout == f"mapped {CLIENT4}"
    assert host.client(*CURL, f"http://{at['mapped']}:8000/").stdout == f"mapped {CLIENT4}"
    refused = everywhere(cluster, host, at["mapped"], 8090, ["asks"])
    assert set(refused.values()) == {"ECONNREFUSED"}, refused


def test_where_a_pod_does_not_listen(cluster, host):
    """It refuses, and no other pod answers, nor the node."""
    pods = (
        pod("listens", web(), idle(), notes={"graft.publish": "8095:80"}),
        pod("quiet", idle()),
        pod("bridged", idle(), graft=False),
    )
    at = cluster.start(*pods)
    for port in (80, 8095, 10250, 22):
        told = everywhere(cluster, host, at["quiet"], port, ["listens", "quiet", "bridged"])
        assert set(told.values()) == {"ECONNREFUSED"}, (port, told)
    assert everywhere(cluster, host, at["listens"], 81, ["quiet"])["quiet"] == "ECONNREFUSED"


def test_containers_of_one_pod(cluster, host):
    """An init container has the network, and what listens at localhost is there for the pod's other containers alone."""
    at = cluster.start(pod("first", web()))
    init = container("init", [*FETCH, f"http://{at['first']}/"])
    local = web(port=8000)
    local["command"].append("127.0.0.1")
    probe = {"exec": {"command": [*FETCH, "http://127.0.0.1:8000/"]}, "timeoutSeconds": 5}
    side = idle("side")
    at |= cluster.start(pod("several", local | {"readinessProbe": probe}, side, initContainers=[init]), pod("other", idle()))
    assert cluster.kubectl("logs", "several", "-c", "init").stdout == f"first {at['several']}"
    assert cluster.exec("several", *FETCH, "http://localhost:8000/", container="side") == "several 127.0.0.1"
    told = everywhere(cluster, host, at["several"], 8000, ["other"])
    assert set(told.values()) == {"ECONNREFUSED"}, told
    assert cluster.exec("other", *tried("127.0.0.1", 8000)).strip() == "ECONNREFUSED"


def test_annotations(cluster, host):
    """What the administrator allows, what anybody may, and what is refused: the event says why."""
    at = cluster.start(pod("closed", web(), notes={"graft.egress": "none"}), pod("open", web(), idle()))
    assert cluster.exec("closed", *tried(CLIENT4, 9)).strip() == "ENETUNREACH"
    assert cluster.exec("open", *tried(CLIENT4, 9), container="idle").strip() == "ECONNREFUSED"
    assert cluster.exec("closed", *FETCH, f"http://{at['open']}/") == f"open {at['closed']}"
    cluster.apply(pod("bad", idle(), notes={"graft.ip": "169.254.169.254"}))
    text = "annotation 'graft.ip=169.254.169.254': pods may not use graft.ip on this node"
    wait_for(lambda: text in cluster.events("bad"), "its event", 20)
    assert json.loads(host.graft("inspect", "default_closed").stdout)["rules"]["egress_default"] == "none"


def test_the_nodes_network(cluster):
    """A pod that has it is told what its author does."""
    cluster.apply(pod("node", idle(), hostNetwork=True))
    text = "the pod has hostNetwork: true, so that it is in the node's network namespace already (omit runtimeClassName: graft"
    wait_for(lambda: text in cluster.events("node"), "its event", 20)


@pytest.mark.parametrize("graft", [True, False])
def test_neither_kind_is_in_the_others_way(cluster, host, graft):
    """The last pod of a kind ends, and those of the other serve on."""
    at = cluster.start(pod("one", web()), pod("bridged", web(), graft=False))
    gone, left = ("one", "bridged") if graft else ("bridged", "one")
    cluster.delete("pod", gone)
    assert host.client(*CURL, f"http://{at[left]}/").stdout == f"{left} {CLIENT4}"
    assert "connected" not in host.client(*tried(at[gone], 80)).stdout
