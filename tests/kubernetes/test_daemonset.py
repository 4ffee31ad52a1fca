"""The DaemonSet of contrib/kubernetes on a whole node: it installs graft, and what runs does not depend on its pod."""

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.bench.lab import CLIENT4, HOST4, ROOT, SLOWNESS, Lab, laboratory, wait_for
from tests.conftest import need_root, python
from tests.kubernetes.cluster import Cluster, idle, pod, restarts, web
from tests.kubernetes.conftest import programs
from tests.kubernetes.machine import Machine
from tests.kubernetes.test_services import LOAD
from tests.system.cri import oci_archive
from tests.system.engines import CURL, image

PLACE = ROOT / "contrib/kubernetes"
IMAGE = "localhost/graft:1"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as Debian's images have it
PROGRAMS = ("bash", "sh", "cp", "nsenter", "sleep", "grep", "tail")  # what the DaemonSet's commands need of a Debian
SYSTEM = ("-n", "kube-system")


def graft_image(lab: Lab) -> Path:
    """An image as the DaemonSet wants it: of this machine's Debian, with graft in /stage."""
    stage, layer = lab.work / "stage", lab.work / "layer.tar"
    environment = {**os.environ, "DESTDIR": str(stage)}
    subprocess.run((ROOT / "scripts/install.sh",), env=environment, check=True, capture_output=True, timeout=200 * SLOWNESS)
    image(layer)
    files = {f"/usr/bin/{name}" for name in PROGRAMS}
    told = subprocess.run(("ldd", *files), capture_output=True, text=True, check=True).stdout
    files |= set(re.findall(r"(/lib\S+) \(", told))
    with tarfile.open(layer, "a", dereference=True) as archive:
        for name in sorted(files):
            archive.add(name, re.sub(r"^/lib", "usr/lib", name))
    with tarfile.open(layer, "a") as archive:
        archive.add(stage, "stage")
    oci_archive(layer, lab.work / "graft.tar", IMAGE, PATH)
    return lab.work / "graft.tar"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A node without graft, and its laboratory, of which no graftd runs."""
    need_root()
    with laboratory("node") as lab:
        lab.host("ip", "route", "add", "default", "via", CLIENT4, check=True)
        one = Machine(lab)
        image(lab.work / "host.tar")
        oci_archive(lab.work / "host.tar", lab.work / "oci.tar")
        try:
            one.load(lab.work / "oci.tar")
            one.load(graft_image(lab))
            yield one
        finally:
            one.stop()


@pytest.fixture(scope="module")
def nodes(machine: Machine) -> Iterator[Cluster]:
    """A cluster whose node is the machine, which has the DaemonSet, the RuntimeClass and its label."""
    one = Cluster(machine.lab, programs(), machine)
    try:
        yield one
    finally:
        one.stop()


def rolled_out(nodes: Cluster) -> str:
    """Wait until the DaemonSet's pod is ready; its name."""
    nodes.kubectl(*SYSTEM, "rollout", "status", "daemonset/graft", "--timeout=120s", timeout=150 * SLOWNESS)
    return str(nodes.get(*SYSTEM, "pods", "-l", "app=graft")["items"][0]["metadata"]["name"])


