"""Lists of destinations by label: containers of Docker's, of an ordinary image, with and without a network."""

import json

import pytest

from graft.bench.lab import CLIENT4, HOST4, wait_for
from tests.conftest import python
from tests.system.outside import CALLS, NONAME, outsides
from tests.system.test_policy_programs import FIVE, index, pip

__all__ = ["index"]  # a fixture
REFUSED = "ENETUNREACH"
pytestmark = pytest.mark.usefixtures("no_container_is_left")


@pytest.fixture
def outside(host):
    for one in outsides(host, "127.0.0.53", HOST4):
        one.greet(8000, 8001)
        yield one


def policy(host, name):
    return json.loads(host.graft("inspect", name, check=True).stdout)["policy"]


@pytest.mark.parametrize("direct", [(), ("--label", "graft.direct=on")], ids=("trap", "direct"))
def test_pip_in_a_container(docker, host, index, tmp_path, direct):
    """pip installs a package from an allowed index; another name and another address are refused and counted."""
    labels = ("--label", f"graft.allow={','.join(FIVE)}", "--label", "graft.resolver=127.0.0.53", *direct)
    shared = ("-v", f"{host.work}:{host.work}", "-v", f"{tmp_path}:/target")
    script = '"$@" && curl -sS https://192.0.2.7/; curl -sS https://evil.test/; echo over; exec sleep 60'
    argv = ("/bin/sh", "-c", script, "sh", *pip(host, "/target"))
    docker.run("-d", "--name", "build", "--network", "none", *labels, *shared, argv=argv)
    wait_for(lambda: "over" in docker("logs", "build").stdout, "its end", 30)
    log = docker("logs", "build")
    assert (tmp_path / "tiny.py").exists(), log.stdout + log.stderr
    told = json.loads(host.graft("inspect", "build").stdout)
    assert [(each["name"], each["why"]) for each in told["policy"]["refused_names"]] == [("evil.test", "not on the list")]
    assert [each["address"] for each in told["last_refused"]] == ["192.0.2.7:443"]


def test_neighbours_by_name_and_nobody_else(docker, host, outside, gnet):
    """On a network: a neighbour on the list by its name, or its address; one that is not is nobody. --dns is whom graft asks."""
    for name, address in (("db", "10.79.0.50"), ("other", "10.79.0.51")):
        docker.run("-d", "--name", name, "--network", gnet, "--ip", address, argv=(*python(SERVER), "5432"))
    on_list = ("--label", "graft.allow=db:5432,www.test:8000")
    network = ("--network", gnet, "--dns", HOST4)
    targets = ("db:5432", f"db.{gnet}:5432", "other:5432", "10.79.0.51:5432", "www.test:8000", "evil.test:8000", "db:5433")
    done = docker.run("--rm", *network, *on_list, argv=(*python(CALLS), *targets))
    assert dict(line.split(" ", 1) for line in done.stdout.splitlines()) == {
        "db:5432": "hello",
        f"db.{gnet}:5432": NONAME,
        "other:5432": NONAME,
        "10.79.0.51:5432": REFUSED,
        "www.test:8000": CLIENT4,
        "evil.test:8000": NONAME,
        "db:5433": REFUSED,
    }
    by_address = ("--label", "graft.allow=10.79.0.51:5432")
    done = docker.run("--rm", *network, *by_address, argv=(*python(CALLS), "db:5432", "other:5432", "10.79.0.51:5432"))
    assert [line.split(" ", 1)[1] for line in done.stdout.splitlines()] == [NONAME, "hello", "hello"]


SERVER = """
import socket, sys
l = socket.create_server(('', int(sys.argv[1])))
while True:
    c, _ = l.accept(); c.sendall(b'hello'); c.close()
"""


def test_a_policy_of_the_administrators(docker, host, outside):
    directory = host.config.with_name("policies")
    directory.mkdir(exist_ok=True)
    (directory / "web.toml").write_text('allow = ["www.test:8000"]')
    (directory / "bad.toml").write_text('allow = ["a.*"]')
    labels = ("--network", "none", "--label", "graft.resolver=127.0.0.53", "--label")
    done = docker.run("--rm", *labels, "graft.policy=web", argv=(*python(CALLS), "www.test:8000", "www.test:8001"))
    assert done.stdout.splitlines() == [f"www.test:8000 {CLIENT4}", f"www.test:8001 {REFUSED}"]
    for value, says in (
        ("absent", f"{directory}/absent.toml: there is no such file"),
        ("bad", f"{directory}/bad.toml, line 1: allow: 'a.*' has a wildcard"),
        ("../web", "'../web' is not a policy's name"),
    ):
        done = docker.run("--rm", *labels, f"graft.policy={value}", argv=("/busybox", "true"), check=False)
        assert done.returncode
        assert says in done.stderr
    done = docker.run("--rm", *labels, "graft.allow=a:99999", argv=("/busybox", "true"), check=False)
    assert "label 'graft.allow=a:99999': 'a:99999': '99999' is not a port" in done.stderr


def test_exec_is_under_the_list(docker, host, outside):
    docker.run("-d", "--name", "job", "--network", "none", "--label", "graft.allow=www.test:8000", "--label", "graft.resolver=127.0.0.53", argv=("sleep", "60"))
    done = docker("exec", "job", *python(CALLS), "www.test:8000", f"{CLIENT4}:8001", "evil.test:80")
    assert [line.split(" ", 1)[1] for line in done.stdout.splitlines()] == [CLIENT4, REFUSED, NONAME]
    assert policy(host, "job")["refused_names"][0]["name"] == "evil.test"
