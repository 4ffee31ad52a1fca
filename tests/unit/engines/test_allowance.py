"""What is kept of names and pins: limits, a hundred thousand queries, what a graftd that follows takes over."""

import gc
import time
import tracemalloc
from types import SimpleNamespace

import dns.message
import dns.rrset
import pytest

from graft.engines import allowance
from graft.engines.allowance import Allowance
from graft.engines.messages import upstream_query
from graft.engines.names import Names
from graft.rules.address import parse_address
from graft.rules.own_address import parse_own
from graft.rules.request import Request
from graft.rules.tables import PIN, PINNED_KEY
from tests.messages import query
from tests.unit.fakes import FakeMap, make_registry, make_tenant

ANY = 255
ALLOW = ("www.test:443", "www.test:80", "*.many.test", "192.0.2.77")


@pytest.fixture
def known(monkeypatch, tmp_path):
    registry = make_registry(monkeypatch, tmp_path)
    tenant = make_tenant(registry, "web")
    tenant.asked = Request(allow=ALLOW)
    log = SimpleNamespace(append=lambda _: None)
    maps = {"pinned": FakeMap("pinned", log), "holders": FakeMap("holders", log, 1 << 20)}
    return Allowance(registry, SimpleNamespace(maps=maps), Names(registry)), tenant, maps["pinned"]  # type: ignore[arg-type]


def replied(asked: bytes, *addresses: str, ttl: int = 60) -> bytes:
    made = dns.message.make_response(dns.message.from_wire(asked))
    made.answer.append(dns.rrset.from_text(made.question[0].name, ttl, "IN", "A", *addresses))
    return made.to_wire(max_size=65535)


def pins(pinned: FakeMap) -> set[tuple[int, str]]:
    found = (PINNED_KEY.unpack(key) for key in pinned.entries)
    return {(port, str(parse_address(".".join(map(str, raw[12:]))))) for _, port, raw in found}


def test_pins_have_the_ports_of_the_name_and_their_time(known):
    books, tenant, pinned = known
    asked = query("www.test")
    assert books.answer(tenant, asked) is None
    books.admit(tenant, asked, replied(asked, "192.0.2.1", "127.0.0.1", ttl=1000))
    assert pins(pinned) == {(80, "192.0.2.1"), (443, "192.0.2.1")}
    (first, *_) = pinned.entries.values()
    assert 1000 < (PIN.unpack(first)[0] - time.monotonic_ns()) / 1e9 <= 1000 + allowance.GRACE
    books.admit(tenant, asked, replied(asked, "192.0.2.1", ttl=0))
    assert PIN.unpack(next(iter(pinned.entries.values())))[0] >= PIN.unpack(first)[0], "a later answer does not shorten it"


@pytest.mark.timeout(600)  # 20 s of processor time
def test_a_hundred_thousand_queries_without_growth(known):
    """Allowed names with new addresses, and refused ones: half of them need no more than all."""
    books, tenant, pinned = known
    template = replied(query("n000000.many.test"), "10.0.0.1", ttl=0)
    grown = []
    tracemalloc.start()
    for n in range(50_000):
        asked = query(f"n{n:06}.many.test")
        assert books.answer(tenant, asked) is None
        reply = asked[:2] + template[2:12] + asked[12:] + template[len(asked) : -4] + bytes((10, n >> 16, n >> 8 & 255, n & 255))
        books.admit(tenant, asked, reply)
        refused = books.answer(tenant, query(f"n{n:06}.refused.test"))
        assert refused is not None
        assert refused[3] & 15 == 3
        if n in (24_999, 49_999):
            gc.collect()
            grown.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(pinned.entries) == allowance.PINS_MAX
    assert (10, 0, 195, 79) in {tuple(PINNED_KEY.unpack(key)[2][12:]) for key in pinned.entries}, "the last one is pinned"
    assert grown[1] < grown[0] * 1.1, grown
    told = books.document(tenant)
    assert told
    assert len(told["refused_names"]) == allowance.NAMES_KEPT
    assert told["refused_names_more"] == 50_000 - allowance.NAMES_KEPT


def test_a_graftd_that_follows(known):
    """It takes over the pins of its containers, and deletes those of others; sweep() ends what has ended."""
    books, tenant, pinned = known
    for number in (tenant.id, 999):
        for address, seconds in (("192.0.2.1", 60), ("192.0.2.2", -1)):
            pinned.update(PINNED_KEY.pack(number, 0, parse_address(address).raw), PIN.pack(time.monotonic_ns() + seconds * 10**9))
    books.restore()
    assert {PINNED_KEY.unpack(key)[0] for key in pinned.entries} == {tenant.id}
    books.sweep()
    assert pins(pinned) == {(0, "192.0.2.1")}
    books.forget(tenant)
    assert not pinned.entries


