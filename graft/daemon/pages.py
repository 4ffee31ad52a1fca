"""The pages that graftd serves by HTTP, where it was told to: the metrics (`graftd --metrics`), dashboards.

Every user of the host may ask for the metrics, without end. So the page is made once for all who wait for it, and
then not again for SPARE times as long as that took: who asks meanwhile gets the one that is there.
"""

import os
import time
from collections.abc import Mapping

from graft.daemon.dashboard import Dashboards
from graft.daemon.metrics import OPENMETRICS, PLAIN, Own, page
from graft.daemon.stats import Stats
from graft.daemon.tenancy import Tenancy
from graft.daemon.web import PATIENCE, Asked, Reply, Response, Web, parse_where
from graft.errors import GraftError
from graft.log import log

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

    def start(self, environment: Mapping[str, str], *, needed: bool) -> None:
        """Serve what the environment names. If that fails, raise GraftError with @needed, else try again later.

        graftd that supervises containers goes on without a page.
        """
        where = environment.get(METRICS, "")
        if not where or self.metrics:
            return
        try:
            parsed = parse_where(where, public=environment.get(METRICS_PUBLIC) == "1", option="--metrics")
            self.metrics = Web(self.tenancy.loop, parsed, self.tenancy.own_socket, self._metrics)
        except GraftError as error:
            if needed:
                raise type(error)(f"metrics: {error.message}", hint=error.hint, code=error.code) from None
            log.error("no metrics: %s", error)
            return
        log.info("metrics at %s", parsed)

    def tick(self, now: float) -> None:
        """Close who is slow, and try again what could not be served. To be called each second."""
        self.dashboards.look(now)
        if now >= self._until:
            self._made = {}
        if self.metrics:
            self.metrics.tick(now)
        elif now >= self.next_try:
            self.next_try = now + RETRY_SECONDS
            self.start(os.environ, needed=False)

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
