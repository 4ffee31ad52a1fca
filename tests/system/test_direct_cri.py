"""Pods that are direct, by containerd's CRI."""

import grpc
import pytest

from graft.bench.lab import GRAFTD, wait_for
from tests.conftest import need, python
from tests.system.cri import Containerd
from tests.system.direct import PROBE, check, ended, view_of_host
from tests.system.engines import CURL, reach

WRITE = ("-o", "/dev/null", "-w", "%{http_code} %{local_ip} %{remote_ip}")
SERVER = ("/usr/bin/python3", "-m", "http.server", "80")


@pytest.fixture(scope="module")
def containerd(host):
    need("containerd", "ctr", "runc", "busybox", "containerd-shim-runc-v2")
    host.config.write_text('[pods]\nannotations = ["graft.publish", "graft.direct"]\n')
    host.graft("endpoint", "show", check=True)
    engine = Containerd(host, host.work / "containerd")
    try:
        yield engine
    finally:
        engine.stop()


def test_pods(containerd, host):
    before = view_of_host(host)
    one = containerd.pod("one", graft_direct="on")
    two = containerd.pod("two", ports=[{"container_port": 80, "host_port": 8931}], graft_direct="on")
    first, second = one.container("main", *SERVER), two.container("main", *SERVER)
    side = one.container("side", "/busybox", "sleep", "100")
    host.wait_listening(8931)
    assert one.exec(first, *CURL, *WRITE, f"http://{two.ip}/") == f"200 {one.ip} {two.ip}"
    assert two.exec(second, *CURL, *WRITE, f"http://{one.ip}/") == f"200 {two.ip} {one.ip}"
    assert one.exec(side, *CURL, *WRITE, "http://127.0.0.1/").startswith("200")  # containers of a pod share localhost
    check(host, one.exec(side, *python(PROBE)), ["eth0", "graft-peer", "lo"])
    assert "Directory listing" in reach(host, 8931)
    forwarded = two.port_forward(80)
    forwarded.send(b"GET / HTTP/1.0\r\n\r\n")
    assert b"200 OK" in forwarded.receive()[1]
    forwarded.close()
    one.remove()
    two.remove()
    wait_for(lambda: not host.containers(), "their end")
    ended(host)
    wait_for(lambda: view_of_host(host) == before, "the host as before")


def test_the_administrators_word(containerd, host):
    """It is a pod's author who writes annotations."""
    before = host.config.read_text()
    host.config.write_text('[pods]\nannotations = ["graft.publish"]\n')
    host.host(GRAFTD, "--replace", check=True)
    try:
        with pytest.raises(grpc.RpcError, match=r"pods may not use graft\.direct on this node"):
            containerd.pod("bad", graft_direct="on")
    finally:
        host.config.write_text(before)
        host.host(GRAFTD, "--replace", check=True)
