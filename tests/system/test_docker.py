"""Docker as it is installed: one flag, labels, networks, names, and nothing left behind."""

import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from graft.bench.lab import HOST4, SLOWNESS, wait_for
from tests.conftest import need, python
from tests.system.engines import APP, CURL, NGINX, nginx_conf, reach
from tests.system.nameservers import ASK, SERVERS

pytestmark = pytest.mark.usefixtures("no_container_is_left")

WRITE_OUT = "%{http_code} %{local_ip} %{remote_ip}:%{remote_port}\n"


def test_lo_alone_and_the_clients_address(docker, host):
    docker.run(
        *("-d", "--name", "web", "--network", "none", "--label", "graft.publish=8701:80", *nginx_conf(host)),
        argv=("nginx", "-c", "/nginx.conf"),
    )
    host.wait_listening(8701)
    assert reach(host, 8701) == "from nginx\n"
    wait_for(lambda: "10.77.0.2 - -" in docker("logs", "web").stdout, "the line of the log")
    devices = docker("exec", "web", "/busybox", "ip", "-o", "link").stdout.splitlines()
    assert [line.split()[1] for line in devices] == ["lo:"]
    assert "Seccomp:\t2" in docker("exec", "web", "/busybox", "cat", "/proc/1/status").stdout
    told = docker("exec", "web", *CURL, "http://127.0.0.1/").stdout
    assert told == "from nginx\n"
    # exec'd processes are grafted, each by a listener of its own
    code = "import os, socket; s = socket.socket(); print(os.fstat(s.fileno()).st_uid >> 28)"
    assert docker("exec", "web", "/usr/bin/python3", "-I", "-c", code).stdout == "7\n"
    shown = json.loads(host.graft("ps", "-j").stdout)
    assert [(c["name"], c["publish"]) for c in shown] == [("web", ["8701:80/tcp"])]


def test_servers(docker, host, httpgo):
    """redis, a static Go server and a Python app, each as another user, without capabilities, or unconfined."""
    docker.run(
        *("-d", "--network", "none", "-p", "8702:6379", "--user", "65534", "--cap-drop", "ALL"),
        argv=("redis-server", "--save", "", "--protected-mode", "no"),
    )
    docker.run(
        *("-d", "--network", "none", "--label", "graft.publish=8703:8000", "--security-opt", "seccomp=unconfined"),
        argv=("python3", "-m", "http.server", "8000"),
    )
    docker.run(
        *("-d", "--network", "none", "--label", "graft.publish=8704:80", "-v", f"{httpgo}:/httpgo:ro"),
        *("--security-opt", "no-new-privileges"),
        argv=("/httpgo", "serve", ":80"),
    )
    for port in (8702, 8703, 8704):
        host.wait_listening(port)
    assert host.client("redis-cli", "-h", HOST4, "-p", "8702", "ping").stdout == "PONG\n"
    assert "Directory listing" in reach(host, 8703)
    assert host.client(*CURL, "-o", "/dev/null", "-w", "%{http_code}", f"http://{HOST4}:8704/").stdout == "200"


def test_a_network(docker, host, gnet):
    docker.run(
        *("-d", "--name", "web", "--network", gnet, "--network-alias", "front", "-p", "8705:80", *nginx_conf(host)),
        argv=("nginx", "-c", "/nginx.conf"),
    )
    host.wait_listening(8705)
    assert reach(host, 8705) == "from nginx\n"
    ip = docker("inspect", "-f", "{{.NetworkSettings.Networks.gnet.IPAddress}}", "web").stdout.strip()
    assert ip.startswith("10.79.0.")
    told = host.host(*CURL, "-o", "/dev/null", "-w", WRITE_OUT, f"http://{ip}/").stdout
    assert told == f"200 {ip} {ip}:80\n"
    number = docker("ps", "-q").stdout.strip()
    script = f'for n in web front {ip} {number}; do curl -sS -o /dev/null -w "{WRITE_OUT}" http://$n/; done; '
    script += "getent hosts front; /busybox nslookup web; getent hosts nosuch || echo none; cat /etc/resolv.conf; "
    script += f"getent hosts front.gnet; getent hosts {ip}"
    done = docker.run("--rm", "--network", gnet, "--ip", "10.79.0.77", argv=("/busybox", "sh", "-c", script))
    assert done.stdout.count(f"200 10.79.0.77 {ip}:80\n") == 4, done.stdout + done.stderr
    assert f"{ip}       front" in done.stdout
    assert f"Address: {ip}" in done.stdout
    assert "none\n" in done.stdout
    assert "nameserver 127.0.0.11" in done.stdout
    assert f"{ip}       front.gnet\n{ip}       web.gnet\n" in done.stdout
    wait_for(lambda: "10.79.0.77 - -" in docker("logs", "web").stdout, "the line of the log")


