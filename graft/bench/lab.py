"""The laboratory: two temporary netns that play a host and a client, with their own graftd.

The "host" and the "client" are joined by a veth pair; the real host's addresses and ports are not touched. graftd
runs in the host's netns, and has its own run directory, cgroup and bpffs directory. `close()` removes everything, and
returns what it could not remove.
"""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from graft.client import exchange
from graft.engines.install import program
from graft.errors import GraftError
from graft.kernel import linux
from graft.kernel.cgroup import cgroup2_root

ROOT = Path(__file__).resolve().parent.parent.parent
GRAFT, GRAFTD, IP_GRAFT = (Path(program(name)) for name in ("graft", "graftd", "ip-graft"))
HOST4, CLIENT4, SECOND4 = "10.77.0.1", "10.77.0.2", "10.77.0.3"
HOST6, CLIENT6 = "2001:db8:77::1", "2001:db8:77::2"
SLOWNESS = float(os.environ.get("GRAFT_SLOWNESS", "1"))  # factor of all waits, for emulated or busy machines
TIMEOUT = 60.0 * SLOWNESS


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 10.0) -> Any:
    """Poll @condition until it is true; returns its value. Raises TimeoutError after @timeout * SLOWNESS seconds."""
    deadline = time.monotonic() + timeout * SLOWNESS
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout} s")
        time.sleep(0.02)


NGINX = """
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log {dir}/access.log;
    client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
    server {{ listen {port}; listen [::]:{port}; root {root}; }}
}}
"""


