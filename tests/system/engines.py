"""Container engines of the distribution, each an instance of its own in a laboratory's host."""

import os
import subprocess
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from graft.bench.lab import Lab, wait_for

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "graft/graft-runtime"
TIMEOUT = 60
PLACES = ("usr", "etc", "dev", "proc", "sys", "root", "run", "tmp", "var/lib", "var/log", "srv")
LINKS = ("bin", "sbin", "lib", "lib64")
HOST_PROGRAMS = ("-v", "/usr:/usr:ro", "-v", "/etc:/etc:ro", "-v", "/var/lib:/var/lib:ro")


def image(path: Path, extra: dict[str, bytes] | None = None) -> Path:
    """A root file system of mount points, for the host's own programs, and of busybox at /busybox; a tar at @path."""
    with tarfile.open(path, "w") as archive:
        for name in PLACES:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            archive.addfile(entry)
        for name in LINKS:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
            archive.addfile(entry)
        for name, content in {"busybox": Path("/bin/busybox").read_bytes(), **(extra or {})}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, BytesIO(content))
    return path


class Engine:
    """What all have: a directory, a log, a command line."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.root = directory
        self.root.mkdir()

    def command(self, *argv: Any) -> list[str]:
        """The command line of the engine's client."""
        raise NotImplementedError

    def __call__(self, *argv: Any, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            self.command(*argv), capture_output=True, text=True, timeout=TIMEOUT, **options
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
        return done

    def wrapper(self, runtime: str = "runc") -> Path:
        """graft-runtime as this laboratory's graftd needs it."""
        script = self.root / f"graft-{runtime}"
        script.write_text(
            f'#!/bin/sh\nexec {RUNTIME} --graft-runtime={runtime} --graft-run-dir={self.lab.run_dir} "$@"\n'
        )
        script.chmod(0o755)
        return script


class Dockerd(Engine):
    """dockerd with its own containerd."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        super().__init__(lab, directory)
        self.key_existed = Path("/etc/docker/key.json").exists()
        self.address = f"unix://{self.root}/sock"
        self.driver = lab.run_dir.name
        self.start()
        self("import", image(self.root / "image.tar", {"entry": b"#!/busybox sh\nexec \"$@\"\n"}), "host")
        self.names = 0

    def start(self) -> None:
        """Start dockerd, and wait until it answers."""
        with open(self.root / "log", "a") as log:
            self.daemon = self.lab.spawn(
                *("dockerd", "-H", self.address, "--data-root", self.root / "data", "--exec-root", self.root / "exec"),
                *("-p", self.root / "pid", "--storage-driver", "vfs", "--ip6tables=false", "--userland-proxy=false"),
                *("--add-runtime", f"graft={self.wrapper()}"),
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: self("version", check=False).returncode == 0, "dockerd", 30)

    def command(self, *argv: Any) -> list[str]:
        return ["docker", "-H", self.address, *map(str, argv)]

    def run(self, *options: Any, argv: Sequence[Any], check: bool = True) -> "subprocess.CompletedProcess[str]":
        """`docker run` with the host's programs."""
        return self("run", "--runtime", "graft", *HOST_PROGRAMS, *options, "host", *argv, check=check)

    def stop(self) -> None:
        """End all containers and dockerd; leave nothing."""
        running = self("ps", "-aq", check=False).stdout.split()
        if running:
            self("rm", "-f", *running, check=False)
        for name in self("network", "ls", "-q", "--filter", f"driver={self.driver}", check=False).stdout.split():
            self("network", "rm", name, check=False)
        self.lab.end(self.daemon)
        for place in (self.root / "exec/netns").glob("*"):
            subprocess.run(("umount", place), capture_output=True)
        for directory in Path("/sys/fs/cgroup").glob("*/docker"):
            for path in [*directory.glob("*/"), directory]:
                if path.is_dir():
                    os.rmdir(path)
        if not self.key_existed:
            Path("/etc/docker/key.json").unlink(missing_ok=True)
