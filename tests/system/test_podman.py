"""Podman by an OCI hook and a plugin of CNI or of netavark: networks, names, pods, exec, kube play; runc and crun."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from graft.bench.lab import HOST4, wait_for
from tests.conftest import python
from tests.system.engines import APP, CURL, NGINX, nginx_conf, reach, started_podman

GRAFT = ("--annotation", "graft=on")
KUBE = """
apiVersion: v1
kind: Pod
metadata:
  name: played
  annotations: {{graft: "on"}}
spec:
  containers:
  - name: web
    image: localhost/host:1
    command: [/usr/bin/python3, -m, http.server, "80"]
    ports: [{{containerPort: 80, hostPort: 8811}}]
    volumeMounts: [{{name: usr, mountPath: /usr}}, {{name: etc, mountPath: /etc}}]
  volumes:
  - {{name: usr, hostPath: {{path: /usr}}}}
  - {{name: etc, hostPath: {{path: /etc}}}}
"""


@pytest.fixture(scope="module", params=["runc", "crun"])
def podman(request, host):
    with started_podman(host, request.param, request.param) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _no_container_is_left(podman, host):
    yield
    podman.clear()
    wait_for(lambda: "10.97." not in host.host("ip", "address").stdout, "the addresses' end")


def test_a_published_server(podman, host):
    podman.run("-d", "--name", "web", *GRAFT, "-p", "8801:80", *nginx_conf(host), argv=("nginx", "-c", "/nginx.conf"))
    host.wait_listening(8801)
    assert reach(host, 8801) == "from nginx\n"
    wait_for(lambda: "10.77.0.2 - -" in podman("logs", "web").stdout, "the line of the log")
    assert "0.0.0.0:8801->80/tcp" in podman("ps").stdout
    devices = podman("exec", "web", "/busybox", "ip", "-o", "link").stdout.splitlines()
    assert {line.split()[1].partition("@")[0].rstrip(":") for line in devices} - {"graft-peer"} == {"lo", "eth0"}
    assert podman("exec", "web", *CURL, "http://127.0.0.1/").stdout == "from nginx\n"
    code = "import os, socket; s = socket.socket(); print(os.fstat(s.fileno()).st_uid >> 28)"
    assert podman("exec", "web", "/usr/bin/python3", "-I", "-c", code).stdout == "7\n"
    shown = json.loads(host.graft("ps", "-j").stdout)
    assert [(c["name"], c["publish"]) for c in shown] == [("web", ["8801:80/tcp"])]
    podman("restart", "-t", "0", "web")
    wait_for(lambda: reach(host, 8801) == "from nginx\n", "the restarted server")
    done = podman.run("--rm", "--name", "late", *GRAFT, "-p", "8801:80", argv=("true",), check=False)
    assert done.returncode == 126
    assert "graft: -p 8801:80/tcp: host port is published by container 'web'" in done.stderr


def test_two_by_name(podman, host):
    podman.run("-d", "--name", "srv", "--network-alias", "al", *GRAFT, argv=("python3", "-m", "http.server", "80"))
    address = podman("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "srv").stdout.strip()
    asked = (*CURL, "-o", "/dev/null", "-w", "%{http_code}", f"http://{address}/")
    wait_for(lambda: host.host(*asked).stdout == "200", "the server")
    script = "for n in srv al; do curl -sS -o /dev/null -w '%{http_code} ' http://$n/; done; getent hosts al"
    done = podman.run("--rm", *GRAFT, argv=("/busybox", "sh", "-c", script))
    assert done.stdout.startswith("200 200 10.97.0."), done.stderr


def test_three_services(podman, host):
    """What a compose file would say: web, app, redis; the app's own port is the number that web publishes."""
    more = "location /app { proxy_pass http://app:8802/; proxy_set_header X-Real-IP $remote_addr; }"
    (host.work / "app.py").write_text(APP.replace("8713", "8802"))
    podman.run("-d", "--name", "redis", *GRAFT, argv=("redis-server", "--save", "", "--protected-mode", "no"))
    work = ("-v", f"{host.work}:/srv:ro")
    podman.run("-d", "--name", "app", *GRAFT, *work, argv=("/usr/bin/python3", "-I", "/srv/app.py"))
    (host.work / "nginx.conf").write_text(NGINX % more)
    podman.run("-d", "--name", "web", *GRAFT, "-p", "8802:80", *work, argv=("nginx", "-c", "/srv/nginx.conf"))
    wait_for(lambda: "hit" in host.client(*CURL, f"http://{HOST4}:8802/app").stdout, "the app")
    assert "from 10.77.0.2" in host.client(*CURL, f"http://{HOST4}:8802/app").stdout


