"""Container engines of the distribution, each an instance of its own in a laboratory's host."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from graft.bench.lab import GRAFTD, HOST4, TIMEOUT, Lab, wait_for
from graft.engines.install import podman_hook, podman_network
from tests.conftest import need

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "graft/graft-runtime"
PLACES = ("usr", "etc", "dev", "proc", "sys", "root", "run", "tmp", "var/lib", "var/log", "srv")
LINKS = ("bin", "sbin", "lib", "lib64")
CURL = ("curl", "-sS", "--max-time", "10")
NGINX = """
daemon off; pid /tmp/nginx.pid; error_log stderr; events {}
http {
    access_log /dev/stdout; server_tokens off;
    client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u;
    scgi_temp_path /tmp/s;
    server { listen 80; location / { return 200 "from nginx\\n"; } %s }
}
"""
# A page of an application that counts its visitors in redis; behind a proxy that says who they are
APP = """
import http.server, socket
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with socket.create_connection(('redis', 6379)) as redis:
            redis.sendall(b'INCR hits\\r\\n')
            hits = redis.recv(100)[1:].strip()
        body = b'hit %s from %s\\n' % (hits, self.headers['X-Real-IP'].encode())
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(('', 8713), Handler).serve_forever()
"""
UNHOOKED = (28, 0)  # the first Docker that sets networks up after `create`, without a hook
NETAVARK = (5, 0)  # the first Podman that has no CNI; netavark knows plugins since 1.5
UNIFIED = "umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup"
CGROUPS = {"v1": "umount /sys/fs/cgroup/unified", "v2": UNIFIED}  # what makes a machine with one of them alone of this
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


def nginx_conf(lab: Lab, more: str = "") -> tuple[str, str]:
    """The options that give a container NGINX, with @more in its server, as /nginx.conf."""
    path = lab.work / "nginx.conf"
    path.write_text(NGINX % more)
    return ("-v", f"{path}:/nginx.conf:ro")


def reach(lab: Lab, port: int, address: str = HOST4) -> str:
    """What the laboratory's client gets by HTTP."""
    return lab.client(*CURL, f"http://{address}:{port}/").stdout


def engine_version(program: str) -> tuple[int, int]:
    """The major and minor version that `@program --version` tells."""
    told = subprocess.run((program, "--version"), capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2])


