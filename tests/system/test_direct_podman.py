"""Podman's containers that are direct: by its hook with runc, on both kinds of machines, and by graft-runtime with crun."""

from typing import Any

import pytest

from graft.bench.lab import wait_for
from tests.conftest import python
from tests.system.direct import PROBE, check, ended, view_of_host
from tests.system.engines import CURL, nginx_conf, reach, started_podman

DIRECT = ("--annotation", "graft.direct=on")
NONE = ("--network", "none", *DIRECT)
CASES: dict[str, dict[str, Any]] = {
    "runc": {"runtime": "runc"},
    "runc-v2": {"runtime": "runc", "unified": True},
    "crun": {"runtime": "crun", "hooked": False},
}


@pytest.fixture(scope="module", params=CASES)
def podman(request, host):
    with started_podman(host, request.param, **CASES[request.param]) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _no_container_is_left(podman, host):
    yield
    podman.clear()
    ended(host)


def test_a_server(podman, host):
    before = view_of_host(host)
    podman.run(
        *("-d", "--name", "web", *NONE, "--annotation", "graft.publish=8751:80"),
        *("--health-cmd", "curl -sSf -o /dev/null http://127.0.0.1/", *nginx_conf(host)),
        argv=("nginx", "-c", "/nginx.conf"),
    )
    host.wait_listening(8751)
    assert reach(host, 8751) == "from nginx\n"
    wait_for(lambda: "10.77.0.2 - -" in podman("logs", "web").stdout, "the line of the log")
    podman("healthcheck", "run", "web")
    assert host.host("curl", "-sS", "http://127.0.0.1:80/").returncode == 7, "its loopback is private"
    check(host, podman("exec", "web", *python(PROBE)).stdout)
    assert podman("exec", "-u", "65534", "web", *CURL, "http://127.0.0.1/").stdout == "from nginx\n"
    podman("restart", "-t", "0", "web")
    wait_for(lambda: reach(host, 8751) == "from nginx\n", "the restarted server")
    podman("stop", "-t", "0", "web")
    wait_for(lambda: not host.containers(), "its end")
    ended(host)
    assert view_of_host(host) == before


def test_a_network(podman, host):
    podman.run("-d", "--name", "web", *DIRECT, "-p", "8752:80", *nginx_conf(host), argv=("nginx", "-c", "/nginx.conf"))
    host.wait_listening(8752)
    assert reach(host, 8752) == "from nginx\n"
    for options in (DIRECT, ("--annotation", "graft=on")):
        done = podman.run("--rm", *options, argv=(*CURL, "http://web/"))
        assert done.stdout == "from nginx\n", done.stderr
    joined = podman.run("--rm", "--network", "container:web", *DIRECT, argv=(*CURL, "http://127.0.0.1/"))
    assert joined.stdout == "from nginx\n"
    done = podman.run("--rm", "--network", "container:web", "--annotation", "graft=on", argv=("true",), check=False)
    assert "container 'web', whose network it joins, is direct" in done.stderr


def test_a_pod(podman, host):
    if podman.inside:
        pytest.skip("the infra container needs the devices of cgroup2 alone; as the runtime's, it is not direct")
    podman("pod", "create", "--name", "both", "-p", "8753:80", "--network", "graft", "--infra-name", "infra")
    server = ("python3", "-m", "http.server", "80")
    podman.run("-d", "--pod", "both", "--name", "main", *DIRECT, argv=server)
    host.wait_listening(8753)
    assert "Directory listing" in reach(host, 8753)
    asked = (*CURL, "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1/")
    assert podman.run("--rm", "--pod", "both", *DIRECT, argv=asked).stdout == "200"
    assert podman("exec", "main", *asked).stdout == "200"
    podman.run("-d", "--pod", "both", "--name", "side", *DIRECT, argv=("/busybox", "sleep", "100"))
    podman("rm", "-f", "-t", "0", "main")
    check(host, podman("exec", "side", *python(PROBE)).stdout, ["eth0", "graft-peer", "lo"])


def test_refusals(podman):
    for options, message in (
        (("--privileged",), "CAP_NET_ADMIN"),
        (("--cap-add", "SYS_ADMIN"), "CAP_SYS_ADMIN would hold in the host's network"),
        (("--pid", "host"), "with the host's processes"),
        (("--security-opt", "unmask=ALL"), "/proc/sys/net would be the host's, and writable"),
        (("--uidmap", "0:100000:65536"), "a user namespace is not the host's network's owner"),
        (("-v", "/sys/fs/cgroup:/cgroups"), "the volume /sys/fs/cgroup at /cgroups"),
        (("--annotation", "graft.direct=perhaps"), "direct 'perhaps' is unknown"),
    ):
        done = podman.run("--rm", *NONE, *options, argv=("true",), check=False)
        assert done.returncode in (125, 126), options
        assert message in done.stderr
    done = podman.run("--rm", "--network", "host", *DIRECT, argv=("true",), check=False)
    assert "shares the host's network namespace" in done.stderr