def test_addresses_inside(docker, gnet):
    """On eth0: those of its networks, also while they change; a label names the device, or none."""
    docker("network", "create", "-d", docker.driver, "--subnet", "10.79.8.0/24", "second")

    def inside(name):
        lines = docker("exec", name, "/busybox", "ip", "-o", "-4", "address").stdout.splitlines()
        return sorted((line.split()[1], line.split()[3]) for line in lines if " 127.0.0.1/" not in line)

    try:
        docker.run("-d", "--name", "one", "--network", gnet, "--ip", "10.79.0.7", argv=("/busybox", "sleep", "60"))
        wait_for(lambda: inside("one") == [("eth0", "10.79.0.7/32")], "its addresses")
        assert docker("exec", "one", "hostname", "-I").stdout.split()[0] == "10.79.0.7"
        docker("network", "connect", "--ip", "10.79.8.7", "second", "one")
        wait_for(lambda: inside("one") == [("eth0", "10.79.0.7/32"), ("eth0", "10.79.8.7/32")], "its addresses")
        docker("network", "disconnect", gnet, "one")
        wait_for(lambda: inside("one") == [("eth0", "10.79.8.7/32")], "its addresses")
        docker("network", "disconnect", "second", "one")
        wait_for(lambda: inside("one") == [("eth0", f"{HOST4}/32")], "its addresses")
        docker("network", "connect", "--ip", "10.79.0.7", gnet, "one")
        wait_for(lambda: inside("one") == [("eth0", "10.79.0.7/32")], "its addresses")
        docker("restart", "-t", "1", "one")
        wait_for(lambda: inside("one") == [("eth0", "10.79.0.7/32")], "its addresses")
        for label, devices in (("net0", ["net0"]), ("lo", ["lo"]), ("none", [])):
            told = docker.run(
                *("--rm", "--network", gnet, "--label", f"graft.interface={label}"),
                argv=("/busybox", "sh", "-c", f"/busybox sleep {SLOWNESS}; /busybox ip -o -4 address"),  # no start waits for them
            ).stdout.splitlines()
            assert [line.split()[1] for line in told if " 127.0.0.1/" not in line] == devices
        joined = ("--rm", "--network", "container:one")
        assert "10.79.0.7/32" in docker.run(*joined, argv=("/busybox", "ip", "address", "show", "eth0")).stdout
        other = ("--label", "graft.interface=none")
        assert docker.run(*joined, *other, argv=("/busybox", "true"), check=False).returncode != 0
    finally:
        docker("rm", "-f", "one", check=False)
        docker("network", "rm", "second")


