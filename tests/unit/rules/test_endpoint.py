"""The grammar of endpoints, rules and publications."""

import contextlib
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import UsageError
from graft.rules.address import ANY4, ANY6, MAPPED, Address, parse_address
from graft.rules.endpoint import EgressRule, IngressRule, parse_egress, parse_endpoint_port, parse_ingress, parse_name
from graft.rules.publication import Publication, fold, parse_publication, published

addresses = st.one_of(
    st.binary(min_size=4, max_size=4).map(lambda b: Address(MAPPED + b)),
    st.binary(min_size=16, max_size=16).map(Address).filter(lambda a: not a.v4),
)
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=15)
ports = st.integers(0, 65535)


@given(addresses)
def test_address_round_trip(address):
    assert parse_address(str(address)) == address
    assert parse_address(str(address), kind=address.kind) == address


@given(addresses, ports, ports, names)
def test_ingress_round_trip(address, a, b, name):
    rule = IngressRule(address, min(a, b), max(a, b), name)
    assert parse_ingress(str(rule)) == rule


@given(addresses, st.integers(0, 128), names)
def test_egress_round_trip(address, length, name):
    width = 32 if address.v4 else 128
    length = min(length, width)
    value = int.from_bytes(address.raw[-width // 8 :], "big") >> (width - length) << (width - length)
    prefix = Address(address.raw[: 16 - width // 8] + value.to_bytes(width // 8, "big"))
    rule = EgressRule(prefix, length, name)
    assert parse_egress(str(rule)) == rule


@given(st.none() | addresses, st.integers(1, 65000), st.integers(1, 65000), st.integers(1, 500), st.booleans())
def test_publication_round_trip(address, host, inner, count, tcp):
    publication = Publication(address, host, inner, count, socket.IPPROTO_TCP if tcp else socket.IPPROTO_UDP)
    assert parse_publication(str(publication)) == publication


@given(st.text(max_size=40))
def test_parsers_raise_only_usage_errors(text):
    for parse in (parse_ingress, parse_egress, parse_publication, parse_address, parse_name, parse_endpoint_port):
        with contextlib.suppress(UsageError):
            parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("80", "names one port"),
        ("8080:", "lacks a port"),
        (":80", "names one port"),
        ("8080:80/sctp", "'sctp' is not a protocol"),
        ("8080:80/", "'' is not a protocol"),
        ("0:80", "'0' is not a port"),
        ("65536:80", "'65536' is not a port"),
        ("8080:99999", "'99999' is not a port"),
        ("-1:80", "'' is not a port"),
        ("9000-9010:9000-9005", "differ in length"),
        ("9010-9000:9000-9010", "runs backwards"),
        ("::1:80:80", "needs brackets"),
        ("example.org:80:80", "'example.org' is not an IP address"),
        ("300.1.1.1:80:80", "'300.1.1.1' is not an IP address"),
        ("\uff18\uff10:80", "is not a port"),
    ],
)
def test_bad_publications(text, says):
    with pytest.raises(UsageError) as caught:
        parse_publication(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.0.0.0:80", "lacks '='"),
        ("0.0.0.0=ep", "lacks ':'"),
        ("0.0.0.0:80=", "is empty"),
        ("0.0.0.0:80=a-15-byte-name-", None),
        ("0.0.0.0:80=a-16-byte-name--", "16 bytes long"),
        ("::1:80=ep", None),
        (":::0-65535=ep", None),
        ("0.0.0.0:80ep", "character 13: lacks '='"),
        ("0.0.0.0:80-x=ep", "character 9: 'x' is not a port"),
        ("0.0.0:80=ep", "character 1: '0.0.0' is not an IP address"),
        ("0.0.0.0:90-80=ep", "runs backwards"),
        ("0.0.0.0:x=ep", "'x' is not a port"),
        ("0.0.0.0:80=a b", "has a space"),
    ],
)
def test_ingress_texts(text, says):
    if says is None:
        parse_ingress(text)
        return
    with pytest.raises(UsageError) as caught:
        parse_ingress(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("10.0.0.0=ep", "lacks '/'"),
        ("10.0.0.0/33=ep", "'33' is not a prefix length"),
        ("10.0.0.1/8=ep", "write 10.0.0.0/8"),
        ("2001:db8::1/32=ep", "write 2001:db8::/32"),
        ("/8=ep", "is not an IP address"),
    ],
)
def test_bad_egress(text, says):
    with pytest.raises(UsageError) as caught:
        parse_egress(text)
    assert says in str(caught.value)


def test_port_words():
    assert parse_endpoint_port("dynamic") == 0
    assert parse_endpoint_port("65535") == 65535
    assert parse_endpoint_port("0") == 0
    for bad in ("65536", "", "http", "1.5", "-1"):
        with pytest.raises(UsageError):
            parse_endpoint_port(bad)


def test_publication_becomes_endpoints_of_both_families():
    taken: set[str] = set()
    pairs = published(parse_publication("9000-9010:100-110/udp"), taken, ipv6=True)
    assert [(e.name, e.kind, e.where) for e, _ in pairs] == [
        ("udp-9000", "ipv4", "0.0.0.0:9000-9010"),
        ("udp6-9000", "ipv6", "[::]:9000-9010"),
    ]
    assert [str(r) for _, r in pairs] == ["0.0.0.0:100-110=udp-9000", "[::]:100-110=udp6-9000"]
    assert [r.address.raw for _, r in pairs] == [ANY4, ANY6]
    assert len(published(parse_publication("9000:100/udp"), taken, ipv6=False)) == 1


def test_publication_names_stay_apart_and_short():
    taken: set[str] = set()
    made = []
    for last in range(1, 130):
        made += published(parse_publication(f"192.0.2.{last}:65535:80"), taken, ipv6=True)
    names = [endpoint.name for endpoint, _ in made]
    assert len(set(names)) == 129
    assert max(len(name) for name in names) <= 15


@pytest.mark.parametrize(
    ("given", "folded"),
    [
        ("81:80 80:79 8080:8080/udp 82:81", "80-82:79-81 8080:8080/udp"),
        ("80:80 81:80 80:80/udp", "80:80 81:80 80:80/udp"),
        ("192.0.2.1:80:80 81:81 [::1]:81:81", "192.0.2.1:80:80 81:81 [::1]:81:81"),
        ("80:80 80:80", "80:80 80:80"),
        ("5-7:5-7 8:8 10-11:10-11 9:9", "5-11:5-11"),
        ("", ""),
    ],
)
def test_ranges_that_came_one_by_one(given, folded):
    assert fold(map(parse_publication, given.split())) == [*map(parse_publication, folded.split())]
