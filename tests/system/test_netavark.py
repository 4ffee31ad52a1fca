"""Networks of Podman with netavark, made by `podman network create -d graft`; what both backends have: test_podman.py."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from graft.bench.lab import HOST4, wait_for
from tests.conftest import python
from tests.system.engines import CURL, NETAVARK, engine_version, nginx_conf, reach, started_podman

GRAFT = ("--annotation", "graft=on")
WEB = ("nginx", "-c", "/nginx.conf")
GENERATORS = ("/usr/libexec/podman/quadlet", "/usr/lib/podman/quadlet")
SERVER = """
import socket, sys
for port in map(int, sys.argv[1:]):
    sock = socket.socket(socket.AF_INET6)
    sock.bind(("::", port))
    sock.listen()
    globals()[f"kept{port}"] = sock
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module", params=["runc", "crun"])
def podman(request, host):
    if engine_version("podman") < NETAVARK:
        pytest.skip("Podman 4 of Debian 12 has CNI; 'make fresh SUITE=trixie' has Podman 5")
    with started_podman(host, request.param, request.param) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _nothing_is_left(podman, host):
    yield
    podman("rm", "-f", "-a", "-t", "0")
    wait_for(lambda: not host.containers(), "the end of all containers")
    for name in podman("network", "ls", "-q", "--filter", "driver=graft").stdout.split():
        if name != "graft":
            podman("network", "rm", "-f", name)
    wait_for(lambda: "10.98." not in host.host("ip", "address").stdout, "the addresses' end")


def networks_of(podman, name):
    return json.loads(podman("inspect", name).stdout)[0]["NetworkSettings"]["Networks"]


def test_a_network_of_its_own(podman, host):
    """Its subnet is chosen; the container has its address there, its names, and its port on the host."""
    assert podman("network", "create", "-d", "graft", "mine").stdout == "mine\n"
    made = json.loads(podman("network", "inspect", "mine").stdout)[0]
    assert (made["driver"], made["dns_enabled"], made["internal"]) == ("graft", True, False)
    assert made["subnets"][0]["subnet"].startswith(("10.98.", "10.99."))
    podman.run(
        *("-d", "--name", "web", "--network", "mine:alias=www", *GRAFT, "-p", "8841:80", *nginx_conf(host)), argv=WEB
    )
    host.wait_listening(8841)
    assert reach(host, 8841) == "from nginx\n"
    found = networks_of(podman, "web")["mine"]
    assert found["Gateway"] == made["subnets"][0]["gateway"]
    shown = json.loads(host.graft("ps", "-j").stdout)[0]
    assert (shown["name"], shown["addresses"]) == ("web", [found["IPAddress"]])
    script = "for n in web www; do curl -sS --max-time 5 http://$n/; done; cat /etc/resolv.conf"
    told = podman.run("--rm", "--network", "mine", *GRAFT, argv=("/busybox", "sh", "-c", script)).stdout
    assert told.count("from nginx\n") == 2
    assert f"nameserver {found['Gateway']}" in told
    elsewhere = podman.run("--rm", *GRAFT, argv=(*CURL, "http://web/"), check=False)
    assert "Could not resolve host" in elsewhere.stderr


def test_addresses_and_ranges_of_ports(podman, host):
    podman("network", "create", "-d", "graft", "--subnet", "10.98.7.0/24", "--subnet", "fd98:7::/64", "both")
    words = ("--ip", "10.98.7.9", "--ip6", "fd98:7::9", "-p", "8842-8844:80-82", "-p", "127.0.0.1:8845:83")
    podman.run("-d", "-i", "--name", "srv", "--network", "both", *words, *GRAFT, argv=(*python(SERVER), "80", "81", "82", "83"))
    for port in (8842, 8843, 8844, 8845):
        host.wait_listening(port)
    found = networks_of(podman, "srv")["both"]
    assert (found["IPAddress"], found["GlobalIPv6Address"]) == ("10.98.7.9", "fd98:7::9")
    code = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).getpeername()[:2])"
    for address, port in (("10.98.7.9", 80), ("fd98:7::9", 81), (HOST4, 8843), ("127.0.0.1", 8845)):
        assert host.host(*python(code), address, port).stdout == f"{(address, port)}\n"
    assert "Refused" in host.client(*python(code), HOST4, "8845").stderr