def alone(cgroups: str) -> tuple[str, ...]:
    """What runs a command where cgroup "v1" or "v2" is mounted alone; "": as this machine has them."""
    return ("unshare", "-m", "sh", "-c", f'{CGROUPS[cgroups]}; exec "$@"', "sh") if cgroups else ()


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

    def __init__(self, lab: Lab, directory: Path, *, image_store: str = "", cgroups: str = "") -> None:
        """@image_store: a snapshotter of containerd's, which has the images then. @cgroups: as alone() has them."""
        super().__init__(lab, directory)
        features = {"features": {"containerd-snapshotter": True}} if image_store else {}
        (self.root / "daemon.json").write_text(json.dumps({**features, "storage-driver": image_store or "vfs"}))
        self.inside = alone(cgroups)
        self.key_existed = Path("/etc/docker/key.json").exists()
        self.address = f"unix://{self.root}/sock"
        self.driver = lab.run_dir.name
        self.start()
        self("import", image(self.root / "image.tar", {"entry": b"#!/busybox sh\nexec \"$@\"\n"}), "host")
        self.names = 0

    def start(self, *more: Any) -> None:
        """Start dockerd with @more options, and wait until it answers."""
        with open(self.root / "log", "a") as log:
            self.daemon = self.lab.spawn(
                *(*self.inside, "dockerd", "--config-file", self.root / "daemon.json", "-H", self.address),
                *("--data-root", self.root / "data", "--exec-root", self.root / "exec", "-p", self.root / "pid"),
                *("--ip6tables=false", "--userland-proxy=false"),
                *("--add-runtime", f"graft={self.wrapper()}", *more),
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
                    with contextlib.suppress(OSError):  # another dockerd's, beside this one
                        os.rmdir(path)
        if not self.key_existed:
            Path("/etc/docker/key.json").unlink(missing_ok=True)


class Podman(Engine):
    """Podman with nothing of the machine's: storage, networks, hooks, configuration."""

    CONFIG = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
log_driver = "k8s-file"
[network]
network_backend = "{backend}"
cni_plugin_dirs = ["{root}/cni"]
netavark_plugin_dirs = ["{root}/netavark"]
network_config_dir = "{root}/net"
default_network = "graft"
[engine]
runtime = "{runtime}"
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
enable_port_reservation = false
hooks_dir = ["{root}/hooks"]
infra_image = "localhost/pause:1"
static_dir = "{root}/data/libpod"
volume_path = "{root}/data/volumes"
tmp_dir = "{root}/tmp"
image_copy_tmp_dir = "{root}/tmp"
"""

    def __init__(
        self, lab: Lab, directory: Path, runtime: str = "runc", *, unified: bool = False, hooked: bool = True
    ) -> None:
        """@unified: it sees a machine with cgroup2 alone. @hooked: graft comes by its hook, not as its runtime."""
        super().__init__(lab, directory)
        self.cache_existed = Path("/var/lib/containers/cache").exists()
        self.inside: list[str] = []
        self.unified = unified
        both = Path("/sys/fs/cgroup/unified").is_dir()
        if both and (unified or runtime == "crun"):  # crun refuses cgroup v1 beside v2
            change = UNIFIED if unified else "umount /sys/fs/cgroup/unified"
            self.holder = lab.spawn("unshare", "-m", "sh", "-c", f"{change}; exec sleep 1000")
            wait_for(self._without_unified, "a namespace with one of cgroup v1 and v2")
            self.inside = ["nsenter", "-m", "-t", str(self.holder.pid)]
        for name in ("cni", "netavark", "net", "hooks", "tmp"):
            (self.root / name).mkdir()
        self.backend = "netavark" if engine_version("podman") >= NETAVARK else "cni"
        config = self.CONFIG.format(
            root=self.root, backend=self.backend, runtime=runtime if hooked else self.wrapper(runtime)
        )
        if both and unified:
            config = config.replace("[containers]", "[containers]\npids_limit = 0")  # there is no such controller
        (self.root / "containers.conf").write_text(config)
        for name in ("host-local", "loopback"):
            (self.root / "cni" / name).symlink_to(f"/usr/lib/cni/{name}")
        for name, program in (("cni/graft-cni", "graft-cni"), ("netavark/graft", "graft-netavark")):
            plugin = self.root / name
            plugin.write_text(f'#!/bin/sh\nGRAFT_RUN_DIR={lab.run_dir} exec {ROOT}/bin/{program} "$@"\n')
            plugin.chmod(0o755)
        self.network("graft", "10.97.0.0/24")
        if hooked:
            hook = podman_hook(str(RUNTIME), "graft-hook", f"--graft-run-dir={lab.run_dir}")
            (self.root / "hooks/graft.json").write_text(hook)
        archive = image(self.root / "image.tar")
        self("import", "-q", "-c", "STOPSIGNAL SIGKILL", "-c", "ENV PATH=/usr/sbin:/usr/bin:/bin", archive, "localhost/host:1")
        entry = 'ENTRYPOINT ["/busybox","sleep","100000"]'
        self("import", "-q", "-c", entry, "-c", "STOPSIGNAL SIGKILL", archive, "localhost/pause:1")

    def _without_unified(self) -> bool:
        return " /sys/fs/cgroup/unified " not in Path(f"/proc/{self.holder.pid}/mounts").read_text()

    def network(self, name: str, subnet: str) -> None:
        """A network of graft's."""
        if self.backend == "netavark":
            document = podman_network(name, subnet)
            (self.root / f"net/{name}.json").write_text(document)
            return
        ipam = {"type": "host-local", "subnet": subnet, "dataDir": str(self.root / "ipam")}
        plugin = {"type": "graft-cni", "capabilities": {"portMappings": True, "aliases": True, "ips": True}, "ipam": ipam}
        conflist = {"cniVersion": "1.0.0", "name": name, "plugins": [plugin]}
        (self.root / f"net/{name}.conflist").write_text(json.dumps(conflist))

    def command(self, *argv: Any) -> list[str]:
        root = self.root
        places = ("--root", root / "data", "--runroot", root / "run", "--tmpdir", root / "tmp", "--storage-driver", "vfs")
        return self.lab.in_host(*self.inside, "env", f"CONTAINERS_CONF={root}/containers.conf", "podman", *places, *argv)

    def run(self, *options: Any, argv: Sequence[Any], check: bool = True) -> "subprocess.CompletedProcess[str]":
        """`podman run` with the host's programs."""
        return self("run", *HOST_PROGRAMS, *options, "localhost/host:1", *argv, check=check)

    def remove_all(self, *, check: bool = True) -> None:
        self("pod", "rm", "-f", "-a", "-t", "0", check=check)
        self("rm", "-f", "-a", "-t", "0", check=check)

    def clear(self) -> None:
        """End all containers, and wait until graftd knows."""
        self.remove_all()
        wait_for(lambda: not self.lab.containers(), "the end of all containers")

    def stop(self) -> None:
        """End all containers; leave nothing."""
        self.remove_all(check=False)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for place in reversed([m for m in mounts if m.startswith(f"{self.root}/")]):
            subprocess.run(("umount", place), capture_output=True)
        for directory in Path("/sys/fs/cgroup").glob("*/libpod_parent"):
            for path in [*sorted((d for d in directory.rglob("*") if d.is_dir()), reverse=True), directory]:
                with contextlib.suppress(OSError):  # another Podman's, beside this one
                    os.rmdir(path)
        if not self.cache_existed:
            shutil.rmtree("/var/lib/containers", ignore_errors=True)
        if self.inside:
            self.lab.end(self.holder)


@contextlib.contextmanager
def started_podman(host: Lab, name: str, runtime: str, *, unified: bool = False, hooked: bool = True) -> Iterator[Podman]:
    """A graftd, and a Podman whose files are in the directory @name of the laboratory's; the others as Podman's."""
    need("podman", "runc", "crun", "conmon", "busybox")
    host.spawn(GRAFTD, stderr=subprocess.DEVNULL)
    wait_for((host.run_dir / "graftd.sock").exists, "graftd")
    (host.work / "empty").mkdir(exist_ok=True)
    engine = Podman(host, host.work / name, runtime, unified=unified, hooked=hooked)
    try:
        yield engine
    finally:
        engine.stop()
