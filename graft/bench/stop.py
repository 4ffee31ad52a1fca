"""What ends a run of the benchmark early: a signal, or the end of its time.

Python's signal handlers run between any two instructions of the main thread. An exception from there must not break
the building of a laboratory, or its removal. So it is raised in `Stop.breakable()` alone, and never where a process
has been started, or is being started, that nobody would end then: subprocess.run() ends its process only from where
it waits for it, in communicate(). Elsewhere the stop is kept for the next `breakable()`, or for a moment.
"""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from types import CodeType, FrameType

from graft.bench.lab import Lab
from graft.errors import GraftError, UsageError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TIME_IS_UP = 124  # as timeout(1) has it
LATER_SECONDS = 0.02
UNITS = {"s": 1, "m": 60, "h": 3600}
STARTS_PROCESSES: tuple[CodeType, ...] = tuple(
    f.__code__ for f in (subprocess.Popen.__init__, subprocess.Popen.__exit__, subprocess.run, Lab.spawn)
)
WAITS = subprocess.Popen.communicate.__code__


class Stopped(BaseException):
    """Raised where the run is when it is stopped. Not an Exception: a case that fails is skipped, a stop is none."""


class Ended(GraftError):
    """The run was stopped; the exit status is 128 and the signal's number, or TIME_IS_UP."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Stop:
    """Waits for the first of SIGNALS, or for the end of @limit seconds (0: none). The main thread makes it, once."""

    def __init__(self, limit: float = 0.0) -> None:
        self.limit = limit
        self.number = 0  # of the signal that came first
        self.raised = False
        self.open = False
        for number in (*SIGNALS, signal.SIGALRM):
            signal.signal(number, self._on_signal)
        signal.setitimer(signal.ITIMER_REAL, limit)

    @property
    def why(self) -> str:
        """What stopped the run; empty if nothing did."""
        if self.number == signal.SIGALRM:
            return f"its time was up after {self.limit:g} s"
        return f"interrupted by {signal.Signals(self.number).name}" if self.number else ""

    def error(self) -> Ended | None:
        """What the command ends with; None if nothing stopped the run."""
        if self.number == signal.SIGALRM:
            return Ended(f"the time is up: {self.limit:g} s", TIME_IS_UP)
        return Ended("interrupted", 128 + self.number) if self.number else None

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """What runs in here may end at any moment, by Stopped; at once if the run was stopped before."""
        self.open = True
        try:
            if self.number:
                self._raise()
            yield
        finally:
            self.open = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self.raised or not self.open:  # one is enough, and cleaning up takes a moment
            return
        while frame and frame.f_code is not WAITS:
            if frame.f_code in STARTS_PROCESSES:
                signal.setitimer(signal.ITIMER_REAL, LATER_SECONDS)
                return
            frame = frame.f_back
        self._raise()

    def _raise(self) -> None:
        self.raised, self.open = True, False
        raise Stopped


def seconds(text: str) -> float:
    """Seconds from 90, 90s, 10m or 1h. Raises UsageError."""
    unit = UNITS.get(text[-1:], 0)
    try:
        found = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise UsageError(f"'{text}' is no time", hint="as 90s, 10m or 1h")
    return found
