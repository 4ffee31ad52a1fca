"""Three nodes of a swarm on one machine: network namespaces on one switch, each with a dockerd and a graftd."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.bench.lab import GRAFT, Lab, wait_for
from graft.engines.swarm import PLUGIN
from tests.system.engines import Dockerd

CLIENT = "10.78.0.9"  # outside of the swarm, on the same wire
WIRE = "swarm0"
MOVE = 60.0  # seconds, within which a task runs
AWAY = 40.0  # seconds after which swarm gives a node up: three heartbeats of at most 6 s, and what it does then


class Node(Dockerd):
    """A machine of the swarm: a dockerd whose default runtime is graft's, and the plugin."""

    def __init__(self, lab: Lab, number: int) -> None:
        self.number = number
        self.at = f"10.78.0.{number}"
        super().__init__(lab, lab.work / "docker")
        self.identity = ""  # of the node in the swarm

    def start(self, *more: Any) -> None:
        super().start("--default-runtime", "graft", *more)

    def kill(self) -> None:
        """Kill dockerd; its containerd ends with it."""
        pid = int((self.root / "exec/containerd/containerd.pid").read_text())
        self.lab.end(self.daemon, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), "containerd's end")

    def stop(self) -> None:
        super().stop()
        while subprocess.run(("umount", self.root / "data"), capture_output=True).returncode == 0:
            pass  # a dockerd that is killed leaves its data mounted

    def graft(self, *argv: Any) -> str:
        """What a command of graft's for this dockerd prints."""
        env = {**self.lab.env, "DOCKER_HOST": self.address}
        done = self.lab.host(GRAFT, *argv, env=env)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def install(self) -> str:
        """`graft install docker --swarm`; what it prints."""
        root = self.lab.work / "root"
        return self.graft("install", "docker", "--swarm", "--yes", "--root", root)

    def wire(self, state: str) -> None:
        """Set the node's end of the wire "up" or "down"."""
        self.lab.host("ip", "link", "set", WIRE, state, check=True)

    def leave(self) -> None:
        """Leave the swarm, which ends the containers of its services."""
        self("swarm", "leave", "-f", check=False)
        wait_for(lambda: not self("ps", "-q", check=False).stdout, "the end of services' containers", 30)
        self("plugin", "rm", "-f", PLUGIN, check=False)


class Swarm:
    """The nodes, of which all are managers; the first one gives the orders."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        first = nodes[0]
        first("swarm", "init", "--advertise-addr", first.at, "--listen-addr", first.at)
        token = first("swarm", "join-token", "-q", "manager").stdout.strip()
        for node in nodes[1:]:
            node("swarm", "join", "--token", token, "--advertise-addr", node.at, "--listen-addr", node.at, f"{first.at}:2377")
        for node in nodes:
            node("network", "create", "--config-only", "--subnet", f"10.79.{node.number}.0/24", "gnet-node")
            node.identity = node("info", "-f", "{{.Swarm.NodeID}}").stdout.strip()
        first("network", "create", "--scope", "swarm", "--config-from", "gnet-node", "-d", PLUGIN, "gnet")

    def __call__(self, *argv: Any, **options: Any) -> str:
        """An order to the first node; what it prints."""
        return self.nodes[0](*argv, **options).stdout.strip()

    def create(self, name: str, *options: Any, argv: tuple[Any, ...]) -> None:
        """`docker service create` with the host's programs."""
        places = (f"type=bind,src={place},dst={place},ro" for place in ("/usr", "/etc", "/var/lib"))
        mounts = [word for place in places for word in ("--mount", place)]
        fixed = ("-d", "--name", name, "--no-resolve-image", "--restart-delay", "200ms", "--stop-grace-period", "1s", *mounts)
        self("service", "create", *fixed, *options, "host:latest", *argv)

    def tasks(self, name: str) -> list[Node]:
        """The nodes on which tasks of a service run that are to run."""
        told = self("service", "ps", "-q", "--filter", "desired-state=running", name).split()
        rows = self("inspect", "--type", "task", "-f", "{{.Status.State}} {{.NodeID}}", *told).splitlines() if told else []
        running = [row.split()[1] for row in rows if row.startswith("running ")]
        return [node for number in running for node in self.nodes if node.identity == number]

    def running(self, name: str, count: int) -> list[Node]:
        """The nodes on which @count tasks of a service run, once they do. Raises AssertionError with their errors."""
        try:
            wait_for(lambda: len(self.tasks(name)) == count, f"{count} tasks of {name}", MOVE)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self('service', 'ps', '--no-trunc', name)}") from None
        return self.tasks(name)

    def errors(self, name: str) -> str:
        """What swarm says of a service's tasks."""
        return self("service", "ps", "--no-trunc", "--format", "{{.Error}}", name)


def _plug(switch: str, namespace: str, address: str, port: str) -> None:
    """Lay a wire from a namespace to the switch."""
    Lab.ip("link", "add", WIRE, "netns", namespace, "type", "veth", "peer", "name", port, "netns", switch)
    Lab.ip("-n", switch, "link", "set", port, "master", "br0", "up")
    Lab.ip("-n", namespace, "address", "add", f"{address}/24", "dev", WIRE)
    Lab.ip("-n", namespace, "link", "set", WIRE, "up")


@contextlib.contextmanager
def swarm_of(labs: list[Lab]) -> Iterator[Swarm]:
    """A swarm of one node in each laboratory's host; the first one's client is on the wire as CLIENT."""
    switch = f"{labs[0].tag}-s"
    Lab.ip("netns", "add", switch)
    nodes: list[Node] = []
    try:
        Lab.ip("-n", switch, "link", "add", "br0", "type", "bridge")
        Lab.ip("-n", switch, "link", "set", "br0", "up")
        _plug(switch, labs[0].client_ns, CLIENT, "client")
        for number, lab in enumerate(labs, 1):
            _plug(switch, lab.host_ns, f"10.78.0.{number}", f"node{number}")
            lab.start_daemon()
            nodes.append(Node(lab, number))
        for node in nodes:
            node.install()
        yield Swarm(nodes)
    finally:
        for node in nodes:
            node.leave()
            node.stop()
        Lab.ip("netns", "del", switch)
