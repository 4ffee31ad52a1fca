"""Docker's swarm: services on networks of graft's, on three nodes, each with a dockerd and a graftd of its own."""

import contextlib
import json
from functools import partial

import pytest

from graft.bench.lab import GRAFT, laboratory, wait_for
from graft.engines.swarm import PLUGIN
from tests.conftest import need, need_root, python
from tests.system.swarm import AWAY, CLIENT, MOVE, Swarm, swarm_of

# Tells whoever connects from where, who it is, and whether it may connect out; LABEL is of the version
SERVE = """
import os, socket
server = socket.create_server(('', 90))
def out():
    try: socket.create_connection(('{client}', 9), 2)
    except OSError as error: return error.errno
while True:
    peer, where = server.accept()
    peer.sendall(f"{{where[0]}} {{os.environ.get('VERSION')}} {{out()}}".encode()); peer.close()
"""
SERVER = python(SERVE.format(client=CLIENT))
ASK = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 3); print(s.recv(99).decode())"
NAMES = """
import socket, sys
for name in sys.argv[1:]:
    try: print(name, *sorted(a[4][0] for a in socket.getaddrinfo(name, 1, socket.AF_INET, socket.SOCK_STREAM)))
    except OSError: print(name, '-')
"""
pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def swarm():
    need_root()
    need("dockerd", "docker", "containerd", "runc", "busybox", "ip")
    with contextlib.ExitStack() as stack:
        labs = [stack.enter_context(laboratory(f"swarm{number}")) for number in (1, 2, 3)]
        yield stack.enter_context(swarm_of(labs))


@pytest.fixture(autouse=True)
def no_service_is_left(swarm: Swarm):
    yield
    for name in swarm("service", "ls", "-q").split():
        swarm("service", "rm", name)
    wait_for(lambda: not any(node.lab.containers() for node in swarm.nodes), "the end of all services", 30)


def ask(swarm: Swarm, node, port=8960):
    """What a server says to the client outside: its address, the version, what connecting out came to; [] if nothing."""
    return swarm.nodes[0].lab.client(*python(ASK), node.at, port).stdout.split()


def shows(node, port):
    """Has the node an endpoint with this port?"""
    return f"port {port}" in node.lab.graft("endpoint", "show").stdout


def published(port=8960, target=90):
    return ("--network", "gnet", "--publish", f"mode=host,target={target},published={port}")


def test_a_service_on_all_nodes(swarm):
    """Published by mode=host: each node answers at its address, and sees who asks. A label of the containers holds."""
    swarm.create("all", "--mode", "global", *published(), "--container-label", "graft.egress=none", argv=SERVER)
    swarm.running("all", 3)
    for node in swarm.nodes:
        assert wait_for(partial(ask, swarm, node), "its server") == [CLIENT, "None", "101"]
        (shown,) = json.loads(node.lab.graft("ps", "-j").stdout)
        assert shown["name"].startswith("all.")
        assert json.loads(node.lab.graft("inspect", shown["name"]).stdout)["rules"]["egress_default"] == "none"


def test_names(swarm):
    """A service's name leads to its containers on the node of whoever asks; those of other nodes are not known there."""
    swarm.create("one", "--mode", "global", "--network", "gnet", argv=SERVER)
    swarm.create("two", "--mode", "global", "--network", "gnet", argv=SERVER)
    swarm.running("one", 3)
    swarm.running("two", 3)
    for node in swarm.nodes:
        asker = node("ps", "-q", "--filter", "name=one.").stdout.strip()
        there = node("ps", "-q", "--filter", "name=two.").stdout.strip()
        (address,) = json.loads(node("inspect", "-f", "{{json .NetworkSettings.Networks}}", there).stdout).values()
        told = node("exec", asker, *python(NAMES), "two", "tasks.two", "nobody").stdout.splitlines()
        found = address["IPAddress"]
        assert found.startswith(f"10.79.{node.number}.")
        assert told == [f"two {found}", f"tasks.two {found}", "nobody -"]
        assert node("exec", asker, *python(ASK), "two", "90").stdout.split()[1] == "None"


def test_a_node_that_dies(swarm):
    """Its task goes to another one. When it is back, with a dockerd that was killed, the plugin and the network are."""
    swarm.create("web", "--replicas", "1", *published(), "--constraint", f"node.id!={swarm.nodes[0].identity}", argv=SERVER)
    (first,) = swarm.running("web", 1)
    assert wait_for(lambda: ask(swarm, first), "its server")[0] == CLIENT
    first.wire("down")
    first.kill()
    (second,) = wait_for(
        lambda: [node for node in swarm.tasks("web") if node is not first and ask(swarm, node)], "the move", AWAY
    )
    assert second is not first
    first.start()
    first.wire("up")
    wait_for(lambda: not first.lab.containers(), "the end of the task that was left", AWAY)
    swarm.create("back", "--constraint", f"node.id=={first.identity}", *published(8961), argv=SERVER)
    wait_for(lambda: ask(swarm, first, 8961), "a task on the node that is back", AWAY)


def test_a_rolling_update(swarm):
    """One task after the other; of two on two nodes one answers at any time."""
    options = ("--replicas", "2", "--update-parallelism", "1", "--update-delay", "1s", "--env", "VERSION=1")
    swarm.create("web", *options, *published(), argv=SERVER)
    for node in swarm.running("web", 2):
        assert wait_for(partial(ask, swarm, node), "its server")[1] == "1"
    swarm("service", "update", "-d", "--env-add", "VERSION=2", "web")
    seen = []

    def done():
        answers = [ask(swarm, node) for node in swarm.nodes]
        seen.append([answer[1] for answer in answers if answer])
        return sorted(seen[-1]) == ["2", "2"]

    wait_for(done, "the update", MOVE)
    assert all(seen), "there was a time when nobody answered"
    assert any("1" in versions for versions in seen)


