"""What a container is allowed: the grammar, whom a list covers, and policy files."""

import pytest

from graft.errors import UsageError
from graft.rules import policy_file, tables
from graft.rules.address import parse_address, parse_prefix
from graft.rules.policy import parse_allow, policy_of
from graft.rules.request import Request, parse_request


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pypi.org", "pypi.org"),
        ("PyPI.org.:443", "pypi.org:443"),
        ("*.GitHub.com:443", "*.github.com:443"),
        ("_dmarc.example.org", "_dmarc.example.org"),
        ("bücher.example:80", "xn--bcher-kva.example:80"),
        ("*.bücher。example", "*.xn--bcher-kva.example"),
        ("db", "db"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("192.0.2.1:5432", "192.0.2.1:5432"),
        ("192.0.2.1/32", "192.0.2.1"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::1", "::1"),
        ("[2001:db8::1]:443", "[2001:db8::1]:443"),
        ("[2001:db8::/32]:53", "[2001:db8::/32]:53"),
        ("[2001:db8::1]", "2001:db8::1"),
    ],
)
def test_entries(text, shown):
    assert str(parse_allow(text)) == shown
    assert parse_allow(shown) == parse_allow(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no name and no address"),
        ("*", "has a wildcard that is not the whole first label"),
        ("a.*.b", "has a wildcard that is not the whole first label"),
        ("*a.b", "has a wildcard that is not the whole first label"),
        ("pypi.org:0", "'pypi.org:0': '0' is not a port (a number from 1 to 65535)"),
        ("pypi.org:65536", "'65536' is not a port"),
        ("pypi.org:https", "'https' is not a port"),
        ("1.2.3", "is not an IP address"),
        ("host.1", "is no name and no address"),
        ("a..b", "is no name and no address"),
        ("-a.b", "is no name and no address"),
        ("a b", "is no name and no address"),
        ("http://pypi.org", "'http://pypi.org' is a URL (its name and its port, like pypi.org:443)"),
        ("https://pypi.org:443/simple", "'https://pypi.org:443/simple' is a URL"),
        ("Straße.example:443", "'Straße.example:443' is strasse.example to some programs and xn--strae-oqa.example to others"),
        ("*.βόλος.example", "is xn--nxasmq6b.example to some programs and xn--nxasmm1c.example to others"),
        ("/8", "'/8': '' is not an IP address"),
        ("[]:1", "'[]:1': '' is not an IP address"),
        ("[pypi.org]:443", "'[pypi.org]:443': 'pypi.org' is not an IP address"),
        ("x" * 64, "is no name and no address"),
        (".".join(["x" * 60] * 5), "is no name and no address"),
        ("ü" * 60, "is no name (IDNA)"),
        ("10.0.0.1/8", "has bits set after the prefix"),
        ("10.0.0.0/33", "is not an address with its prefix length"),
        ("[::1", "is no name and no address"),
        ("[::1]x", "is no name and no address"),
    ],
)
def test_what_is_no_entry(text, says):
    with pytest.raises(UsageError) as error:
        parse_allow(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_whom_a_list_covers():
    policy = policy_of(("pypi.org", "pypi.org:443", "*.example.org:443", "*.a.example.org", "10.0.0.0/8", "192.0.2.1:5432"), None)
    assert policy
    assert policy.ports("pypi.org") == {0, 443}
    assert policy.ports("x.pypi.org") == policy.ports("example.org") == policy.ports("org") == policy.ports("") == set()
    assert policy.ports("x.example.org") == policy.ports("x.y.example.org") == {443}
    assert policy.ports("x.a.example.org") == {0, 443}
    assert policy.ports("xexample.org") == set()
    assert [policy.covers(parse_address(a)) for a in ("10.1.2.3", "192.0.2.1", "192.0.2.2", "::1")] == [True, True, False, False]
    assert policy_of((), None) is None
    learns = policy_of((), "on")
    assert learns
    assert learns.learns


def test_what_does_not_go_together():
    for request, says in (
        (Request(allow=("a.b",), egress_default="none"), "--egress none"),
        (Request(learn="on", egress_default="none"), "--egress none"),
        (Request(learn="on", allow=("a.b",)), "--learn lets everything through"),
        (Request(allow=("a.b",) * 1001), "1001 destinations are too many"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_request(request)
    parse_request(Request(allow=("a.b",), egress_default="none", egress=("10.0.0.0/8=ep",)))


def test_entries_of_the_kernels_table():
    policy = policy_of(("10.0.0.0/8:443", "2001:db8::/32", "a.b"), None)
    made = tables.compile_tables(7, {}, [], [], slice_number=8, egress_host=True, strict=False, direct=True, policy=policy)
    assert made.allowed == {
        tables.ALLOWED_KEY.pack(64 + 96 + 8, 7, 443, parse_address("10.0.0.0").raw): bytes(4),
        tables.ALLOWED_KEY.pack(64 + 32, 7, 0, parse_address("2001:db8::").raw): bytes(4),
    }
    assert made.flags & tables.TENANT_ALLOW
    assert not made.flags & (tables.TENANT_PLAIN | tables.TENANT_LEARN)


def test_no_stub_resolver_beside_grafts():
    stub = [parse_address("127.0.0.53")]
    made = tables.compile_tables(
        7, {}, [], [], slice_number=8, egress_host=True, strict=False, resolvers=stub, policy=policy_of(("a.b",), None)
    )
    assert not made.services


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('allow = ["pypi.org"]\nalow = []', "line 2: unknown key 'alow' (did you mean 'allow'?)"),
        ('allow = ["pypi.org",\n  "a.*.b",\n]', "line 2: allow: 'a.*.b' has a wildcard"),
        ("allow = ['x:99999']", "line 1: allow: 'x:99999': '99999' is not a port"),
        ("allow = [7]", "line 1: allow: 7 is not a string"),
        ('allow = "pypi.org"', "line 1: allow: 'pypi.org' is not an array (write it in brackets: [...])"),
        ("allow = []", "it allows nothing"),
        ("", "it allows nothing"),
        ("allow = [", "Invalid value"),
    ],
)
def test_wrong_files(tmp_path, content, says):
    file = tmp_path / "policy.toml"
    file.write_text(content)
    with pytest.raises(UsageError) as error:
        policy_file.read_policy(file)
    assert says in str(error.value)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_whose_a_file_is(tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text('allow = ["pypi.org:443"]')
    file.chmod(0o666)
    assert policy_file.read_policy(file, anybodys=True) == ("pypi.org:443",)
    with pytest.raises(UsageError, match="others than root may write it"):
        policy_file.read_policy(file)
    with pytest.raises(UsageError, match="there is no such file"):
        policy_file.read_policy(tmp_path / "absent.toml")


def test_policies_of_the_administrator(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CONFIG", str(tmp_path / "graft.toml"))
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "build.toml").write_text('allow = ["pypi.org:443"]')
    assert policy_file.named_policy("build") == ("pypi.org:443",)
    for name in ("", "..", "../build", "a/b", ".build", "build.toml\n"):
        with pytest.raises(UsageError, match="is not a policy's name"):
            policy_file.named_policy(name)


@pytest.mark.parametrize("length", ["129", "0000128", "000000330504082", "-1", "+8", "8 ", "²", ""])
def test_a_length_that_is_none(length):
    with pytest.raises(UsageError):
        parse_prefix(f"::/{length}")