def test_the_daemonset(machine, nodes):
    """It installs graft; its pod is replaced, and deleted, and pods of graft serve on and are made anew."""
    lab = machine.lab
    assert machine.run("graft --version", check=False).returncode == 127
    nodes.kubectl("delete", "runtimeclass", "graft")
    nodes.kubectl("apply", "-f", PLACE / "runtimeclass.yaml")
    nodes.kubectl("label", "node", "node", "graft=on")
    ports = [{"containerPort": 80, "hostPort": 8080}]
    nodes.apply(pod("web", web(ports=ports), idle()))
    wait_for(lambda: 'no runtime for "graft" is configured' in nodes.events("web"), "what is told of a pod that comes early", 30)

    text = (PLACE / "daemonset.yaml").read_text()
    nodes.kubectl("apply", "-f", "-", input=text.replace("image: IMAGE", f"image: {IMAGE}"))
    wait_for(lambda: "'exitCode': 1," in str(nodes.get(*SYSTEM, "pods", "-l", "app=graft")), "the refusal without a subnet", 60)
    assert machine.run("graft --version", check=False).returncode == 127
    nodes.kubectl(*SYSTEM, "create", "configmap", "graft-subnets", "--from-literal=node=10.86.3.0/24 10.86.0.0/16")
    nodes.kubectl(*SYSTEM, "delete", "pods", "-l", "app=graft")
    first = rolled_out(nodes)
    listed = json.loads(machine.run("cat /etc/cni/graft.d/10-graft.conflist").stdout)["plugins"][0]
    assert (listed["ipam"]["subnet"], listed["network"]) == ("10.86.3.0/24", "10.86.0.0/16")
    assert machine.run("systemctl is-active graftd graftd.socket graftd-agent.socket").stdout == "active\n" * 3
    at = nodes.wait_ready("web", timeout=60)
    assert nodes.get("pod", "web")["spec"]["overhead"] == {"memory": "1Mi"}
    assert lab.host(*CURL, f"http://{at['web']}/").stdout.startswith("web ")
    assert re.search(r"^default_web .* 8080:80/tcp ", machine.run("graft ps").stdout, re.M)

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    load = lab.spawn(*python(LOAD), f"http://{HOST4}:8080/", client=True, **pipes)
    graftd = machine.run("systemctl show --value -p MainPID graftd").stdout
    nodes.kubectl(*SYSTEM, "delete", "pod", first)
    second = rolled_out(nodes)
    assert second != first
    assert machine.run("systemctl show --value -p MainPID graftd").stdout != graftd  # an upgrade in place
    inside = nodes.exec("web", *CURL, f"http://{at['web']}/", container="idle")
    assert inside.startswith("web ")

    graftd = machine.run("systemctl show --value -p MainPID graftd").stdout
    nodes.kubectl(*SYSTEM, "delete", "daemonset", "graft")
    wait_for(lambda: not nodes.get(*SYSTEM, "pods", "-l", "app=graft")["items"], "the end of the DaemonSet's pod", 60)
    assert machine.run("systemctl show --value -p MainPID graftd").stdout == graftd
    at |= nodes.start(pod("later", web()), timeout=60)
    assert nodes.exec("web", *CURL, f"http://{at['later']}/", container="idle") == f"later {at['web']}"
    assert restarts(nodes.get("pod", "web")) == 0
    answered, count, *failed = load.communicate("\n", timeout=30)[0].split("\n")[:-1]
    assert (answered, failed) == ("1", [])
    assert int(count) > 100


def test_it_is_removed(machine, nodes):
    """By hand, once no pod has it, as docs/kubernetes.md says under "Remove"; other pods of the node do not notice."""
    at = nodes.start(pod("other", web(), graft=False))
    refused = machine.run("graft uninstall containerd --yes", check=False)
    assert refused.returncode == 1
    assert re.search("2 of containerd's use graft: default_(web, default_later|later, default_web) ", refused.stderr)
    nodes.kubectl("delete", "pods", "web", "later", "--wait=false")
    wait_for(lambda: machine.run("graft ps -j").stdout.strip() == "[]", "their end", 60)  # kubelet tells of it late
    nodes.kubectl("delete", "runtimeclass", "graft")
    script = machine.lab.work / "install.sh"
    script.write_bytes((ROOT / "scripts/install.sh").read_bytes())
    machine.run("graft uninstall containerd --yes --reload")
    machine.run("systemctl disable --now graftd graftd.socket graftd-agent.socket")
    machine.run(f"bash {script} remove")
    for word in ("graft", "graftd", "graft-cni"):
        assert machine.run(f"command -v {word}", check=False).stdout == ""
    assert machine.run("ls -d /opt/graft /etc/cni/graft.d/* /etc/systemd/system/graftd*", check=False).stdout == ""
    assert "graft" not in machine.run("cat /etc/containerd/config.toml").stdout
    assert machine.lab.host(*CURL, f"http://{at['other']}/").stdout.startswith("other ")
    nodes.start(pod("another", web(), graft=False), timeout=60)
