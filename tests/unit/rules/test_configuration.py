"""graft.toml: its grammar, and what holds without it."""

import re
import textwrap
from pathlib import Path

import pytest

from graft import toml
from graft.errors import Failure, UsageError
from graft.process.keeper import SILENCE_SECONDS
from graft.rules import configuration
from graft.rules.address import parse_address, parse_prefix
from graft.rules.configuration import Configuration, read_configuration, read_endpoints
from graft.rules.endpoint import EndpointWords
from graft.rules.limits import Limits, default_limits

ROOT = Path(__file__).parents[3]


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "graft.toml"
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
        'reserved_ports = [22, "8000-8010"]\nreserve_listening = false\ncount_datagrams = true\naddresses = ["10.9.0.0/16", "fd00::7"]\n'
        '[pods]\nannotations = ["graft.publish", "graft.endpoint", "graft.endpoint.web"]\n'
        'resolvers = ["10.96.0.10", "fd00::a"]\n'
        '[metrics]\nlisten = "0.0.0.0:9435"\npublic = true\n[run]\ndirect = true\n'
    )
    head = 'limits = "udp=100"\nlog = "debug"\nwatchdog = 0\naddress_wait = 0.5\n'
    file.write_text(head + file.read_text())
    told = read_configuration()
    assert told.reserved_ports == ((22, 22), (8000, 8010))
    assert told.document() == {
        "reserved_ports": ["22", "8000-8010"],
        "reserve_listening": False,
        "count_datagrams": True,
        "addresses": ["10.9.0.0/16", "fd00::7/128"],
        "pods": {
            "annotations": ["graft.publish", "graft.endpoint", "graft.endpoint.web"],
            "resolvers": ["10.96.0.10", "fd00::a"],
        },
        "limits": "sockets=65536,udp=100",
        "metrics": {"listen": "0.0.0.0:9435", "public": True},
        "run": {"direct": True},
        "log": "debug",
        "watchdog": 0,
        "address_wait": 0.5,
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
        ("[pod]", "unknown key 'pod' (did you mean 'pods'?)"),
        ('annotations = ["graft.publish"]', "unknown key 'annotations' (did you mean 'pods.annotations'?)"),
        ("nonsense = 1", "unknown key 'nonsense' (limits, log, watchdog, address_wait, reserved_ports, "),
        ('limits = "sockets=0"', "limits: limit 'sockets=0': not a number from 1 to"),
        ("limits = {sockets = 5}", "limits: a table is not a string"),
        ('log = "warn"', "log: 'warn' is unknown (did you mean 'warning'?)"),
        ("watchdog = -1", "watchdog: -1 is not a number from 0 to 86400"),
        ("address_wait = nan", "address_wait: nan is not a number of seconds from 0 to 600"),
        ('[metrics]\nlisten = "nonsense"', "metrics.listen: listen 'nonsense' is no address"),
        ('[metrics]\nlisten = "0.0.0.0:9435"', "metrics.listen: listen 0.0.0.0:9435 is not on the loopback"),
        ("[run]\ndirect = 1", "run.direct: 1 is neither true nor false"),
    ],
)
def test_what_is_wrong(file, text, says):
    file.write_text(text)
    with pytest.raises(Failure) as found:
        read_configuration()
    assert str(found.value).startswith(f"{file}, line {text.count(chr(10)) + 1}: {says}")


def test_the_former_name(tmp_path, monkeypatch):
    """A host that is upgraded does not lose what its administrator has decided."""
    monkeypatch.delenv("GRAFT_CONFIG", raising=False)
    monkeypatch.setattr(configuration, "CONFIGURATION", tmp_path / "graft.toml")
    former = tmp_path / configuration.FORMER
    former.touch(0o644)
    former.write_text("reserve_listening = false\n")
    assert not read_configuration().reserve_listening
    assert configuration.endpoints_directory() == tmp_path / "endpoints.d"
    (tmp_path / "graft.toml").touch(0o644)
    assert read_configuration().reserve_listening


def test_the_environment_wins_for_the_limits_that_it_names():
    configured = Limits(sockets=10, udp=20)
    assert default_limits({"GRAFT_LIMITS": "udp=5"}, configured) == configured._replace(udp=5)
    assert default_limits({}, configured) == configured


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


def put(path, text):
    path.parent.mkdir(0o755, exist_ok=True)
    path.write_text(text)
    path.chmod(0o644)