def test_servers(podman, host, httpgo):
    """Without a network: ports by annotation; a static Go server, another user, no capabilities."""
    podman.run(
        *("-d", "--network", "none", "--annotation", "graft=8803:80", "-v", f"{httpgo}:/httpgo:ro"),
        *("--user", "65534", "--cap-drop", "ALL"),
        argv=("/httpgo", "serve", ":80"),
    )
    host.wait_listening(8803)
    assert host.client(*CURL, "-o", "/dev/null", "-w", "%{http_code}", f"http://{HOST4}:8803/").stdout == "200"


def test_a_pod(podman, host):
    podman("pod", "create", "--name", "both", "-p", "8804:80", "--network", "graft")
    podman.run("-d", "--pod", "both", *GRAFT, argv=("python3", "-m", "http.server", "80"))
    host.wait_listening(8804)
    assert "Directory listing" in reach(host, 8804)
    done = podman.run("--rm", "--pod", "both", *GRAFT, argv=(*CURL, "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1/"))
    assert done.stdout == "200"
    other = podman.run("--rm", *GRAFT, argv=(*CURL, "-o", "/dev/null", "-w", "%{http_code}", "http://both/"))
    assert other.stdout == "200"
    second = podman.run("-d", "--pod", "both", *GRAFT, argv=("python3", "-m", "http.server", "81")).stdout.strip()
    enter = ("nsenter", "-t", podman("inspect", "-f", "{{.State.Pid}}", second).stdout.strip(), "-n", *CURL)
    wait_for(lambda: not host.host(*enter, "http://localhost:81/").returncode, "the second container's server")
    status = [host.host(*enter, f"http://localhost:{port}/").returncode for port in (80, 81, 82)]
    assert status == [0, 0, 7], "from outside, in the pod's namespace: both containers' servers, and no more"


def test_two_networks(podman, host):
    """Both are told the ports, which are the container's."""
    podman.network("two", "10.97.1.0/24")
    podman.run("-d", "--name", "m1", *GRAFT, "--network", "graft,two", "-p", "8806:80", argv=("python3", "-m", "http.server", "80"))
    host.wait_listening(8806)
    podman.run("-d", "--name", "m2", *GRAFT, "-p", "8807:80", argv=("python3", "-m", "http.server", "80"))
    podman("network", "connect", "two", "m2")
    shown = {c["name"]: (c["publish"], len(c["addresses"])) for c in json.loads(host.graft("ps", "-j").stdout)}
    assert shown == {"m1": (["8806:80/tcp"], 2), "m2": (["8807:80/tcp"], 2)}
    podman("network", "disconnect", "graft", "m2")
    shown = {c["name"]: (c["publish"], len(c["addresses"])) for c in json.loads(host.graft("ps", "-j").stdout)}
    assert shown["m2"] == (["8807:80/tcp"], 1)
    host.wait_listening(8807)
    assert "Directory listing" in reach(host, 8807)


def test_kube_play(podman, host):
    path = host.work / "pod.yml"
    path.write_text(KUBE.format())
    podman("kube", "play", "--network", "graft", path)
    host.wait_listening(8811)
    assert "Directory listing" in reach(host, 8811)
    podman("kube", "down", path)
    wait_for(lambda: not host.listening(8811), "its end")


def test_kube_generate_and_play(podman, host):
    """What Podman writes of a pod is played again: the annotation of the one container, not of the other."""
    podman("pod", "create", "--name", "twice", "--network", "graft", "-p", "8812:80")
    podman.run("-d", "--pod", "twice", "--name", "web", *GRAFT, argv=("python3", "-m", "http.server", "80"))
    podman.run("-d", "--pod", "twice", "--name", "idle", argv=("sleep", "1000"))
    host.wait_listening(8812)
    path = host.work / "twice.yml"
    path.write_text(podman("kube", "generate", "twice").stdout)
    assert "graft/web" in path.read_text()
    podman("pod", "rm", "-f", "-t", "0", "twice")
    wait_for(lambda: not host.listening(8812), "its end")
    podman("kube", "play", "--network", "graft", path)
    host.wait_listening(8812)
    assert "Directory listing" in reach(host, 8812)
    assert host.containers() == ["twice-web"]
    podman("kube", "down", path)
    wait_for(lambda: not host.listening(8812), "its end")


