"""Kubernetes' way in: containerd's CRI, a runtime handler, a CNI plugin."""

import contextlib
import json
import re
import subprocess

import grpc
import pytest

from graft.bench.lab import CLIENT4, GRAFTD, HOST4, wait_for
from tests.conftest import need, python
from tests.system.cri import Containerd, cni
from tests.system.engines import CURL, reach
from tests.system.outside import CALLS, NONAME, greeting

WRITE = ("-o", "/dev/null", "-w", "%{http_code} %{local_ip} %{remote_ip}")
SERVER = ("/usr/bin/python3", "-m", "http.server", "80")


@pytest.fixture(scope="module")
def containerd(host):
    need("containerd", "ctr", "runc", "busybox", "containerd-shim-runc-v2")
    host.config.write_text('[pods]\nannotations = ["graft.publish", "graft.endpoint.ep-pod"]\n')
    host.graft("endpoint", "add", "ep-pod", "type", "ipv4", "addr", HOST4, "port", "8910", check=True)
    engine = Containerd(host, host.work / "containerd")
    try:
        yield engine
    finally:
        engine.stop()
        host.graft("endpoint", "del", "ep-pod")


def listening(host, ip, port=80):
    wait_for(lambda: host.host(*CURL, f"http://{ip}:{port}/").returncode == 0, f"{ip}:{port}")


def test_two_pods_on_port_80(containerd, host):
    one, two = containerd.pod("one"), containerd.pod("two", ports=[{"container_port": 80, "host_port": 8901}])
    first, second = one.container("main", *SERVER), two.container("main", *SERVER)
    side = one.container("side", "/busybox", "sleep", "100")
    listening(host, one.ip)
    host.wait_listening(8901)
    assert one.exec(first, *CURL, *WRITE, f"http://{two.ip}/") == f"200 {one.ip} {two.ip}"
    assert two.exec(second, *CURL, *WRITE, f"http://{one.ip}/") == f"200 {two.ip} {one.ip}"
    assert one.exec(side, *CURL, *WRITE, "http://127.0.0.1/").startswith("200")  # containers of a pod share localhost
    devices = one.exec(side, "/busybox", "ip", "-o", "link").splitlines()
    assert {line.split()[1].partition("@")[0].rstrip(":") for line in devices} - {"graft-peer"} == {"lo", "eth0"}
    assert "Directory listing" in reach(host, 8901)
    log = containerd.root / "log/two-main.log"  # which containerd writes in its own time
    wait_for(lambda: "10.77.0.2 - -" in log.read_text(), "the line of the log")
    assert host.host(*CURL, *WRITE, f"http://{one.ip}/").stdout.startswith("200")
    with pytest.raises(grpc.RpcError, match="host port is published by container 'default_two'"):
        containerd.pod("three", ports=[{"container_port": 80, "host_port": 8901}])
    ip = one.ip
    one.remove()
    two.remove()
    wait_for(lambda: not host.containers(), "their end")
    assert f"inet {ip}/" not in host.host("ip", "address").stdout


def test_port_forward(containerd, host):
    """As kubectl port-forward asks for it: the servers of both containers of the pod, and a port where none is."""
    code = """import socket, sys
sock, kept = socket.create_server(("127.0.0.1", int(sys.argv[1]))), []
while True:
    kept.append(sock.accept()[0])
    kept[-1].sendall(kept[-1].recv(99) + sys.argv[1].encode())
"""
    pod = containerd.pod("forward")
    for name, port in (("main", "80"), ("side", "81")):
        pod.container(name, *python(code), port)
    (row,) = [one for one in json.loads(host.graft("ps", "-j", check=True).stdout) if one["name"] == "default_forward"]
    inside = ("nsenter", "-t", row["pid"], "-n", "bash", "-c")
    wait_for(lambda: not host.host(*inside, ": >/dev/tcp/127.0.0.1/80 && : >/dev/tcp/127.0.0.1/81").returncode, "both servers")
    for number in (80, 81):
        forwarded = pod.port_forward(number)
        forwarded.send(b"asked at ")
        assert forwarded.receive() == (0, b"asked at %d" % number)
        forwarded.close()
    channel, text = pod.port_forward(82).receive()
    assert channel == 1
    assert b"127.0.0.1:82: connect: connection refused" in text
    pod.remove()
    wait_for(lambda: not host.containers(), "its end")