class Lab:
    """A host and a client, each a netns, a veth pair between them, and the host's graftd once something starts it."""

    def __init__(self, tag: str = "") -> None:
        self.tag = f"graft-{tag or 'lab'}-{uuid.uuid4().hex[:6]}"
        self.host_ns, self.client_ns = f"{self.tag}-h", f"{self.tag}-c"
        self.run_dir = Path("/run") / self.tag
        self.work = Path(tempfile.mkdtemp(prefix=f"{self.tag}-"))
        self.work.chmod(0o755)
        self.config = self.work / "graft.toml"  # of the next graftd that starts
        self.config.touch(0o644)
        own = {"GRAFT_RUN_DIR": str(self.run_dir), "GRAFT_CONFIG": str(self.config)}
        waits = {"GRAFT_ADDRESS_WAIT": str(SLOWNESS)}
        self.env = {**os.environ, **own, **waits, "PYTHONUNBUFFERED": "1"}
        self.started: list[subprocess.Popen[str]] = []
        self.daemon: subprocess.Popen[str] | None = None  # by start_daemon()
        self.shaping: tuple[str, ...] = ()  # a queueing discipline of tc(8) for each end of a wire
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        for ns in (self.host_ns, self.client_ns):
            self.ip("netns", "add", ns)
            self.ip("-n", ns, "link", "set", "lo", "up")
        veth = ("veth0", "netns", self.host_ns, "type", "veth", "peer", "name", "veth0", "netns", self.client_ns)
        self.ip("link", "add", *veth)
        for ns, addresses in (
            (self.host_ns, (f"{HOST4}/24", f"{SECOND4}/24", f"{HOST6}/64")),
            (self.client_ns, (f"{CLIENT4}/24", f"{CLIENT6}/64")),
        ):
            for address in addresses:
                self.ip("-n", ns, "address", "add", address, "dev", "veth0", *(["nodad"] if ":" in address else []))
            self.ip("-n", ns, "link", "set", "veth0", "up")

    @staticmethod
    def ip(*arguments: str) -> None:
        """Run ip(8). Raises CalledProcessError."""
        subprocess.run(("ip", *arguments), check=True, timeout=TIMEOUT)

    def shape(self, ns: str, device: str) -> None:
        """Give an end of a wire its queueing discipline, `shaping`. Raises CalledProcessError, with tc(8)'s words."""
        if self.shaping:
            command = ("tc", "-n", ns, "qdisc", "add", "dev", device, "root", *self.shaping)
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)

    def _in(self, ns: str, argv: tuple[Any, ...]) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{ns}", *map(str, argv)]

    def in_host(self, *argv: Any) -> list[str]:
        """Return the argv that runs a command on the host."""
        return self._in(self.host_ns, argv)

    def host(self, *argv: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the host and wait for its end. @options: as subprocess.run() has them."""
        return self._run(self._in(self.host_ns, argv), options)

    def client(self, *argv: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the client and wait for its end. @options: as subprocess.run() has them."""
        return self._run(self._in(self.client_ns, argv), options)

    def graft(self, *argv: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `graft ...` on the host and wait for its end."""
        return self.host(GRAFT, *argv, **options)

    def refused(
        self, argv: Sequence[Any], status: int, text: str, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run @argv on the host, which must end with @status and have @text in its standard error; what it did.

        Raises AssertionError, with the command, its output and its status.
        """
        done = self.host(*argv, **options)
        if done.returncode != status or text not in done.stderr:
            told = f"status {done.returncode}\nstdout: {done.stdout}\nstderr: {done.stderr}"
            raise AssertionError(f"{shlex.join(map(str, argv))}: not {status} with {text!r}, but {told}")
        return done

    def _run(self, argv: list[str], options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        settings = {"capture_output": True, "text": True, "timeout": TIMEOUT, "env": self.env, "cwd": self.work}
        settings |= options
        return subprocess.run(argv, **settings)  # type: ignore[no-any-return, call-overload]

    def spawn(self, *argv: Any, client: bool = False, **options: Any) -> subprocess.Popen[str]:
        """Start a command on the host (or the client); `close()` ends it."""
        settings: dict[str, Any] = {"text": True, "env": self.env, "cwd": self.work, "stdin": subprocess.DEVNULL}
        process: subprocess.Popen[str] = subprocess.Popen(
            self._in(self.client_ns if client else self.host_ns, argv), **settings | options
        )
        self.started.append(process)
        return process

    def spawn_graft(self, *argv: Any, **options: Any) -> subprocess.Popen[str]:
        """Start `graft run ...` on the host."""
        return self.spawn(GRAFT, "run", *argv, **options)

    def end(self, process: subprocess.Popen[str], how: int = signal.SIGTERM) -> int:
        """End a started process by the signal @how, after 10 * SLOWNESS s by SIGKILL; returns its status."""
        if process.poll() is None:
            process.send_signal(how)
        try:
            return process.wait(10 * SLOWNESS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(10)

    def start_daemon(self) -> None:
        """Start graftd as an administrator does: it stays. One that an order starts ends when it is idle."""
        self.run_dir.mkdir(mode=0o755)
        with (self.run_dir / "graftd.log").open("ab") as log:
            argv = self.in_host(GRAFTD)
            self.daemon = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True, env=self.env, cwd="/"
            )
        wait_for((self.run_dir / "graftd.sock").exists, "graftd's start")

    def daemon_pid(self) -> int:
        """Return the PID of graftd; 0 if there is none. A child that is about to execute another program is none."""
        found = self._processes("graftd")
        for pid in found:
            with contextlib.suppress(OSError):
                if linux.parent(pid) not in found:
                    return pid
        return 0

    def helper_pids(self) -> list[int]:
        """Return the PIDs of the graft-sup processes, of which each listener has one."""
        return self._processes("graft-sup")

    def direct_cgroups(self) -> list[Path]:
        """The cgroups of direct containers that this process, or one that it has started, has begun."""
        root = cgroup2_root()
        found = [Path(at) for at, _, _ in os.walk(root) if Path(at).name.startswith(f"{self.tag}-")]
        return [path for path in found if path != self.relay_cgroup()]

    def _processes(self, name: str) -> list[int]:
        """The PIDs of the processes of this name in graftd's cgroup, or its relays'; some live for a moment."""
        procs = [path / "cgroup.procs" for path in (self.cgroup(), self.relay_cgroup())]
        pids = [pid for path in procs if path.exists() for pid in path.read_text().split()]
        return [int(pid) for pid in pids if linux.comm(pid) == name]

    def keeper_pid(self) -> int:
        """Return the PID of the keeper. Raises OSError if there is none."""
        return int((self.run_dir / "keeper.lock").read_text().splitlines()[0])

    def guard_pid(self) -> int:
        """The guard's pid; 0 if there is none."""
        ours = f"GRAFT_RUN_DIR={self.run_dir}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "cmdline").read_bytes().startswith(b"graft-guard\0") and (
                    ours in (process / "environ").read_bytes().split(b"\0")
                ):
                    return int(process.name)
        return 0

    def cgroup(self) -> Path:
        """Return the path of graftd's cgroup (cgroup v2)."""
        unified = Path("/sys/fs/cgroup/unified")
        return (unified if unified.is_dir() else Path("/sys/fs/cgroup")) / self.tag

    def relay_cgroup(self) -> Path:
        """Return the path of the graft-relays' cgroup, which is there once there was one."""
        return self.cgroup().with_name(f"{self.tag}-relay")

    def pins(self) -> Path:
        """Return the path of graftd's directory in bpffs."""
        return Path("/sys/fs/bpf") / self.tag

    def listening(self, port: int, *, udp: bool = False) -> bool:
        """Return whether a socket on the host listens at @port (TCP) or is bound to it (UDP)."""
        kind = "-ulnH" if udp else "-tlnH"
        return bool(self.host("ss", kind, f"sport = :{port}").stdout.strip())

    def wait_listening(self, port: int, *, udp: bool = False) -> None:
        """Wait until a socket on the host has @port. Raises TimeoutError."""
        wait_for(lambda: self.listening(port, udp=udp), f"port {port}")

    def wait_logged(self, text: str) -> None:
        """Wait until graftd's log has @text, which may come after what it tells of. Raises TimeoutError."""
        wait_for(lambda: text in (self.run_dir / "graftd.log").read_text(), f"{text!r} in graftd's log")

    def containers(self) -> list[str]:
        """Return the names of the running containers; none are without a graftd.

        The admin socket is asked from this process: `graft ps` costs 0.1 s, and whoever waits asks often.
        """
        with contextlib.suppress(OSError, GraftError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(str(self.run_dir / "graftd.sock"))
            return [row["name"] for row in exchange(sock, "ps", {})]
        return []

    def add_endpoints(self, endpoints: Mapping[str, str], netns: str | None = None) -> None:
        """Add endpoints, words by name, to the host's table or that of @netns, by one command."""
        self._batch([f"add {name} {words}" for name, words in endpoints.items()], netns)

    def delete_endpoints(self, names: Iterable[str], netns: str | None = None) -> None:
        """Delete endpoints, by one command."""
        self._batch([f"del {name}" for name in names], netns)

    def _batch(self, lines: list[str], netns: str | None) -> None:
        where = ("-netns", netns) if netns else ()
        self.host(IP_GRAFT, *where, "-batch", "-", input="\n".join(lines) + "\n", check=True)

    def close(self) -> list[str]:
        """End and remove everything; returns a line for each thing left behind, and for a traceback in the log."""
        for process in self.started:
            self.end(process)
        left = self._stop_daemon()
        if self.daemon:
            self.daemon.wait(TIMEOUT)
        for ns in (self.host_ns, self.client_ns):
            if Path("/run/netns", ns).exists():
                try:
                    wait_for(partial(self._empty, ns), f"processes in {ns}", 3.0)
                except TimeoutError:
                    left += [f"process {pid} ({linux.comm(pid)}) in {ns}" for pid in self._pids(ns)]
                self.ip("netns", "del", ns)
        log = self.run_dir / "graftd.log"
        if log.exists() and ("Traceback" in log.read_text() or "starting again" in log.read_text()):
            left.append(f"a traceback in graftd's log:\n{log.read_text()[-4000:]}")
        for path in (self.run_dir, self.work):
            shutil.rmtree(path, ignore_errors=True)
        for path in (
            self.pins(),
            self.cgroup(),
            self.relay_cgroup(),
            *self.direct_cgroups(),
            Path("/run/docker/plugins", f"{self.tag}.sock"),
        ):
            if path.exists():
                left.append(str(path))
        return left

    @staticmethod
    def _pids(ns: str) -> list[str]:
        return subprocess.run(("ip", "netns", "pids", ns), capture_output=True, text=True).stdout.split()

    def _empty(self, ns: str) -> bool:
        return not self._pids(ns)

    def _stop_daemon(self) -> list[str]:
        if not (self.run_dir / "graftd.sock").exists():
            return []
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not self.containers(), "containers to end", 5.0)
        result = self.host(GRAFTD, "--stop", "--force")
        if result.returncode and "not running" not in result.stderr:
            return [f"graftd --stop: {result.stderr.strip()}"]
        try:
            wait_for(lambda: not self.pins().exists(), "graftd's end")
            if (self.run_dir / "keeper.lock").exists():
                wait_for(lambda: not (self.run_dir / "graftd.sock").exists(), "the keeper's end")
        except TimeoutError as error:
            return [str(error)]
        return []


@contextlib.contextmanager
def laboratory(tag: str = "") -> Iterator[Lab]:
    """Open a Lab and close it afterwards. Raises AssertionError if something is left behind."""
    lab = Lab(tag)
    try:
        yield lab
    finally:
        left = lab.close()
    assert not left, f"left behind: {left}"


def nginx_config(lab: Lab, name: str, port: int) -> Path:
    """Write a configuration of nginx with one worker that serves lab.work/root at @port; returns its path."""
    directory = lab.work / name
    directory.mkdir()
    path = directory / "nginx.conf"
    path.write_text(NGINX.format(dir=directory, port=port, root=lab.work / "root"))
    return path
