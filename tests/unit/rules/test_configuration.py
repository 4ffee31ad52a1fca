"""graftd.toml: its grammar, and what holds without it."""

import pytest

from graft.errors import Failure, UsageError
from graft.rules import configuration
from graft.rules.address import parse_address, parse_prefix
from graft.rules.configuration import Configuration, read_configuration, read_endpoints
from graft.rules.endpoint import EndpointWords


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "graftd.toml"
    path.touch(0o644)
    monkeypatch.setenv("GRAFT_CONFIG", str(path))
    return path


def test_the_defaults_are_narrow(file, monkeypatch, tmp_path):
    told = read_configuration()
    assert told == Configuration()
    assert (told.addresses, told.annotations, told.reserve_listening) == ((), (), True)
    assert told.document()["reserved_ports"] == ["22", "2379-2380", "6443", "10248-10250", "10256-10259"]
    monkeypatch.delenv("GRAFT_CONFIG")
    monkeypatch.setattr(configuration, "CONFIGURATION", tmp_path / "absent.toml")
    assert read_configuration() == Configuration()


def test_a_file_that_is_named_has_to_be_there(file):
    file.unlink()
    with pytest.raises(Failure, match=f"{file}: No such file"):
        read_configuration()


def test_all_of_it(file):
    file.write_text(
        'reserved_ports = [22, "8000-8010"]\nreserve_listening = false\naddresses = ["10.9.0.0/16", "fd00::7"]\n'
        '[pods]\nannotations = ["graft.publish", "graft.endpoint", "graft.endpoint.web"]\n'
        'resolvers = ["10.96.0.10", "fd00::a"]\n'
    )
    told = read_configuration()
    assert told.reserved_ports == ((22, 22), (8000, 8010))
    assert told.document() == {
        "reserved_ports": ["22", "8000-8010"],
        "reserve_listening": False,
        "addresses": ["10.9.0.0/16", "fd00::7/128"],
        "pods": {
            "annotations": ["graft.publish", "graft.endpoint", "graft.endpoint.web"],
            "resolvers": ["10.96.0.10", "fd00::a"],
        },
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("reserved_ports = [0]", "reserved_ports: '0' is not a port (a number from 1 to 65535)"),
        ("reserved_ports = [true]", 'reserved_ports: true is not a port (like 22 or "2379-2380")'),
        ('reserved_ports = ["9-8"]', "reserved_ports: port range '9-8' runs backwards (write 8-9)"),
        ('addresses = ["10.9.0.1/16"]', "addresses: '10.9.0.1/16' has bits set after the prefix (like 10.77.0.0/16)"),
        ('addresses = ["10.9.0.0/33"]', "addresses: '10.9.0.0/33' is not an address with its prefix length"),
        ('addresses = ["host"]', "addresses: 'host' is not an IP address"),
        ('[pods]\nannotations = ["publish"]', "pods.annotations: 'publish' is no annotation that needs it"),
        ('[pods]\nannotations = ["graft.family"]', "pods.annotations: 'graft.family' is no annotation that needs it"),
        ('[pods]\nannotations = ["graft.endpoint."]', "pods.annotations: 'graft.endpoint.' is no annotation"),
        ('[pods]\nresolvers = ["127.0.0.53"]', "pods.resolvers: '127.0.0.53' is no resolver of pods"),
        ('[pods]\nresolvers = ["dns"]', "pods.resolvers: 'dns' is not an IP address"),
        ('[pods]\nresolvers = "10.96.0.10"', "pods.resolvers: "),
        ("[pod]", "unknown key 'pod' (reserved_ports, reserve_listening, addresses, pods)"),
    ],
)
def test_what_is_wrong(file, text, says):
    file.write_text(text)
    with pytest.raises(Failure) as found:
        read_configuration()
    assert str(found.value).startswith(f"{file}, line {text.count(chr(10)) + 1}: {says}")


@pytest.fixture
def endpoints(file):
    path = file.with_name("endpoints.toml")
    path.touch(0o644)
    return path


def test_endpoints_are_in_the_grammar_of_endpoint_add(endpoints):
    assert read_endpoints() == {}
    endpoints.write_text('web = "type ipv4 addr 192.0.2.1 port 80"\n"ep-Ü" = "port dynamic addr ::1 type ipv6"\n')
    assert read_endpoints() == {
        "web": EndpointWords("ipv4", "192.0.2.1", "80"),
        "ep-Ü": EndpointWords("ipv6", "::1", "dynamic"),
    }
    endpoints.unlink()
    assert read_endpoints() == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('a = "type ipv4 addr 192.0.2.1"', "a: 'port' is missing"),
        ('ok = "type local"\nb = "type ipv4 addr 192.0.2.300 port 80"', "b: '192.0.2.300' is not"),
        ('"../x" = "type local"', "../x: endpoint name '../x' has a space, '=', '/'"),
        ('"" = "type local"', ": endpoint name is empty"),
        ('sixteen-letters- = "type local"', "sixteen-letters-: endpoint name 'sixteen-letters-' is 16 bytes long"),
        ("a = 80", "a: 80 is not a string"),
        ('[a]\ntype = "local"', "a: a table is not a string"),
        ('a = "type unix path ../../etc/shadow"', "a: path '../../etc/shadow' is not absolute"),
        ('a = "type ipv4 addr 127.0.0.1 port 1 netns 1"', "a: a file names no network namespace"),
        ('a = "type unix path /run/x/y netns blue"', "a: a file names no network namespace"),
        ('a = ""', "a: 'type' is missing"),
    ],
)
def test_endpoints_that_are_wrong(endpoints, text, says):
    endpoints.write_text(text)
    with pytest.raises(Failure) as found:
        read_endpoints()
    told = str(found.value).removeprefix(str(endpoints))
    assert told.partition(": ")[0] in ("", ", line 1", ", line 2")
    assert told.partition(": ")[2].startswith(says)


def test_endpoints_of_a_file_that_others_write(endpoints):
    endpoints.write_text('web = "type local"\n')
    endpoints.chmod(0o666)
    with pytest.raises(Failure, match="others than root may write it"):
        read_endpoints()


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        ("10.9.0.0/16", "10.9.255.1", "10.10.0.1"),
        ("10.9.0.7", "10.9.0.7", "10.9.0.6"),
        ("0.0.0.0/0", "192.0.2.1", "2001:db8::1"),
        ("2001:db8::/33", "2001:db8::1", "2001:db8:8000::1"),
        ("::/0", "fd00::1", "192.0.2.1"),
    ],
)
def test_prefixes(prefix, inside, outside):
    assert parse_prefix(prefix).covers(parse_address(inside))
    assert not parse_prefix(prefix).covers(parse_address(outside))


@pytest.mark.parametrize("text", ["", "10.9.0.0/", "10.9.0.0/x", "10.9.0.0/1234567890123", "fd00::/129", "10.9.0.0/-1"])
def test_what_is_no_prefix(text):
    with pytest.raises(UsageError):
        parse_prefix(text)