def test_refusals(podman):
    for annotation, message in (
        ("graft=nonsense", "graft: annotation 'graft=nonsense': publication 'nonsense' names one port"),
        ("graft.endpoint.nope=80", "graft: rule '0.0.0.0:80=nope' names an unknown endpoint 'nope'"),
        ("graft=off", "graft: annotation 'graft=off': a container without this setting does not use graft"),
        ("graft.egress=all", "graft: annotation 'graft.egress=all': egress rule 'all', character 4: lacks '='"),
    ):
        done = podman.run("--rm", "--network", "none", "--annotation", annotation, argv=("true",), check=False)
        assert done.returncode == 126
        assert message in done.stderr


def test_a_capability_that_acts_on_nothing(podman):
    for option in ("--cap-add=NET_ADMIN", "--privileged"):
        done = podman.run("--rm", "--network", "none", *GRAFT, option, argv=("true",), check=False)
        assert done.returncode == 126
        assert "graft: CAP_NET_ADMIN is of no use" in done.stderr
    asked = ("--annotation", "graft.netadmin=on")
    podman.run("--rm", "--network", "none", *asked, "--cap-add=NET_ADMIN", argv=("ip", "link", "set", "lo", "mtu", "9000"))


def test_sysctls(podman):
    code = "import socket; print({socket.socket(f).getsockopt(6, 4) for f in (2, 10) for _ in range(99)}, open('/proc/sys/net/ipv4/tcp_keepalive_time').read())"
    wanted = ("--rm", "--network", "none", *GRAFT, "--sysctl", "net.ipv4.tcp_keepalive_time=300")
    assert podman.run(*wanted, argv=python(code)).stdout == "{300} 300\n\n"
    done = podman.run(*wanted, "--sysctl", "net.ipv4.tcp_sack=0", argv=("true",), check=False)
    assert done.returncode == 126
    assert "graft: sysctl net.ipv4.tcp_sack=0: it acts on no socket: those are the host's, whose value is 1" in done.stderr
    podman.run(*wanted, "--sysctl", "net.ipv4.tcp_sack=0", "--annotation", "graft.sysctl=ignore", argv=("true",))


def test_joining_a_network_of_its_own(podman):
    """Past a VPN of another container's, or of the pod's, no socket may leave by the host's route."""
    podman.run("-d", "--name", "vpn", "--network", "none", argv=("/busybox", "sleep", "100"))
    podman.run("--rm", "--network", "container:vpn", *GRAFT, argv=("true",))
    pid = podman("inspect", "-f", "{{.State.Pid}}", "vpn").stdout.strip()
    subprocess.run(("nsenter", "-n", "-t", pid, "ip", "link", "add", "tun7", "type", "veth", "peer", "tun8"), check=True)
    subprocess.run(("nsenter", "-n", "-t", pid, "ip", "link", "set", "tun7", "up"), check=True)
    done = podman.run("--rm", "--network", "container:vpn", *GRAFT, argv=("true",), check=False)
    assert done.returncode == 126
    assert "graft: the network that it joins has a device of its own (tun7): its sockets would be the host's" in done.stderr


def test_an_image_may_not_publish(podman, host):
    """Podman 4 hands an image's annotations on to its containers, Podman 5 does not."""
    (host.work / "Containerfile").write_text("FROM localhost/host:1\n")
    words = ("--isolation", "chroot", "--annotation", "graft.publish=8805:80", "-t", "greedy")
    podman("build", "-q", *words, "-f", host.work / "Containerfile", host.work / "empty")
    assert "graft.publish:8805:80" in podman("image", "inspect", "-f", "{{.Annotations}}", "greedy").stdout
    done = podman("run", "--name", "greedy", "--network", "none", "greedy", "/busybox", "true", check=False)
    if podman.backend == "cni":
        assert "graft: annotation 'graft.publish' comes from the image, which may not ask for the host's" in done.stderr
    else:
        assert done.returncode == 0
        assert "graft" not in podman("inspect", "-f", "{{.Config.Annotations}}", "greedy").stdout
    podman("run", "--rm", "--network", "none", "--annotation", "graft.publish=", "greedy", "/busybox", "true")
    podman("rm", "-f", "greedy")
    podman("rmi", "-f", "greedy")


def test_many_at_once(podman, host):
    code = python("import socket; s = socket.socket(); s.bind(('', 80)); s.listen(); print('up')")
    began = time.monotonic()
    before = set(Path("/run/netns").glob("netns-*"))
    started = [
        subprocess.Popen(
            podman.command("run", "--rm", *GRAFT, "-p", f"{8820 + n}:80", "-v", "/usr:/usr:ro", "localhost/host:1", *code),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(8)
    ]
    done = [p.communicate(timeout=60) for p in started]
    assert [out for out, _ in done] == ["up\n"] * 8, done
    assert time.monotonic() - began < 60
    wait_for(lambda: set(Path("/run/netns").glob("netns-*")) <= before, "the namespaces' end")
