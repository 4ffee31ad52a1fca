"""What graftd's resolver takes for a query."""

import struct
import time
from types import SimpleNamespace

import dns.message
import dns.rcode
import dns.rdatatype
import dns.reversename
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.engines import names
from graft.engines.names import Names, docker_names, is_query, question, question_end
from graft.rules.address import parse_address
from graft.rules.endpoint import EndpointWords, make_endpoint
from graft.rules.endpoint_names import address_of
from graft.rules.own_address import network_of
from graft.tenants.attachment import Attachment
from graft.tenants.tenant import Member
from tests.messages import query
from tests.unit.fakes import make_registry, make_tenant


@pytest.mark.parametrize("name", ["web", "a.b.c.example.com", "x" * 63])
def test_queries(name):
    assert is_query(query(name))
    assert question_end(query(name)) == len(query(name))
    opt = b"\0" + struct.pack(">2HIH", 41, 1232, 0, 0)
    assert is_query(query(name)[:10] + b"\0\1" + query(name)[12:] + opt)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        query("web")[:-1],
        query("web")[:2] + b"\x80\0" + query("web")[4:],
        query("web")[:4] + b"\0\0" + query("web")[6:],
        query("web")[:4] + b"\0\1\0\1" + query("web")[8:],
        query("web")[:12] + b"\xc0\x0c\0\1\0\1",
        query(".".join(["x" * 63] * 5)),
        query("web") + bytes(600),
        query("web") + bytes(11),
        query("web")[:10] + b"\0\1" + query("web")[12:],
        query("web")[:10] + b"\0\1" + query("web")[12:] + b"\0" + struct.pack(">2HIH", 41, 1232, 0, 9),
    ],
)
def test_what_is_none(data):
    assert not is_query(data)


@given(st.binary(max_size=600))
def test_anything(data):
    assert is_query(data) in (True, False)
    assert 0 <= question_end(data) <= len(data)


def test_docker_names():
    known = {
        "Name": "/web",
        "Config": {"Hostname": "h"},
        "NetworkSettings": {
            "Networks": {
                "a": {"NetworkID": "n1", "Aliases": ["x", "y"]},
                "b": {"NetworkID": "n2", "Aliases": None, "DNSNames": ["z"]},
                "c": None,
            }
        },
    }
    assert docker_names(known) == (["web", "h"], {"n1": ["x", "y"], "n2": ["z"], "": []}, {"n1": "a", "n2": "b", "": "c"})
    assert docker_names({}) == (["", ""], {}, {})
    labels = {"com.docker.swarm.service.name": "db"}
    service = {"Name": "/db.1.x", "Config": {"Hostname": "h", "Labels": labels}, "Managed": True}
    assert docker_names(service).everywhere == ["db.1.x", "h", "db", "tasks.db"]
    assert docker_names({**service, "Managed": False}).everywhere == ["db.1.x", "h"], "an image may have the label"


@given(st.binary(max_size=60))
def test_any_question(label):
    text = query("x").replace(b"\1x", bytes([len(label)]) + label if label else b"")
    assert is_query(text)
    name, kind = question(text)
    assert kind == 1
    assert name == (label.decode().lower() if label.isascii() and label.decode().isprintable() and b"." not in label else "?")


def attach(tenant, network, *addresses, called=()):
    number = len(tenant.attached) + 1
    one = Attachment(f"docker/{tenant.name}{number}", network)
    one.addresses = [network_of(f"{text}/24" if "." in text else f"{text}/64", number) for text in addresses]
    one.names = list(called)
    tenant.attached.append(one)
    return one


@pytest.fixture
def two(monkeypatch, tmp_path):
    """A container on two networks, with an alias in each, and one that asks on each."""
    reg = make_registry(monkeypatch, tmp_path)
    server = make_tenant(reg, "server", 1000)
    attach(server, "blue", "10.1.0.2", "fd00::2", called=["server", "in-blue"])
    attach(server, "red", "10.2.0.2", called=["server", "in-red"])
    blue, red, both = (make_tenant(reg, name, 1001 + n) for n, name in enumerate(("blue", "red", "both")))
    for tenant, network, address in (
        (blue, "blue", "10.1.0.3"), (red, "red", "10.2.0.3"), (both, "blue", "10.1.0.4"), (both, "red", "10.2.0.4")
    ):  # fmt: skip
        attach(tenant, network, address)
        tenant.egress_host = False
    return Names(reg), server, blue, red, both


def asked(known, tenant, name, kind="A"):
    """The records that are told, read by somebody else's parser; or the error."""
    request = dns.message.make_query(name, kind, use_edns=len(name) % 2 == 0)
    reply = known.answer(tenant, request.to_wire())
    if reply is None:
        return "forwarded"
    response = dns.message.from_wire(reply)
    assert request.is_response(response)
    if response.rcode():
        return dns.rcode.to_text(response.rcode())
    return [item.to_text() for rrset in response.answer for item in rrset]