def test_what_swarm_cannot_give(swarm):
    """The routing mesh and a service without a network are refused by a line that is the task's error."""
    swarm.create("mesh", "--network", "gnet", "--publish", "published=8962,target=90", argv=SERVER)
    wait_for(lambda: "swarm's routing mesh leads to a device" in swarm.errors("mesh"), "the refusal", MOVE)
    assert "(--publish mode=host,target=...,published=...)" in swarm.errors("mesh")
    swarm.create("alone", argv=SERVER)
    wait_for(lambda: "network 'bridge' is not graft's" in swarm.errors("alone"), "the refusal", MOVE)


def test_a_port_that_is_taken(swarm):
    """Swarm gives a port of a node once; what it does not know of is refused by graft, with the holder."""
    node = swarm.nodes[1]
    server = node.lab.spawn(*python("import socket; s = socket.create_server(('', 8963)); print(flush=True); s.accept()"), stdout=-1)
    server.stdout.readline()
    swarm.create("taken", "--constraint", f"node.id=={node.identity}", *published(8963), argv=SERVER)
    says = "-p 8963:90/tcp: host port 0.0.0.0:8963/tcp is in use by python3"
    wait_for(lambda: says in swarm.errors("taken"), "the refusal", MOVE)
    node.lab.end(server)
    wait_for(lambda: ask(swarm, node, 8963), "the task", MOVE)


def test_endpoints_by_a_configuration_of_swarm(swarm, tmp_path):
    """A service on each node puts the file into /etc/graft; graftd takes it, and another service's label names it."""
    put = "cp /endpoints.toml /out/.new && mv /out/.new /out/endpoints.toml && exec sleep 1000"
    for version, port in (("1", 8964), ("2", 8965)):
        (tmp_path / "endpoints.toml").write_text(f'ep-web = "type ipv4 addr 0.0.0.0 port {port}"\n')
        swarm("config", "create", f"endpoints-{version}", tmp_path / "endpoints.toml")
    for node in swarm.nodes:
        target = node.lab.config.parent
        swarm.create(
            f"files{node.number}", "--constraint", f"node.id=={node.identity}", "--network", "gnet",
            "--container-label", "graft.egress=none", "--config", "source=endpoints-1,target=/endpoints.toml",
            "--mount", f"type=bind,src={target},dst=/out", argv=("/busybox", "sh", "-c", put),
        )  # fmt: skip
    for node in swarm.nodes:
        wait_for(partial(shows, node, 8964), "the endpoint", MOVE)
    swarm.create("web", "--mode", "global", "--network", "gnet", "--container-label", "graft.endpoint.ep-web=90", argv=SERVER)
    for node in swarm.nodes:
        wait_for(partial(ask, swarm, node, 8964), "the service at the endpoint", MOVE)
    node = swarm.nodes[0]
    update = ("--config-rm", "endpoints-1", "--config-add", "source=endpoints-2,target=/endpoints.toml")
    swarm("service", "update", "-d", *update, f"files{node.number}")
    wait_for(partial(shows, node, 8965), "the new file", MOVE)
    assert ask(swarm, node, 8964), "who runs keeps what it was given"


def test_the_plugin_comes_and_goes(swarm):
    """It is no container of graft's, is refused to be removed while a container needs it, and is there again."""
    node = swarm.nodes[0]
    order = ("docker", "--swarm", "--yes", "--root", node.lab.work / "root")
    assert node.graft("install", *order).endswith("\ndocker: graft is installed already\n")
    assert "graft-plugin" not in node.lab.graft("ps").stdout
    swarm.create("web", "--constraint", f"node.id=={node.identity}", *published(), argv=SERVER)
    wait_for(lambda: ask(swarm, node), "its server", MOVE)
    env = {**node.lab.env, "DOCKER_HOST": node.address}
    node.lab.refused((GRAFT, "uninstall", *order), 125, f"docker plugin disable {PLUGIN}", env=env)
    assert (node.lab.work / "root/etc/docker/daemon.json").exists()
    swarm("service", "rm", "web")
    wait_for(lambda: not node.lab.containers(), "its end", MOVE)

    def uninstalled():
        """dockerd gives the network up a moment after its last container."""
        done = node.lab.host(GRAFT, "uninstall", *order, env=env)
        return "" if done.returncode else done.stdout

    assert f"the plugin {PLUGIN} is removed" in wait_for(uninstalled, "the end of the network", MOVE)
    assert PLUGIN not in node("plugin", "ls").stdout
    assert not (node.lab.work / "root/etc/docker/daemon.json").exists()
    assert f"the plugin {PLUGIN} is enabled" in node.install()
    swarm.create("web", "--constraint", f"node.id=={node.identity}", *published(), argv=SERVER)
    wait_for(lambda: ask(swarm, node), "its server", MOVE)


def test_networks_of_graftd_itself_stay(swarm):
    """The plugin has a name of its own: dockerd finds the legacy driver of its networks also when it starts again."""
    node = swarm.nodes[2]
    node("network", "create", "-d", node.driver, "--subnet", "10.80.3.0/24", "old")
    try:
        node.lab.end(node.daemon)
        node.start()
        node("run", "--rm", "--network", "old", "-v", "/usr:/usr:ro", "host", "/busybox", "true")
    finally:
        node("network", "rm", "old")
    wait_for(lambda: swarm("node", "ls").count("Ready") == 3, "the node", AWAY)