def test_ports_of_all_kinds(docker, host, gnet):
    ports = ("-p", "7000", "-p", "9000-9002:80", "-p", f"{HOST4}:8706:53/udp", "-p", "8707-8708:8707-8708")
    docker.run("-d", "--name", "many", "--network", gnet, *ports, argv=("/busybox", "sleep", "60"))
    docker.run("-d", "--name", "more", "--network", gnet, "-P", "--expose", "81", argv=("/busybox", "sleep", "60"))
    shown = {c["name"]: sorted(c["publish"]) for c in json.loads(host.graft("ps", "-j").stdout)}
    assert f"{HOST4}:8706:53/udp" in shown["many"]
    assert {"8707-8708:8707-8708/tcp", "9000:80/tcp"} < set(shown["many"])
    chosen = [p for p in shown["many"] if p.endswith(":7000/tcp")]
    assert len(chosen) == len(shown["more"]) == 1
    assert 49153 <= int(chosen[0].split(":")[0]) < int(shown["more"][0].split(":")[0])
    docker.run("-d", "--name", "next", "--network", gnet, "-p", "9000-9002:80", argv=("/busybox", "sleep", "60"))
    assert json.loads(host.graft("inspect", "next").stdout)["publish"] == ["9001:80/tcp"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--network", "none", "--label", "graft.publish=80"), "graft: label 'graft.publish=80': publication '80' names"),
        (("--network", "none", "--label", "graft.endpoint.nope=80"), "names an unknown endpoint 'nope'"),
        (("--network", "none", "--label", "graft.colour=red"), "unknown setting (graft.publish, graft.ingress"),
        (("--network", "none", "-p", "8709:80"), "-p 8709:80/tcp: host port 0.0.0.0:8709/tcp is in use by python3 (pid"),
        (("--network", "gnet", "-p", "8709:80"), "-p 8709:80/tcp: host port 0.0.0.0:8709/tcp is in use by python3 (pid"),
        (("--network", "gnet", "-p", "8714:80", "-p", "8715:80"), "the container's port is published already (-p 871"),
        (("--network", "none", "-p", "8714:80", "-p", "8715:80"), "the container's port is published already (-p 871"),
        (("--network", "none", "-p", "8714:80", "-p", "8714:81"), "host port is published by container 'this one'"),
        (("--network", "gnet", "-p", "8714:80", "--label", "graft.publish=8715:80"), "-p publishes port 80 already"),
        (("--network", "none", "--label", "graft.ip=10.9.9.1,10.9.9.2"), "10.9.9.1 and 10.9.9.2 are of one family"),
        ((), "graft: network 'bridge' is not graft's (--network none, or a network made by 'docker network create"),
        (("--network", "host"), "graft: network 'host' is not graft's"),
        (("--network", "plain"), "graft: network 'plain' is not graft's"),
    ],
)
def test_refusals(docker, host, gnet, options, message):
    holder = host.spawn(*python("import socket,time; s=socket.create_server(('', 8709)); time.sleep(60)"))
    host.wait_listening(8709)
    docker("network", "create", "plain")
    try:
        done = docker.run("--rm", *options, argv=("/busybox", "true"), check=False)
        assert done.returncode == 125
        assert message in done.stderr
    finally:
        docker("network", "rm", "plain")
        host.end(holder)


def test_a_capability_that_acts_on_nothing(docker):
    """At create and at exec; a firewall inside would say OK and stop nothing."""
    admin = ("ip", "link", "set", "lo", "mtu", "9000")
    for option in ("--cap-add=NET_ADMIN", "--privileged"):
        done = docker.run("--rm", "--network", "none", option, argv=admin, check=False)
        assert done.returncode == 125
        assert "graft: CAP_NET_ADMIN is of no use: a firewall or a route inside acts on no socket" in done.stderr
    try:
        docker.run("-d", "--name", "plain", "--network", "none", argv=("/busybox", "sleep", "100"))
        docker("exec", "plain", "/busybox", "echo", "CAP_NET_ADMIN")
        done = docker("exec", "--privileged", "plain", *admin, check=False)
        assert done.returncode != 0
        assert "graft: CAP_NET_ADMIN is of no use" in done.stderr + done.stdout
        label = ("--label", "graft.netadmin=on", "--cap-add=NET_ADMIN")
        docker.run("-d", "--name", "asked", "--network", "none", *label, argv=("/busybox", "sleep", "100"))
        docker("exec", "asked", *admin)
        done = docker("exec", "--privileged", "asked", *admin, check=False)  # dockerd may lack what it is to give
        assert "graft:" not in done.stderr + done.stdout
    finally:
        docker("rm", "-f", "plain", "asked")