def test_annotations(containerd, host):
    settings = {"graft_endpoint_ep-pod": "80", "graft_egress": "none", "graft_publish": "8902:81"}
    pod = containerd.pod("noted", **settings)
    container = pod.container("main", *SERVER)
    host.wait_listening(8910)
    shown = json.loads(host.graft("inspect", "default_noted").stdout)
    assert shown["publish"] == ["8902:81/tcp"]
    assert shown["rules"]["egress_default"] == "none"
    code = "import socket\ntry: socket.create_connection(('10.77.0.2', 9), 5)\nexcept OSError as e: print(e.errno)"
    assert pod.exec(container, *python(code)) == "101\n"
    pod.remove()
    refused(containerd, "annotation 'graft.publish=x': publication 'x' names one port", graft_publish="x")


@contextlib.contextmanager
def configured(host, text):
    """graftd with another configuration, and afterwards with the one from before."""
    before = host.config.read_text()
    try:
        host.config.write_text(text)
        host.host(GRAFTD, "--replace", check=True)
        yield
    finally:
        host.config.write_text(before)
        host.host(GRAFTD, "--replace", check=True)


def refused(containerd, message, **annotations):
    """A pod that is not created, with this line as its event."""
    with pytest.raises(grpc.RpcError, match=re.escape(message)):
        containerd.pod("bad", **annotations)


def test_annotations_take_nothing(containerd, host):
    """Without the administrator's word: one line, which says where that goes."""
    with configured(host, ""):
        for key, value in (
            ("graft_publish", "8903:80"),
            ("graft_endpoint_ep-pod", "80"),
            ("graft_egress", "none,10.0.0.0/8=ep-pod"),
            ("graft_ip", "169.254.169.254"),
            ("graft_resolver", "127.0.0.53"),
            ("graft_netadmin", "on"),
            ("graft_limit", "sockets=100000"),
        ):
            label = key.replace("_", ".")
            refused(
                containerd,
                f"annotation '{label}={value}': pods may not use {label} on this node "
                f'({host.config}, [pods], annotations = ["{label}"] allows it)',
                **{key: value},
            )
        pod = containerd.pod("modest", graft_egress="none", graft_family="on", graft_limit="sockets=100")
        wait_for(lambda: "default_modest" in host.containers(), "the pod")
        assert json.loads(host.graft("inspect", "default_modest").stdout)["limits"]["sockets"]["max"] == 100
        pod.remove()


ASK = """
import errno, socket
def ask(kind, where, connected=True):
    sock = socket.socket(socket.AF_INET, kind)
    sock.settimeout(10)
    try:
        if connected:
            sock.connect(where)
            sock.send(b'name?')
        else:
            sock.sendto(b'name?', where)
        return sock.recv(99).decode()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
told = [
    ask(kind, where)
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)
    for where in (('10.77.0.2', 53), ('10.77.0.2', 54), ('10.77.0.1', 53))
]
print(*told, ask(socket.SOCK_DGRAM, ('10.77.0.2', 53), connected=False))
"""
ANSWER = """
import socket, threading
def answer_udp(port):
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(('', port))
    while True:
        udp.sendto(b'udp', udp.recvfrom(99)[1])
def answer_tcp(port):
    tcp = socket.create_server(('', port))
    while True:
        tcp.accept()[0].send(b'tcp')
for port in (53, 54):
    for answer in (answer_udp, answer_tcp):
        threading.Thread(target=answer, args=(port,)).start()
"""


def test_names_without_egress(containerd, host):
    """Whom the administrator says, at port 53; also when that changes. `graft run` is no pod."""
    server = host.spawn(*python(ANSWER), client=True)
    wait_for(lambda: host.client("ss", "-tlnH", "sport = :54").stdout, "the server")
    refused = "ENETUNREACH"
    with configured(host, '[pods]\nresolvers = ["10.77.0.2", "10.96.0.10"]\n'):
        pod = containerd.pod("asks", graft_egress="none")
        container = pod.container("main", "/busybox", "sleep", "100")
        told = ["udp", refused, refused, "tcp", refused, refused, "udp"]
        assert pod.exec(container, *python(ASK)).split() == told
        assert host.graft("run", "--egress", "none", *python(ASK)).stdout.split() == [refused] * 7
        doctor = host.graft("doctor").stdout
        assert "pods: nothing that takes, names of 10.77.0.2, 10.96.0.10 without egress; addresses" in doctor
    assert pod.exec(container, *python(ASK)).split() == [refused] * 7
    pod.remove()
    host.end(server)


