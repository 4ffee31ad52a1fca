"""What a container may ask for: by options, by labels, on the wire, and in files of an earlier release."""

import hashlib
import hmac
import json
import time
from pathlib import Path

import msgspec
import pytest

from graft import protocol
from graft.engines.container import Container, metadata_of
from graft.engines.seal import is_sealed, seal
from graft.errors import UsageError
from graft.process.key import KEY_FILE
from graft.rules.limits import Limits
from graft.rules.request import (
    LABELS,
    SETTINGS,
    Parsed,
    Request,
    check_options,
    needs_root,
    parse_request,
    parse_resolver,
    with_label,
)

FULL = Request(("8080:80",), ("0.0.0.0:81=ep",), ("10.0.0.0/8=ep",), "none", ("10.88.0.5",), ("sockets=100",))


def test_each_setting_is_whole():
    """The three parts of a setting have the same names, and each name stands once."""
    assert tuple(s.field for s in SETTINGS) == Request._fields == Parsed._fields
    options = [option for setting in SETTINGS for option in setting.options]
    assert len(set(options)) == len(options)
    assert set(Request._field_defaults) == set(Request._fields)
    assert Request().given() == {}


def test_parsed():
    asked = parse_request(FULL)
    assert [str(p) for p in asked.publish] == ["8080:80/tcp"]
    assert [str(r) for r in (*asked.ingress, *asked.egress)] == ["0.0.0.0:81=ep", "10.0.0.0/8=ep"]
    assert (asked.egress_default, str(asked.ip[0].address)) == ("none", "10.88.0.5")
    assert asked.limits.or_else(Limits(7, 8, 9)) == Limits(100, 8, 9)
    assert parse_request(Request()).limits.or_else(Limits(7, 8, 9)) == Limits(7, 8, 9)


def test_one_interface():
    assert parse_request(Request()).interface == ""
    assert [parse_request(Request(interface=(name,))).interface for name in ("eth0", "lo", "none")] == ["eth0", "lo", "none"]
    with pytest.raises(UsageError, match="eth0 and eth1: a container has one"):
        parse_request(Request(interface=("eth0", "eth1")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"publish": ("80:80", "80")}, "-p: publication '80' names one port"),
        ({"ingress": ("x",)}, "-i: ingress rule 'x', character 2: lacks '='"),
        ({"egress": ("10.0.0.1/8=x",)}, "-e: egress rule '10.0.0.1/8=x', character 1"),
        ({"egress_default": "some"}, "--egress: egress 'some' is unknown"),
        ({"ip": ("127.0.0.1",)}, "--ip: 127.0.0.1 is a loopback address"),
        ({"limits": ("sockets=0",)}, "--limit: limit 'sockets=0': not a number"),
        ({"resolver": ("192.0.2.1",)}, "--resolver: resolver 192.0.2.1 is not on the host's loopback"),
        ({"resolver": ("127.64.0.33",)}, "--resolver: resolver 127.64.0.33 is no nameserver's address"),
        ({"resolver": ("224.0.0.251",)}, "--resolver: resolver 224.0.0.251 is no nameserver's address"),
        ({"resolver": ("255.255.255.255",)}, "--resolver: resolver 255.255.255.255 is no nameserver's address"),
        ({"resolver": ("ff02::fb",)}, "--resolver: resolver ff02::fb is no nameserver's address"),
        ({"interface": ("a/b",)}, "--interface: interface 'a/b' is not a name for a device"),
    ],
)
def test_errors_name_the_option(change, message):
    with pytest.raises(UsageError) as error:
        check_options(FULL._replace(**change))
    assert error.value.message.startswith(message)
    with pytest.raises(UsageError):
        parse_request(FULL._replace(**change))


def test_labels_say_the_same_as_options():
    """Whatever an option says, its label says as well."""
    request = Request()
    for setting in SETTINGS:
        request = with_label(request, setting.label, setting.texts(FULL))
    assert request == FULL
    assert LABELS[:5] == ("publish", "ingress", "egress", "ip", "limit")
    with pytest.raises(UsageError, match="are of one family"):
        with_label(with_label(Request(), "ip", ["10.1.2.3"]), "ip", ["10.1.2.4"])


def test_long_labels_take_no_time(tmp_path, monkeypatch):
    """A rootless engine sends them to graftd's loop, as its user wishes."""
    monkeypatch.setenv("GRAFT_CONFIG", str(tmp_path / "graft.toml"))
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "a.toml").write_text('allow = ["pypi.org:443"]')
    began = time.process_time()
    assert len(with_label(Request(), "sysctl", [f"net.ipv4.conf.e{n}.forwarding=1" for n in range(20000)]).sysctl) == 20000
    assert metadata_of(Container("podman", "1", "n", {"graft.policy": "a " * 900})).request.allow == ("pypi.org:443",)
    assert time.process_time() - began < 1.5


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("graft.nothing", "1", "label 'graft.nothing=1': unknown setting"),
        ("graft.egress", "some", "label 'graft.egress=some': egress rule 'some'"),
        ("graft", "off", "label 'graft=off': a container without this setting does not use graft"),
        ("graft.family", "perhaps", "label 'graft.family=perhaps': the value is neither on nor off"),
        ("graft.endpoint.a=b", "80", "label 'graft.endpoint.a=b=80': ingress rule '0.0.0.0:80=a=b'"),
    ],
)
def test_errors_name_the_label(key, value, message):
    with pytest.raises(UsageError) as error:
        metadata_of(Container("docker", "id", "web", {key: value}))
    assert error.value.message.startswith(message)
    if key == "graft.nothing":
        assert error.value.hint.startswith("graft.publish, graft.ingress, graft.egress, graft.ip, graft.limit")
        assert error.value.hint.endswith(", graft.family, graft.netadmin, graft.endpoint.NAME")


