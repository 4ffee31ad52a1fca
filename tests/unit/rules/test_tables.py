"""Rules → kernel tables, against a slow reference that reads the rules themselves."""

import itertools
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import Refused
from graft.rules import match, slices, tables
from graft.rules.address import ANY4, ANY6, MAPPED, Address
from graft.rules.endpoint import EgressRule, Endpoint, IngressRule, parse_egress, parse_ingress

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP


def longest_prefix(entries: dict[bytes, bytes], data: bytes) -> bytes | None:
    """What an LPM trie finds for @data, the key after its prefixlen (kernel/bpf/lpm_trie.c)."""
    best, found = -1, None
    for key, value in entries.items():
        (length,) = struct.unpack_from("=I", key)
        bits = len(data) * 8
        mine = int.from_bytes(key[4:], "big") >> (bits - length)
        if length > best and mine == int.from_bytes(data, "big") >> (bits - length):
            best, found = length, value
    return found


def look_up_ingress(entries, tenant, protocol, address, port):
    family = tables.INET if address.v4 else tables.INET6
    data = tables.INGRESS_KEY.pack(0, tenant, protocol, family, 0, address.raw, port.to_bytes(2, "big"))[4:]
    value = longest_prefix(entries, data)
    if value in (None, tables.NO_INGRESS):
        return None
    raw, base, first, span, *_ = tables.INGRESS_VALUE.unpack(value)
    return raw, base + port - first if span else base


def reference_ingress(rules, endpoints, protocol, address, port):
    for rule in rules:
        endpoint = endpoints.get(rule.endpoint)
        if protocol in rule.protocols and rule.address == address and rule.first <= port <= rule.last:
            return endpoint and (endpoint.address.raw, endpoint.port + (port - rule.first if endpoint.span > 1 else 0))
    return None


small_addresses = st.sampled_from([Address(ANY4), Address(MAPPED + b"\x7f\0\0\1"), Address(ANY6)])
port_pairs = st.tuples(st.integers(0, 65535), st.integers(0, 400)).map(lambda t: (t[0], min(65535, t[0] + t[1])))
ingress_rules = st.lists(
    st.builds(
        lambda address, pair, name, protocols: IngressRule(address, pair[0], pair[1], name, protocols),
        small_addresses,
        st.one_of(port_pairs, st.just((0, 65535)), st.just((80, 80))),
        st.sampled_from(["a", "b", "c", "gone"]),
        st.sampled_from([(TCP,), (UDP,), (TCP, UDP)]),
    ),
    max_size=6,
)
ENDPOINTS = {
    "a": Endpoint("a", Address(MAPPED + bytes([192, 0, 2, 1])), 8080),
    "b": Endpoint("b", Address(MAPPED + bytes([192, 0, 2, 2])), 0),
    "c": Endpoint("c", Address(ANY4), 20000, span=401),
}


@given(ingress_rules, small_addresses, st.integers(0, 65535), st.sampled_from([TCP, UDP]))
def test_ingress_is_the_first_matching_rule(rules, address, port, protocol):
    entries = tables.compile_ingress(7, rules, ENDPOINTS)
    edges = {port, *(r.first for r in rules), *(r.last for r in rules), *(min(r.last + 1, 65535) for r in rules)}
    for probe in edges:
        expected = reference_ingress(rules, ENDPOINTS, protocol, address, probe)
        if expected and expected[1] > 65535:
            continue
        assert look_up_ingress(entries, 7, protocol, address, probe) == expected
        assert look_up_ingress(entries, 8, protocol, address, probe) is None
        found = match.match_ingress(rules, ENDPOINTS, protocol, address, probe)
        assert (found and found.address and found.address.raw) == (expected and expected[0])


def look_up_led(entries, address, port):
    """To whom, and to which of its ports, as led_at() in csrc/led.bpf.h has it."""
    for at in (address.raw, ANY4 if address.v4 else ANY6):
        value = longest_prefix(entries, tables.LED_KEY.pack(0, at, port.to_bytes(2, "big"))[4:])
        if value:
            tenant, _, first, inside = tables.LED.unpack(value)
            return tenant, inside + port - first
    return None