def test_a_link_layer_address_is_refused(docker, gnet):
    words = ("--rm", "--network", "gnet", "--mac-address", "02:00:00:00:00:09")
    done = docker.run(*words, argv=("/busybox", "true"), check=False)
    if '"specify mac-address per network" requires API version 1.44' in done.stderr:
        pytest.skip("this docker asks for dockerd 25 or newer")
    assert done.returncode == 125
    assert "a container has no link-layer address of its own (leave out --mac-address)" in done.stderr


def test_an_internal_network_is_refused(docker):
    done = docker("network", "create", "-d", docker.driver, "--internal", "inner", check=False)
    assert "--internal is not supported (give the containers --label graft.egress=none)" in done.stderr


def test_an_image_may_not_publish(docker, host):
    container = docker("create", "host", "true").stdout.strip()
    docker("commit", "-c", "LABEL graft.publish=22:22", container, "greedy")
    done = docker("run", "--rm", "--runtime", "graft", "--network", "none", "greedy", "/busybox", "true", check=False)
    assert "label 'graft.publish' comes from the image, which may not ask for the host's network" in done.stderr
    docker("run", "--rm", "--runtime", "graft", "--network", "none", "--label", "graft.publish=", "greedy", "/busybox", "true")
    docker("rm", "-f", container)
    docker("rmi", "-f", "greedy")


def test_labels(docker, host):
    """An endpoint of the host's, no way out, an address of its own."""
    server = "import socket; s = socket.socket(); s.bind(('', 80)); s.listen(); s.accept()[0].sendall(b'here')"
    docker.run(
        *("-d", "--name", "ends", "--network", "none", "--label", "graft.endpoint.ep-keep=80"),
        *("--label", "graft.egress=none", "--label", "graft.ip=10.99.1.5"),
        argv=python(server),
    )
    host.wait_listening(8710)
    code = "import socket; print(socket.create_connection(('10.77.0.1', 8710)).recv(9))"
    shown = json.loads(host.graft("ps", "-j").stdout)[0]
    assert (shown["named_endpoints"], shown["addresses"]) == (["ep-keep"], ["10.99.1.5"])
    refused = docker("exec", "ends", *python("import socket; socket.create_connection(('10.77.0.2', 9))"), check=False)
    assert "Network is unreachable" in refused.stderr
    assert host.client(*python(code)).stdout == "b'here'\n"


def test_the_same_port_twice(docker, host, gnet):
    docker.run("-d", "--name", "one", "--network", gnet, "-p", "8711:80", argv=("/busybox", "sleep", "60"))
    for network in (gnet, "none"):
        done = docker.run("--rm", "--network", network, "-p", "8711:80", argv=("/busybox", "true"), check=False)
        assert "-p 8711:80/tcp: host port is published by container 'one'" in done.stderr


def test_life(docker, host, gnet):
    """restart, stop and start, pause, a second network while it runs, rename."""
    other = "gnet2"
    docker("network", "create", "-d", docker.driver, "--ipam-driver", docker.driver, other)
    try:
        docker.run(
            *("-d", "--name", "web", "--network", gnet, "-p", "8712:80", *nginx_conf(host)),
            argv=("nginx", "-c", "/nginx.conf"),
        )
        host.wait_listening(8712)
        docker("restart", "-t", "1", "web")
        wait_for(lambda: reach(host, 8712) == "from nginx\n", "the restarted server")
        docker("stop", "-t", "1", "web")
        assert not host.listening(8712)
        assert "10.79." not in host.host("ip", "address").stdout
        docker("start", "web")
        wait_for(lambda: reach(host, 8712) == "from nginx\n", "the started server")
        docker("pause", "web")
        docker("unpause", "web")
        docker("network", "connect", "--alias", "second", other, "web")
        told = docker.run("--rm", "--network", other, argv=(*CURL, "http://second/"))
        assert told.stdout == "from nginx\n"
        done = docker.run("--rm", "--network", gnet, argv=(*CURL, "http://second/"), check=False)
        assert "Could not resolve host" in done.stderr  # the alias is the other network's
        told = docker.run("--rm", "--network", gnet, argv=(*CURL, "http://web/"))
        assert told.stdout == "from nginx\n"
        docker("network", "disconnect", gnet, "web")
        assert reach(host, 8712) == "from nginx\n"  # the ports are the container's, not the network's
        docker("network", "disconnect", other, "web")
        docker("network", "connect", gnet, "web")
        docker("rename", "web", "renamed")
        told = docker.run("--rm", "--network", gnet, argv=(*CURL, "http://renamed/"))
        assert told.stdout == "from nginx\n"
        done = docker.run("--rm", "--network", other, argv=(*CURL, "http://second/"), check=False)
        assert "Could not resolve host" in done.stderr
        docker("rm", "-f", "renamed")
    finally:
        docker("rm", "-f", "web", "renamed", check=False)
        docker("network", "rm", other)


