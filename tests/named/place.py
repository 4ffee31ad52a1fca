"""Where a named program runs: on the laboratory's host, under `graft run -p`, or there with an address of its own.

The same play (a server, and what its clients see) is done at each place, and has to come to the same. Programs are the
system's own, or those of a Debian 12 in a directory (`make test-programs`), which each process enters by itself: in a
mount and a pid namespace, so that all that it has started ends with it.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft.bench.lab import CLIENT4, CLIENT6, HOST4, HOST6, Lab, wait_for
from tests.conftest import lack

OWN4, OWN6 = "10.99.7.5", "fd00:99::75"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENTER = f"""
root=$1 work=$2; shift 2
mount --rbind /dev "$root/dev"; mount --rbind /sys "$root/sys"; mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 run "$root/run"; mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mkdir -p "$root$work"; mount --bind "$work" "$root$work"
chroot "$root" env --chdir="$work" PATH={PATH} HOME=/root TERM=dumb "$@"
exit $?
"""  # no exec: some servers misbehave as PID 1


class Place:
    """On the host itself: what is right."""

    address4, address6 = HOST4, HOST6

    def __init__(self, lab: Lab, root: Path | None, work: Path) -> None:
        self.lab, self.root, self.work = lab, root, work
        self.name = work.name
        self.processes: list[subprocess.Popen[str]] = []
        self.programs = 0

    def within(self, argv: tuple[Any, ...]) -> list[str]:
        """@argv as it runs in the programs' own system."""
        words = [str(word) for word in argv]
        if self.root is None:
            return ["env", f"PATH={PATH}", *words]
        enter = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "slave", "sh", "-c", ENTER)
        return [*enter, "enter", str(self.root), str(self.lab.work), *words]

    def start(self, *argv: Any, publish: tuple[str, ...] = (), **options: Any) -> "subprocess.Popen[str]":
        """Start a program at this place; @publish: its ports, "21", "30000-30009" or "69/udp"."""
        log = open(self.work / f"{self.programs}.log", "w")  # noqa: SIM115 - the program's
        options = {"stdout": log, "stderr": log, "cwd": self.work} | options
        process = self.begin(self.within(argv), publish, options)
        log.close()
        self.processes.append(process)
        self.programs += 1
        for one in publish:
            port, _, kind = one.partition("/")
            if port.isdigit():
                self.wait(process, int(port), udp=kind == "udp")
        return process

    def begin(self, argv: list[str], publish: tuple[str, ...], options: dict[str, Any]) -> "subprocess.Popen[str]":
        """Start what start() is told to."""
        return self.lab.spawn(*argv, **options)

    def wait(self, process: "subprocess.Popen[str]", port: int, *, udp: bool = False) -> None:
        """Wait until @port is served here. Raises AssertionError, with what @process wrote, if it ends or is not."""

        def there() -> bool:
            assert process.poll() is None, f"{process.args!r} ended:\n{self.logs()}"
            if udp:
                return self.lab.listening(port, udp=True)
            return self.lab.host("bash", "-c", f": </dev/tcp/{self.address4}/{port}").returncode == 0

        try:
            wait_for(there, f"port {port}", 30)
        except TimeoutError as error:
            raise AssertionError(f"{type(self).__name__}: {error}:\n{self.logs()}{self.refusals()}") from None

    def logs(self) -> str:
        """What the programs of this place wrote."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.work.glob("*.log")))

    def client(self, *argv: Any, **options: Any) -> str:
        """What a command of the laboratory's client prints."""
        return self._printed(self.lab.client(*self.within(argv), **options))

    def beside(self, *argv: Any, **options: Any) -> str:
        """What a command of the host prints."""
        return self._printed(self.lab.host(*self.within(argv), **options))

    def inside(self, *argv: Any, **options: Any) -> str:
        """What a command prints that runs where the program does."""
        return self.beside(*argv, **options)

    def alone(self, *argv: Any, **options: Any) -> str:
        """What a command prints that is a program of its own here, and publishes nothing."""
        return self.beside(*argv, **options)

    def serve_far(self, *argv: Any, port: int, udp: bool = False) -> None:
        """Start a server on the laboratory's client, and wait for it."""
        log = open(self.work / f"far-{len(self.processes)}.log", "w")  # noqa: SIM115 - the program's
        self.processes.append(self.lab.spawn(*self.within(argv), client=True, stdout=log, stderr=log, cwd=self.work))
        log.close()
        kind = "-ulnH" if udp else "-tlnH"
        wait_for(lambda: self.lab.client("ss", kind, f"sport = :{port}").stdout, f"port {port} of the client", 30)

    def _printed(self, done: "subprocess.CompletedProcess[str]") -> str:
        assert done.returncode == 0, (
            f"{type(self).__name__}: status {done.returncode} of {done.args}:\n{done.stdout}{done.stderr}\n{self.logs()}{self.refusals()}"
        )
        for address, called in ((self.address4, "SERVER4"), (self.address6, "SERVER6"), (CLIENT4, "CLIENT4")):
            done.stdout = done.stdout.replace(address, called)
        return done.stdout.replace(CLIENT6, "CLIENT6")

    def refusals(self) -> str:
        """What graft has refused here."""
        return ""

    def close(self) -> None:
        """End what was started here, with all of its children."""
        for process in reversed(self.processes):
            self.end(process)
        self.processes.clear()

    def end(self, process: "subprocess.Popen[str]") -> None:
        """End a program that was started here. Its first process is killed, with which its pid namespace ends."""
        if self.root is not None and process.poll() is None:
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            process.wait(10)
        self.lab.end(process, signal.SIGKILL)


