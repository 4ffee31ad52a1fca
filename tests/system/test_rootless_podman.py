"""Podman without root: `graft install podman` by the user; published ports, names, pods, exec; other users."""

import json
import re
import subprocess

import pytest

from graft.bench.lab import GRAFT, GRAFTD, HOST4, wait_for
from tests.conftest import need
from tests.system.engines import CURL, nginx_conf, reach
from tests.system.rootless import IMAGE, RootlessPodman, shown, users_of

GRAFTED = ("--annotation", "graft=on")
ON_NETWORK = (*GRAFTED, "--network", "graft")
SERVE = ("python3", "-m", "http.server", "80")
STATUS = (*CURL, "-o", "/dev/null", "-w", "%{http_code}")
GRANTED = '[users.alice]\naddresses = ["10.99.1.0/24"]\nports = ["unprivileged", 81]\n'


@pytest.fixture(scope="module", params=["crun", "runc"])
def runtime(request):
    return request.param


@pytest.fixture(scope="module")
def users(runtime):
    """With crun a machine that has cgroup2 alone: beside cgroup v1 crun refuses it."""
    need("podman", runtime, "conmon", "slirp4netns")
    with users_of(unified=runtime == "crun", granted=GRANTED) as found:
        yield found


@pytest.fixture
def host(users):
    return users.lab


@pytest.fixture(scope="module")
def alice(runtime, users):
    """alice's Podman, with graft's configuration; root has granted her addresses."""
    podman = RootlessPodman(users["alice"], runtime)
    podman.install()
    yield podman
    podman.clear()


@pytest.fixture(scope="module")
def bob(runtime, users):
    """bob's, to whom nothing is granted."""
    podman = RootlessPodman(users["bob"], runtime)
    podman.install()
    yield podman
    podman.clear()


@pytest.fixture(autouse=True)
def _no_container_is_left(request, users):
    yield
    for name in {"alice", "bob"} & set(request.fixturenames):
        request.getfixturevalue(name).clear()
    wait_for(lambda: not users.lab.containers(), "the end of all containers")
    wait_for(lambda: "10.99." not in users.lab.host("ip", "address").stdout, "the addresses' end")


def test_a_published_server(alice, host):
    alice.run("-d", "--name", "web", *ON_NETWORK, "-p", "8801:80", *nginx_conf(host), argv=("nginx", "-c", "/nginx.conf"))
    host.wait_listening(8801)
    assert reach(host, 8801) == "from nginx\n"
    wait_for(lambda: "10.77.0.2 - -" in alice("logs", "web").stdout, "the line of the log")
    assert "0.0.0.0:8801->80/tcp" in alice("ps").stdout
    assert alice("exec", "web", *CURL, "http://127.0.0.1/").stdout == "from nginx\n"
    assert [(c["name"], c["publish"]) for c in shown(alice.user)] == [("web", ["8801:80/tcp"])]
    holders = host.host("ss", "-tlnpH", "sport = :8801").stdout
    assert "nginx" in holders, "the container's own socket has the port"
    assert not re.search("rootlessport|pasta|slirp", holders)
    alice("restart", "-t", "0", "web")
    wait_for(lambda: reach(host, 8801) == "from nginx\n", "the restarted server")


def test_without_a_network(alice, host):
    alice.run("-d", "--network", "none", "--annotation", "graft=8803:80", argv=SERVE)
    host.wait_listening(8803)
    assert "Directory listing" in reach(host, 8803)