def test_who_may_ask():
    """A setting is for root alone unless it says otherwise."""
    assert needs_root(FULL)
    for setting in SETTINGS:
        alone = Request(**{setting.field: getattr(FULL, setting.field)})
        assert needs_root(alone) == (setting.field in ("publish", "ip")), setting.field
    assert needs_root(Request(egress_default="host"))
    assert not needs_root(Request())


def test_on_the_wire():
    line = json.dumps({"op": "run", "version": "1", "name": "web", "request": FULL, "argv": ["x"], "swap": True})
    run = protocol.decode_request(line.encode())
    assert isinstance(run, protocol.Run)
    assert (run.request, run.traps_addresses) == (FULL, True)
    metadata = protocol.Metadata(name="web", request=FULL, traps_addresses=True, container="c")
    assert protocol.decode_metadata(json.dumps(protocol.metadata_document(metadata))) == metadata


@pytest.mark.parametrize(
    "text",
    ['{"request": []}', '{"publish": "8080:80"}', '{"publish": [1]}', '{"egress_default": []}', '{"surprise": 1}', "[]"],
)
def test_metadata_that_is_malformed(text):
    with pytest.raises(UsageError, match="malformed listenerMetadata"):
        protocol.decode_metadata(text)


# What release 0.1 wrote under KEY.
KEY = bytes(range(32))
SEALED = (
    r'{"name":"web","publish":["8080:80","127.0.0.1:53:53/udp"],"ingress":["0.0.0.0:81=ep"],"egress":["10.0.0.0/8=ep"],'
    r'"egress_default":"none","strict":false,"swap":true,"wrapper":false,"verbose":false,"argv":["nginx","-g",'
    r'"daemon off; ü\"/\n"],"ip":["10.88.0.5"],"limits":["sockets=100"],"container":"0123456789abcdef",'
    r'"engine":"docker","directory":"/var/lib/docker/containers/0123456789abcdef",'
    r'"seal":"cd9ccba2ee5d3133c5b7606849572b133b573aa38e75973874084e810f164408"}'
)
SEALED_EMPTY = (
    '{"name":null,"publish":[],"ingress":[],"egress":[],"egress_default":null,"strict":false,"swap":false,'
    '"wrapper":false,"verbose":false,"argv":[],"ip":[],"limits":[],"container":"","engine":"","directory":"",'
    '"seal":"0e678dc9c9f11fc48c1cf0ea924e04cc8dfcab4d1e3d33c899690304bcf067ad"}'
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / KEY_FILE).write_bytes(KEY)
    return tmp_path


@pytest.mark.parametrize("text", [SEALED, SEALED_EMPTY])
def test_what_an_earlier_release_sealed(directory, text):
    """It is recognised, and this release writes the same: so the earlier one recognises that as well."""
    assert is_sealed(text, directory)
    metadata = protocol.decode_metadata(text)
    metadata.seal = ""
    assert seal(metadata, directory) == text
    assert not is_sealed(text.replace('"strict":false', '"strict":true'), directory)
    if text is SEALED:
        assert metadata.request.publish == ("8080:80", "127.0.0.1:53:53/udp")
        assert (metadata.request.limits, metadata.traps_addresses) == (("sockets=100",), True)
        assert metadata.directory.endswith(metadata.container)


def test_a_later_release_has_more_fields(directory):
    """A field that this release has and the text lacks does not break the seal."""
    plain = msgspec.json.encode({"name": "web", "container": "c", "seal": ""})
    sealed = json.loads(plain) | {"seal": hmac.new(KEY, plain, hashlib.sha256).hexdigest()}
    assert is_sealed(json.dumps(sealed), directory)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fe80::1", "is link-local, and lacks its device (like fe80::1%eth0)"),
        ("fe80::1%", "is no address with a device"),
        ("2001:db8::1%eth0", "is no address with a device"),
        ("192.0.2.1%eth0", "is no address with a device"),
        ("fe80::1%" + "x" * 16, "is no address with a device"),
    ],
)
def test_a_resolver_of_one_device(text, told):
    assert str(parse_resolver("fe80::1%eth0")) == "fe80::1"
    check_options(Request(resolver=("fe80::1%eth0",), names="on"))
    with pytest.raises(UsageError) as caught:
        check_options(Request(resolver=(text,), names="on"))
    assert f"--resolver: resolver {text} {told}" in f"{caught.value.message} ({caught.value.hint})"


def test_a_resolver_anywhere_goes_with_a_list():
    for request in (Request(resolver=("2001:db8::53", "192.0.2.53"), allow=("a.b",)), Request(resolver=("192.0.2.53",), learn="on")):
        check_options(request)
        assert len(parse_request(request).resolver) == len(request.resolver)
    with pytest.raises(UsageError, match=r"resolver 0\.0\.0\.0"):
        check_options(Request(resolver=("0.0.0.0",), allow=("a.b",)))