def test_endpoints_of_a_directory(endpoints):
    directory = endpoints.with_name("endpoints.d")
    endpoints.write_text('a = "type local"\n')
    put(directory / "z.toml", 'b = "type local"\n')
    put(directory / "w.toml", 'c = "type local"\n')
    put(directory / ".new.toml", "half of a fi")
    put(directory / "README", "not TOML")
    assert list(read_endpoints()) == ["a", "c", "b"]
    assert configuration.endpoint_place("b") == f"{directory}/z.toml, line 1"
    assert configuration.endpoint_place("nobody") == str(directory)
    (directory / "z.toml").write_text('b = "type local"\n\na = "type local"\n')
    with pytest.raises(Failure, match=f"{directory}/z.toml, line 3: a: it stands in {endpoints}, line 1 as well"):
        read_endpoints()
    (directory / "z.toml").unlink()
    assert list(read_endpoints()) == ["a", "c"]
    (directory / "z.toml").symlink_to("nowhere")
    with pytest.raises(Failure, match=f"{directory}/z.toml: a symbolic link that leads nowhere"):
        read_endpoints()
    (directory / "z.toml").unlink()
    directory.chmod(0o777)
    with pytest.raises(Failure, match=f"others than root may write in {directory}"):
        read_endpoints()


def test_a_directory_of_endpoints_that_is_lost(endpoints):
    """A link that leads nowhere is no empty directory: the endpoints would be deleted."""
    directory = endpoints.with_name("endpoints.d")
    directory.symlink_to("elsewhere")
    with pytest.raises(Failure, match=f"{directory}: a symbolic link that leads nowhere"):
        read_endpoints()
    put(endpoints.with_name("elsewhere") / "a.toml", 'a = "type local"\n')
    assert list(read_endpoints()) == ["a"]


def test_lines_are_those_of_toml(file):
    """U+2028 and U+0085 end no line there, as they do for str.splitlines()."""
    file.write_text("# \u2028 \u0085\nlog = 'info'\nlogg = 1\n")
    with pytest.raises(Failure, match=f"{file}, line 3: unknown key 'logg'"):
        read_configuration()
    file.write_text("# \u2028\nlog = 'info'\n\nlog = 'info'\n")
    with pytest.raises(Failure, match=f"{file}, line 4"):
        read_configuration()


def test_endpoints_of_too_much(endpoints, monkeypatch):
    directory = endpoints.with_name("endpoints.d")
    directory.write_text("")
    with pytest.raises(Failure, match=f"{directory}: Not a directory"):
        read_endpoints()
    directory.unlink()
    for name in "abc":
        put(directory / f"{name}.toml", "#" * (toml.SIZE_MAX * 2 // 5))
    with pytest.raises(Failure, match=f"{directory}/c.toml: with the files before it more than 1 MiB"):
        read_endpoints()
    monkeypatch.setattr(configuration, "FILES_MAX", 2)
    with pytest.raises(Failure, match=f"{directory}: 3 files are too many .at most 2"):
        read_endpoints()


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


def blocks(text):
    """The indented examples of a document."""
    return [textwrap.dedent(block) for block in re.findall(r"(?:^(?:    .*)?\n)+", text, re.M) if block.strip()]


@pytest.mark.parametrize("document", ["docs/operations.md", "man/graft.toml.5.md"])
def test_examples_are_right(file, document):
    """What people copy from the documents is taken as it stands."""
    found = blocks((ROOT / document).read_text())
    settings = [block for block in found if "reserved_ports" in block]
    named = [block for block in found if '= "type ' in block]
    assert (len(settings), len(named)) == (1, 1)
    file.write_text(settings[0])
    assert read_configuration() != Configuration()
    put(file.with_name("endpoints.d") / "example.toml", named[0])
    assert len(read_endpoints()) >= 2


def test_the_page_has_every_key():
    text = (ROOT / "man/graft.toml.5.md").read_text()
    for key, check in configuration.SCHEMA.items():
        names = [f"**[{key}] {inner}** =" for inner in check] if isinstance(check, dict) else [f"**{key}** ="]
        assert all(text.count(f"\n{name}") for name in names), names


def test_the_page_has_the_defaults():
    text = " ".join((ROOT / "man/graft.toml.5.md").read_text().split())
    told = Configuration()
    assert "[" + ", ".join(f'"{p}"' if "-" in p else p for p in told.document()["reserved_ports"]) + "]" in text
    assert f'"{told.limits},ports={told.limits.ports}"' in text
    assert (told.log, told.address_wait, SILENCE_SECONDS) == ("info", 1.0, 30)
