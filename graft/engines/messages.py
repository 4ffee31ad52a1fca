"""DNS answers of nameservers: read, and made again of what is to be believed (RFC 1035, RFC 6891). Pure.

An answer comes from whoever a name's owner chooses, and may be made to cost the reader its time. So a name has at
most NAME_MAX bytes and HOPS_MAX pointers, each of which leads back; a message has at most RECORDS_MAX records that
are read; and what stands at one place is read once. What is handed on is written anew: the question, the chain of
CNAMEs that begins there, and the records at its end, of the type that was asked for. Nothing else of a message
reaches a program.

The queries of containers are read by graft/engines/names.py.
"""

import struct
from typing import NamedTuple

from graft.engines.names import AAAA, NAME_MAX, OPT, PAYLOAD, QUESTION_AT, A, question, question_end

CNAME, SOA, RRSIG = 5, 6, 46
INTERNET = 1
NOERROR, NXDOMAIN = 0, 3
HOPS_MAX = 64
RECORDS_MAX = 1000
CHAIN_MAX = 16  # CNAMEs in a row
ADDRESSES_MAX = 256  # of one answer
AUTHORITATIVE, TRUNCATED, RECURSION, AVAILABLE = 0x0400, 0x0200, 0x0100, 0x0080
AUTHENTIC, CHECKING = 0x0020, 0x0010
DNSSEC_OK = 0x8000  # of the flags in the TTL of an OPT record
EXPLAINED, BLOCKED = 15, 15  # an option of OPT, and its value: Extended DNS Errors (RFC 8914)
RECORD = struct.Struct(">HHIH")
DATAGRAM = 512  # bytes that who sends no OPT record takes
SIZES = {A: 4, AAAA: 16}
HINTING = (64, 65)  # SVCB, HTTPS
HINTS = {4: 4, 6: 16}  # ipv4hint, ipv6hint: the bytes of an address in them


class Record(NamedTuple):
    """A record of an answer. `owner` and, of a CNAME, `data` are names as on the wire, without pointers."""

    owner: bytes
    kind: int
    ttl: int
    data: bytes


class Answer(NamedTuple):
    """What is believed of a nameserver's answer. `chain`: CNAMEs from the question on, `records`: at their end."""

    code: int
    truncated: bool
    authentic: bool
    chain: list[Record]
    records: list[Record]  # of the type that was asked for
    signatures: list[Record]  # RRSIG of both
    negative: Record | None  # the SOA of an answer without records


class _Names:
    """The names of one message. Raises ValueError for what is no name."""

    def __init__(self, message: bytes) -> None:
        self.message = message
        self.known: dict[int, tuple[bytes, int]] = {}  # by place

    def at(self, place: int) -> tuple[bytes, int]:
        """The name at @place as on the wire, without pointers, in lower case, and where it ends there."""
        found = self.known.get(place)
        if found is None:
            found = self.known[place] = self._read(place)
        return found

    def _read(self, place: int) -> tuple[bytes, int]:
        message, parts, length, end, lowest = self.message, [], 0, 0, place
        for _ in range(NAME_MAX + HOPS_MAX):
            size = message[place]
            if size < 64:
                part = message[place : place + 1 + size]
                length += 1 + size
                if len(part) != 1 + size or length > NAME_MAX:
                    break
                parts.append(part)
                place += 1 + size
                if not size:
                    return b"".join(parts).lower(), end or place
            elif size >= 192:
                target = int.from_bytes(message[place : place + 2], "big") & 0x3FFF
                end = end or place + 2
                if target >= lowest:
                    break
                place = lowest = target
            else:
                break
        raise ValueError("a malformed name")


def addresses_told(message: bytes) -> list[bytes]:
    """The addresses in a message that answers a query, wherever they stand in it, as far as it can be read.

    Those that HTTPS and SVCB records give as hints are among them (RFC 9460, 7.3).
    """
    found: list[bytes] = []
    try:
        questions, *counts = struct.unpack_from(">4H", message, 4)
        at = 12
        for _ in range(min(questions, RECORDS_MAX)):
            at = _after_name(message, at) + 4
        for _ in range(min(sum(counts), RECORDS_MAX)):
            at = _after_name(message, at)
            kind, _, _, size = RECORD.unpack_from(message, at)
            at += RECORD.size
            data = message[at : at + size]
            at += size
            if kind in SIZES and len(data) == SIZES[kind]:
                found.append(data)
            elif kind in HINTING:
                found += _hints(data)
    except (IndexError, struct.error):
        pass  # no program can read on either
    return found


