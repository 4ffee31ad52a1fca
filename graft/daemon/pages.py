"""The pages that graftd serves by HTTP, where it was told to: the metrics (`graftd --metrics`), dashboards.

Every user of the host may ask for the metrics, without end. So the page is made once for all who wait for it, and
then not again for SPARE times as long as that took: who asks meanwhile gets the one that is there.
"""

import os
import time

from graft import toml
from graft.daemon.dashboard import Dashboards
from graft.daemon.metrics import OPENMETRICS, PLAIN, Own, page
from graft.daemon.stats import Stats
from graft.daemon.tenancy import Tenancy
from graft.daemon.web import PATIENCE, Asked, Reply, Response, Web
from graft.errors import GraftError
from graft.log import log
from graft.rules.configuration import Configuration, configuration_path
from graft.rules.where import Where, parse_where

METRICS, METRICS_PUBLIC = "GRAFT_METRICS", "GRAFT_METRICS_PUBLIC"
RETRY_SECONDS = 10.0
SPARE = 9  # of graftd's time, a tenth is for the page


class Pages:
    """What is served. For the loop's thread."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy
        self.readers = tenancy.readers
        self.metrics: Web | None = None
        self.dashboards = Dashboards(tenancy)
        self.next_try = 0.0
        self._waiting: list[tuple[bool, Reply]] = []  # who has asked for metrics: OpenMetrics, the answer
        self._made: dict[bool, Response] = {}  # by whether it is OpenMetrics
        self._asked = self._until = 0.0  # monotonic seconds: when it was begun, until when it is told

    def start(self, *, needed: bool) -> None:
        """Serve what is configured. If that fails, raise GraftError with @needed, else try again later.

        graftd that supervises containers goes on without a page.
        """
        try:
            self.change(self.tenancy.configuration)
        except GraftError as error:
            if needed:
                raise
            log.error("%s", error)

    def change(self, configuration: Configuration) -> None:
        """Serve the metrics where the environment says, else @configuration, and no more where they were.

        Raises GraftError, which names the file and the line or the variable, and then nothing has changed.
        """
        try:
            where = _where(configuration)
            if where == (self.metrics.where if self.metrics else None):
                return
            served = Web(self.tenancy.loop, where, self.tenancy.own_socket, self._metrics) if where else None
        except GraftError as error:
            told = "metrics"
            if not os.environ.get(METRICS):
                told = f"{toml.place(configuration_path(), 'metrics.listen')}: metrics.listen"
            raise type(error)(f"{told}: {error.message}", hint=error.hint, code=error.code) from None
        if self.metrics:
            self.metrics.close()
        self.metrics = served
        log.info("metrics at %s", where) if where else log.info("no metrics any more")

    def tick(self, now: float) -> None:
        """Close who is slow, and try again what could not be served. To be called each second."""
        self.dashboards.look(now)
        if now >= self._until:
            self._made = {}
        if self.metrics:
            self.metrics.tick(now)
        elif now >= self.next_try:
            self.next_try = now + RETRY_SECONDS
            self.start(needed=False)

    def close(self) -> None:
        """Serve nothing any more."""
        self.dashboards.close()
        if self.metrics:
            self.metrics.close()
            self.metrics = None

    def _metrics(self, asked: Asked, reply: Reply) -> None:
        if asked.path == "/":
            reply(Response(200, "text/html; charset=utf-8", b'graftd: <a href="metrics">metrics</a>\n'))
            return
        if asked.path != "/metrics":
            reply(Response(404, "text/plain", b"/metrics is here\n"))
            return
        openmetrics = "application/openmetrics-text" in asked.headers.get("accept", "")
        began = time.monotonic()
        if began < self._until and openmetrics in self._made:
            reply(self._made[openmetrics])
            return
        if self._waiting and began < self._asked + PATIENCE:
            self._waiting.append((openmetrics, reply))
            return
        self._waiting, self._asked = [(openmetrics, reply)], began  # who has waited for longer is closed

        def then(stats: list[Stats]) -> None:
            own = Own(len(self.readers), self.readers.closed, self.readers.lost)
            waiting, self._waiting, self._made = self._waiting, [], {}
            for kind in {kind for kind, _ in waiting}:
                made = page(stats, own, openmetrics=kind)
                self._made[kind] = Response(200, OPENMETRICS if kind else PLAIN, made)
            ended = time.monotonic()
            self._until = ended + SPARE * (ended - began)
            for kind, answer in waiting:
                answer(self._made[kind])

        self.tenancy.counting.ask(then)


def _where(configuration: Configuration) -> Where | None:
    """Where the metrics are to be; None: nowhere. Raises UsageError for what the environment says."""
    if os.environ.get(METRICS):  # which `graftd --metrics` sets, when it has looked at its words
        public = os.environ.get(METRICS_PUBLIC) == "1"
        return parse_where(os.environ[METRICS], public=public, option=METRICS, consent=f"{METRICS_PUBLIC}=1")
    told = configuration.listen
    return parse_where(told, public=configuration.public, option="listen") if told else None
