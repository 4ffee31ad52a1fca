"""Lists of destinations by annotation: containers and pods of Podman's, whose resolver is at their network's gateway."""

import json

import pytest

from graft.bench.lab import CLIENT4, HOST4
from tests.conftest import python
from tests.system.engines import started_podman
from tests.system.outside import CALLS, NONAME, greeting
from tests.system.test_policy_engines import SERVER

REFUSED = "ENETUNREACH"


@pytest.fixture(scope="module")
def podman(host):
    with started_podman(host, "crun", "crun") as engine:
        yield engine


@pytest.fixture
def outside(host):
    yield from greeting(host, HOST4)


@pytest.fixture(autouse=True)
def _no_container_is_left(podman, host):
    yield
    podman.clear()


def listed(value):
    return ("--annotation", "graft=on", "--annotation", f"graft.allow={value}", "--annotation", f"graft.resolver={HOST4}")


def test_a_container_and_its_neighbour(podman, host, outside):
    podman.run("-d", "--name", "db", "--annotation", "graft=on", argv=(*python(SERVER), "5432"))
    targets = ("www.test:8000", "www.test:8001", "db:5432", "evil.test:80", f"{CLIENT4}:8001")
    argv = (*python(CALLS), *targets)
    done = podman.run("--rm", *listed("www.test:8000 db:5432"), argv=argv)
    assert dict(line.split(" ", 1) for line in done.stdout.splitlines()) == {
        "www.test:8000": CLIENT4,
        "www.test:8001": REFUSED,
        "db:5432": "hello",
        "evil.test:80": NONAME,
        f"{CLIENT4}:8001": REFUSED,
    }, done.stderr


def test_whom_podman_names(podman, host, outside):
    """Its `--dns` is whom graft's resolver asks, with a list or with names; what the program writes changes nothing."""
    targets = ("www.test:8000", "evil.test:80")
    for asks in ("graft.names=on", "graft.allow=www.test:8000"):
        argv = ("sh", "-c", 'echo nameserver 192.0.2.9 >/etc/resolv.conf; exec "$@"', "sh", *python(CALLS), *targets)
        done = podman.run("--rm", "--dns", HOST4, "--annotation", "graft=on", "--annotation", asks, argv=argv)
        told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
        assert told == {"www.test:8000": CLIENT4, "evil.test:80": NONAME}, done.stderr


def test_a_pod_has_one_list(podman, host, outside):
    """A second container of the pod is under the same; another one is refused."""
    podman("pod", "create", "--name", "both", "--network", "graft")
    podman.run("-d", "--pod", "both", "--name", "first", *listed("www.test:8000"), argv=("sleep", "60"))
    second = podman.run("--rm", "--pod", "both", *listed("www.test:8000"), argv=(*python(CALLS), "www.test:8000", "evil.test:80"))
    assert [line.split(" ", 1)[1] for line in second.stdout.splitlines()] == [CLIENT4, NONAME], second.stderr
    (shown,) = json.loads(host.graft("ps", "-j").stdout)
    refused = json.loads(host.graft("inspect", shown["name"]).stdout)["policy"]["refused_names"]
    assert "evil.test" in [each["name"] for each in refused]
    other = podman.run("--rm", "--pod", "both", *listed("evil.test"), argv=("true",), check=False)
    assert "runs with another list of destinations" in other.stderr