def _after_name(message: bytes, at: int) -> int:
    """Where the name at @at ends."""
    while message[at] and message[at] < 64:
        at += 1 + message[at]
    return at + (2 if message[at] else 1)


def _hints(data: bytes) -> list[bytes]:
    """The addresses in the data of an HTTPS or SVCB record: its parameters ipv4hint and ipv6hint."""
    at, found = _after_name(data, 2), []
    while at + 4 <= len(data):
        key, size = struct.unpack_from(">2H", data, at)
        width = HINTS.get(key, 0)
        found += [data[n : n + width] for n in range(at + 4, at + 4 + size, width)] if width else []
        at += 4 + size
    return [address for address in found if len(address) in SIZES.values()]


def wire(name: str) -> bytes:
    """A name on the wire. @name: in text, each label of at most 63 bytes."""
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label) + b"\0"


def text_of(name: bytes) -> str:
    """A name on the wire, without pointers, as question() tells one."""
    return question(bytes(12) + name + bytes(4))[0]


def upstream_query(query: bytes) -> bytes:
    """The query that a nameserver is asked, of a container's, which is_query(): nothing of it but its question.

    Options, and upper case in the name, would carry what the container likes to whoever answers.
    """
    end = question_end(query)
    flags = int.from_bytes(query[2:4], "big") & (RECURSION | CHECKING)
    extended = b""
    if query[11]:
        okay = int.from_bytes(query[end + 7 : end + 9], "big") & DNSSEC_OK
        extended = struct.pack(">BHHHHH", 0, OPT, PAYLOAD, 0, okay, 0)
    header = struct.pack(">2s5H", query[:2], flags, 1, 0, 0, query[11])
    return header + query[12 : end - 4].lower() + query[end - 4 : end] + extended


def as_asked(query: bytes, reply: bytes) -> bytes:
    """A nameserver's @reply to upstream_query(), with the id of @query, and the name as it was written there.

    Resolvers that mix upper and lower case compare it to the letter, against forgeries.
    """
    end = question_end(query)
    same = reply[12:end].lower() == query[12:end].lower()
    return query[:2] + reply[2:12] + query[12:end] + reply[end:] if same else query[:2] + reply[2:]


def parse_answer(message: bytes, query: bytes) -> Answer:
    """Read a nameserver's @message that answers @query, which is_query() and asks for A or AAAA.

    Raises ValueError for one that is malformed, answers something else, or has a chain that is too long.
    """
    try:
        return _parse(message, query)
    except (IndexError, struct.error):
        raise ValueError("it ends early") from None


def _parse(message: bytes, query: bytes) -> Answer:
    flags, questions, answers, authority = struct.unpack_from(">4H", message, 2)
    end = question_end(query)
    asked, kind = query[12 : end - 4].lower(), int.from_bytes(query[end - 4 : end - 2], "big")
    if (
        not flags & 0x8000
        or questions != 1
        or message[12 : end - 4].lower() + message[end - 4 : end] != (asked + query[end - 4 : end])
    ):
        raise ValueError("it answers another question")
    names = _Names(message)
    at, found = end, []
    for _ in range(min(answers, RECORDS_MAX)):
        record, at = _record(names, at)
        if record:
            found.append(record)
    chain, records, signatures = _follow(asked, kind, found)
    negative = None
    if not records and answers <= RECORDS_MAX:
        for _ in range(min(authority, 16)):
            record, at = _record(names, at)
            negative = negative or (record if record and record.kind == SOA else None)
    return Answer(
        flags & 0xF,
        bool(flags & TRUNCATED),
        bool(flags & AUTHENTIC),
        chain,
        records[:ADDRESSES_MAX],
        signatures,
        negative,
    )


