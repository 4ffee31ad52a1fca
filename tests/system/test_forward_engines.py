"""What is dialled inside the netns of an engine's containers: the engine's way in (port-forward) is in test_cri.py."""

import pytest

from graft.bench.lab import wait_for
from tests.conftest import python
from tests.system.engines import HOST_PROGRAMS
from tests.system.inside import has_entrance

pytestmark = pytest.mark.usefixtures("no_container_is_left")

SERVE = """
import socket, sys
sock = socket.create_server(("127.0.0.1", int(sys.argv[2])))
while True:
    peer = sock.accept()[0]
    peer.sendall(sys.argv[1].encode())
    peer.close()
"""


def serve(name, port):
    """A server that tells its name."""
    return (*python(SERVE), name, port)


def path_of(docker, name):
    return f"/proc/{docker('inspect', '-f', '{{.State.Pid}}', name).stdout.strip()}/ns/net"


def told(docker, host, name, port):
    """What who enters the container's netns is told at a port; nothing if nobody is there."""
    return host.host("nsenter", f"--net={path_of(docker, name)}", "bash", "-c", f"cat </dev/tcp/127.0.0.1/{port}").stdout


def test_the_netns_that_an_engine_has_made(docker, host, gnet):
    """Without a network, on a network of graft's, and joined by another of graft's containers."""
    docker.run("-d", "--name", "alone", "--network", "none", argv=serve("first", "80"))
    docker.run("-d", "--name", "member", "--network", gnet, argv=serve("member", "80"))
    docker.run("-d", "--name", "second", "--network", "container:alone", argv=serve("second", "81"))
    expected = {("alone", 80): "first", ("alone", 81): "second", ("member", 80): "member"}
    wait_for(lambda: {at: told(docker, host, *at) for at in expected} == expected, "all servers")


def test_the_netns_of_a_container_without_graft(docker, host):
    """Who joins it has its servers at the same ports, and takes nobody's connections there."""
    docker("run", "-d", "--name", "plain", "--network", "none", *HOST_PROGRAMS, "host", *serve("plain", "80"))
    docker.run("-d", "--name", "guest", "--network", "container:plain", argv=serve("guest", "80"))
    docker.run("-d", "--name", "later", "--network", "none", argv=serve("later", "80"))
    wait_for(lambda: told(docker, host, "later", 80) == "later", "an entrance that is made after the guest's would be")
    assert not has_entrance(host, path_of(docker, "plain"))
    wait_for(lambda: told(docker, host, "plain", 80), "the plain container's server")
    assert told(docker, host, "guest", 80) == "plain"