def test_networks_are_apart(docker, gnet):
    docker("network", "create", "-d", docker.driver, "--subnet", "10.79.9.0/24", "apart")
    try:
        docker.run("-d", "--name", "srv", "--network", gnet, "--ip", "10.79.0.9", argv=("python3", "-m", "http.server", "80"))
        wait_for(lambda: docker.lab.host("curl", "-s", "-o", "/dev/null", "http://10.79.0.9/").returncode == 0, "the server")
        inside = docker.run("--rm", "--network", gnet, argv=(*CURL, "http://srv/"))
        assert "Directory listing" in inside.stdout
        done = docker.run("--rm", "--network", "apart", argv=(*CURL, "http://10.79.0.9/"), check=False)
        assert (done.returncode, done.stdout) == (7, "")
    finally:
        docker("network", "rm", "apart")


COMPOSE = """
version: "2.4"
x-host: &host
  image: host
  runtime: graft
  networks: [net]
  volumes: ["/usr:/usr:ro", "/etc:/etc:ro", "{work}:{work}:ro"]
services:
  web:
    <<: *host
    command: [nginx, -c, {work}/compose-nginx.conf]
    ports: ["8713:80"]
    depends_on: [app]
  app:
    <<: *host
    command: [python3, -I, {work}/app.py]
    depends_on: [redis]
  redis:
    <<: *host
    command: [redis-server, --save, "", --protected-mode, "no"]
networks:
  net:
    driver: {driver}
"""


def test_compose(docker, host):
    """A web server in front of an app in front of redis; the app's own port is the number that web publishes."""
    need("docker-compose")
    work = host.work
    more = "location /app { proxy_pass http://app:8713/; proxy_set_header X-Real-IP $remote_addr; }"
    (work / "compose-nginx.conf").write_text(NGINX % more)
    (work / "app.py").write_text(APP)
    (work / "compose.yml").write_text(COMPOSE.format(work=work, driver=docker.driver))

    def compose(*argv):
        command = ("docker-compose", "-p", "shop", "-f", work / "compose.yml", *argv)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=100, env={**os.environ, "DOCKER_HOST": docker.address}
        )
        assert done.returncode == 0, done.stdout + done.stderr

    compose("up", "-d")
    try:
        wait_for(lambda: "hit" in host.client(*CURL, f"http://{HOST4}:8713/app").stdout, "the app")
        assert "from 10.77.0.2" in host.client(*CURL, f"http://{HOST4}:8713/app").stdout
        names = {c.replace("-", "_") for c in host.containers()}  # Compose 2 joins the words by '-'
        assert {name.rpartition("_")[0] for name in names} == {"shop_web", "shop_app", "shop_redis"}
    finally:
        compose("down", "-t", "1")


