"""The run of `graft bench`: all cases in all peers, in interleaved rounds, with a live table.

Shared machines change speed from minute to minute, but rarely within a round. So each case is set up in all peers,
which are then measured one after another, round by round, with the order rotated each time. Ratios are taken between
samples of the same round, and the result is their median. A run that is stopped yields the rounds that are done.
"""

import contextlib
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from graft import __version__
from graft.bench import scale
from graft.bench.case import Case, Figures, Measure, Scale
from graft.bench.cases import CASES
from graft.bench.lab import Lab, laboratory
from graft.bench.peer import Peer
from graft.bench.peers import PEERS
from graft.bench.result import FORMAT, Growth, Partial, Result, Row, Skipped, machine
from graft.bench.rootless import ROOTLESS
from graft.bench.stop import Stop, Stopped
from graft.errors import Failure, UsageError

FULL = Scale(2, 20000)
QUICK = Scale(1, 2000)
QUICK_EVERYWHERE = (
    "tcp-in",
    "http-1kib-close",
    "short-out",
)  # the only cases of --quick with other peers, and --direct
ALWAYS = ("host", "graft", "graft-direct", "graft-accel", "graft-local")  # whatever --against says
FOR_SOME = ("graft-accel", "graft-local", "passed")  # they take part only in the cases that name them
FAULTS = (RuntimeError, OSError, ValueError, KeyError, subprocess.SubprocessError, TimeoutError)
NAMES = (*(case.name for case in CASES), *scale.CASES)


class Choice(NamedTuple):
    """The options of one run."""

    cases: Sequence[str] = ()  # names, or parts of them; empty: all
    against: Sequence[str] = ()  # peers besides the host and graft's; empty: all
    rounds: int = 5
    quick: bool = False
    rate: str = ""  # of the wire, as tc(8) takes it; empty: unlimited
    delay: str = ""  # of the wire, one way, as tc(8) takes it; empty: none
    rootless: bool = False  # the peers that an ordinary user can have

    def wants(self, name: str) -> bool:
        """Return whether the case @name is to be measured. A full name selects its case alone, a part all matches."""
        return not self.cases or any(text == name or (text not in NAMES and text in name) for text in self.cases)

    def peers(self) -> list[type[Peer]]:
        """Return the peers to measure."""
        return [peer for peer in self.known() if not self.against or peer.name in (*ALWAYS, *self.against)]

    def known(self) -> tuple[type[Peer], ...]:
        """Return the peers that there are."""
        return ROOTLESS if self.rootless else PEERS


class Board:
    """The display during a run: a table of medians against the host, and the progress."""

    def __init__(self, console: Console, peers: Sequence[type[Peer]], total: int) -> None:
        self.console = console
        self.peers = peers
        self.rows: list[Row] = []
        self.growth: list[Growth] = []
        self.partial: Partial | None = None
        self.ended = False
        columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("", total=total)

    def doing(self, what: str) -> None:
        """Show @what as the case that is being measured."""
        self.progress.update(self.task, description=what)

    def done(self, rows: Sequence[Row] = (), growth: Sequence[Growth] = ()) -> None:
        """Add the results of a case. Without a terminal, print them as lines."""
        self.rows += rows
        self.growth += growth
        self.progress.advance(self.task)
        if not self.console.is_terminal:
            for row in rows:
                self.console.print(self._line(row), highlight=False, soft_wrap=True)
            for entry in growth:
                text = f"{entry.title}: {entry.value:.4g} {entry.unit}"
                self.console.print(f"{text} ({entry.note})" if entry.note else text, highlight=False, soft_wrap=True)

    def _line(self, row: Row) -> str:
        parts = (
            [f"{row.title}, {row.figure}: host {row.median('host'):.5g} {row.unit}"] if "host" in row.samples else []
        )
        for peer in row.samples:
            ratios = row.ratios(peer)
            if peer != "host" and ratios:
                parts.append(f"{peer} {statistics.median(ratios):.3f}")
        return "; ".join(parts)

    def __rich__(self) -> Group:
        shown = self.rows if self.ended else self.rows[-max(self.console.size.height - 8, 5) :]
        return Group(self.table(shown), self.progress)

    def table(self, rows: Sequence[Row]) -> Table:
        """Return a table with the host's own figures and, for other peers, the medians of their ratios to it."""
        title = "ratio to the host's own stack; 1.00: equal, more is better"
        if self.partial:
            title = f"{title}\n{self.partial}"
        table = Table(title=title, title_justify="left")
        table.add_column("case")
        table.add_column("host", justify="right")
        others = [peer.name for peer in self.peers if peer.name != "host"]
        for name in others:
            table.add_column(name, justify="right")
        for row in rows:
            own = f"{row.median('host'):.4g} {row.unit}" if "host" in row.samples else ""
            cells = []
            for name in others:
                ratios = row.ratios(name)
                cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
            table.add_row(f"{row.title}, {row.figure}", own, *cells)
        return table


