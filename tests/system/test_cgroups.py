"""Docker, Podman and containerd where cgroup v1 or v2 is alone: a container of graft's starts, serves, and ends."""

from pathlib import Path

import pytest

from graft.bench.lab import wait_for
from tests.conftest import need
from tests.system.cri import Containerd
from tests.system.engines import CURL, Dockerd, nginx_conf, reach, started_podman

PORT = "8726"
ALONE = pytest.mark.parametrize("cgroups", ["v1", "v2"])


@pytest.fixture(autouse=True)
def _both(host):
    """A machine that has one of them alone runs all other tests so."""
    if not Path("/sys/fs/cgroup/unified").is_dir():
        pytest.skip("this machine has not both")
    host.config.write_text('[pods]\nannotations = ["graft.publish"]\n')
    if not host.daemon:
        host.start_daemon()


def serves(host, enter):
    """@enter: what executes a command in the container."""
    host.wait_listening(int(PORT))
    assert reach(host, int(PORT)) == "from nginx\n"
    assert enter(*CURL, "http://127.0.0.1/") == "from nginx\n"


@ALONE
def test_docker(host, cgroups):
    need("dockerd", "docker", "containerd", "runc", "busybox")
    docker = Dockerd(host, host.work / f"docker-{cgroups}", cgroups=cgroups)
    try:
        docker("network", "create", "-d", docker.driver, "--subnet", "10.79.5.0/24", "gnet")
        options = ("-d", "--name", "web", "--network", "gnet", "-p", f"{PORT}:80", *nginx_conf(host))
        docker.run(*options, argv=("nginx", "-c", "/nginx.conf"))
        serves(host, lambda *argv: docker("exec", "web", *argv).stdout)
        docker("rm", "-f", "web")
        wait_for(lambda: not host.containers(), "its end")
    finally:
        docker.stop()


# with cgroup2, crun raises its limit of locked memory for the program of the devices, which not every root may
@pytest.mark.parametrize(("runtime", "cgroups"), [("runc", "v2"), ("crun", "v1")])
def test_podman(host, runtime, cgroups):
    with started_podman(host, f"{runtime}-{cgroups}", runtime, unified=cgroups == "v2") as podman:
        options = ("-d", "--name", "web", "--annotation", "graft=on", "-p", f"{PORT}:80", *nginx_conf(host))
        podman.run(*options, argv=("nginx", "-c", "/nginx.conf"))
        serves(host, lambda *argv: podman("exec", "web", *argv).stdout)
        podman("rm", "-f", "-t", "0", "web")
        wait_for(lambda: not host.containers(), "its end")


@ALONE
def test_containerd(host, cgroups):
    need("containerd", "ctr", "runc", "busybox", "containerd-shim-runc-v2")
    containerd = Containerd(host, host.work / f"containerd-{cgroups}", cgroups=cgroups)
    try:
        pod = containerd.pod("one", ports=[{"container_port": 80, "host_port": int(PORT)}])
        number = pod.container("main", "/usr/bin/python3", "-m", "http.server", "80")
        host.wait_listening(int(PORT))
        assert "Directory listing" in reach(host, int(PORT))
        assert "Directory listing" in pod.exec(number, *CURL, "http://127.0.0.1/")
        pod.remove()
        wait_for(lambda: not host.containers(), "its end")
    finally:
        containerd.stop()