def test_an_address_that_becomes_the_hosts(known):
    """A name told it for a day; then a container gets it, to which no name could have led."""
    books, tenant, pinned = known
    books.know_hosts([parse_address("192.0.2.9")])
    for name, address in (("www.test", "10.99.1.5"), ("a.many.test", "10.99.1.6")):
        asked = query(name)
        books.admit(tenant, asked, replied(asked, address, ttl=86400))
    books.know_hosts([parse_address("192.0.2.9"), parse_address("10.99.1.5")])
    assert pins(pinned) == {(0, "10.99.1.6")}
    following = Allowance(books.registry, books.kernel, books.names)
    following.restore()
    following.know_hosts([parse_address("10.99.1.6")])
    assert not pins(pinned)


def test_a_neighbour_that_is_started_again(known):
    """It keeps its address, which its name has told."""
    books, tenant, pinned = known
    neighbour = make_tenant(books.registry, "db", 1001)
    own = parse_address("10.99.1.7")
    tenant.asked = Request(allow=("db.graft",))
    for _ in range(2):
        neighbour.given.append(parse_own("10.99.1.7"))
        books.know_hosts([own])
        assert books.answer(tenant, query("db.graft"))
        assert pins(pinned) == {(0, "10.99.1.7")}
        neighbour.given.clear()
        books.know_hosts([])


def test_a_map_that_is_full(known, caplog):
    """It is logged; the answer is sent all the same, and the connection is refused."""
    books, tenant, pinned = known
    pinned.room = 1
    asked = query("x.many.test")
    assert books.admit(tenant, asked, replied(asked, "192.0.2.1", "192.0.2.2"))
    assert len(pinned.entries) == 1
    assert "is not pinned" in caplog.text


def test_malformed_answers_are_failures(known):
    books, tenant, pinned = known
    asked = query("www.test")
    for reply in (b"", asked, replied(query("evil.test"), "192.0.2.1"), replied(asked, "192.0.2.1")[:-3]):
        assert books.admit(tenant, asked, reply)[3] & 15 == 2
    assert not pinned.entries


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "250.64.0.7"])
def test_addresses_in_answers_of_other_types(known, address):
    """What no name may stand for is told by no answer, whatever was asked; the letters of the name come back."""
    books, tenant, _ = known
    asked = query("WwW.tesT", ANY)
    assert books.answer(tenant, asked) is None
    told = books.admit(tenant, asked, replied(upstream_query(asked), "192.0.2.1"))
    assert (told[:2], b"\3WwW\4tesT\0" in told, bytes((192, 0, 2, 1)) in told) == (asked[:2], True, True)
    refused = books.admit(tenant, asked, replied(asked, "192.0.2.1", address))
    assert (refused[3] & 15, refused[7]) == (3, 0)
    assert books.document(tenant)["refused_names"][0]["why"] == f"{address} is {allowance.SHARED}"


def aliased(asked: bytes, *targets: str) -> bytes:
    made = dns.message.make_response(dns.message.from_wire(asked))
    owner = str(made.question[0].name)
    for target in targets:
        made.answer.append(dns.rrset.from_text(owner, 60, "IN", "CNAME", target))
        owner = target
    made.answer.append(dns.rrset.from_text(owner, 60, "IN", "A", "192.0.2.1"))
    return made.to_wire()


def test_what_an_allowed_name_is_an_alias_of(known, monkeypatch):
    """Its names are asked for, for their time; not those that a query could fill, nor containers', nor more than a few."""
    books, tenant, pinned = known
    asked = query("www.test")
    books.admit(tenant, asked, aliased(asked, "cdn.test.", "\\001.cdn.test.", "edge.test."))
    for name, told in (("cdn.test", True), ("edge.test", True), ("\2.cdn.test", False), ("other.test", False)):
        assert (books.answer(tenant, query(name)) is None) == told, name
    later = query("edge.test")
    books.admit(tenant, later, replied(later, "192.0.2.2"))
    assert pins(pinned) == {(port, address) for port in (80, 443) for address in ("192.0.2.1", "192.0.2.2")}
    monkeypatch.setattr(books.names, "addresses", lambda _, name: [parse_address("10.9.9.9")] if name == "cdn.test" else [])
    assert books.answer(tenant, query("cdn.test"))[3] & 15 == 3
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60 + allowance.GRACE + 1)
    assert books.answer(tenant, later)[3] & 15 == 3
    for n in range(2 * allowance.NAMES_KEPT):
        books.admit(tenant, asked, aliased(asked, f"n{n}.cdn.test."))
    assert len(books.books[tenant.id].aliases) == allowance.NAMES_KEPT
