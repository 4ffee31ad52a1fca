"""Docker with its images in containerd's store."""

import pytest

from graft.bench.lab import wait_for
from tests.conftest import need
from tests.system.engines import Dockerd, engine_version, nginx_conf, reach

STORES = (24, 0)  # the first Docker that can have its images there
NONE = ("--runtime", "graft", "--network", "none")


def serve(docker, host, *options):
    """A container of graft's whose server answers, is entered, and ends."""
    docker.run("-d", "--name", "web", *options, "-p", "8725:80", *nginx_conf(host), argv=("nginx", "-c", "/nginx.conf"))
    host.wait_listening(8725)
    assert reach(host, 8725) == "from nginx\n"
    assert docker("exec", "web", "curl", "-sS", "http://127.0.0.1/").stdout == "from nginx\n"
    docker("rm", "-f", "web")
    wait_for(lambda: not host.containers(), "its end")


@pytest.fixture
def started(host):
    """dockerd, in one of its variants, which is ended after the test."""
    need("dockerd", "docker", "containerd", "runc", "busybox")
    host.graft("endpoint", "show", check=True)
    engines = []

    def start(**how):
        directory = host.work / "-".join(("docker", *how))  # a short path, as sockets need
        engines.append(Dockerd(host, directory, **how))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


def test_images_in_containerds_store(started, host):
    """Labels of an image are refused there as well: by its manifest, and by its index."""
    if engine_version("dockerd") < STORES:
        pytest.skip("this Docker has its images in a store of its own alone")
    docker = started(image_store="native")
    serve(docker, host, "--network", "none")
    container = docker("create", "host", "true").stdout.strip()
    docker("commit", "-c", "LABEL graft.publish=22:22", container, "greedy")
    done = docker("run", "--rm", *NONE, "greedy", "/busybox", "true", check=False)
    assert "label 'graft.publish' comes from the image, which may not ask for the host's network" in done.stderr
    docker("run", "--rm", *NONE, "--label", "graft.publish=", "greedy", "/busybox", "true")
    docker("rm", "-f", container)
