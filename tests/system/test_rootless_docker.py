"""Docker without root: dockerd under rootlesskit, `graft install docker` by the user, --runtime graft."""

import json

import pytest

from graft.bench.lab import GRAFT, wait_for
from tests.conftest import need
from tests.system.engines import CURL, nginx_conf, reach
from tests.system.rootless import RootlessDocker, shown, users_of

GRAFTED = ("--runtime", "graft", "--network", "none")
SERVE = ("python3", "-m", "http.server", "80")
COMPOSE = """
services:
  web:
    image: host
    runtime: graft
    network_mode: none
    ports: ["8904:80"]
    labels: {graft.limit: "sockets=100"}
    command: [/usr/bin/python3, -m, http.server, "80"]
    volumes: ["/usr:/usr:ro", "/etc:/etc:ro", "/var/lib:/var/lib:ro"]
"""


@pytest.fixture(scope="module", params=[True, False], ids=["cgroup2", "both"])
def alice(request):
    need("dockerd", "docker", "rootlesskit", "runc", "slirp4netns")
    with users_of(unified=request.param) as users:
        engine = RootlessDocker(users["alice"])
        try:
            yield engine
        finally:
            engine.clear()
            engine.lab.end(engine.daemon)


@pytest.fixture
def host(alice):
    return alice.lab


@pytest.fixture(autouse=True)
def _no_container_is_left(alice, host):
    yield
    alice.clear()
    wait_for(lambda: not host.containers(), "the end of all containers")


def test_a_published_server(alice, host):
    alice.run("-d", "--name", "web", *GRAFTED, "-p", "8901:80", *nginx_conf(host), argv=("nginx", "-c", "/nginx.conf"))
    host.wait_listening(8901)
    assert reach(host, 8901) == "from nginx\n"
    wait_for(lambda: "10.77.0.2 - -" in alice("logs", "web").stdout, "the line of the log")
    assert "nginx" in host.host("ss", "-tlnpH", "sport = :8901").stdout, "the container's own socket has the port"
    assert alice("exec", "web", *CURL, "http://127.0.0.1/").stdout == "from nginx\n"
    assert [(c["name"], c["publish"]) for c in shown(alice.user)] == [("web", ["8901:80/tcp"])]
    alice("restart", "-t", "0", "web")
    wait_for(lambda: reach(host, 8901) == "from nginx\n", "the restarted server")


def test_labels_and_users(alice, host):
    labels = ("--label", "graft.publish=8902:80", "--label", "graft.egress=none")
    alice.run("-d", *GRAFTED, *labels, "--user", "1000", "--cap-drop", "ALL", argv=SERVE)
    host.wait_listening(8902)
    assert "Directory listing" in reach(host, 8902)


def test_joining_a_container(alice):
    alice.run("-d", "--name", "first", *GRAFTED, argv=SERVE)
    ask = (*CURL, "--retry", "9", "--retry-connrefused", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1/")
    assert alice.run("--rm", "--runtime", "graft", "--network", "container:first", argv=ask).stdout == "200"


def test_a_healthcheck(alice):
    check = f"{' '.join(CURL)} -o /dev/null http://127.0.0.1/"
    alice.run("-d", "--name", "well", *GRAFTED, "--health-cmd", check, "--health-interval", "1s", argv=SERVE)
    state = ("inspect", "-f", "{{.State.Health.Status}}", "well")
    wait_for(lambda: alice(*state).stdout == "healthy\n", "a healthy container", 20)


def test_compose(alice, host):
    need("docker-compose")
    path = alice.user.home / "docker-compose.yml"
    alice.user("sh", "-c", 'cat >"$0"', path, input=COMPOSE)
    where = ("env", f"DOCKER_HOST=unix://{alice.user.runtime}/docker.sock", "docker-compose", "-f", path, "-p", "one")
    alice.user(*where, "up", "-d")
    host.wait_listening(8904)
    assert "Directory listing" in reach(host, 8904)
    alice.user(*where, "down", "-t", "0")
    wait_for(lambda: not host.listening(8904), "its end")


def test_refusals(alice):
    alice("network", "create", "own")
    for options, text in (
        ((*GRAFTED, "-p", "80:80"), "graft: -p 80:80/tcp: port 80/tcp is below 1024, where root alone binds"),
        (("--runtime", "graft"), "graft: network 'bridge' is not graft's (--network none; Docker has networks of graft's for root"),
        (("--runtime", "graft", "--network", "own"), "graft: network 'own' is not graft's (--network none; Docker has networks of graft's for root"),
        ((*GRAFTED, "--label", "graft.direct=on"), "graft: only root may start a direct container"),
        ((*GRAFTED, "--privileged"), "graft: CAP_NET_ADMIN is of no use"),
        ((*GRAFTED, "--label", "graft.publish=nonsense"), "publication 'nonsense' names one port"),
    ):
        done = alice.run("--rm", *options, argv=("true",), check=False)
        assert done.returncode, options
        assert text in done.stderr, (options, done.stderr)
    alice("network", "rm", "own")


def test_docker_without_graft_is_as_before(alice, host):
    alice.run("-d", "--name", "plain", "-p", "8905:80", argv=SERVE)
    wait_for(lambda: "Directory listing" in reach(host, 8905), "the server")
    assert "rootlesskit" in host.host("ss", "-tlnpH", "sport = :8905").stdout
    assert not shown(alice.user)


def test_install_writes_the_users_file_alone(alice):
    path = alice.user.home / ".config/docker/daemon.json"
    assert json.loads(path.read_text())["runtimes"]["graft"]["path"].endswith("/graft-runtime")
    assert "docker/daemon.json" in alice.told
    alice.user(GRAFT, "uninstall", "docker", "--yes")
    assert not path.exists()
    alice.user(GRAFT, "install", "docker", "--yes")