@given(st.integers(1, 60000), st.integers(1, 400), st.integers(1, 60000), st.booleans())
def test_what_is_led_has_the_ports_of_its_publication(host, span, first, v4):
    endpoints = {"p": Endpoint("p", Address(ANY4 if v4 else ANY6), host, span, published=True)}
    rules = [IngressRule(Address(ANY4 if v4 else ANY6), first, first + span - 1, "p", (TCP,))]
    entries = tables.compile_led(7, rules, endpoints, {"p"})
    here = Address(MAPPED + bytes([192, 0, 2, 1])) if v4 else Address(bytes([32] + [1] * 15))
    for n in (0, span // 2, span - 1):
        assert look_up_led(entries, here, host + n) == (7, first + n)
    assert look_up_led(entries, here, host - 1) is look_up_led(entries, here, host + span) is None
    assert tables.compile_led(7, rules, endpoints, ()) == {}
    kept = tables.compile_ingress(7, rules, endpoints, {"p"})
    assert look_up_ingress(kept, 7, TCP, rules[0].address, first) is None, "a bind there is private"
    assert kept.keys() == tables.compile_ingress(7, rules, endpoints).keys(), "nor does it fall to a wider rule"


def test_an_endpoint_that_is_led_keeps_its_udp():
    rules = [parse_ingress("0.0.0.0:80=a")]
    entries = tables.compile_ingress(7, rules, ENDPOINTS, {"a"})
    assert look_up_ingress(entries, 7, TCP, Address(ANY4), 80) is None
    assert look_up_ingress(entries, 7, UDP, Address(ANY4), 80)[1] == 8080
    assert len(tables.compile_led(7, rules, ENDPOINTS, {"a"})) == 1


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_port_prefixes_cover_exactly(a, b):
    first, last = min(a, b), max(a, b)
    prefixes = tables.port_prefixes(first, last)
    assert len(prefixes) <= 30
    covered = [(port, port + (1 << (16 - bits)) - 1) for port, bits in prefixes]
    assert covered[0][0] == first
    assert covered[-1][1] == last
    for (_, end), (start, _) in itertools.pairwise(covered):
        assert start == end + 1


def look_up_egress(entries, tenant, address):
    family = tables.INET if address.v4 else tables.INET6
    value = longest_prefix(entries, tables.EGRESS_KEY.pack(0, tenant, family, address.raw)[4:])
    return None if value in (None, tables.NO_EGRESS) else tables.EGRESS_VALUE.unpack(value)[:2]


def reference_egress(rules, endpoints, address, *, host):
    best, found = -1, (ANY4 if address.v4 else ANY6, 0) if host else None
    for rule in rules:
        endpoint = endpoints.get(rule.endpoint)
        width = 32 if rule.prefix.v4 else 128
        if rule.prefix.v4 != address.v4 or rule.length <= best:
            continue
        mine = int.from_bytes(rule.prefix.raw[-width // 8 :], "big") >> (width - rule.length)
        if int.from_bytes(address.raw[-width // 8 :], "big") >> (width - rule.length) == mine:
            best, found = rule.length, endpoint and (endpoint.address.raw, endpoint.port)
    return found


def prefix(raw: bytes, length: int, *, v4: bool) -> tuple[Address, int]:
    width = 32 if v4 else 128
    length %= width + 1
    value = int.from_bytes(raw[: width // 8], "big") >> (width - length) << (width - length)
    tail = value.to_bytes(width // 8, "big")
    return Address(MAPPED + tail if v4 else tail), length


egress_rules = st.lists(
    st.builds(
        lambda raw, length, v4, name: EgressRule(*prefix(raw, length, v4=v4), name),
        st.sampled_from([bytes([10, 1, 2, 3] * 4), bytes([10, 1, 200, 3] * 4), bytes(16)]),
        st.integers(0, 128),
        st.booleans(),
        st.sampled_from(["a", "b", "gone"]),
    ),
    max_size=8,
)
destinations = st.sampled_from(
    [Address(MAPPED + bytes(x)) for x in ([10, 1, 2, 3], [10, 1, 200, 9], [8, 8, 8, 8])]
    + [Address(bytes([10, 1, 2, 3] * 4)), Address(bytes(15) + b"\1")]
)


@given(egress_rules, destinations, st.booleans())
def test_egress_is_the_longest_prefix(rules, destination, host):
    rules = [r for r in rules if not (r.prefix.raw.startswith(MAPPED) and not r.prefix.v4)]
    entries = tables.compile_egress(9, rules, ENDPOINTS, (), host=host)
    assert look_up_egress(entries, 9, destination) == reference_egress(rules, ENDPOINTS, destination, host=host)
    assert look_up_egress(entries, 10, destination) is None
    found = match.match_egress(rules, ENDPOINTS, destination)
    expected = reference_egress(rules, ENDPOINTS, destination, host=False)
    assert (found and found.address and found.address.raw) == (expected and expected[0])


def test_first_of_equal_ranges_wins():
    rules = [parse_ingress("0.0.0.0:80=a"), parse_ingress("0.0.0.0:0-65535=b")]
    entries = tables.compile_ingress(1, rules, ENDPOINTS)
    assert look_up_ingress(entries, 1, TCP, Address(ANY4), 80)[1] == 8080
    assert look_up_ingress(entries, 1, TCP, Address(ANY4), 81)[1] == 0
    entries = tables.compile_ingress(1, rules[::-1], ENDPOINTS)
    assert look_up_ingress(entries, 1, TCP, Address(ANY4), 80)[1] == 0


def test_what_the_hooks_cannot_do_compiles_to_another_place():
    """A unix endpoint, or one of another namespace, is an entry that holds for no socket of here."""
    endpoints = {
        "unix": Endpoint("unix", None, path="/run/x.sock"),
        "away": Endpoint("away", Address(ANY4), 80, place=3),
        "default-source": Endpoint("default-source", Address(ANY4), 0, place=2),
    }
    rules = [parse_ingress("0.0.0.0:1=unix"), parse_ingress("[::]:2=unix"), parse_ingress("0.0.0.0:3=away")]
    for rule in rules:
        match.check_rule(rule, endpoints)
    values = tables.compile_ingress(1, rules, endpoints).values()
    assert {tables.INGRESS_VALUE.unpack(v)[4] for v in values} == {tables.PLACE_UNIX, 3}
    entries = tables.compile_egress(1, [parse_egress("10.0.0.0/8=unix")], endpoints, (), host=False)
    assert {tables.EGRESS_VALUE.unpack(v)[2] for v in entries.values()} == {tables.PLACE_UNIX, 2}


def test_many_rules_compile_in_a_moment():
    """10,000 rules for one address: by the clock, since it was quadratic once."""
    import time

    endpoints = {f"e{n}": Endpoint(f"e{n}", Address(ANY4), n) for n in range(1, 10001)}
    rules = [IngressRule(Address(ANY4), n, n, f"e{n}") for n in range(1, 10001)]
    began = time.process_time()
    entries = tables.compile_ingress(1, rules, endpoints)
    assert len(entries) == 20000
    assert time.process_time() - began < 5


def test_rules_are_checked():
    with pytest.raises(Refused, match="unknown endpoint 'nope'"):
        match.check_rule(parse_ingress("0.0.0.0:80=nope"), ENDPOINTS)
    with pytest.raises(Refused, match="is ipv6, endpoint 'a' is ipv4"):
        match.check_rule(parse_ingress("[::]:80=a"), ENDPOINTS)
    with pytest.raises(Refused, match="is ipv6, endpoint 'a' is ipv4"):
        match.check_rule(parse_egress("::/0=a"), ENDPOINTS)
    match.check_rule(parse_egress("0.0.0.0/0=a"), ENDPOINTS)


def test_flags_follow_egress():
    def flags(**settings):
        return tables.compile_tables(1, ENDPOINTS, [], settings.pop("egress", []), slice_number=1, strict=False, **settings).flags

    assert flags(egress_host=True) == tables.TENANT_EGRESS
    assert flags(egress_host=False) == tables.TENANT_REPLIES
    narrowed = flags(egress_host=False, egress=[parse_egress("10.0.0.0/8=a")])
    assert narrowed == tables.TENANT_EGRESS | tables.TENANT_REPLIES
    assert flags(egress_host=False, egress=[parse_egress("10.0.0.0/8=gone")]) == tables.TENANT_REPLIES


@given(st.integers(1, slices.SLICE_COUNT - 1), st.integers(0, 65535), st.booleans())
def test_slices_are_private_and_high(slot, port, v4):
    address, real = slices.slice_address(slot, port, v4=v4)
    assert address.v4 is v4
    assert real == 0 or 61440 <= real <= 65535
    if v4:
        assert address.raw[12] == 127
        assert 64 <= address.raw[13] <= 127


def test_slices_do_not_overlap():
    seen = {slices.slice_address(slot, port) for slot in (1, 2, 3) for port in range(65536)}
    assert len(seen) == 3 * 65536