def test_whom_the_pod_names(containerd, host):
    """The nameservers of its dnsConfig are whom graft's resolver asks for it, but not by a pod without egress."""
    for outside in greeting(host, HOST4):
        for settings in ({"graft_names": "on"}, {"graft_allow": "www.test:8000"}):
            pod = containerd.pod("names", servers=(HOST4,), **settings)
            container = pod.container("main", "/busybox", "sleep", "100")
            told = pod.exec(container, *python(CALLS), "www.test:8000", "evil.test:80").splitlines()
            assert told == [f"www.test:8000 {CLIENT4}", f"evil.test:80 {NONAME}"]
            pod.remove()
        asked = len(outside.queries())
        pod = containerd.pod("names", servers=(HOST4,), graft_names="on", graft_egress="none")
        container = pod.container("main", "/busybox", "sleep", "100")
        assert pod.exec(container, *python(CALLS), "www.test:8000") == f"www.test:8000 {NONAME}\n"
        assert len(outside.queries()) == asked
        pod.remove()


def test_ports_of_the_node(containerd, host):
    """Also while kubelet is being restarted, and nobody has them."""
    says = "-p 10250:80/tcp: port 10250 is the node's, not a pod's"
    hint = f"publish another host port; {host.config}, reserved_ports and reserve_listening, say which are"
    with pytest.raises(grpc.RpcError, match=re.escape(f"{says}; {hint}")):  # as containerd puts a plugin's details
        containerd.pod("greedy", ports=[{"container_port": 80, "host_port": 10250}])
    refused(containerd, f"{says} ({hint})", graft_publish="10250:80")


def gone(host, address):
    wait_for(lambda: f"inet {address}/" not in host.host("ip", "address").stdout, f"the end of {address}")


def test_an_address_by_annotation(containerd, host):
    """Of the pod's own network, or of the administrator's ranges; the metadata service's is neither."""
    with configured(host, 'addresses = ["10.99.0.0/30"]\n[pods]\nannotations = ["graft.ip"]\n'):
        for address in ("169.254.169.254", "8.8.8.8", "10.97.0.5"):
            refused(
                containerd,
                f"annotation 'graft.ip={address}': not in the container's network (10.96.0.0/24) "
                f'(take one of it; or {host.config}, addresses = ["{address}"] allows it)',
                graft_ip=address,
            )
        refused(containerd, "the gateway's or a broadcast address of 10.96.0.0/24", graft_ip="10.96.0.1")
        refused(containerd, f"{HOST4}': not in the container's network", graft_ip=HOST4)
        neighbour = containerd.pod("neighbour")
        refused(containerd, f"{neighbour.ip} is the address of container 'default_neighbour'", graft_ip=neighbour.ip)
        for address in ("10.96.0.200", "10.99.0.2"):
            pod = containerd.pod("placed", graft_ip=address)
            wait_for(lambda: "default_placed" in host.containers(), "the pod")  # runc waits for no answer of graftd's
            assert f"inet {address}/32" in host.host("ip", "address", "show", "lo").stdout
            pod.remove()
            gone(host, address)
        neighbour.remove()


