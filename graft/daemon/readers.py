"""Who reads `graft log -f`: each gets what is decided as it is decided.

A reader is a connection to graftd.sock that stays open, to which graftd writes a line of JSON for each call, and
never waits. What a reader has no room for is counted, and it is told the count when it reads again. One that has read
nothing for UNREAD_SECONDS while there was something is closed. While a reader is full, nothing is formatted for it.

While somebody reads what is allowed as well, the tenants that he reads of are marked (TENANT_WATCHED), and the kernel
half reports it (csrc/watch.bpf.h). It bounds what it reports (csrc/report.bpf.h), so a line with `dropped` says how
many calls of a container are missing here.
"""

import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from graft.daemon.admission_users import User
from graft.daemon.connection import Connection
from graft.daemon.decisions import decision_document
from graft.errors import Refused
from graft.kernel.denials import ALLOWED, CONVERTED, Event
from graft.log import log
from graft.rules.address import Address
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant

READERS_MAX = 64
READERS_OF_USERS, READERS_OF_A_USER = 32, 4
FULL_SECONDS = 0.1  # a reader that was full is not looked at again before
UNREAD_SECONDS = 10.0


class Reader:
    """One connection. @tenant: whose calls it gets, None: of all that it may see. @every: also what is allowed."""

    def __init__(self, connection: Connection, tenant: Tenant | None, *, every: bool) -> None:
        self.connection = connection
        self.user: User | None = connection.user  # without root, who sees their own containers alone
        self.tenant = tenant
        self.every = every
        self.lost = 0  # lines, since it was told of such
        self.missing: Counter[str] = Counter()  # unreported calls of containers that it has not heard of
        self.full_since = 0.0  # monotonic seconds; 0: it is not full
        self.next_look = 0.0

    @property
    def gone(self) -> bool:
        """Is its connection closed?"""
        return self.connection.sock.fileno() < 0

    def wants(self, tenant: Tenant | None, *, allowed: bool) -> bool:
        """Does it get such a call of @tenant, or of a wrapper inside its container?"""
        if allowed and not self.every:
            return False
        if self.user and not (tenant and self.user.owns(tenant.parent or tenant)):
            return False
        return self.tenant is None or (tenant is not None and self.tenant in (tenant, tenant.parent))

    def has_room(self, now: float) -> bool:
        """May it be sent a line now, as far as is known?"""
        return not self.gone and not self.connection.outgoing and (not self.full_since or now >= self.next_look)

    def send(self, document: dict[str, Any], now: float) -> bool:
        """Send a line, and before it the count of those that were lost. False: it was not sent."""
        lines = [{"lost": self.lost}] if self.lost else []
        data = "".join(json.dumps(line) + "\n" for line in [*lines, document]).encode()
        try:
            self.connection.sock.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            self.full_since = self.full_since or now
            self.next_look = now + FULL_SECONDS
            return False
        except OSError:
            self.connection.close()
            return False
        self.lost, self.full_since = 0, 0.0
        return True


