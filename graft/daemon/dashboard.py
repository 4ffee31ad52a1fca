"""The page of `graft dashboard`: containers, who talks to whom, and what is refused, to be looked at and not changed.

It lives as long as the command that asked for it. Who opens it needs the token that graftd has chosen then; by it the
browser gets a cookie, and every other request is answered with 401 and nothing of what there is. The page's own files
are all that it may load (Content-Security-Policy), and it shows foreign text as text.
"""

import hmac
import json
import secrets
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from graft.daemon.connection import Connection
from graft.daemon.open_sockets import Owned
from graft.daemon.stats import Stats
from graft.daemon.tenancy import Tenancy
from graft.daemon.web import Asked, Reply, Response, Web
from graft.errors import Refused
from graft.rules.where import parse_where

FILES = {
    "/": ("dashboard.html", "text/html; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
}
COOKIE = "graft-dashboard"  # and a number: a browser has one jar for all ports of a host, so for all such pages
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-ancestors 'none'"
HEADERS = (("Content-Security-Policy", POLICY), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"))
PAGES_MAX = 4
LOG_LINES = 200
OUTSIDE = ""  # the name of whoever is no container


class Dashboard:
    """One page, for the connection that asked for it. For the loop's thread."""

    def __init__(self, tenancy: Tenancy, connection: Connection, web: Web, token: str) -> None:
        self.tenancy = tenancy
        self.connection = connection
        self.web = web
        self.token = token
        self.cookie = f"{COOKIE}-{secrets.token_hex(4)}"

    @property
    def over(self) -> bool:
        """Has the command ended?"""
        return self.connection.sock.fileno() < 0

    def answer(self, asked: Asked, reply: Reply) -> None:
        """Answer a request of a browser."""
        given = parse_qs(asked.query).get("token", [""])[0]
        if given and self._is_token(given):
            cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            reply(Response(303, "text/plain", b"", (*HEADERS, ("Location", "/"), ("Set-Cookie", cookie))))
        elif not any(self._is_token(text) for text in _cookies(asked, self.cookie)):
            reply(Response(401, "text/plain", b"open the address that 'graft dashboard' has printed\n", HEADERS))
        elif asked.path == "/state":
            self._state(reply)
        elif asked.path in FILES:
            name, kind = FILES[asked.path]
            reply(Response(200, kind, Path(__file__).with_name(name).read_bytes(), HEADERS))
        else:
            reply(Response(404, "text/plain", b"there is no such page\n", HEADERS))

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(errors="replace"), self.token.encode())

    def _state(self, reply: Reply) -> None:
        tenants = self.tenancy.registry.tenants

        def then(found: tuple[list[Stats], list[dict[str, Any]]]) -> None:
            stats, links = found
            containers = []
            for one in stats:
                tenant = tenants.get(one.number)
                if tenant:
                    containers.append(
                        {
                            **one.document,
                            "kind": tenant.kind,
                            "direct": bool(tenant.cgroup),
                            "started": tenant.started,
                            "command": " ".join(tenant.argv),
                            "publish": [str(p) for p in tenant.publications],
                            "addresses": [str(own.address) for own in tenant.owned],
                            "endpoints": [f"{e.name} {e.where}" for e in tenant.endpoints.values()],
                            "rules": [*map(str, tenant.ingress), *map(str, tenant.egress)],
                        }
                    )
            names = {number: tenant.name for number, tenant in tenants.items()}
            for link in links:
                link["from"], link["to"] = (names.get(link[end], OUTSIDE) for end in ("from", "to"))
            log = self.tenancy.last_refused(None)[-LOG_LINES:]
            body = json.dumps({"containers": containers, "links": links, "log": log}).encode()
            reply(Response(200, "application/json", body, HEADERS))

        self.tenancy.counting.ask(then, links)


class Dashboards:
    """The pages that are open. For the loop's thread."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy
        self.open: list[Dashboard] = []

    def add(self, connection: Connection, at: str, *, public: bool) -> str:
        """Serve a page at @at (ADDR:PORT or a path) until @connection ends. Returns the address to open.

        Raises UsageError, Refused, and Failure if the address is in use.
        """
        self.tick()
        if len(self.open) >= PAGES_MAX:
            raise Refused(f"{PAGES_MAX} dashboards are open already", hint="end one of them", code="EUSERS")
        where = parse_where(at, public=public, option="--at")
        token = secrets.token_urlsafe(24)
        web = Web(self.tenancy.loop, where, self.tenancy.own_socket, lambda asked, reply: page.answer(asked, reply))
        page = Dashboard(self.tenancy, connection, web, token)
        connection.told, connection.deadline = True, float("inf")
        self.open.append(page)
        return f"http://{where}/?token={token}" if where.address else f"{where}, token {token}"

    def tick(self) -> None:
        """Close the pages whose command has ended. To be called each second."""
        for page in [page for page in self.open if page.over]:
            page.web.close()
            self.open.remove(page)

    def look(self, now: float) -> None:
        """As tick(), and close browsers that are slow. @now: monotonic seconds."""
        self.tick()
        for page in self.open:
            page.web.tick(now)

    def close(self) -> None:
        """Close all pages."""
        for page in self.open:
            page.web.close()
        self.open = []


def links(owned: Iterable[Owned]) -> list[dict[str, Any]]:
    """Who talks to whom: the tenants at both ends, 0 outside, with the open connections and the bytes of both ways.

    A connection between two containers counts once, at the end that made it.
    """
    every = [one for one in owned if one.tenant and one.socket.peer[1] and one.socket.inode]
    accepted = {(one.socket.local, one.socket.peer): one.tenant for one in every if one.accepted}
    made = {(one.socket.peer, one.socket.local) for one in every if not one.accepted}
    sums: defaultdict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    for one in every:
        here = one.socket.local, one.socket.peer
        if one.accepted and here in made:
            continue
        other = accepted.get((one.socket.peer, one.socket.local), 0)
        ends = (other, one.tenant) if one.accepted else (one.tenant, other)
        carried = (1, one.socket.sent, one.socket.received)
        sums[ends] = [before + more for before, more in zip(sums[ends], carried, strict=True)]
    return [
        {"from": source, "to": to, "connections": count, "sent": sent, "received": received}
        for (source, to), (count, sent, received) in sums.items()
    ]


def _cookies(asked: Asked, name: str) -> list[str]:
    """The values of the cookie @name. Others, of whatever else the host serves, may be of any form.

    Not by http.cookies, which takes the square of a length: who asks is nobody yet.
    """
    pairs = [each.strip().partition("=") for each in asked.headers.get("cookie", "").split(";")]
    return [value for each, _, value in pairs if each == name]