def test_fifty_at_once(docker, host, gnet):
    """Started and removed in parallel, half of them with a port on a network: nothing is left."""

    def one(n):
        network = ("--network", gnet, "-p", f"{8720 + n}:80") if n % 2 else ("--network", "none")
        code = "import socket; s=socket.socket(); s.bind(('',80)); s.listen(); print('up')"
        return docker.run("--rm", "--name", f"n{n}", *network, argv=("/usr/bin/python3", "-I", "-c", code), check=False)

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(one, range(50)))
    assert [(d.returncode, d.stdout) for d in done] == [(0, "up\n")] * 50, [d.stderr for d in done if d.returncode][:3]
    wait_for(lambda: not host.containers(), "their end")
    assert "10.79." not in host.host("ip", "address").stdout
    assert not [line for line in host.host("ss", "-tulnH").stdout.splitlines() if "127.0.0.11" in line]
    state = json.loads((host.run_dir / "state.json").read_text())
    assert (state["tenants"], state["attachments"]) == ([], [])


def test_graftd_killed_while_containers_run(docker, host, gnet):
    """No call fails, in a container that opens connections to another by name and by address."""
    docker.run("-d", "--name", "srv", "--network", gnet, argv=("python3", "-I", "-c", ECHO))
    script = "import socket,sys,time\nfailed=n=0\nend=time.time()+4\nwhile time.time()<end:\n"
    script += " time.sleep(0.005)\n"  # or it asks for more names than a container may
    script += " try:\n  s=socket.create_connection(('srv',80),5); assert s.recv(9)==b'x'; s.close(); n+=1\n"
    script += " except OSError as e: failed+=1; print(e)\nprint(n>50, failed)"
    result = []
    client = threading.Thread(
        target=lambda: result.append(docker.run("--rm", "--network", gnet, argv=python(script), check=False))
    )
    client.start()
    wait_for(lambda: len(host.containers()) == 2, "the client")
    for _ in range(4):
        time.sleep(0.6)
        pid = wait_for(host.daemon_pid, "graftd")
        os.kill(pid, signal.SIGKILL)
        wait_for(partial(lambda old: host.daemon_pid() not in (0, old), pid), "the next graftd")
    client.join(30)
    assert result[0].stdout == "True 0\n", result[0].stdout + result[0].stderr
    assert docker("exec", "srv", "/busybox", "true").returncode == 0
    docker("restart", "-t", "0", "srv")
    assert host.containers() == ["srv"]


ECHO = """
import socket
s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('', 80)); s.listen(512)
while True:
    c, _ = s.accept(); c.sendall(b'x'); c.close()
"""


LISTENS = """
import socket, time
worst = 0
while not input_ready():
    began = time.monotonic(); s = socket.socket(); s.listen(); s.close(); worst = max(worst, time.monotonic() - began)
print(worst)
"""
ECHO_UDP = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 15000))
while True: s.sendto(*s.recvfrom(99))
"""


def test_ten_thousand_ports(docker, host, gnet):
    """A PBX's range: one publication, at once, and a neighbour's listen() does not wait for it."""
    ready = "import select, sys\ninput_ready = lambda: select.select([sys.stdin], [], [], 0)[0]"
    bystander = host.spawn_graft(*python(ready + LISTENS), stdin=-1, stdout=-1)
    argv = ("-d", "--name", "pbx", "--network", gnet, "-p", "10000-20000:10000-20000/udp", "-p", "10000-10063:10000-10063")
    docker.run(*argv, argv=python(ECHO_UDP))
    worst = float(bystander.communicate("end\n", timeout=30)[0])
    assert worst < 1, worst  # it was 11.7 s with 8,001 ports
    shown = json.loads(host.graft("inspect", "pbx").stdout)["publish"]
    assert sorted(shown) == ["10000-10063:10000-10063/tcp", "10000-20000:10000-20000/udp"]
    ask = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5); s.connect(('10.77.0.1', 15000)); s.send(b'x'); print(s.recv(9))"
    wait_for(lambda: host.client(*python(ask)).stdout == "b'x'\n", "its server")
    used = docker.run("--rm", "--network", gnet, "-p", "19000-29000:19000-29000/udp", argv=("/busybox", "true"), check=False)
    assert "host port is published by container 'pbx'" in used.stderr
    docker("rm", "-f", "pbx")


OUT = """
import errno, socket
def out(kind, port, to):
    s = socket.socket(socket.AF_INET, kind); s.settimeout(5)
    try:
        s.bind(('', port)); s.connect(to); s.send(b'x')
        print(s.getsockname()[1] == port or not port, s.recv(99).decode().split()[0], flush=True)
    except OSError as error: print(errno.errorcode[error.errno], flush=True)
