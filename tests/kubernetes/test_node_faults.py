"""Daemons of the node are killed, one by one and all at once: pods go on, and the node is as before afterwards."""

import signal
import subprocess

import pytest

from graft.bench.lab import CLIENT4, GRAFTD, wait_for
from tests.conftest import kill, kill_graftd, python
from tests.kubernetes.cluster import container, idle, is_ready, pod, restarts, web
from tests.system.engines import CURL

# Makes sockets and asks over new connections, without a pause, and tells at its own port what came of it
WORK = """
import http.server, socket, sys, threading, time
done, failed = [], []
def work():
    while True:
        try:
            with socket.create_connection((sys.argv[1], 80), 30) as sock:
                sock.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')
                answer = b''
                while part := sock.recv(999): answer += part
                assert b'200 OK' in answer, answer
            done.append(1)
        except (OSError, AssertionError) as error: failed.append(f'{time.strftime("%X")} {error!r}')
        time.sleep(.01)
threading.Thread(target=work, daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write('\\n'.join([str(len(done)), *failed]).encode())
    def log_message(self, *told): pass
http.server.HTTPServer(('', int(sys.argv[2])), Handler).serve_forever()
"""


def kill_kubelet(cluster):
    cluster.parts["kubelet"].kill()
    cluster.parts["kubelet"].wait(10)


def kill_containerd(cluster):
    cluster.node.daemon.kill()
    cluster.node.daemon.wait(10)


def kill_all(cluster):
    lab = cluster.lab
    for process in (cluster.parts["kubelet"], cluster.node.daemon):
        process.send_signal(signal.SIGSTOP)
    kill_graftd(lab)
    kill_kubelet(cluster)
    kill_containerd(cluster)


FAULTS = {
    "kubelet": kill_kubelet,
    "containerd": kill_containerd,
    "graftd": lambda cluster: kill(cluster.lab.daemon_pid()),
    "graftd and its keeper": lambda cluster: kill(cluster.lab.keeper_pid(), cluster.lab.daemon_pid()),
    "all": kill_all,
}


def start_again(cluster):
    """What a service manager does."""
    if not cluster.lab.daemon_pid():
        cluster.lab.spawn(GRAFTD, stderr=subprocess.DEVNULL)
    wait_for(cluster.lab.daemon_pid, "graftd")
    if cluster.node.daemon.poll() is not None:
        cluster.node.start()
    if cluster.parts["kubelet"].poll() is not None:
        cluster.start_kubelet()


@pytest.mark.parametrize("fault", FAULTS)
def test_killed(cluster, host, fault):
    """No connection fails, from outside and from within, and no container is started again."""
    at = cluster.start(pod("serves", web(), idle()), pod("bridged", web(), graft=False))
    worker = container("works", [*python(WORK), at["serves"], "8000"])
    at |= cluster.start(pod("works", worker))
    outside = host.spawn(*python(WORK), at["serves"], "8000", client=True)
    at_work = (f"http://{at['works']}:8000/", f"http://{CLIENT4}:8000/")
    wait_for(lambda: all(host.host(*CURL, url).returncode == 0 for url in at_work), "both at work")
    before = {one["metadata"]["name"]: restarts(one) for one in cluster.pods()}
    wait_for(lambda: host.graft("ps").stdout.count("default_") == 2, "both pods")
    FAULTS[fault](cluster)
    for _ in range(5):
        assert host.client(*CURL, f"http://{at['serves']}/").stdout == f"serves {CLIENT4}"
    start_again(cluster)
    wait_for(cluster.is_ready, "the node", 60)
    found = cluster.start(pod("later", web(), idle()), timeout=60)
    assert host.client(*CURL, f"http://{found['later']}/").stdout == f"later {CLIENT4}"
    assert cluster.exec("later", *CURL, f"http://{at['serves']}/", container="idle") == f"serves {found['later']}"
    assert cluster.exec("serves", *CURL, f"http://{at['bridged']}/", container="idle").split()[0] == "bridged"
    wait_for(lambda: all(map(is_ready, cluster.pods())), "all pods", 30)
    after = {one["metadata"]["name"]: restarts(one) for one in cluster.pods()}
    assert {name: after[name] for name in before} == before
    for url in at_work:
        done, *failed = host.host(*CURL, url).stdout.split("\n")
        assert (url, failed) == (url, [])
        assert int(done) > 20
    host.end(outside)
    assert "unsupervised" not in host.graft("ps").stdout
