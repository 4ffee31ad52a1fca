"""The peers of `graft bench`: ways to run the same programs, on the host, under graft, and in other networking.

A peer starts servers that the laboratory's client can reach, and runs clients. Each peer has its own ports, which
have the same number inside and outside. slirp4netns and pasta forward all of them from the start.
"""

import json
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from graft.bench.lab import GRAFT, HOST4, TIMEOUT, Lab, wait_for

PORTS = 12  # how many each peer has
BRIDGE = "172.30.{}"
MACVLAN4 = "10.77.0.9"


class Peer:
    """The host's own stack, and the base class of the other peers. @index sets the peer's ports, from `first` up."""

    name = "host"
    title = "the host's own stack"
    needs: tuple[str, ...] = ()
    servers_at = HOST4

    def __init__(self, lab: Lab, index: int) -> None:
        self.lab = lab
        self.first = 20000 + 100 * index
        self.running: list[subprocess.Popen[str]] = []

    @classmethod
    def reason(cls) -> str:
        """Return why this peer cannot run on this machine; "" if it can."""
        missing = [tool for tool in cls.needs if not shutil.which(tool)]
        return f"not installed: {', '.join(missing)}" if missing else ""

    def start(self) -> None:
        """Create what the peer needs: a netns, a daemon, an endpoint."""

    def close(self) -> None:
        """Remove what start() created."""

    def wrap(self, argv: tuple[Any, ...], ports: tuple[int, ...]) -> list[str]:  # noqa: ARG002 - others publish
        """Return the command line that, on the host, runs @argv inside the peer, with @ports published."""
        return list(map(str, argv))

    def serve(self, slot: int, argv: tuple[Any, ...], *, udp: bool = False) -> tuple[str, int]:
        """Start a server inside the peer, and wait until it answers. Returns address and port for the client.

        @slot: which of the peer's ports; "{port}" in @argv stands for it. Raises TimeoutError.
        """
        port = self.first + slot
        command = tuple(str(word).replace("{port}", str(port)) for word in argv)
        null = subprocess.DEVNULL
        self.running.append(self.lab.spawn(*self.wrap(command, (port,)), stdout=null, stderr=null))
        if not udp:
            wait_for(lambda: self._answers(port), f"{self.name}: {command[0]} on port {port}", 20)
        else:
            time.sleep(1.0)
        return self.servers_at, port

    def _answers(self, port: int) -> bool:
        code = f"import socket; socket.create_connection(('{self.servers_at}', {port}), 1).close()"
        return self.lab.client("/usr/bin/python3", "-I", "-c", code).returncode == 0

    def run(self, *argv: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a client inside the peer and wait for its end."""
        return self.lab.host(*self.wrap(argv, ()), **options)

    def neighbour(self) -> str:
        """Return the address at which another container on this host reaches a server of this peer."""
        return "127.0.0.1"

    def end_servers(self) -> None:
        """End the servers of the current case."""
        for process in self.running:
            self.lab.end(process)
            self.lab.started.remove(process)
        self.running.clear()


class Graft(Peer):
    """`graft run`, with ports published by -p."""

    name = "graft"
    title = "graft run, any program"
    options: tuple[str, ...] = ()

    def wrap(self, argv: tuple[Any, ...], ports: tuple[int, ...]) -> list[str]:
        words: list[str] = [str(GRAFT), "run", *self.options]
        for port in ports:
            words += ["-p", f"{port}:{port}", "-p", f"{port}:{port}/udp"]
        return [*words, "--", *map(str, argv)]

    def neighbour(self) -> str:
        return HOST4


class Accel(Graft):
    """`graft run --accel`, which preloads a library; so it is for dynamically linked programs."""

    name = "graft-accel"
    title = "graft run --accel, dynamic programs"
    options = ("--accel",)


class Local(Graft):
    """Two containers that meet at an endpoint of type local."""

    name = "graft-local"
    title = "graft, an endpoint of type local"
    endpoint = "bench-local"
    address = "10.77.99.1"

    def start(self) -> None:
        self.lab.graft("endpoint", "add", self.endpoint, "type", "local", check=True)

    def close(self) -> None:
        self.lab.graft("endpoint", "del", self.endpoint)

    def wrap(self, argv: tuple[Any, ...], ports: tuple[int, ...]) -> list[str]:
        rules = [f"--ingress=0.0.0.0:{port}={self.endpoint}" for port in ports]
        if not ports:
            rules = [f"--egress-rule={self.address}/32={self.endpoint}"]
        return [str(GRAFT), "run", *rules, "--", *map(str, argv)]

    def _answers(self, port: int) -> bool:
        code = f"import socket; socket.create_connection(('{self.address}', {port}), 1).close()"
        return self.run("/usr/bin/python3", "-I", "-c", code).returncode == 0

    def neighbour(self) -> str:
        return self.address


class InNamespace(Peer):
    """Base class of peers whose container is a netns that is made here, without an engine."""

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


class Bridge(InNamespace):
    """A veth pair, a bridge, DNAT and MASQUERADE, as container engines set them up."""

    name = "bridge"
    title = "veth + bridge + NAT, by hand"
    needs = ("iptables",)

    def connect(self) -> None:
        net, ip, host = BRIDGE.format(self.first // 100 % 100), self.lab.ip, self.lab.host_ns
        veth = f"vb{self.first}"
        ip("link", "add", veth, "netns", host, "type", "veth", "peer", "name", "eth0", "netns", self.ns)
        ip("-n", host, "link", "add", "gbench0", "type", "bridge")
        ip("-n", host, "link", "set", veth, "master", "gbench0")
        ip("-n", host, "address", "add", f"{net}.1/24", "dev", "gbench0")
        ip("-n", self.ns, "address", "add", f"{net}.2/24", "dev", "eth0")
        for ns, link in ((host, veth), (host, "gbench0"), (self.ns, "eth0")):
            ip("-n", ns, "link", "set", link, "up")
        ip("-n", self.ns, "route", "add", "default", "via", f"{net}.1")
        self.lab.host("sysctl", "-qw", "net.ipv4.ip_forward=1", check=True)
        table = ("iptables", "-w", "-t", "nat", "-A")
        ports = f"{self.first}:{self.first + PORTS - 1}"
        for protocol in ("tcp", "udp"):
            match = ("-m", "addrtype", "--dst-type", "LOCAL", "-p", protocol, "--dport", ports)
            self.lab.host(*table, "PREROUTING", *match, "-j", "DNAT", "--to-destination", f"{net}.2", check=True)
        for way in ("-i", "-o"):  # a dockerd in the same netns sets FORWARD's policy to DROP
            self.lab.host("iptables", "-w", "-I", "FORWARD", way, "gbench0", "-j", "ACCEPT", check=True)
        masquerade = ("-s", f"{net}.0/24", "!", "-o", "gbench0", "-j", "MASQUERADE")
        self.lab.host(*table, "POSTROUTING", *masquerade, check=True)
        self.net = net

    def neighbour(self) -> str:
        return f"{self.net}.2"


class Macvlan(InNamespace):
    """macvlan in bridge mode on the host's device: the container has its own address on the wire, no port mapping."""

    name = "macvlan"
    title = "macvlan, an address on the wire"
    servers_at = MACVLAN4

    def connect(self) -> None:
        ip = self.lab.ip
        ip("-n", self.lab.host_ns, "link", "add", "gmv0", "link", "veth0", "type", "macvlan", "mode", "bridge")
        ip("-n", self.lab.host_ns, "link", "set", "gmv0", "netns", self.ns, "name", "eth0")
        ip("-n", self.ns, "address", "add", f"{MACVLAN4}/24", "dev", "eth0")
        ip("-n", self.ns, "link", "set", "eth0", "up")


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
    """slirp4netns(1), with the large MTU that rootless engines set."""

    name = "slirp4netns"
    title = "slirp4netns"
    needs = ("slirp4netns",)

    def connect(self) -> None:
        api = self.lab.work / "slirp.sock"
        self.lab.spawn(
            *("slirp4netns", "-c", "--mtu=65520", "--disable-dns", "--netns-type=path", "-a", api),
            *(f"/run/netns/{self.ns}", "tap0"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: api.exists() and "10.0.2.100" in self._addresses(), "slirp4netns")
        for port in range(self.first, self.first + PORTS):
            for protocol in ("tcp", "udp"):
                self._order(api, {"proto": protocol, "host_addr": "0.0.0.0", "host_port": port, "guest_port": port})

    def _addresses(self) -> str:
        return subprocess.run(
            ("ip", "-n", self.ns, "-4", "address", "show", "tap0"), capture_output=True, text=True
        ).stdout

    @staticmethod
    def _order(api: Path, arguments: dict[str, Any]) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(api))
            sock.sendall(json.dumps({"execute": "add_hostfwd", "arguments": arguments}).encode())
            sock.recv(4096)


class Docker(Peer):
    """A dockerd in the laboratory's host netns, with the default bridge, and without the userland proxy."""

    name = "docker"
    title = "docker, bridge + NAT"
    needs = ("dockerd", "docker")
    image = "graft-bench"

    def __init__(self, lab: Lab, index: int) -> None:
        super().__init__(lab, index)
        self.root = lab.work / "docker"
        self.names: list[str] = []
        self.key_existed = Path("/etc/docker/key.json").exists()
        self.address = f"unix://{self.root}/sock"
        self.daemon: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.root.mkdir()
        with open(self.root / "log", "w") as log:
            self.daemon = self.lab.spawn(
                *(
                    "dockerd",
                    "-H",
                    self.address,
                    "--data-root",
                    self.root / "data",
                    "--exec-root",
                    self.root / "exec",
                ),
                *("-p", self.root / "pid", "--storage-driver", "vfs", "--ip6tables=false", "--userland-proxy=false"),
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: self._docker("version").returncode == 0, "dockerd", 30)
        self._import()

    def _import(self) -> None:
        """Import an image of nothing but mount points, in which the host's own programs run."""
        tree = self.root / "image"
        for path in ("usr", "etc", "dev", "proc", "sys", "root", "run", "tmp", "var/lib", "var/log"):
            (tree / path).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (tree / name).symlink_to(f"usr/{name}")
        archive = self.root / "image.tar"
        subprocess.run(("tar", "-C", tree, "-cf", archive, "."), check=True, timeout=TIMEOUT)
        self._docker("import", archive, self.image, check=True)

    def _docker(self, *argv: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
        command = ("docker", "-H", self.address, *map(str, argv))
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, **options)

    def wrap(self, argv: tuple[Any, ...], ports: tuple[int, ...]) -> list[str]:
        work = self.lab.work
        words = ["docker", "-H", self.address, "run", "--rm"]
        for place in ("/usr:/usr:ro", "/etc:/etc:ro", f"{work}:{work}", "/var/lib:/var/lib:ro"):
            words += ["-v", place]
        for port in ports:
            name = f"graft-bench-{port}"
            self.names.append(name)
            words += ["--name", name, "-p", f"{port}:{port}", "-p", f"{port}:{port}/udp"]
        return [*words, "-w", str(work), self.image, *map(str, argv)]

    def neighbour(self) -> str:
        form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return self._docker("inspect", "-f", form, self.names[-1], check=True).stdout.strip()

    def end_servers(self) -> None:
        if self.names:
            self._docker("rm", "-f", *self.names)
            self.names.clear()
        for process in self.running:
            self.lab.end(process, signal.SIGKILL)
            self.lab.started.remove(process)
        self.running.clear()

    def close(self) -> None:
        self.end_servers()
        if self.daemon:
            self.lab.end(self.daemon)
        for place in (self.root / "exec/netns").glob("*"):
            subprocess.run(("umount", place), capture_output=True)
        if not self.key_existed:
            Path("/etc/docker/key.json").unlink(missing_ok=True)
        for path in sorted(Path("/sys/fs/cgroup").glob("*/docker"), reverse=True):
            subprocess.run(("rmdir", path), capture_output=True)


PEERS: tuple[type[Peer], ...] = (Peer, Graft, Accel, Local, Docker, Bridge, Macvlan, Pasta, Slirp)
