"""The outside of containers with a list: a nameserver of the host's, and servers on the client's machine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from graft.bench.lab import CLIENT4, CLIENT6, ROOT, Lab, wait_for
from tests.conftest import python

NAMESERVER = "127.0.0.53"
GREETER = """
import socket, sys, threading
def serve(family, port):
    l = socket.socket(family); l.setsockopt(1, 2, 1)
    if family == socket.AF_INET6: l.setsockopt(41, 26, 1)
    l.bind(('', port)); l.listen(1024)
    while True:
        c, peer = l.accept()
        try: c.sendall(c.getsockname()[0].encode())
        except OSError: pass
        c.close()
def datagrams(port):
    u = socket.socket(type=socket.SOCK_DGRAM); u.bind(('', port))
    while True: u.sendto(b'udp', u.recvfrom(99)[1])
for port in map(int, sys.argv[1:]):
    for family in (socket.AF_INET, socket.AF_INET6): threading.Thread(target=serve, args=(family, port), daemon=True).start()
    threading.Thread(target=datagrams, args=(port,), daemon=True).start()
threading.Event().wait()
"""
# Connects to each NAME:PORT, by all addresses in turn as programs do, and says what came of it: a greeting, or an errno
CALLS = """
import errno, socket, sys
for each in sys.argv[1:]:
    host, _, port = each.rpartition(':')
    try:
        with socket.create_connection((host.strip('[]'), int(port)), 5) as s: print(each, s.recv(99).decode(), flush=True)
    except socket.gaierror as error: print(each, 'EAI_' + str(error.errno), flush=True)
    except OSError as error: print(each, errno.errorcode.get(error.errno, type(error).__name__), flush=True)
"""
CALLS_ONCE = """
import socket, sys
for each in sys.argv[1:]:
    host, port = each.split(':')
    try: socket.create_connection((host, int(port)), 5).close(); print('ok')
    except OSError as error: print(error.errno)
"""
NONAME, AGAIN = "EAI_-2", "EAI_-3"  # netdb.h: EAI_NONAME, EAI_AGAIN


class Outside:
    """A zone that a nameserver of the host's has, and what is allowed by default."""

    def __init__(self, lab: Lab, *nameservers: str) -> None:
        self.lab = lab
        self.file = lab.work / "zone.json"
        self.log = lab.work / "queries"
        self.zone: dict[str, dict[str, Any]] = {}
        self.write({"www.test": {"A": [CLIENT4]}, "six.test": {"AAAA": [CLIENT6]}})
        with self.log.open("w") as log:
            argv = (sys.executable, ROOT / "tests/programs/nameserver.py", self.file, *(nameservers or (NAMESERVER,)))
            self.server = lab.spawn(*argv, stdout=log)
        wait_for(lambda: "ready" in self.log.read_text(), "the nameserver")
        self.log.write_text("")

    def write(self, zone: dict[str, dict[str, Any]]) -> None:
        """Add names to the zone; a query meets the old one or the new one."""
        self.zone |= zone
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.zone))
        new.rename(self.file)

    def queries(self) -> list[str]:
        """The names and types that the nameserver was asked for."""
        return self.log.read_text().split("\0")[-1].splitlines()

    def greet(self, *ports: int) -> None:
        """Serve at these ports of the client's."""
        self.lab.spawn(*python(GREETER), *map(str, ports), client=True)
        for port in ports:
            wait_for(partial(self._serves, port), "a server")

    def _serves(self, port: int) -> bool:
        return self.lab.client("ss", "-tlnH", f"sport = :{port}").stdout.count("\n") == 2

    def run(self, *argv: Any, allow: tuple[str, ...] = (), options: tuple[Any, ...] = (), **settings: Any) -> "subprocess.CompletedProcess[str]":
        """`graft run` with a list, by this nameserver."""
        listed = [word for each in allow for word in ("--allow", each)]
        return self.lab.graft("run", "--resolver", NAMESERVER, *listed, *options, *argv, **settings)

    def calls(self, *targets: str, allow: tuple[str, ...] = (), options: tuple[Any, ...] = ()) -> dict[str, str]:
        """What came of connections to these NAME:PORT."""
        done = self.run(*python(CALLS), *targets, allow=allow, options=options)
        assert done.returncode == 0, done.stderr
        return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def outsides(lab: Lab, *nameservers: str) -> Iterator[Outside]:
    """An Outside whose processes end with it, as all that was started since."""
    before = len(lab.started)
    yield Outside(lab, *nameservers)
    for process in lab.started[before:]:
        lab.end(process)


def greeting(lab: Lab, *nameservers: str) -> Iterator[Outside]:
    """An Outside with servers at ports 8000 and 8001."""
    for one in outsides(lab, *nameservers):
        one.greet(8000, 8001)
        yield one


def certificate(directory: Path, *names: str) -> tuple[Path, Path]:
    """A certificate of its own for these names, and its key, by openssl."""
    key, made = directory / "key.pem", directory / "cert.pem"
    alternatives = ",".join(f"DNS:{name}" for name in names)
    subprocess.run(
        ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=outside", "-addext", f"subjectAltName={alternatives}", "-keyout", key, "-out", made),
        check=True, capture_output=True,
    )  # fmt: skip
    return made, key
