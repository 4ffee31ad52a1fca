"""The peers of `graft bench --rootless`: what an ordinary user can have. Each is a user of its own.

A container is a network namespace that a user namespace of the user's owns, as rootless engines make it. The user has
no root in there, so that programs do not try to become another one.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.bench.lab import GRAFT, HOST4, ROOT, Lab, wait_for
from graft.bench.networks import LISTENER, add_forward
from graft.bench.peer import PORTS, Peer
from graft.bench.user import User, Users
from graft.kernel import linux


class Rootless(Peer):
    """The host's own stack, for a user."""

    title = "the host's own stack, as an ordinary user"

    def __init__(self, lab: Lab, index: int) -> None:
        super().__init__(lab, index)
        self.users: Users | None = None
        self.index = index

    @property
    def user(self) -> User:
        """The peer's user, from start() on."""
        assert self.users
        return self.users[f"bench{self.index}"]

    def start(self) -> None:
        self.users = Users(self.lab, f"bench{self.index}", first=self.index)
        # pasta and others end their own connections to a server, whose ports the next peer would lack for a minute
        self.lab.host("sysctl", "-q", "net.ipv4.tcp_tw_reuse=1", check=True)

    def close(self) -> None:
        if self.users:
            self.users.close()

    def inside(self, argv: Sequence[Any], ports: tuple[int, ...]) -> list[str]:  # noqa: ARG002 - others publish
        """The command line that runs @argv in the container, for whoever is the user already."""
        return list(map(str, argv))

    def wrap(self, argv: tuple[Any, ...], ports: tuple[int, ...]) -> list[str]:
        for path in (Path(word).parent for word in map(str, argv)):
            if path.parent == self.lab.work:  # a configuration, beside which its server has its files
                os.chown(path, self.user.uid, self.user.uid)
        return self.user.command(*self.inside(argv, ports))


class RootlessGraft(Rootless):
    """`graft run` by the user."""

    name = "graft"
    title = "graft run as an ordinary user"

    def inside(self, argv: Sequence[Any], ports: tuple[int, ...]) -> list[str]:
        words: list[str] = [str(GRAFT), "run"]
        for port in ports:
            words += ["-p", f"{port}:{port}", "-p", f"{port}:{port}/udp"]
        return [*words, "--", *map(str, argv)]

    def start(self) -> None:
        super().start()
        assert self.users
        self.users.start_daemon()

    def neighbour(self) -> str:
        return HOST4


class InUserNamespace(Rootless):
    """Base class of peers whose container is a netns in a user namespace, which a program of the user's connects."""

    def start(self) -> None:
        super().start()
        self.holder = self.user.spawn("unshare", "--user", "--map-current-user", "--net", "sleep", "100000")
        wait_for(lambda: linux.comm(self.holder.pid) == "sleep", "the user's namespaces")
        self.connect(self.user)

    def connect(self, user: User) -> None:
        """Connect the netns to the host."""
        raise NotImplementedError

    def enter(self, *argv: Any) -> list[str]:
        """The command line that runs @argv in the namespaces, for the user."""
        spaces = ("--user", "--preserve-credentials", "--net", "-t", self.holder.pid)
        return list(map(str, ("nsenter", *spaces, *argv)))

    def inside(self, argv: Sequence[Any], ports: tuple[int, ...]) -> list[str]:  # noqa: ARG002 - forwarded already
        return self.enter(*argv)


class RootlessPasta(InUserNamespace):
    """pasta(1), with the options that rootless Podman gives it."""

    name = "pasta"
    title = "pasta, as an ordinary user"
    needs = ("pasta",)

    def connect(self, user: User) -> None:
        ports = f"{self.first}-{self.first + PORTS - 1}"
        user(
            *("pasta", "-q", "--config-net", "-4", "-i", "veth0", "-a", "10.0.2.100", "-n", "24", "-g", "10.0.2.2"),
            *("-t", ports, "-u", ports, "-T", "none", "-U", "none", "-P", user.home / "pasta.pid"),
            self.holder.pid,
        )


class RootlessSlirp(InUserNamespace):
    """slirp4netns(1), with the large MTU that rootless engines set."""

    name = "slirp4netns"
    title = "slirp4netns, as an ordinary user"
    needs: tuple[str, ...] = ("slirp4netns",)

    def connect(self, user: User) -> None:
        api = user.home / "slirp.sock"
        user.spawn(
            *("slirp4netns", "-c", "--mtu=65520", "--disable-dns", "-a", api, self.holder.pid, "tap0"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        shown = self.enter("ip", "-4", "address", "show", "tap0")
        wait_for(lambda: api.exists() and "10.0.2.100" in user(*shown, check=False).stdout, "slirp4netns")
        self.publish(user, api)

    def publish(self, user: User, api: Path) -> None:  # noqa: ARG002 - bypass4netns does it as the user
        """Forward the ports."""
        for port in range(self.first, self.first + PORTS):
            add_forward(api, port)


class RootlessBypass(RootlessSlirp):
    """bypass4netns beside slirp4netns, as rootless nerdctl has it: host sockets by a seccomp listener."""

    name = "bypass4netns"
    title = "bypass4netns with slirp4netns, as an ordinary user"
    needs = ("bypass4netns", "slirp4netns")

    def publish(self, user: User, api: Path) -> None:
        self.agent = api.with_name("bypass4netns.sock")
        published = [word for port in range(self.first, self.first + PORTS) for word in ("-p", f"{port}:{port}")]
        user.spawn(
            *("bypass4netns", f"--socket={self.agent}", "--ignore=127.0.0.0/8,10.0.2.0/24", *published),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self.agent.exists, "bypass4netns")

    def inside(self, argv: Sequence[Any], ports: tuple[int, ...]) -> list[str]:  # noqa: ARG002 - forwarded already
        return self.enter(sys.executable, "-I", "-c", LISTENER, ROOT, self.agent, *argv)


ROOTLESS: tuple[type[Peer], ...] = (Rootless, RootlessGraft, RootlessPasta, RootlessSlirp, RootlessBypass)
