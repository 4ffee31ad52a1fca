"""The peers whose container is a network namespace made by hand: what connects it is what is measured.

slirp4netns, pasta and bypass4netns forward all of a peer's ports from the start.
"""

import functools
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from graft.bench.lab import ROOT, Lab, wait_for
from graft.bench.peer import PORTS, Peer

LISTENER = "import sys; sys.path.insert(0, sys.argv[1]); from graft.bench.listener import main; main(*sys.argv[2:])"
BRIDGE = "172.30.{}"
MACVLAN4 = "10.77.0.9"
IPVLAN4, IPVLAN_CLIENT4 = "10.77.2.9", "10.77.2.2"


@functools.cache
def _lacks_device(kind: str) -> str:
    """Return why there can be no device of this kind; "" if there can, or if it takes root to know.

    A device is made in a netns that ends with the command. ipvlan lacks the device that it stands on; what counts is
    whether the kernel knows the kind.
    """
    known = subprocess.run(("ip", "link", "help"), capture_output=True, text=True).stderr
    if kind not in known.split():
        return f"ip(8) of this system knows no {kind}"
    command = ("unshare", "--net", "ip", "link", "add", "probe", "type", kind)
    said = subprocess.run(command, capture_output=True, text=True).stderr
    return f"this kernel has no {kind}" if "Unknown device type" in said or "not supported" in said else ""


def add_forward(api: Path, port: int) -> None:
    """Have the slirp4netns whose API is at @api forward @port of the host, TCP and UDP. Raises OSError."""
    for protocol in ("tcp", "udp"):
        arguments = {"proto": protocol, "host_addr": "0.0.0.0", "host_port": port, "guest_port": port}
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(api))
            sock.sendall(json.dumps({"execute": "add_hostfwd", "arguments": arguments}).encode())
            sock.recv(4096)


class InNamespace(Peer):
    """Base class of peers whose container is a netns that is made here, without an engine."""

    device = ""  # the kind of network device that it needs, if it is not everywhere

    @classmethod
    def reason(cls) -> str:
        return super().reason() or (_lacks_device(cls.device) if cls.device else "")

    def __init__(self, lab: Lab, index: int) -> None:
        super().__init__(lab, index)
        self.ns = f"{lab.tag}-{self.name[:2]}{self.first // 100 % 100}"

    def start(self) -> None:
        self.lab.ip("netns", "add", self.ns)
        self.lab.ip("-n", self.ns, "link", "set", "lo", "up")
        self.connect()

    def connect(self) -> None:
        """Connect the netns to the host."""

    def close(self) -> None:
        if Path("/run/netns", self.ns).exists():
            self.lab.ip("netns", "del", self.ns)

    def wrap(self, argv: tuple[Any, ...], ports: tuple[int, ...]) -> list[str]:  # noqa: ARG002 - forwarded already
        return ["nsenter", f"--net=/run/netns/{self.ns}", *map(str, argv)]


