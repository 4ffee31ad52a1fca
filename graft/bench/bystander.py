"""The case of the host's own servers: what they lose while graft's programs are loaded in their network namespace.

Two laboratories stand side by side, and graft runs a container in one of them. One process (bystander.c) has sockets
in both, and counts its CPU time batch by batch in turn. A rate would depend on where the scheduler puts client and
server: a matter of chance that weighs more than what is looked for.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from graft.bench.case import CPU_MICROSECONDS, Abreast, Case, Figures, Scale
from graft.bench.lab import HOST4, Lab, laboratory, wait_for

PORT = 7001


@contextlib.contextmanager
def _bystanders(programs: Path, scale: Scale) -> Iterator[Abreast]:
    with laboratory("bench") as bare, laboratory("bench") as grafted:
        grafted.spawn_graft("--name", "bystander", "sleep", "86400")
        wait_for(grafted.helper_pids, "a container")
        time.sleep(0.3)  # until graftd is idle
        yield lambda: _measure(programs, scale, {"host": bare, "graft": grafted})


def _measure(programs: Path, scale: Scale, labs: dict[str, Lab]) -> dict[str, Figures]:
    namespaces = [ns for lab in labs.values() for ns in (lab.client_ns, lab.host_ns)]
    command = (programs / "bystander", HOST4, PORT, max(scale.requests // 20, 200), *namespaces)
    told = labs["host"].host(*command, check=True).stdout.splitlines()
    pairs = [map(float, line.split()) for line in told]
    return {name: dict(zip(("UDP", "TCP"), pair, strict=True)) for name, pair in zip(labs, pairs, strict=True)}


BYSTANDER = Case(
    "bystander",
    "a host's own servers, with graft loaded",
    {"UDP": CPU_MICROSECONDS, "TCP": CPU_MICROSECONDS},
    None,
    ("cc",),
    ("host", "graft"),
    abreast=_bystanders,
)
