"""What a case of `graft bench` is: its values, and the units of its figures.

A case is set up once in each peer; then the peers are measured in turn. One measurement returns all figures of its
case. `better` says which direction of a figure is good: "more" for rates, "less" for times and costs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from graft.bench.peer import Peer

Figures = dict[str, float]
Measure = Callable[[], Figures]
Abreast = Callable[[], dict[str, Figures]]  # figures by peer


class Unit(NamedTuple):
    """The unit of a figure, and which direction is better: "more" or "less"."""

    name: str
    better: str


class Scale(NamedTuple):
    """The length of a measurement: by time, or by the number of requests or connections."""

    seconds: int
    requests: int


class Case(NamedTuple):
    """One case. The first of its figures stands for it in the summary."""

    name: str
    title: str
    figures: dict[str, Unit]
    setup: Callable[[Peer, Scale], Measure] | None
    tools: tuple[str, ...] = ()  # programs that it needs
    peers: tuple[str, ...] = ()  # those that it is for; empty: all that can serve to the outside
    also: tuple[str, ...] = ()  # peers that are for some cases only
    abreast: Callable[[Path, Scale], AbstractContextManager[Abreast]] | None = None  # instead of `setup`: all at once


GBIT = Unit("Gbit/s", "more")
PER_SECOND = Unit("1/s", "more")
CPU_GB = Unit("CPU s per GB", "less")
CPU_REQUESTS = Unit("CPU s per 100,000", "less")
CPU_MICROSECONDS = Unit("CPU us", "less")  # of a request or a connection, both ends
MICROSECONDS = Unit("us", "less")