class Readers:
    """All readers of the log. For the loop's thread."""

    def __init__(self, registry: Registry, named: Callable[[Tenant, Address], str]) -> None:
        """@named: the name by which a container was last told an address; "" if none was."""
        self.registry = registry
        self.named = named
        self.readers: list[Reader] = []
        self.closed = 0  # readers that did not read
        self.lost = 0  # lines that those had no room for
        self._dropped: dict[int, int] = {}  # of a tenant, how many reports the readers know to be missing
        self._seen: set[int] = set()  # tenants that have reported since the last tick
        self._holders: dict[bytes, str] = {}

    def __len__(self) -> int:
        return sum(not reader.gone for reader in self.readers)

    def add(self, connection: Connection, tenant: Tenant | None, *, every: bool) -> None:
        """Send @connection a line for each call from now on. Raises Refused (EUSERS) if there are READERS_MAX."""
        self._forget_gone()
        users = [reader.user.account for reader in self.readers if reader.user]
        own = connection.user and users.count(connection.user.account) >= READERS_OF_A_USER
        if len(self.readers) >= READERS_MAX or own or (connection.user and len(users) >= READERS_OF_USERS):
            raise Refused(f"{len(self.readers)} read the log already", hint="end some of them", code="EUSERS")
        connection.told, connection.deadline = True, float("inf")
        if not self.readers:
            reports = self.registry.kernel.reports
            self._dropped = {number: reports.dropped(number) for number in self.registry.tenants}
            self._look_up_holders()
        self.readers.append(Reader(connection, tenant, every=every))
        self._watch()

    def tell(self, event: Event) -> None:
        """Send the call to whoever wants it."""
        if not self.readers or event.reason == CONVERTED:
            return
        tenant, now = self.registry.tenants.get(event.tenant), time.monotonic()
        allowed = event.reason == ALLOWED
        self._seen.add(event.tenant)
        document: dict[str, Any] | None = None
        for reader in self.readers:
            if not reader.wants(tenant, allowed=allowed):
                continue
            if reader.has_room(now):
                if reader.user:
                    sent = reader.send(reader.user.own_view(self.document(event, tenant, {})), now)
                else:
                    document = document or self.document(event, tenant, self._holders)
                    sent = reader.send(document, now)
                if sent:
                    continue
            reader.lost += 1

    def document(self, event: Event, tenant: Tenant | None, holders: dict[bytes, str]) -> dict[str, Any]:
        """A call in JSON, with the name by which its destination was known."""
        document = decision_document(event, tenant, holders)
        if tenant and not document["name"] and event.op in ("connect", "send"):
            document["name"] = self.named(tenant.parent or tenant, Address(event.address))
        return document

    def ended(self, tenant: Tenant) -> None:
        """Tell who reads of this tenant alone that it has ended."""
        for reader in [r for r in self.readers if r.tenant is tenant]:
            if not reader.gone:
                reader.send({"ended": tenant.name}, time.monotonic())
                reader.connection.close()
        self._dropped.pop(tenant.id, None)

    def tick(self, now: float) -> None:
        """Close readers that do not read, and tell the others what is missing. To be called each second."""
        if not self.readers:
            return
        for reader in self.readers:
            if reader.full_since and now - reader.full_since > UNREAD_SECONDS:
                self.closed += 1
                log.warning("pid %d reads the log no more: %d lines lost", reader.connection.pid, reader.lost)
                self.lost += reader.lost
                reader.connection.close()
        self._tell_dropped(now)
        self._forget_gone()
        self._look_up_holders()
        self._watch()

    def _tell_dropped(self, now: float) -> None:
        again = set()
        for number in self._seen:
            count = self.registry.kernel.reports.dropped(number)
            missing = count - self._dropped.get(number, 0)
            self._dropped[number] = count
            tenant = self.registry.tenants.get(number)
            if missing <= 0:
                continue
            again.add(number)  # more may follow that no report goes before
            for reader in self.readers:
                if reader.wants(tenant, allowed=False):
                    reader.missing[tenant.name if tenant else ""] += missing
        self._seen = again
        for reader in self.readers:
            for name, count in list(reader.missing.items()):
                document = {"time": time.time(), "container": name, "dropped": count}
                if reader.has_room(now) and reader.send(document, now):
                    del reader.missing[name]

    def _forget_gone(self) -> None:
        self.readers = [reader for reader in self.readers if not reader.gone]

    def _look_up_holders(self) -> None:
        tenants = self.registry.tenants.values()
        self._holders = {own.address.raw: tenant.name for tenant in tenants for own in tenant.owned}

    def _watch(self) -> None:
        """Have the kernel half report what somebody reads, and nothing else."""
        watching = [reader for reader in self.readers if reader.every]
        self.registry.watches_all = any(reader.tenant is None and not reader.user for reader in watching)
        for tenant in self.registry.tenants.values():
            wanted = self.registry.watches_all or any(reader.wants(tenant, allowed=True) for reader in watching)
            if tenant.watched != wanted:
                tenant.watched = wanted
                with contextlib.suppress(OSError):  # the entry is there: its value changes
                    self._mark(tenant)
        self.registry.kernel.tell(watched=bool(watching))

    def _mark(self, tenant: Tenant) -> None:
        flags = tenant.compile(self.registry.added, self.registry.pod_resolvers).flags
        tenant.installed = tenant.installed._replace(flags=flags)
        self.registry.kernel.maps["tenants"].update(tenant.id.to_bytes(4, "little"), tenant.value(flags))
