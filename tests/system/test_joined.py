"""Docker: networks that a container joins, where what is there would act on none of its sockets."""

import errno
import subprocess

import pytest

from tests.conftest import python
from tests.system.engines import HOST_PROGRAMS

pytestmark = pytest.mark.usefixtures("no_container_is_left")

def test_joining_a_network_of_its_own(docker, host, gnet):
    """Past a bridge, or a VPN and its kill switch, no socket of the container's may leave by the host's route."""
    sleep = ("/busybox", "sleep", "100")
    docker("run", "-d", "--name", "vpn", "host", *sleep)
    done = docker.run("--rm", "--network", "container:vpn", argv=("true",), check=False)
    assert done.returncode == 125
    assert "graft: the network that it joins has a device of its own (eth0): its sockets would be the host's" in done.stderr
    docker.run("-d", "--name", "first", "--network", gnet, argv=sleep)
    docker.run("--rm", "--network", "container:first", argv=("true",))
    pid = docker("inspect", "-f", "{{.State.Pid}}", "first").stdout.strip()
    own = docker("inspect", "-f", "{{.NetworkSettings.Networks.gnet.IPAddress}}", "first").stdout.strip()
    inside = ("nsenter", "-n", "-t", pid, "ip")
    subprocess.run((*inside, "link", "add", "tun7", "type", "veth", "peer", "tun8"), check=True)
    docker.run("--rm", "--network", "container:first", argv=("true",))  # it is down
    subprocess.run((*inside, "link", "set", "tun7", "up"), check=True)
    done = docker.run("--rm", "--network", "container:first", argv=("true",), check=False)
    assert "the network that it joins has a device of its own (tun7)" in done.stderr
    subprocess.run((*inside, "address", "add", f"{own}/32", "dev", "tun7"), check=True)
    docker.run("--rm", "--network", "container:first", argv=("true",))  # it has the container's own address alone
    subprocess.run((*inside, "address", "add", "10.8.0.2/24", "dev", "tun7"), check=True)
    done = docker.run("--rm", "--network", "container:first", argv=("true",), check=False)
    assert "the network that it joins has a device of its own (tun7)" in done.stderr


def test_joining_a_container_with_the_capability(docker, host):
    asked = ("--label", "graft.netadmin=on")
    docker.run("-d", "--name", "vpn", "--network", "none", *asked, "--cap-add", "NET_ADMIN", argv=("/busybox", "sleep", "100"))
    done = docker.run("--rm", "--network", "container:vpn", argv=("true",), check=False)
    assert done.returncode == 125
    assert "graft: container 'vpn', which it joins, may have CAP_NET_ADMIN: a VPN or a firewall there would act on none" in done.stderr
    docker.run("--rm", "--network", "container:vpn", *asked, argv=("true",))


def test_a_plain_container_that_joins(docker, host):
    """It has lo alone: the servers of the container that it joins are the host's, also those on the loopback."""
    server = "import socket, time; s = socket.create_server(('', 80)); print('up', flush=True); time.sleep(100)"
    docker.run("-d", "--name", "web", "--network", "none", "-p", "8718:80", argv=python(server))
    host.wait_listening(8718)
    ask = "import socket\nfor a in ('127.0.0.1', '192.0.2.1'):\n  try: socket.create_connection((a, 80), 5)\n  except OSError as error: print(error.errno)"
    done = docker("run", "--rm", "--network", "container:web", *HOST_PROGRAMS, "host", *python(ask))
    assert done.stdout.split() == [str(errno.ECONNREFUSED), str(errno.ENETUNREACH)]