def test_on_two_networks_and_connected_later(podman, host):
    for n in (1, 2):
        podman("network", "create", "-d", "graft", "--subnet", f"10.98.{n}.0/24", f"net{n}")
    podman.run("-d", "--name", "web", "--network", "net1", *GRAFT, *nginx_conf(host), argv=WEB)
    asks = ("--rm", "--network", "net2", *GRAFT)
    assert podman.run(*asks, argv=(*CURL, "http://web/"), check=False).returncode == 6
    podman("network", "connect", "--alias", "second", "net2", "web")
    assert set(networks_of(podman, "web")) == {"net1", "net2"}
    wait_for(lambda: podman.run(*asks, argv=(*CURL, "http://second/"), check=False).stdout == "from nginx\n", "its name")
    podman("network", "disconnect", "net2", "web")
    assert podman.run(*asks, argv=(*CURL, "http://second/"), check=False).returncode == 6
    assert podman.run("--rm", "--network", "net1", *GRAFT, argv=(*CURL, "http://web/")).stdout == "from nginx\n"


def test_names_can_be_left_out(podman, host):
    podman("network", "create", "-d", "graft", "--disable-dns", "--subnet", "10.98.3.0/24", "silent")
    podman.run("-d", "--name", "web", "--network", "silent", *GRAFT, *nginx_conf(host), argv=WEB)
    told = podman.run("--rm", "--network", "silent", *GRAFT, argv=("cat", "/etc/resolv.conf")).stdout
    assert "10.98.3.1" not in told


def test_what_is_refused(podman):
    """In Podman's own error, and nothing is left of it."""
    for words, message in (
        (("--internal",), "graft: --internal is not supported (give the containers --annotation graft.egress=none)"),
        (("-o", "mtu=1400"), "graft: option 'mtu' is unknown (leave it out)"),
        (("--ipam-driver", "dhcp"), "graft: IPAM driver 'dhcp' is not supported"),
        (("--interface-name", "br9"), "graft: a network has no interface on the host"),
    ):
        done = podman("network", "create", "-d", "graft", *words, "wrong", check=False)
        assert done.returncode
        assert message in done.stderr
    assert "wrong" not in podman("network", "ls", "-q").stdout
    podman("network", "create", "-d", "graft", "--subnet", "10.98.4.0/24", "mine")
    sleeps = ("/busybox", "sleep", "60")
    done = podman.run("--rm", "--network", "mine", "--mac-address", "aa:bb:cc:dd:ee:ff", *GRAFT, argv=sleeps, check=False)
    assert "graft: a container has no link-layer address of its own" in done.stderr
    podman.run("-d", "--name", "one", "--network", "mine", "-p", "8846:80", *GRAFT, argv=sleeps)
    done = podman.run("--rm", "--network", "mine", "-p", "8846:80", *GRAFT, argv=sleeps, check=False)
    assert "graft: -p 8846:80/tcp: host port is published by container 'one'" in done.stderr


QUADLET = """
[Container]
Image=localhost/host:1
ContainerName=unit
Annotation=graft=on
Network=graft
PublishPort=8847:80
Volume=/usr:/usr:ro
Volume=/etc:/etc:ro
CgroupsMode=enabled
Exec=/usr/bin/python3 -m http.server 80
"""


def test_a_quadlet(podman, host):
    """What Podman's generator makes of a unit's file for systemd, by the commands of the unit."""
    directory = host.work / f"quadlet-{podman.root.name}"
    directory.mkdir()
    (directory / "unit.container").write_text(QUADLET)
    generator = next(path for path in GENERATORS if Path(path).exists())
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "QUADLET_UNIT_DIRS": str(directory)}
    made = subprocess.run((generator, "-dryrun"), env=environment, capture_output=True, text=True, check=True).stdout
    commands = {}
    for line in made.splitlines():
        name, _, command = line.partition("=")
        if name.startswith("Exec"):
            commands[name] = shlex.split(command.lstrip("-").replace("%%", "%").replace("%t", str(directory)))
    podman(*commands["ExecStart"][1:])
    host.wait_listening(8847)
    assert "Directory listing" in reach(host, 8847)
    podman(*commands["ExecStop"][1:])
    wait_for(lambda: not host.listening(8847), "its end")
