"""What is a peer of `graft bench`: the host itself, graft in its ways, and the base class of the others.

A peer starts servers that the laboratory's client can reach, and runs clients. Each peer has its own ports, which
have the same number inside and outside.
"""

import shutil
import subprocess
import time
from typing import Any

from graft.bench.lab import GRAFT, HOST4, Lab, wait_for
from graft.rules.request import SETTINGS

PORTS = 12  # how many each peer has


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


class Direct(Graft):
    """`graft run --direct`: the command stays in the host's netns, so that nothing traps its internet sockets."""

    name = "graft-direct"
    title = "graft run --direct, any program"
    options = ("--direct",)

    @classmethod
    def reason(cls) -> str:
        return "" if any("--direct" in setting.options for setting in SETTINGS) else "this graft has no --direct"


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
