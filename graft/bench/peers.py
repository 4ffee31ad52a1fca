"""The peers of `graft bench`: docker, and the list of all. The others are in peer.py and networks.py."""

import signal
import subprocess
from pathlib import Path
from typing import Any

from graft.bench.lab import TIMEOUT, Lab, wait_for
from graft.bench.networks import Bridge, Bypass, Ipvlan, Macvlan, Netkit, Passed, Pasta, Slirp
from graft.bench.peer import Accel, Direct, Graft, Local, Peer


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


PEERS: tuple[type[Peer], ...] = (
    *(Peer, Graft, Direct, Accel, Local),
    *(Docker, Bridge, Netkit, Macvlan, Ipvlan, Pasta, Slirp, Bypass, Passed),
)