def _record(names: _Names, at: int) -> tuple[Record | None, int]:
    """The record at @at, and where it ends; None for one that is of no use."""
    message = names.message
    owner, at = names.at(at)
    kind, group, ttl, size = RECORD.unpack_from(message, at)
    at += RECORD.size
    end = at + size
    if end > len(message):
        raise ValueError("it ends early")
    if group != INTERNET:
        return None, end
    data = message[at:end]
    if kind == CNAME:
        data, stop = names.at(at)
        if stop != end:
            raise ValueError("a malformed CNAME")
    elif kind == SOA:
        first, stop = names.at(at)
        second, stop = names.at(stop)
        if stop + 20 != end:
            raise ValueError("a malformed SOA")
        data = first + second + message[stop:end]
    elif kind in SIZES and size != SIZES[kind]:
        raise ValueError("an address of another size")
    elif kind not in SIZES and kind != RRSIG:
        return None, end
    return Record(owner, kind, 0 if ttl >> 31 else ttl, data), end  # RFC 2181, 8


def _follow(asked: bytes, kind: int, found: list[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """The chain that begins at @asked, the records of @kind at its end, and the signatures of both."""
    by_owner: dict[bytes, list[Record]] = {}
    for record in found:
        by_owner.setdefault(record.owner, []).append(record)
    chain: list[Record] = []
    signatures: list[Record] = []
    owner = asked
    while True:
        here = by_owner.get(owner, [])
        signatures += [r for r in here if r.kind == RRSIG]
        records = [r for r in here if r.kind == kind]
        alias = next((r for r in here if r.kind == CNAME), None)
        if records or alias is None:
            return chain, records, signatures
        chain.append(alias)
        if len(chain) > CHAIN_MAX:
            raise ValueError("a chain of CNAMEs without an end")
        owner = alias.data


def written(query: bytes, answer: Answer, why: str = "") -> bytes:
    """The response to @query that tells @answer. @why: an explanation, of what is refused."""
    end = question_end(query)
    records = [*answer.chain, *answer.records]
    extended, okay = _options(query, why)
    if okay:
        records += answer.signatures
    authority = [answer.negative] if answer.negative else []
    flags = 0x8000 | AVAILABLE | int.from_bytes(query[2:4], "big") & (RECURSION | CHECKING) | answer.code
    flags |= (TRUNCATED if answer.truncated else 0) | (AUTHENTIC if answer.authentic else 0)
    header = struct.pack(">2s5H", query[:2], flags, 1, len(records), len(authority), 1 if extended else 0)
    asked = query[12 : end - 4].lower()
    parts = [header, query[12:end]]
    for record in (*records, *authority):
        parts.append(QUESTION_AT.to_bytes(2, "big") if record.owner == asked else record.owner)
        parts += [RECORD.pack(record.kind, INTERNET, record.ttl, len(record.data)), record.data]
    return b"".join((*parts, extended))


def _options(query: bytes, why: str = "") -> tuple[bytes, bool]:
    """The OPT record of a response, b"" where the query has none, and whether the client wants signatures."""
    if not query[11]:
        return b"", False
    end = question_end(query)
    okay = int.from_bytes(query[end + 7 : end + 9], "big") & DNSSEC_OK
    told = why.encode()[:200]
    option = struct.pack(">HHH", EXPLAINED, 2 + len(told), BLOCKED) + told if why else b""
    return struct.pack(">BHHHHH", 0, OPT, PAYLOAD, 0, okay, len(option)) + option, bool(okay)


def cut(query: bytes, reply: bytes) -> bytes:
    """@reply as a datagram: whole if the client takes as much, else without records, so that it asks by TCP."""
    end = question_end(query)
    room = max(DATAGRAM, int.from_bytes(query[end + 3 : end + 5], "big")) if query[11] else DATAGRAM
    if len(reply) <= room:
        return reply
    extended, _ = _options(query)
    flags = int.from_bytes(reply[2:4], "big") | TRUNCATED
    return struct.pack(">2s5H", reply[:2], flags, 1, 0, 0, 1 if extended else 0) + query[12:end] + extended


def refusal(query: bytes, why: str) -> bytes:
    """NXDOMAIN for a name that a container may not reach.

    REFUSED would say it better, and stub resolvers take it for a server that is out of order: they ask the next one,
    and then tell their program of a temporary failure, which it tries again. @why is told to who sends an OPT record.
    """
    return written(query, Answer(NXDOMAIN, False, False, [], [], [], None), why)


def nothing(query: bytes) -> bytes:
    """A response without a record: the name is there, and has none of this type."""
    return written(query, Answer(NOERROR, False, False, [], [], [], None))