def test_the_plugin_alone(host, tmp_path):
    """The specification's commands, by hand: chained, alone, twice, with bad input."""
    names = (f"{host.tag}-c1", f"{host.tag}-c2")
    for name in names:
        subprocess.run(("ip", "netns", "add", name), check=True)
    path, other = (f"/run/netns/{name}" for name in names)
    ipam = {"type": "host-local", "subnet": "10.98.0.0/24", "dataDir": str(tmp_path)}
    config = {"cniVersion": "1.0.0", "name": "n", "type": "graft-cni", "ipam": ipam}
    ports = {"runtimeConfig": {"portMappings": [{"hostPort": 8920, "containerPort": 80, "protocol": "tcp"}]}}
    try:
        status, told = cni(host, "VERSION", {"cniVersion": "1.0.0"})
        assert (status, told["supportedVersions"][-1]) == (0, "1.0.0")
        status, added = cni(host, "ADD", config | ports, CNI_NETNS=path)
        assert (status, added["ips"][0]["address"], added["cniVersion"]) == (0, "10.98.0.2/24", "1.0.0")
        assert cni(host, "CHECK", config | {"prevResult": added}, CNI_NETNS=path) == (0, None)
        again = cni(host, "ADD", config | ports, CNI_NETNS=other, CNI_CONTAINERID="def")
        assert again[0] == 1
        assert "host port is published by container" in again[1]["msg"]
        host.host("ip", "address", "del", "10.98.0.2/32", "dev", "lo", check=True)
        status, told = cni(host, "CHECK", config | {"prevResult": added}, CNI_NETNS=path)
        assert (status, told["msg"]) == (1, "graft: 10.98.0.2/24: no longer an address of this container")
        for netns in (path, ""):
            assert cni(host, "DEL", config | {"prevResult": added}, CNI_NETNS=netns) == (0, None)
        status, told = cni(host, "CHECK", config | {"prevResult": added}, CNI_NETNS=path)
        assert (status, told["msg"].split(":")[1]) == (1, " host-local")
        status, told = cni(host, "CHECK", {k: v for k, v in config.items() if k != "ipam"} | {"prevResult": added})
        assert (status, told["msg"]) == (1, "graft: the container is not attached")

        plain = {"cniVersion": "0.4.0", "name": "n", "type": "graft-cni"}
        before = {"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.98.0.9/24"}]}
        status, chained = cni(host, "ADD", plain | {"prevResult": before}, CNI_NETNS=path)
        assert (status, chained["ips"][0]["address"]) == (0, "10.98.0.9/24")
        assert "inet 10.98.0.9/32" in host.host("ip", "address").stdout
        assert cni(host, "CHECK", plain | {"prevResult": chained}, CNI_NETNS=path) == (0, None)
        host.host("ip", "address", "del", "10.98.0.9/32", "dev", "lo", check=True)
        status, told = cni(host, "CHECK", plain | {"prevResult": chained}, CNI_NETNS=path)
        assert (status, told["msg"]) == (1, "graft: 10.98.0.9: no longer an address of this container")
        assert cni(host, "DEL", plain, CNI_NETNS="")[0] == 0
        inside = before | {"interfaces": [{"name": "eth0", "sandbox": path}]}
        status, chained = cni(host, "ADD", plain | {"prevResult": inside}, CNI_NETNS=path)
        assert (status, chained["interfaces"]) == (0, inside["interfaces"])
        assert "10.98.0.9" not in host.host("ip", "address").stdout
        assert cni(host, "DEL", plain, CNI_NETNS="")[0] == 0

        for arguments, code, message in (
            (("ADD", "{"), 6, "the network configuration is not JSON"),
            (("ADD", {"cniVersion": "9.9", "name": "n"}), 1, "cniVersion '9.9' is unknown"),
            (("ADD", {"cniVersion": "1.0.0"}), 7, "the configuration has no name"),
            (("ADD", config), 4, "CNI_NETNS is not set"),
            (("NO", config), 4, "CNI_COMMAND 'NO' is unknown"),
            (("CHECK", config), 7, "CHECK without prevResult"),
            (("ADD", config | {"ipam": {"type": "nosuch"}}), 7, "IPAM plugin 'nosuch' is not in CNI_PATH"),
        ):
            given = {"CNI_NETNS": path} if "nosuch" in str(arguments) else {}
            status, told = cni(host, *arguments, **given)
            assert (status, told["code"], told["msg"]) == (1, code, f"graft: {message}")
        status, told = cni(host, "ADD", config, CNI_NETNS=path, GRAFT_RUN_DIR=str(tmp_path))
        assert (status, told["code"], told["msg"]) == (1, 11, "graft: graftd is not running")
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "del", name), check=True)