def test_a_name_is_told_to_whom_it_was_given_for(two):
    known, _, blue, red, both = two
    assert asked(known, blue, "IN-blue") == ["10.1.0.2"]
    assert asked(known, red, "in-red.") == ["10.2.0.2"]
    assert asked(known, blue, "in-red") == asked(known, red, "in-blue") == "NXDOMAIN"
    assert asked(known, both, "in-red") == ["10.2.0.2"]
    assert asked(known, both, "in-blue") == ["10.1.0.2"]
    assert asked(known, blue, "server") == ["10.1.0.2"]
    assert sorted(asked(known, both, "server")) == ["10.1.0.2", "10.2.0.2"]
    assert asked(known, blue, "server", "AAAA") == []  # its server's socket is at the IPv4 address
    assert asked(known, blue, "server", "MX") == []
    assert asked(known, both, "Server.Blue") == ["10.1.0.2"]
    assert asked(known, both, "server.red") == ["10.2.0.2"]
    assert asked(known, blue, "server.red") == "NXDOMAIN"
    for address, knows in (("10.1.0.2", blue), ("fd00::2", blue), ("10.2.0.2", red)):
        pointer = dns.reversename.from_address(address).to_text()
        assert asked(known, knows, pointer, "PTR") == [f"server.{'red' if knows is red else 'blue'}."]
        assert asked(known, red if knows is blue else blue, pointer, "PTR") == "NXDOMAIN"
        assert asked(known, both, pointer, "PTR") == [f"server.{'red' if knows is red else 'blue'}."]
    for nothing in ("1.2.3.in-addr.arpa", "x.2.1.10.in-addr.arpa", "ip6.arpa", "zz." * 32 + "ip6.arpa", "."):
        assert asked(known, blue, nothing, "PTR") == "NXDOMAIN"


def test_docker_gives_aliases_by_network(two, tmp_path):
    known, server, blue, red, _ = two
    for attachment in server.attached:
        attachment.names = []
    server.members["0123456789abcdef"] = Member("docker", "web", str(tmp_path))
    file = tmp_path / "config.v2.json"
    text = '{"Name": "/web", "NetworkSettings": {"Networks": {"b": {"NetworkID": "%s", "Aliases": ["front"]}}}}'
    file.write_text(text % "blue")
    assert asked(known, blue, "front") == ["10.1.0.2"]
    assert asked(known, red, "front") == "NXDOMAIN"
    assert asked(known, red, "web") == asked(known, red, "0123456789ab") == ["10.2.0.2"]
    file.write_text(text % "")
    time.sleep(names.FRESH)
    assert asked(known, blue, "front") == "NXDOMAIN"  # which of the two networks is not known yet
    server.attached.pop()
    assert asked(known, blue, "web") == ["10.1.0.2"]
    time.sleep(names.FRESH)
    assert asked(known, blue, "front") == ["10.1.0.2"]


def test_names_are_new_at_once_and_cost_little(two, monkeypatch):
    known, server, blue, *_ = two
    assert asked(known, blue, "server") == ["10.1.0.2"]
    server.attached[0].names.append("later")
    time.sleep(known.rest)
    assert asked(known, blue, "later") == ["10.1.0.2"]
    made = []

    def slow(*_):
        made.append(1)
        time.sleep(0.002)
        return set()

    monkeypatch.setattr(known, "of", slow)
    known.made = float("-inf")
    began = time.monotonic()
    while time.monotonic() - began < 0.3:
        known.answer(blue, query("nobody"))
    assert len(made) <= 6 * 5  # of the three tenants on networks there are five attachments


def test_more_answers_than_a_datagram_has_room_for(two):
    known, server, blue, *_ = two
    server.attached[0].addresses = [network_of(f"10.1.0.{n}/24", 1) for n in range(2, 250)]
    assert len(asked(known, blue, "in-blue")) == names.ANSWERS_MAX
    assert parse_address(asked(known, blue, "in-blue")[0])


@given(st.binary(max_size=600))
def test_any_bytes_have_an_answer(data):
    known = Names(SimpleNamespace(tenants={}))  # type: ignore[arg-type]
    reply = known.answer(SimpleNamespace(attached=[], egress_host=False), data)  # type: ignore[arg-type]
    assert isinstance(reply, bytes)
    if reply[3:4] == b"\x83":
        assert dns.message.from_wire(reply).rcode() == dns.rcode.NXDOMAIN


def test_names_of_endpoints(monkeypatch, tmp_path):
    """Of the tenant's own table, by type; one that needs traps which it lacks is not told, nor what is for nothing."""
    reg = make_registry(monkeypatch, tmp_path)
    tenant, other = make_tenant(reg, "a", 1), make_tenant(reg, "b", 2)
    known = Names(reg)
    four, six = EndpointWords("ipv4", addr="192.0.2.1", port="80"), EndpointWords("ipv6", addr="2001:db8::1", port="80")
    made = {name: make_endpoint(name, words) for name, words in (("ep-four", four), ("ep-six", six), ("file", EndpointWords("unix", path="/run/x")))}
    tenant.table.endpoints |= made
    (address,) = asked(known, tenant, "EP-four.graft")
    assert parse_address(address) == address_of(made["ep-four"])
    assert asked(known, tenant, dns.reversename.from_address(address), "PTR") == ["ep-four.graft."]
    assert asked(known, tenant, "ep-four.graft", "AAAA") == asked(known, tenant, "ep-four.graft", "TXT") == []
    assert len(asked(known, tenant, "ep-six.graft", "AAAA")) == 1
    assert asked(known, tenant, "file.graft") == "NXDOMAIN"
    tenant.traps_addresses = True
    assert len(asked(known, tenant, "file.graft")) == 1
    assert asked(known, other, "ep-four.graft") == "NXDOMAIN"
    assert asked(known, other, dns.reversename.from_address(address), "PTR") == "forwarded"
    tenant.table.endpoints["ep-four"] = made["ep-four"]._replace(imported=True)
    assert asked(known, tenant, "ep-four.graft") == "NXDOMAIN", "no rule names it"


def test_a_failure_has_the_question():
    """Go's resolver waits on after a response without one, and c-ares takes it for a bad one."""
    asked = query("www.example.org")
    assert names.failure(asked) == asked[:2] + b"\x81\x82\0\1" + bytes(6) + asked[12:]
    for broken in (asked[:15], asked[:4] + b"\0\2" + asked[6:], asked[:12] + b"\xc0\x0c\0\1\0\1"):
        assert names.failure(broken) == broken[:2] + b"\x81\x82" + bytes(8)
