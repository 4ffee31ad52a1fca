"""Docker: sysctls of a container, and networks that it joins: what would act on none of its sockets is refused."""

import errno
import json
import subprocess

import pytest

from graft.bench.lab import HOST4, wait_for
from tests.conftest import python
from tests.system.engines import HOST_PROGRAMS
from tests.system.inside import has_entrance

pytestmark = pytest.mark.usefixtures("no_container_is_left")

SYSCTLS = """
import socket, sys
for line in sys.stdin:
    told = [{socket.socket(f, t).getsockopt(*o) for _ in range(50)} for f, t, o in (
        (2, 1, (6, 4)), (10, 1, (6, 4)), (2, 1, (0, 2)), (2, 2, (0, 2)), (10, 1, (0, 2)), (10, 2, (0, 2)))]
    print(told, flush=True)
"""
FOLLOWED = f"{[{300}, {300}, {33}, {33}, {33}, {33}]}\n"
WANTED = ("--sysctl", "net.ipv4.tcp_keepalive_time=300", "--sysctl", "net.ipv4.ip_default_ttl=33", "--sysctl", "net.core.somaxconn=9")


def test_sysctls(docker, host):
    """Its sockets have them, those of exec'd processes, too; a server's backlog is bounded; what acts on nothing is refused."""
    none = ("--network", "none")
    docker.run("-d", "--name", "tuned", *none, *WANTED, "-p", "8716:80", argv=("python3", "-m", "http.server", "80"))
    host.wait_listening(8716)
    assert host.host("ss", "-tlnH", "sport = :8716").stdout.split()[2] == "5"  # what socketserver asks for
    code = "import socket; s = socket.socket(); s.bind(('', 81)); s.listen(100); print(open('/proc/sys/net/core/somaxconn').read()); input()"
    server = host.spawn(*docker.command("run", "-i", "--rm", "--runtime", "graft", "-v", "/usr:/usr:ro", *none, *WANTED, "-p", "8717:81", "host", *python(code)), stdin=-1, stdout=-1)
    assert server.stdout.readline() == "9\n"
    assert host.host("ss", "-tlnH", "sport = :8717").stdout.split()[2] == "9"
    server.communicate("\n")
    wait_for(lambda: host.containers() == ["tuned"], "the other's end")

    def logged():
        return [line for line in (host.run_dir / "graftd.log").read_text().splitlines() if "tuned" in line]

    before = logged()
    for _ in range(3):
        assert docker("exec", "-i", "tuned", *python(SYSCTLS), input="\n").stdout == FOLLOWED
    assert logged() == before  # health checks execute something every few seconds
    docker("restart", "-t", "0", "tuned")
    assert docker("exec", "-i", "tuned", *python(SYSCTLS), input="\n").stdout == FOLLOWED
    sack = ("--sysctl", "net.ipv4.tcp_sack=0")
    done = docker.run("--rm", *none, *sack, argv=("true",), check=False)
    assert done.returncode == 125
    assert "graft: sysctl net.ipv4.tcp_sack=0: it acts on no socket: those are the host's, whose value is 1 (leave it out" in done.stderr
    shown = docker.run("--rm", *none, *sack, "--label", "graft.sysctl=ignore", argv=("cat", "/proc/sys/net/ipv4/tcp_sack"))
    assert shown.stdout == "0\n"
    done = docker.run("--rm", *none, "--label", "graft.sysctl=net.core.somaxconn=9", argv=("true",), check=False)
    assert "graft: label 'graft.sysctl=net.core.somaxconn=9': sysctls are the engine's to set (ignore is the only value)" in done.stderr


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
    subprocess.run((*inside, "link", "set", "tun7", "group", "26470"), check=True)  # graft's, by its address and group
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
    """It reaches the servers of the container that it joins by the relay, at localhost, and nobody else."""
    server = "import socket, time; s = socket.create_server(('', 80)); print('up', flush=True); time.sleep(100)"
    docker.run("-d", "--name", "web", "--network", "none", "-p", "8718:80", argv=python(server))
    host.wait_listening(8718)
    pid = docker("inspect", "-f", "{{.State.Pid}}", "web").stdout.strip()
    wait_for(lambda: has_entrance(host, f"/proc/{pid}/ns/net"), "the entrance")
    ask = "import socket\nfor a in ('127.0.0.1', '192.0.2.1'):\n  try: print(socket.create_connection((a, 80), 5).getpeername()[0])\n  except OSError as error: print(error.errno)"
    done = docker("run", "--rm", "--network", "container:web", *HOST_PROGRAMS, "host", *python(ask))
    assert done.stdout.split() == ["127.0.0.1", str(errno.ENETUNREACH)]


def test_what_the_engine_shows(docker, host, gnet):
    """docs/differences.md: no ports, no traffic; and inside no socket."""
    server = "import socket; s = socket.create_server(('', 80)); c = s.accept()[0]; c.sendall(b'x' * 100000); input()"
    docker.run("-d", "-i", "--name", "web", "--network", gnet, "-p", "8719:80", argv=python(server))
    host.wait_listening(8719)
    assert docker("port", "web").stdout == ""
    assert docker("inspect", "-f", "{{json .NetworkSettings.Ports}}", "web").stdout == "{}\n"
    assert docker("ps", "--format", "{{.Ports}}").stdout == "\n"
    shown = docker("exec", "web", "ss", "-Htan").stdout + docker("exec", "web", "netstat", "-tan").stdout
    assert ":80 " not in shown  # dockerd has a resolver of its own there
    assert "python3" in host.host("ss", "-tlnpH", "sport = :8719").stdout
    take = "import socket, sys; s = socket.create_connection((sys.argv[1], 8719)); n = 0\nwhile n < 100000: n += len(s.recv(1 << 20))"
    host.client(*python(take), HOST4, check=True)
    assert docker("stats", "--no-stream", "--format", "{{.NetIO}}", "web").stdout == "0B / 0B\n"
    assert "web" in host.graft("ps").stdout


def test_what_a_container_that_joined_brought_goes_with_it(docker, host):
    """Its ports are free at once, its name is gone, and what comes later may ask for less; also after a restart of it."""
    sleep = ("/busybox", "sleep", "100")
    docker.run("-d", "--name", "first", "--network", "none", "--label", "graft.publish=8741:81", argv=sleep)
    joins = ("-d", "--network", "container:first", "--label", "graft.netadmin=on", "--label", "graft.publish=8740:80")
    docker.run(*joins, "--name", "second", argv=sleep)

    def published():
        return next(row["publish"] for row in json.loads(host.graft("ps", "-j", check=True).stdout) if row["name"] == "first")

    def members():
        (one,) = json.loads((host.run_dir / "state.json").read_text())["tenants"]
        return len(one["members"])

    both, own = ["8741:81/tcp", "8740:80/tcp"], ["8741:81/tcp"]
    assert (published(), members()) == (both, 2)
    docker("restart", "-t", "0", "second")
    assert (published(), members()) == (both, 2)
    docker("exec", "second", "/busybox", "true")
    assert (published(), members()) == (both, 2), "an exec that has ended is no member"
    docker("rm", "-f", "second")
    wait_for(lambda: published() == own, "the port is free")
    wait_for(lambda: members() == 1, "it is forgotten")
    docker.run("--rm", "--network", "none", "-p", "8740:80", argv=("/busybox", "true"))
    docker.run("--rm", "--network", "container:first", "--label", "graft.publish=8742:80", argv=("/busybox", "true"))
    wait_for(lambda: published() == own, "nor has a short one left anything")
    assert host.graft("inspect", "first").returncode == 0