def benchmark(choice: Choice, console: Console, stop: Stop) -> Result:
    """Measure what @choice selects, until the end or until @stop.

    The result of a run that is stopped, or whose laboratory breaks, is partial. Raises UsageError for an unknown case
    or peer, and Failure without a compiler.
    """
    _check(choice)
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    facts = {**machine(), "wire": f"veth, rate {choice.rate or 'unlimited'}, delay {choice.delay or 'none'}"}
    run = Run(choice, console, stop)
    show = Live(run.board, console=console, refresh_per_second=4) if console.is_terminal else contextlib.nullcontext()
    with show:
        run.measure()
    return Result(
        FORMAT,
        __version__,
        started,
        round(time.monotonic() - began, 1),
        choice.quick,
        facts,
        {peer.name: peer.title for peer in choice.peers()},
        run.board.rows,
        run.board.growth,
        run.skipped,
        run.board.partial,
    )


class Run:
    """One run: how far it is, and what it has skipped."""

    def __init__(self, choice: Choice, console: Console, stop: Stop) -> None:
        self.choice = choice
        self.stop = stop
        self.cases = [case for case in CASES if choice.wants(case.name) and (case.setup or not choice.rootless)]
        self.growing = [name for name in scale.CASES if choice.wants(name) and not choice.rootless]
        self.board = Board(console, choice.peers(), len(self.cases) + len(self.growing))
        self.skipped: list[Skipped] = []
        self.rounds = 0

    def measure(self) -> None:
        """All cases, until @stop."""
        try:
            if self.cases:
                self._pairs()
            for name in self.growing:
                self.board.doing(name)
                self._grow(name)
        except Stopped:
            self._end_early(self.stop.why)
        except (*FAULTS, AssertionError) as error:
            told = f"the laboratory: {_told(error)}"
            if self.stop.why:
                self.skipped.append(Skipped("", "", told))
            self._end_early(self.stop.why or told)
        self.board.ended = True

    def _end_early(self, why: str) -> None:
        of = sum(self.choice.rounds for case in self.cases if not _missing(case)) + len(self.growing)
        self.board.partial = Partial(why, self.rounds, of, self.choice.rounds)

    def _pairs(self) -> None:
        """The cases in one laboratory, peer beside peer."""
        with laboratory("bench") as lab:
            with self.stop.breakable():
                _compile(lab, self.cases)
                _shape(lab, self.choice)
            field = Field(lab, self)
            try:
                for case in self.cases:
                    self.board.doing(case.title)
                    rows = case_rows(case)
                    try:
                        field.measure(case, rows)
                    finally:
                        self.board.done([row for row in rows if row.samples])
            finally:
                field.close()

    def _grow(self, name: str) -> None:
        """One of the scale cases; what it had found when something failed is kept."""
        found: list[Growth] = []
        try:
            with laboratory("bench") as lab, self.stop.breakable():
                _compile(lab)
                found.extend(scale.CASES[name](lab, quick=self.choice.quick))
        except (*FAULTS, AssertionError) as error:
            self.skipped.append(Skipped(name, "graft", _told(error)))
            if self.stop.raised:
                raise Stopped from None
        finally:
            self.board.done(growth=found)
        self.rounds += 1


def case_rows(case: Case) -> list[Row]:
    """The rows of a case, without samples yet."""
    return [Row(case.name, figure, case.title, unit.name, unit.better, {}) for figure, unit in case.figures.items()]


def _check(choice: Choice) -> None:
    for text in choice.cases:
        if not any(text in name for name in NAMES):
            raise UsageError(f"no case is named '{text}'", hint=f"one of {', '.join(NAMES)}")
    for name in choice.against:
        known = [peer.name for peer in choice.known()]
        if name not in known:
            raise UsageError(f"no peer is named '{name}'", hint=f"one of {', '.join(known)}")


def _compile(lab: Lab, cases: Sequence[Case] = ()) -> None:
    """Compile the load of the benchmark, and the Go program if one of @cases needs it. Raises Failure."""
    for name in ("load", "bystander"):
        source = Path(__file__).with_name(f"{name}.c")
        _build(
            source, ("cc", "-O2", "-pthread", source, "-o", lab.work / name), "apt-get install gcc libc6-dev", None
        )
    if shutil.which("go") and any("go" in case.tools for case in cases):
        source = Path(__file__).with_name("load.go")
        env = {
            **os.environ,
            "CGO_ENABLED": "0",
            "GOFLAGS": "",
            "GOTOOLCHAIN": "local",
            "GOCACHE": str(lab.work / "go-cache"),
        }
        _build(source, ("go", "build", "-o", lab.work / "load-go", source), "go env, go build by hand", env)


def _build(source: Path, command: Sequence[str | Path], hint: str, env: dict[str, str] | None) -> None:
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    if result.returncode:
        raise Failure(f"compile {source}: {result.stderr.strip()}", hint=hint)