@pytest.mark.parametrize(
    "options",
    [
        ("--userns=keep-id",),
        ("--userns=auto",),
        ("--uidmap", "0:0:1000"),
        ("--user", "1000"),
        ("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    ],
    ids=["keep-id", "auto", "uidmap", "user", "no-new-privileges"],
)
def test_other_users_inside(alice, host, options):
    """With a user namespace of the container's own, Podman attaches it to its network after `create`."""
    serve = ("python3", "-m", "http.server", "8000")
    alice.run("-d", "--name", "other", *options, *ON_NETWORK, "-p", "8812:8000", argv=serve)
    host.wait_listening(8812)
    assert "Directory listing" in reach(host, 8812)
    assert alice("exec", "other", *STATUS, "http://127.0.0.1:8000/").stdout == "200"


def test_two_by_name(alice):
    """Names need addresses, which root has granted to alice."""
    alice.run("-d", "--name", "srv", "--network-alias", "al", *ON_NETWORK, argv=SERVE)
    script = "for n in srv al; do curl -sS --retry 9 --retry-connrefused -o /dev/null -w '%{http_code} ' http://$n/; done"
    done = alice.run("--rm", *ON_NETWORK, argv=("/busybox", "sh", "-c", f"{script}; getent hosts al"))
    assert done.stdout.startswith("200 200 10.99.1."), done.stderr


def test_a_granted_port(alice, host):
    """Podman's own forwarder could not bind it."""
    alice.run("-d", *ON_NETWORK, "-p", "81:80", argv=SERVE)
    host.wait_listening(81)
    assert "Directory listing" in reach(host, 81)


def test_graftd_is_replaced(alice, users, host):
    """The next one knows whose the container is, and its network."""
    alice.run("-d", "--name", "web", *ON_NETWORK, "-p", "8809:80", argv=SERVE)
    host.wait_listening(8809)
    before = host.daemon_pid()
    assert subprocess.run(users.command(GRAFTD, "--replace"), env=host.env, capture_output=True).returncode == 0
    wait_for(lambda: host.daemon_pid() not in (0, before), "the next graftd")
    assert [(c["name"], c["publish"]) for c in shown(alice.user)] == [("web", ["8809:80/tcp"])]
    assert alice("exec", "web", *STATUS, "http://127.0.0.1/").stdout == "200"
    assert "Directory listing" in reach(host, 8809)
    alice("rm", "-f", "-t", "0", "web")
    alice.run("--rm", *ON_NETWORK, "-p", "8809:80", argv=("true",))


def test_a_pod(alice, host):
    alice("pod", "create", "--name", "both", "-p", "8804:80", "--network", "graft")
    alice.run("-d", "--pod", "both", *GRAFTED, argv=SERVE)
    host.wait_listening(8804)
    assert "Directory listing" in reach(host, 8804)
    assert alice.run("--rm", "--pod", "both", *GRAFTED, argv=(*STATUS, "http://127.0.0.1/")).stdout == "200"


def test_a_healthcheck(alice):
    check = f"{' '.join(CURL)} -o /dev/null http://127.0.0.1/ || exit 1"
    alice.run("-d", "--name", "well", *ON_NETWORK, "--health-cmd", check, "--health-interval", "disable", argv=SERVE)
    wait_for(lambda: not alice("healthcheck", "run", "well", check=False).returncode, "a healthy container")


def test_kube_play(alice, host):
    from tests.system.test_podman import KUBE

    path = alice.write("pod.yml", KUBE.format())
    alice("kube", "play", "--network", "graft", path)
    host.wait_listening(8811)
    assert "Directory listing" in reach(host, 8811)
    alice("kube", "down", path)
    wait_for(lambda: not host.listening(8811), "its end")


def test_private_loopback_of_two_users(alice, bob):
    """Each has 127.0.0.1:5000, and reaches its own."""
    for podman in (alice, bob):
        code = f"import http.server as h; h.SimpleHTTPRequestHandler.do_GET = lambda s: (s.send_response(200), s.end_headers(), s.wfile.write(b'{podman.user.name}')); h.HTTPServer(('127.0.0.1', 5000), h.SimpleHTTPRequestHandler).serve_forever()"
        podman.run("-d", "--name", "app", *GRAFTED, "--network", "none", argv=("python3", "-c", code))
    for podman in (alice, bob):
        ask = ("exec", "app", *CURL, "--retry", "9", "--retry-connrefused", "http://127.0.0.1:5000/")
        assert podman(*ask).stdout == podman.user.name
        assert [c["name"] for c in shown(podman.user)] == ["app"]


def test_without_granted_addresses(bob, host):
    assert "no addresses are granted to you: containers have ports, and no names" in bob.told
    bob.run("-d", "--name", "web", *ON_NETWORK, "-p", "8805:80", argv=SERVE)
    host.wait_listening(8805)
    assert bob("exec", "web", *STATUS, f"http://{HOST4}:8805/").stdout == "200"


def test_refusals(alice, bob, host):
    alice.run("-d", "--name", "web", *ON_NETWORK, "-p", "8806:80", argv=SERVE)
    host.wait_listening(8806)
    low = "port 80/tcp is below 1024, where root alone binds"
    for podman, options, text in (
        (alice, (*ON_NETWORK, "-p", "80:80"), low),
        (alice, (*GRAFTED, "--network", "none", "--annotation", "graft=80:80"), low),
        (bob, (*ON_NETWORK, "-p", "8806:80"), "graft: -p 8806:80/tcp: host port is in use"),
        (bob, ("--annotation", "graft=8806:80", "--network", "none"), "graft: -p 8806:80/tcp: host port is in use"),
        (alice, ("--network", "none", "--annotation", "graft.ip=10.77.0.77"), "10.77.0.77: not granted to you"),
        (alice, ("--network", "none", "--annotation", "graft.direct=on"), "only root may start a direct container"),
        (alice, (*GRAFTED, "--network", "slirp4netns"), "has a device of its own (tap0)"),
        (alice, (*GRAFTED, "--network", "host"), "graft: the container shares the host's network namespace"),
        (alice, ("--annotation", "graft=nonsense", "--network", "none"), "publication 'nonsense' names one port"),
    ):
        done = podman.run("--rm", *options, argv=("true",), check=False)
        assert done.returncode, options
        assert text in done.stderr, (options, done.stderr)
        assert "web" not in done.stderr or podman is alice, "who has the port is not told to strangers"


def test_podman_without_graft_is_as_before(alice, host):
    """Its own forwarder has the port, on its own network, as if graft were not there."""
    alice.run("-d", "--name", "plain", "--network", "slirp4netns:port_handler=rootlesskit", "-p", "8807:80", argv=SERVE)
    wait_for(lambda: "Directory listing" in reach(host, 8807), "the server")
    assert "rootlessport" in host.host("ss", "-tlnpH", "sport = :8807").stdout
    alice("network", "create", "own")
    alice.run("-d", "--name", "bridged", "--network", "own", "-p", "8808:80", argv=SERVE)
    wait_for(lambda: "Directory listing" in reach(host, 8808), "the server on a bridge")
    assert not shown(alice.user)
    alice.clear()
    alice("network", "rm", "own")


def test_uninstall(bob):
    refused = None
    bob.run("-d", "--name", "held", *GRAFTED, "--network", "none", argv=("/busybox", "sleep", "1000"))
    refused = bob.user(GRAFT, "uninstall", "podman", "--yes", check=False)
    assert refused.returncode
    assert "1 of podman's use graft: held" in refused.stderr
    bob.clear()
    wait_for(lambda: not shown(bob.user), "its end")
    bob.user(GRAFT, "uninstall", "podman", "--yes")
    left = bob.user("find", bob.user.home, "-name", "*graft*").stdout.split()
    assert [path for path in left if not path.endswith("/containers/graft")] == []
    assert bob.run("--rm", "--network", "none", argv=("/busybox", "echo", "on")).stdout == "on\n"
    bob.install()
    assert json.loads(bob("network", "inspect", "graft").stdout)[0]["name"] == "graft"
    assert bob("image", "exists", IMAGE).returncode == 0