out(socket.SOCK_STREAM, 0, ('10.77.0.2', 7071)); out(socket.SOCK_STREAM, 5060, ('10.77.0.2', 7071))
out(socket.SOCK_DGRAM, 5060, ('10.77.0.2', 7071)); out(socket.SOCK_DGRAM, 0, ('10.77.0.2', 7071))
out(socket.SOCK_DGRAM, 5061, ('10.77.0.1', 7072)); input()
"""
ECHOES = """
import socket, threading
def answer(address, port):
    l = socket.socket(); l.setsockopt(1, 2, 1); l.bind((address, port)); l.listen()
    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind((address, port))
    def tcp():
        while True:
            c, peer = l.accept(); c.sendall(peer[0].encode()); c.close()
    threading.Thread(target=tcp).start()
    while True:
        _, peer = u.recvfrom(99); u.sendto(peer[0].encode(), peer)
"""


def test_out_of_a_network_from_a_port_of_ones_own(docker, host, gnet):
    """TCP and UDP leave as the host does, and nothing is refused."""
    host.spawn(*python(ECHOES + "answer('10.77.0.2', 7071)"), client=True)
    host.spawn(*python(ECHOES + "answer('10.77.0.1', 7072)"))
    wait_for(lambda: host.client("ss", "-tlnH", "sport = :7071").stdout, "the server")
    host.wait_listening(7072, udp=True)
    docker.run("-d", "-i", "--name", "out", "--network", gnet, "--ip", "10.79.0.40", argv=python(OUT))
    lines = wait_for(lambda: docker("logs", "out").stdout.count("\n") == 5 and docker("logs", "out").stdout.splitlines(), "its word")
    assert lines == ["True 10.77.0.1"] * 5
    assert json.loads(host.graft("inspect", "out").stdout)["refused"] == []


def test_nameservers_of_ones_own(docker, host, gnet):
    """The resolver of a network asks whom --dns says, over UDP and TCP; names of containers are its own all the same."""
    server = host.spawn(*python(SERVERS), "mine@10.77.0.2", client=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == "ready\n"
    docker.run("-d", "--name", "neighbour", "--network", gnet, "--ip", "10.79.0.41", argv=("sleep", "60"))
    network = ("--network", gnet, "--dns", "127.0.0.1", "--dns", "10.77.0.2")
    asked = docker.run("--rm", *network, argv=(*python(ASK), "127.0.0.11", "")).stdout
    assert asked.split() == ["udp", "0", "mine", "False", "tcp", "1", "0", "mine", "False", "tcp", "2", "0", "mine", "True"]
    told = docker.run("--rm", *network, argv=python("import socket; print(socket.gethostbyname('neighbour'))")).stdout
    assert told == "10.79.0.41\n"


def test_dockerd_restarts(docker, host, gnet):
    """Docker's network is usable by a dockerd that has restarted."""
    docker("network", "inspect", gnet)
    host.end(docker.daemon)
    docker.start()
    done = docker.run("--rm", "--network", gnet, argv=("/busybox", "hostname", "-i"))
    assert done.stdout.startswith("10.79.0.")


def test_without_graftd(docker, host):
    """Fail closed, and say how to start it."""
    host._stop_daemon()
    done = docker.run("--rm", "--network", "none", argv=("/busybox", "true"), check=False)
    assert "graft: graftd is not running (start it: systemctl start graftd, or graftd as root)" in done.stderr
    host.graft("endpoint", "show", check=True)