class Translated(InNamespace):
    """Base class of peers with a network of their own behind the host's NAT (DNAT and MASQUERADE)."""

    needs = ("iptables",)

    def translate(self, net: str, device: str) -> None:
        """Have the host forward the peer's ports to the second address of @net, which is behind @device."""
        self.lab.host("sysctl", "-qw", "net.ipv4.ip_forward=1", check=True)
        table = ("iptables", "-w", "-t", "nat", "-A")
        ports = f"{self.first}:{self.first + PORTS - 1}"
        for protocol in ("tcp", "udp"):
            match = ("-m", "addrtype", "--dst-type", "LOCAL", "-p", protocol, "--dport", ports)
            self.lab.host(*table, "PREROUTING", *match, "-j", "DNAT", "--to-destination", f"{net}.2", check=True)
        for way in ("-i", "-o"):  # a dockerd in the same netns sets FORWARD's policy to DROP
            self.lab.host("iptables", "-w", "-I", "FORWARD", way, device, "-j", "ACCEPT", check=True)
        masquerade = ("-s", f"{net}.0/24", "!", "-o", device, "-j", "MASQUERADE")
        self.lab.host(*table, "POSTROUTING", *masquerade, check=True)

    def net(self) -> str:
        """Return the peer's network, without the last number: the host has 1 in it, the peer has 2."""
        return BRIDGE.format(self.first // 100 % 100)

    def neighbour(self) -> str:
        return f"{self.net()}.2"


class Bridge(Translated):
    """A veth pair, a bridge, DNAT and MASQUERADE, as container engines set them up."""

    name = "bridge"
    title = "veth + bridge + NAT, by hand"

    def connect(self) -> None:
        net, ip, host = self.net(), self.lab.ip, self.lab.host_ns
        veth = f"vb{self.first}"
        ip("link", "add", veth, "netns", host, "type", "veth", "peer", "name", "eth0", "netns", self.ns)
        ip("-n", host, "link", "add", "gbench0", "type", "bridge")
        ip("-n", host, "link", "set", veth, "master", "gbench0")
        ip("-n", host, "address", "add", f"{net}.1/24", "dev", "gbench0")
        ip("-n", self.ns, "address", "add", f"{net}.2/24", "dev", "eth0")
        for ns, link in ((host, veth), (host, "gbench0"), (self.ns, "eth0")):
            ip("-n", ns, "link", "set", link, "up")
        ip("-n", self.ns, "route", "add", "default", "via", f"{net}.1")
        self.translate(net, "gbench0")


class Netkit(Translated):
    """A netkit pair instead of the veth pair, routed, without a bridge and without BPF; the NAT is the same."""

    name = "netkit"
    title = "netkit, routed + NAT, by hand"
    device = "netkit"

    def connect(self) -> None:
        net, ip, host = self.net(), self.lab.ip, self.lab.host_ns
        near = f"nk{self.first}"
        ip("-n", host, "link", "add", near, "type", "netkit", "peer", "name", "eth0", "netns", self.ns)
        for ns, link, last in ((host, near, 1), (self.ns, "eth0", 2)):
            ip("-n", ns, "address", "add", f"{net}.{last}/24", "dev", link)
            ip("-n", ns, "link", "set", link, "up")
        ip("-n", self.ns, "route", "add", "default", "via", f"{net}.1")
        self.translate(net, near)


class Macvlan(InNamespace):
    """macvlan in bridge mode on the host's device: the container has its own address on the wire, no port mapping."""

    name = "macvlan"
    title = "macvlan, an address on the wire"
    device = "macvlan"
    servers_at = MACVLAN4

    def connect(self) -> None:
        ip = self.lab.ip
        ip("-n", self.lab.host_ns, "link", "add", "gmv0", "link", "veth0", "type", "macvlan", "mode", "bridge")
        ip("-n", self.lab.host_ns, "link", "set", "gmv0", "netns", self.ns, "name", "eth0")
        ip("-n", self.ns, "address", "add", f"{MACVLAN4}/24", "dev", "eth0")
        ip("-n", self.ns, "link", "set", "eth0", "up")


class Ipvlan(InNamespace):
    """ipvlan in L2 mode: the container has its own address on the wire, no port mapping.

    It gets a wire of its own beside the laboratory's, because a device serves macvlan or ipvlan, not both.
    """

    name = "ipvlan"
    title = "ipvlan, an address on the wire"
    device = "ipvlan"
    servers_at = IPVLAN4
    wire = "veth2"

    def connect(self) -> None:
        ip, host, client = self.lab.ip, self.lab.host_ns, self.lab.client_ns
        ip("link", "add", self.wire, "netns", host, "type", "veth", "peer", "name", self.wire, "netns", client)
        ip("-n", client, "address", "add", f"{IPVLAN_CLIENT4}/24", "dev", self.wire)
        for ns in (host, client):
            ip("-n", ns, "link", "set", self.wire, "up")
            self.lab.shape(ns, self.wire)
        ip("-n", host, "link", "add", "gip0", "link", self.wire, "type", "ipvlan", "mode", "l2")
        ip("-n", host, "link", "set", "gip0", "netns", self.ns, "name", "eth0")
        ip("-n", self.ns, "address", "add", f"{IPVLAN4}/24", "dev", "eth0")
        ip("-n", self.ns, "link", "set", "eth0", "up")
        ip("-n", self.ns, "route", "add", "default", "via", IPVLAN_CLIENT4)

    def close(self) -> None:
        super().close()
        self.lab.ip("-n", self.lab.host_ns, "link", "del", self.wire)


class Pasta(InNamespace):
    """pasta(1), with the options that rootless Podman gives it."""

    name = "pasta"
    title = "pasta"
    needs = ("pasta",)

    def connect(self) -> None:
        last = self.first + PORTS - 1
        self.lab.host(
            *("pasta", "-q", "--runas", "0:0", "--config-net", "-4", "-i", "veth0", "-a", "10.0.2.100", "-n", "24"),
            *("-g", "10.0.2.2", "-t", f"{self.first}-{last}", "-u", f"{self.first}-{last}", "-T", "none"),
            *("-U", "none", "--netns", f"/run/netns/{self.ns}", "-P", self.lab.work / "pasta.pid"),
            check=True,
        )


class Slirp(InNamespace):
    """slirp4netns(1), with the large MTU that rootless engines set. It forwards all ports from the start."""

    name = "slirp4netns"
    title = "slirp4netns"
    needs: tuple[str, ...] = ("slirp4netns",)

    def connect(self) -> None:
        api = self.lab.work / f"{self.name}-slirp.sock"
        self.lab.spawn(
            *("slirp4netns", "-c", "--mtu=65520", "--disable-dns", "--netns-type=path", "-a", api),
            *(f"/run/netns/{self.ns}", "tap0"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: api.exists() and "10.0.2.100" in self._addresses(), "slirp4netns")
        self.publish(api)

    def publish(self, api: Path) -> None:
        """Forward the ports."""
        for port in self._ports():
            add_forward(api, port)

    def _ports(self) -> range:
        return range(self.first, self.first + PORTS)

    def _addresses(self) -> str:
        return subprocess.run(
            ("ip", "-n", self.ns, "-4", "address", "show", "tap0"), capture_output=True, text=True
        ).stdout


class Bypass(Slirp):
    """bypass4netns beside slirp4netns, as rootless nerdctl has it: host sockets by a seccomp listener.

    It gets the listener from bench/listener.py, instead of from runc by listenerPath, with the same filter.
    """

    name = "bypass4netns"
    title = "bypass4netns with slirp4netns"
    needs = ("bypass4netns", "slirp4netns")

    def publish(self, api: Path) -> None:  # noqa: ARG002 - slirp4netns would hold the ports
        self.agent = self.lab.work / "bypass4netns.sock"
        published = [word for port in self._ports() for word in ("-p", f"{port}:{port}")]
        self.lab.spawn(
            *("bypass4netns", f"--socket={self.agent}", "--ignore=127.0.0.0/8,10.0.2.0/24", *published),
            env={**self.lab.env, "XDG_RUNTIME_DIR": str(self.lab.work)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self.agent.exists, "bypass4netns")

    def wrap(self, argv: tuple[Any, ...], ports: tuple[int, ...]) -> list[str]:
        return super().wrap((sys.executable, "-I", "-c", LISTENER, ROOT, self.agent, *argv), ports)


class Passed(InNamespace):
    """A netns without any network, whose server is passed a listening socket of the host's (sd_listen_fds(3)).

    The server works as on the host: the upper bound of what a container's server can do. There are no clients in it.
    nginx has an environment variable of its own for that.
    """

    name = "passed"
    title = "a passed socket, no network: the bound for servers"
    code = """
import os, socket, sys
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.bind(("", int(sys.argv[1])))
sock.listen(4096)
sock.setblocking(False)
os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)  # dup2() leaves a descriptor alone that is 3 already
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "NGINX": "3;"}
os.execvp(sys.argv[2], sys.argv[2:])
"""

    def wrap(self, argv: tuple[Any, ...], ports: tuple[int, ...]) -> list[str]:
        (port,) = ports
        return ["/usr/bin/python3", "-I", "-c", self.code, str(port), *super().wrap(argv, ports)]
