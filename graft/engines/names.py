"""Names of containers on networks, as DNS answers."""

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


TTL = 5  # seconds; short, because containers come and go


QUERY_MAX = 512  # bytes: header 12, question at most 259, the rest for an OPT record
NAME_MAX = 255  # bytes of a name on the wire (RFC 1035, 2.3.4)


def docker_names(known: dict[str, Any]) -> list[str]:
    """Return a container's name, host name and aliases. @known: Docker's config.v2.json, parsed."""
    found = [str(known.get("Name", "")).lstrip("/"), (known.get("Config") or {}).get("Hostname") or ""]
    for network in ((known.get("NetworkSettings") or {}).get("Networks") or {}).values():
        for key in ("Aliases", "DNSNames"):
            found += (network or {}).get(key) or []
    return found


def _failed(query: bytes) -> bytes:
    """Return a SERVFAIL response to a query, which need not be well-formed."""
    return query[:2] + b"\x81\x82" + bytes(8)


def question_end(query: bytes) -> int:
    """Return the offset of the end of a message's first question; 0 if it is malformed (RFC 1035, 4.1.2)."""
    at = 12
    while at < len(query) and 0 < query[at] < 64:
        at += 1 + query[at]
    return at + 5 if at + 5 <= len(query) and query[at] == 0 and at - 12 < NAME_MAX else 0


def is_query(query: bytes) -> bool:
    """Return whether @query is a standard query of one question and at most an OPT record (RFC 6891).

    Stub resolvers send nothing else. The check bounds what has to be parsed of untrusted input.
    """
    if not 12 <= len(query) <= QUERY_MAX or query[2] & 0xF8:  # these bits: a response, or another opcode
        return False
    return struct.unpack(">4H", query[4:12]) in ((1, 0, 0, 0), (1, 0, 0, 1)) and bool(question_end(query))
