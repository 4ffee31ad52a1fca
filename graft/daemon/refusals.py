"""What is refused, as lines of the journal: with the fields CONTAINER, VERDICT, OPERATION, ADDRESS, REASON and ERRNO.

`graft log` has the last ones of each container, in memory. The journal keeps them, and must not be filled by them:
each container has a few lines at once and then one in some seconds, all together some in a second, and the next line
says how many are missing. Where graftd's log is no journal, they are not written.
"""

import time

from graft.daemon.decisions import decision_document
from graft.kernel.denials import Event
from graft.log import is_journal, log
from graft.process.bucket import Bucket
from graft.tenants.tenant import Tenant

RATE, BURST = 0.2, 20.0  # of one container, lines a second
ALL_RATE, ALL_BURST = 5.0, 100.0


class Refusals:
    """Writes them. All methods are for the loop's thread."""

    def __init__(self) -> None:
        self._all = Bucket(ALL_RATE, ALL_BURST)
        self._own: dict[int, Bucket] = {}
        self._missing: dict[int, int] = {}

    def tell(self, event: Event, tenant: Tenant) -> None:
        """Write the line of a refused call of @tenant's, if there is room for it."""
        if not is_journal():
            return
        now = time.monotonic()
        own = self._own.setdefault(tenant.id, Bucket(RATE, BURST))
        if own.level(now) < 1 or self._all.level(now) < 1:
            self._missing[tenant.id] = self._missing.get(tenant.id, 0) + 1
            return
        own.take(1)
        self._all.take(1)
        missing = self._missing.pop(tenant.id, 0)
        told = decision_document(event, tenant, {})
        what = " ".join(filter(None, (told["op"], told["protocol"], told["asked"])))
        more = f" ({missing} more before it are not told)" if missing else ""
        fields = {"VERDICT": "refused", "OPERATION": told["op"], "ADDRESS": told["asked"], "REASON": told["rule"]}
        log.info(
            "container %s: %s[%s] %s: refused %s, %s%s",
            tenant.name,
            told["command"] or "-",
            told["pid"] or "-",
            what,
            told["errno"],
            told["rule"],
            more,
            extra={"fields": {**fields, "ERRNO": str(event.error)}},
        )

    def ended(self, tenant: Tenant) -> None:
        """Forget a container."""
        self._own.pop(tenant.id, None)
        self._missing.pop(tenant.id, None)
