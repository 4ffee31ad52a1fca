"""Engines without root: Podman and Docker of an ordinary user, with the configuration that `graft install` writes."""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graft.bench.lab import GRAFT, laboratory, wait_for
from graft.bench.user import User, Users
from tests.conftest import need, need_root
from tests.system.engines import HOST_PROGRAMS, image

CONTAINERS = """
[engine]
runtime = "{runtime}"
cgroup_manager = "cgroupfs"
events_logger = "none"
infra_image = "localhost/pause:1"
[containers]
log_driver = "k8s-file"
pids_limit = 0
"""
STORAGE = '[storage]\ndriver = "vfs"\n'
ROOTLESS_DOCKER = Path("/usr/share/docker.io/contrib")
IMAGE = "localhost/host:1"


class RootlessPodman:
    """Podman of one user, as the distribution has it."""

    def __init__(self, user: User, runtime: str) -> None:
        self.user, self.lab = user, user.lab
        self.told = ""  # by install()
        base = self.write(".config/containers/containers.conf", CONTAINERS.format(runtime=runtime))
        self.write(".config/containers/storage.conf", STORAGE)
        self.drop_in = base.parent / "containers.conf.d/graft.conf"
        archive = image(user.home / "image.tar")
        self("import", "-q", "-c", "STOPSIGNAL SIGKILL", "-c", "ENV PATH=/usr/sbin:/usr/bin:/bin", archive, IMAGE)
        entry = 'ENTRYPOINT ["/busybox","sleep","100000"]'
        self("import", "-q", "-c", entry, "-c", "STOPSIGNAL SIGKILL", archive, "localhost/pause:1")

    def write(self, name: str, text: str) -> Path:
        """Write a file in the user's home, as the user."""
        path = self.user.home / name
        self.user("sh", "-c", 'mkdir -p "${0%/*}"; cat >"$0"', path, input=text)
        return path

    def __call__(self, *argv: Any, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        return self.user("podman", *argv, check=check, **options)

    def run(self, *options: Any, argv: Sequence[Any], check: bool = True) -> "subprocess.CompletedProcess[str]":
        """`podman run` with the host's programs."""
        return self("run", *HOST_PROGRAMS, *options, IMAGE, *argv, check=check)

    def install(self, *options: Any) -> None:
        """`graft install podman` by the user."""
        self.told = self.user(GRAFT, "install", "podman", "--yes", *options).stdout

    def clear(self) -> None:
        """Remove all containers and pods."""
        self("pod", "rm", "-f", "-a", "-t", "0", check=False)
        self("rm", "-f", "-a", "-t", "0", check=False)


class RootlessDocker:
    """dockerd of one user under rootlesskit, as Debian's docker.io starts it."""

    def __init__(self, user: User, *, install: bool = True) -> None:
        self.user, self.lab = user, user.lab
        self.told = user(GRAFT, "install", "docker", "--yes").stdout if install else ""
        self.log = user.home / "dockerd.log"
        with open(self.log, "w") as log:
            path = f"PATH={ROOTLESS_DOCKER}:/usr/sbin:/usr/bin:/sbin:/bin"
            net = "DOCKERD_ROOTLESS_ROOTLESSKIT_NET=slirp4netns"
            command = ("dockerd-rootless.sh", "--storage-driver", "vfs")
            self.daemon = user.spawn("env", path, net, *command, stdout=log, stderr=log)
        wait_for(lambda: self("version", check=False).returncode == 0, "dockerd", 60)
        self("import", image(user.home / "image.tar"), "host")

    def __call__(self, *argv: Any, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        return self.user("docker", "-H", f"unix://{self.user.runtime}/docker.sock", *argv, check=check, **options)

    def run(self, *options: Any, argv: Sequence[Any], check: bool = True) -> "subprocess.CompletedProcess[str]":
        """`docker run` with the host's programs."""
        return self("run", *HOST_PROGRAMS, *options, "host", *argv, check=check)

    def clear(self) -> None:
        """Remove all containers."""
        running = self("ps", "-aq", check=False).stdout.split()
        if running:
            self("rm", "-f", *running, check=False)


def shown(user: User) -> list[dict[str, Any]]:
    """What `graft ps` shows to the user."""
    found: list[dict[str, Any]] = json.loads(user(GRAFT, "ps", "-j").stdout)
    return found


@contextlib.contextmanager
def users_of(*, unified: bool = False, granted: str = "") -> Iterator[Users]:
    """alice and bob on the host of a laboratory, and a graftd that knows them. @granted: users.toml."""
    need_root()
    need("newuidmap", "busybox")
    with laboratory("rless") as lab:
        if granted:
            lab.config.with_name("users.toml").write_text(granted)
        users = Users(lab, "alice", "bob", unified=unified)
        try:
            users.start_daemon()
            yield users
        finally:
            users.close()
