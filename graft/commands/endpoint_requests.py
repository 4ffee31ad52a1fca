"""Requests about the endpoint table: how `graft endpoint` and `ip-graft` ask graftd to add, delete and list."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from graft import client
from graft.errors import Refused
from graft.kernel.netns import open_netns
from graft.protocol import DESCRIPTORS_MAX
from graft.rules.endpoint import parse_endpoint_words

CHUNK = 2000  # endpoints in one message


def add_endpoints(endpoints: Sequence[tuple[str, list[str]]], table: str | None) -> None:
    """Add endpoints, each a name and its words, to the table of the caller's netns, or of the netns @table.

    A netns among the words is opened here, because a PID has its meaning in the caller's PID namespace. All endpoints
    of one message are added, or none; a message has up to 2,000 endpoints, in up to 4 namespaces. Raises GraftError.
    """
    if client.is_user():
        endpoints = [(name, _looked_up(name, words)) for name, words in endpoints]
    for part in _messages(endpoints):
        numbers: dict[str, int] = {}
        fds: list[int] = []
        try:
            for _, words in part:
                netns = parse_endpoint_words(words).netns
                if netns and netns not in numbers:
                    fd, _ = open_netns(netns)
                    numbers[netns] = len(fds)
                    fds.append(fd)
            document = [
                {"name": name, "words": words, "netns": numbers.get(parse_endpoint_words(words).netns, -1)}
                for name, words in part
            ]
            client.call("endpoint-add", fds=tuple(fds), netns=table, endpoints=document)
        finally:
            for fd in fds:
                os.close(fd)


def _looked_up(name: str, words: list[str]) -> list[str]:
    """The words of a user's endpoint, with the links in its path followed: graftd asks no file system for a user."""
    path = parse_endpoint_words(words).path
    if not path:
        return words
    directory, last = os.path.split(path)
    if not os.path.isdir(directory):
        raise Refused(
            f"endpoint '{name}': there is no directory '{directory}' that you may see",
            hint="create it first; the path is the host's",
            code="ENOENT",
        )
    found = [os.path.join(os.path.realpath(directory), last) if word == path else word for word in words]
    parse_endpoint_words(found)
    return found


def _messages(endpoints: Sequence[tuple[str, list[str]]]) -> Iterator[list[tuple[str, list[str]]]]:
    part: list[tuple[str, list[str]]] = []
    seen: set[str] = set()
    for name, words in endpoints:
        netns = parse_endpoint_words(words).netns
        if len(part) == CHUNK or (netns and len(seen | {netns}) > DESCRIPTORS_MAX):
            yield part
            part, seen = [], set()
        part.append((name, words))
        if netns:
            seen.add(netns)
    if part:
        yield part


def delete_endpoints(names: Sequence[str], table: str | None) -> None:
    """Delete endpoints; of each message, with up to 2,000 names, all are deleted or none. Raises GraftError."""
    for at in range(0, len(names), CHUNK):
        client.call("endpoint-del", netns=table, names=list(names[at : at + CHUNK]))


def show_endpoints(name: str | None, table: str | None) -> list[dict[str, Any]]:
    """Return the endpoints of a table, sorted by name, or the one named @name. Raises GraftError.

    Without root, the agent socket is asked: it shows anyone the table of the netns that they are in.
    """
    found: list[dict[str, Any]]
    try:
        found = client.call("endpoint-show", netns=table, name=name)
    except Refused as error:
        if error.code not in ("EACCES", "EPERM") or table is not None:
            raise
        with client.connect_agent(start=False) as sock:
            found = [e for e in client.converse(sock, {"op": "endpoints"}) if name in (None, e["name"])]
        if name is not None and not found:
            raise Refused(f"endpoint '{name}' does not exist in this namespace", code="ENOENT") from None
    return found


def describe(endpoint: dict[str, Any]) -> str:
    """Return an endpoint as one line of `ip graft show`. @endpoint: its JSON document from graftd."""
    if endpoint["type"] == "local":
        return f"{endpoint['name']} type local"
    if endpoint["type"] == "unix":
        where = f"path {endpoint['path']}"
    else:
        where = f"addr {endpoint['addr']} port {endpoint['port']}"
    netns = f" netns {endpoint['netns']}" if "netns" in endpoint else ""
    return f"{endpoint['name']} type {endpoint['type']} {where}{netns}"