class Grafted(Place):
    """Under `graft run`, published on the host's addresses under the same ports."""

    options: tuple[str, ...] = ()

    def begin(self, argv: list[str], publish: tuple[str, ...], options: dict[str, Any]) -> "subprocess.Popen[str]":
        name = f"{self.name}-{self.programs}" if self.programs else self.name
        ports = [word for one in publish for word in ("-p", self.publication(one))]
        return self.lab.spawn_graft("--name", name, *self.options, *ports, *argv, **options)

    @staticmethod
    def publication(port: str) -> str:
        """ "69/udp" as an option of graft run; one that says more stands as it is."""
        bare, slash, kind = port.partition("/")
        return port if ":" in port else f"{bare}:{bare}{slash}{kind}"

    def inside(self, *argv: Any, **options: Any) -> str:
        return self._printed(self.lab.graft("run", "--netns", self.name, *self.within(argv), **options))

    def alone(self, *argv: Any, **options: Any) -> str:
        return self._printed(self.lab.graft("run", *self.options, *self.within(argv), **options))

    def refusals(self) -> str:
        told = self.lab.graft("inspect", self.name)
        return json.dumps(json.loads(told.stdout)["last_refused"]) if told.returncode == 0 else ""

    def close(self) -> None:
        super().close()
        wait_for(lambda: not self.lab.containers(), "containers to end")


class Own(Grafted):
    """Under `graft run --ip`: an address of its own, nothing published."""

    address4, address6 = OWN4, OWN6
    options = ("--ip", OWN4, "--ip", OWN6)

    def begin(self, argv: list[str], publish: tuple[str, ...], options: dict[str, Any]) -> "subprocess.Popen[str]":
        return super().begin(argv, (), options)


class Stage:
    """The places of one laboratory."""

    def __init__(self, lab: Lab, root: Path | None) -> None:
        self.lab, self.root = lab, root
        self.count = len(list(lab.work.iterdir()))

    def need(self, *programs: str) -> None:
        """Skip, or fail, where a program is not there."""
        path = PATH if self.root is None else ":".join(f"{self.root}{folder}" for folder in PATH.split(":"))
        for program in programs:
            if not shutil.which(program, path=path):
                lack(f"'{program}' is not installed ({'make setup-test' if self.root is None else 'make test-programs'})")

    def same(self, play: Callable[[Any], Any], *places: type[Place]) -> Any:
        """Do @play on the host and at each of @places, which has to come to the same; what that is."""
        right = self.at(Place, play)
        for kind in places or (Grafted, Own):
            assert self.at(kind, play) == right, kind.__name__
        return right

    def at(self, kind: type[Place], play: Callable[[Any], Any]) -> Any:
        """Do @play at one place."""
        self.count += 1
        work = self.lab.work / f"{kind.__name__.lower()}-{self.count}"
        work.mkdir()
        work.chmod(0o777)
        place = kind(self.lab, self.root, work)
        try:
            return play(place)
        finally:
            place.close()


def routed(lab: Lab, what: str) -> None:
    """Add or delete ("add", "del") the client's routes to the addresses of Own."""
    for address, bits, gateway in ((OWN4, 32, HOST4), (OWN6, 128, HOST6)):
        lab.ip("-n", lab.client_ns, "route", what, f"{address}/{bits}", "via", gateway)