def _shape(lab: Lab, choice: Choice) -> None:
    """Set the rate and delay of the veth pair in both directions (tc-netem(8), tc-tbf(8)).

    Raises UsageError for a value that tc(8) does not understand, Failure if the kernel lacks the queueing discipline.
    """
    if choice.delay:
        rate = ("rate", choice.rate) if choice.rate else ()
        lab.shaping = ("netem", "delay", choice.delay, *rate, "limit", "100000")
    elif choice.rate:
        lab.shaping = ("tbf", "rate", choice.rate, "burst", "1mb", "latency", "50ms")
    try:
        for ns in (lab.host_ns, lab.client_ns):
            lab.shape(ns, "veth0")
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())
        if "llegal" in said:
            raise UsageError(said, hint="write it as tc(8) does: 1gbit, 5ms") from None
        words = " ".join(lab.shaping)
        raise Failure(f"tc qdisc add {words}: {said}", hint=f"the kernel needs sch_{lab.shaping[0]}") from None


def _missing(case: Case) -> str:
    missing = [tool for tool in case.tools if not shutil.which(tool)]
    return f"not installed: {', '.join(missing)}" if missing else ""


class Field:
    """The peers in one laboratory. Each is started when a case first needs it, and is kept until close()."""

    def __init__(self, lab: Lab, run: Run) -> None:
        self.lab = lab
        self.run = run
        self.choice = run.choice
        self.skipped = run.skipped
        self.kinds = {kind.name: (index, kind) for index, kind in enumerate(run.choice.peers(), 1)}
        self.built: dict[str, Peer] = {}
        self.absent: set[str] = set()

    def close(self) -> None:
        """End all servers, and remove all peers."""
        for peer in reversed(self.built.values()):
            try:
                peer.end_servers()
                peer.close()
            except FAULTS as error:  # the others are to go as well; the laboratory finds what is left
                self.skipped.append(Skipped("", peer.name, f"taking it away: {_told(error)}"))

    def measure(self, case: Case, rows: Sequence[Row]) -> None:
        """Measure one case in all peers that take part; puts each round's samples into @rows when the round is done.

        Failures go to `skipped`.
        """
        reason = _missing(case)
        if reason:
            self.skipped.append(Skipped(case.name, "", reason))
            return
        scale = QUICK if self.choice.quick else FULL
        try:
            with case.abreast(self.lab.work, scale) if case.abreast else contextlib.nullcontext() as abreast:
                with self.run.stop.breakable():
                    measures = self._set_up(case, scale)
                for turn in range(0 if self.choice.quick else -1, self.choice.rounds):  # the first round warms up
                    with self.run.stop.breakable():
                        found = abreast() if abreast else self._round(case, measures, turn)
                    if turn < 0:
                        continue
                    for row in rows:
                        for name, figures in found.items():
                            row.samples.setdefault(name, []).append(figures[row.figure])
                    self.run.rounds += 1
        except FAULTS as error:
            self.skipped.append(Skipped(case.name, "", _told(error)))
        finally:
            for peer in self.built.values():
                peer.end_servers()

    def _round(self, case: Case, measures: dict[str, Measure], turn: int) -> dict[str, Figures]:
        """One round in all peers, in an order that turns; one that fails takes no further part."""
        found = {}
        names = list(measures)
        at = turn % max(len(names), 1)
        for name in names[at:] + names[:at]:
            try:
                found[name] = measures[name]()
            except FAULTS as error:
                self.skipped.append(Skipped(case.name, name, _told(error)))
                del measures[name]
        return found

    def _takes_part(self, case: Case, name: str) -> bool:
        if not case.setup or (case.peers and name not in case.peers):
            return False
        if not case.peers and name in FOR_SOME and name not in case.also:
            return False
        everywhere = not self.choice.quick or bool(self.choice.cases) or case.name in QUICK_EVERYWHERE
        return everywhere or name in ("host", "graft", "graft-accel", "graft-local")

    def _set_up(self, case: Case, scale: Scale) -> dict[str, Measure]:
        measures: dict[str, Measure] = {}
        for name in self.kinds:
            if not case.setup or not self._takes_part(case, name):
                continue
            try:
                peer = self._peer(name)
                if peer:
                    measures[name] = case.setup(peer, scale)
            except FAULTS as error:
                self.skipped.append(Skipped(case.name, name, _told(error)))
        return measures

    def _peer(self, name: str) -> Peer | None:
        """Return the peer, started if need be; None if it cannot run, which is told once."""
        if name in self.absent:
            return None
        if name not in self.built:
            index, kind = self.kinds[name]
            reason = kind.reason()
            if not reason:
                self.built[name] = kind(self.lab, index)  # also what is half built has to go
                try:
                    self.built[name].start()
                except FAULTS as error:
                    reason = _told(error)
            if reason:
                self.absent.add(name)
                self.skipped.append(Skipped("", name, reason))
                return None
        return self.built[name]


def _told(error: Exception) -> str:
    """Return an error as one line; of a command that failed, the end of its standard error."""
    said = str(getattr(error, "stderr", None) or error).strip() or type(error).__name__
    return " ".join(said.split())[-300:]
