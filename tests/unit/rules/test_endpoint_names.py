"""Which address stands for the name of an endpoint, and whose it is if two have one."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import UsageError
from graft.rules import endpoint_names, slices
from graft.rules.address import parse_address
from graft.rules.endpoint import EndpointWords, make_endpoint, parse_endpoint_words
from graft.rules.endpoint_names import address_of, by_address, endpoint_at, endpoint_named, label_of
from graft.rules.own_address import parse_own
from graft.rules.request import parse_resolver
from graft.rules.slices import NAMES4, NAMES6, in_names, in_slices

FOUR = EndpointWords("ipv4", addr="192.0.2.1", port="80")
SIX = EndpointWords("ipv6", addr="2001:db8::1", port="80")
UNIX = EndpointWords("unix", path="/run/x.sock")


def table(**words):
    return {name: make_endpoint(name, each) for name, each in words.items()}


def test_the_addresses_stay():
    """Programs hold them, and files may have them: another hash would lead them elsewhere."""
    endpoints = table(ep=FOUR, six=SIX, file=UNIX)
    assert [str(address_of(e)) for e in endpoints.values()] == ["250.119.112.23", "fd67:7261:6674:1:8248:8b19:5cec:9f4b", "250.122.123.91"]


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=15), st.sampled_from([FOUR, SIX, UNIX]))
def test_an_address_is_in_its_block_and_nothing_else_s(name, words):
    endpoint = make_endpoint(name, words)
    address = address_of(endpoint)
    assert address
    assert in_names(address)
    assert not in_slices(address)
    assert ipaddress.ip_address(str(address)) in ipaddress.ip_network(NAMES6 if words is SIX else NAMES4)
    assert endpoint_at({name: endpoint}, address) is endpoint
    assert endpoint_named({name: endpoint}, f"{name}.graft") == (address, endpoint)


def test_ends_of_the_blocks():
    for inside, outside in (("250.64.0.0", "250.63.255.255"), ("250.127.255.255", "250.128.0.0")):
        assert in_names(parse_address(inside))
        assert not in_names(parse_address(outside))
    assert in_names(parse_address("fd67:7261:6674:1::"))
    assert not in_names(parse_address("fd67:7261:6674:2::"))
    assert not in_names(parse_address(slices.SLICE6_NETWORK.removesuffix("/64")))


@pytest.mark.parametrize("name", ["a!", "ä", "x:1", "a..b", ".a", "a*"])
def test_what_is_no_name_of_dns(name):
    endpoint = make_endpoint(name, FOUR)
    assert label_of(endpoint) == ""
    assert address_of(endpoint) is None
    assert by_address({name: endpoint}) == {}


def test_a_publication_has_none():
    assert address_of(make_endpoint("tcp-80", FOUR)._replace(published=True)) is None


def test_names_that_differ_in_upper_case():
    """They are one to DNS: that which was added first has it, also if the other is of another type."""
    endpoints = table(EP=FOUR, ep=SIX)
    assert list(by_address(endpoints).values()) == [endpoints["EP"]]
    assert endpoint_named(endpoints, "ep.graft") == (address_of(endpoints["EP"]), endpoints["EP"])
    other = address_of(endpoints["ep"])
    assert other
    assert endpoint_at(endpoints, other) is None


def test_two_names_of_one_address(monkeypatch):
    monkeypatch.setattr(endpoint_names, "_address", lambda *_: parse_address("250.64.0.1"))
    endpoints = table(a=FOUR, b=FOUR)
    assert endpoint_named(endpoints, "a.graft") == (parse_address("250.64.0.1"), endpoints["a"])
    assert endpoint_named(endpoints, "b.graft") is None


def test_a_table_that_is_large():
    endpoints = table(**{f"e{n}": FOUR for n in range(3000)})
    found = by_address(endpoints)
    assert len(found) == endpoint_names.NAMED_MAX
    assert endpoint_named(endpoints, "e0.graft")
    assert not endpoint_named(endpoints, "e2999.graft")


@pytest.mark.parametrize("name", ["ep", "ep.graft.test", "graft", ".graft", "x.graft", ""])
def test_other_names(name):
    assert endpoint_named(table(ep=FOUR), name) is None


@pytest.mark.parametrize("text", ["250.64.0.1", "fd67:7261:6674:1::1"])
def test_nothing_else_may_have_such_an_address(text):
    for parse in (
        parse_own,
        parse_resolver,
        lambda t: parse_endpoint_words(["type", "ipv6" if ":" in t else "ipv4", "addr", t, "port", "1"]),
    ):
        with pytest.raises(UsageError):
            parse(text)
