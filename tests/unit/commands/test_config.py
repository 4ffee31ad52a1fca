"""`graft config check`: all faults of all files at once, and what nobody reads."""

import pytest
from click.testing import CliRunner

from graft.commands.config import command
from graft.errors import Refused, UsageError


@pytest.fixture
def put(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CONFIG", str(tmp_path / "elsewhere/graft.toml"))

    def put(name, text):
        path = tmp_path / name
        path.parent.mkdir(0o755, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)
        return path

    return put


def check(*words):
    done = CliRunner().invoke(command, ["check", *map(str, words)])
    return done.stdout.splitlines(), done.exception


def test_all_is_right(put, tmp_path):
    names = ("graft.toml", "endpoints.toml", "endpoints.d/a.toml", "users.toml", "policies/build.toml")
    texts = ('log = "info"', 'web = "type local"', 'db = "type local"', "[users.alice]", 'allow = ["pypi.org:443"]')
    for name, text in zip(names, texts, strict=True):
        put(name, text)
    assert check(tmp_path) == ([f"right  {tmp_path}/{name}" for name in names], None)


def test_a_directory_with_the_former_name_alone(put, tmp_path):
    put("graftd.toml", "reserved_port = [22]")
    lines, error = check(tmp_path)
    assert lines[0].startswith(f"wrong  {tmp_path}/graftd.toml, line 1: unknown key 'reserved_port'")
    assert isinstance(error, Refused)
    put("graft.toml", 'log = "info"')
    lines, error = check(tmp_path)
    assert (lines[0], error) == (f"right  {tmp_path}/graft.toml", None)
    assert "graftd.toml is not read" in lines[1]


def test_every_fault_is_told(put, tmp_path):
    put("graft.toml", "\nreserved_port = [22]")
    put("endpoints.toml", 'web = "type local"')
    put("endpoints.d/a.toml", 'web = "type local"')
    put("users.toml", "[users.alice]\nprots = [80]")
    put("policies/build.toml", "allow = [\n'pypi.org:443',\n'pypi.org:https',\n]")
    lines, error = check(tmp_path)
    for line, told in zip(lines, (
        "graft.toml, line 2: unknown key 'reserved_port' (did you mean 'reserved_ports'?)",
        f"endpoints.d/a.toml, line 1: web: it stands in {tmp_path}/endpoints.toml, line 1 as well (remove one of the two)",
        "users.toml, line 2: unknown key 'users.alice.prots' (did you mean 'users.alice.ports'?)",
        "policies/build.toml, line 3: allow: ",
    ), strict=True):  # fmt: skip
        assert line.startswith(f"wrong  {tmp_path}/{told}")
    assert isinstance(error, Refused)
    assert str(error) == "4 faults: of a file that has one nothing is taken"


def test_every_fault_of_a_file_is_told(put, tmp_path):
    put("policies/build.toml", "allow = [\n'pypi.org:443',\n'pypi.org:https',\n'[::1]:70000',\n]\nallw = []")
    put("graft.toml", 'log = "Debug"\nreserved_port = [22]\nwatchdog = -1\n[metrics]\nlistn = 1\npublic = 1\n[run]\ndirect = true\n')
    put("endpoints.d/a.toml", 'web = "type local"\nx = 5\n')
    put("endpoints.d/b.toml", 'web = "type local"\na-name-of-17-byte = "type local"\ngood = "type local"\n')
    put("users.toml", '[user.bob]\n[users.alice]\nprots = [80]\negress = "all"\n')
    lines, error = check(tmp_path)
    assert [line.removeprefix(f"wrong  {tmp_path}/").partition(": ")[::2] for line in lines] == [
        ("graft.toml, line 1", "log: 'Debug' is unknown (did you mean 'debug'?)"),
        ("graft.toml, line 2", "unknown key 'reserved_port' (did you mean 'reserved_ports'?)"),
        ("graft.toml, line 3", "watchdog: -1 is not a number from 0 to 86400"),
        ("graft.toml, line 5", "unknown key 'metrics.listn' (did you mean 'metrics.listen'?)"),
        ("graft.toml, line 6", "metrics.public: 1 is neither true nor false"),
        ("endpoints.d/a.toml, line 2", "x: 5 is not a string (write it in quotes)"),
        ("endpoints.d/b.toml, line 1", f"web: it stands in {tmp_path}/endpoints.d/a.toml, line 1 as well (remove one of the two)"),
        ("endpoints.d/b.toml, line 2", "a-name-of-17-byte: endpoint name 'a-name-of-17-byte' is 17 bytes long (at most 15)"),
        ("users.toml, line 1", "unknown key 'user' (did you mean 'users'?)"),
        ("users.toml, line 3", "unknown key 'users.alice.prots' (did you mean 'users.alice.ports'?)"),
        ("users.toml, line 4", "users.alice.egress: 'all' is unknown (host or none)"),
        ("policies/build.toml, line 3", "allow: 'pypi.org:https': 'https' is not a port (a number from 1 to 65535)"),
        ("policies/build.toml, line 4", "allow: '[::1]:70000': '70000' is not a port (a number from 1 to 65535)"),
        ("policies/build.toml, line 6", "unknown key 'allw' (did you mean 'allow'?)"),
    ]
    assert str(error).startswith("14 faults: ")
    put("users.toml", "".join(f"key{n} = 1\n" for n in range(100)))
    assert sum("/users.toml" in line for line in check(tmp_path)[0]) == 20, "a log or a screen has an end"


@pytest.mark.parametrize("name", ["graft.toml", "endpoints.toml", "endpoints.d/a.toml", "users.toml", "policies/b.toml"])
def test_a_link_that_leads_nowhere(put, tmp_path, name):
    put(name, "").unlink()
    (tmp_path / name).symlink_to("nowhere")
    lines, error = check(tmp_path)
    assert lines == [f"wrong  {tmp_path}/{name}: a symbolic link that leads nowhere"]
    assert isinstance(error, Refused)


def test_a_table_that_is_an_array_has_a_line(put, tmp_path):
    put("graft.toml", 'log = "info"\n[[metrics]]\n')
    lines, _error = check(tmp_path)
    assert lines == [f"wrong  {tmp_path}/graft.toml, line 2: metrics: not a table ([metrics])"]


def test_what_nobody_reads(put, tmp_path):
    for name in ("graft.toml", "graftd.toml", "endpoint.toml", "notes", "endpoints.d/web.tom", ".swap", "endpoints.d/.x"):
        put(name, "")
    lines, error = check(tmp_path)
    assert error is None
    assert [line for line in lines if line.startswith("note")] == [
        f"note   {tmp_path}/endpoint.toml is not read: did you mean endpoints.toml?",
        f"note   {tmp_path}/graftd.toml is not read, because {tmp_path}/graft.toml is there",
        f"note   {tmp_path}/notes is not read",
        f"note   {tmp_path}/endpoints.d/web.tom is not read: its name does not end in .toml",
    ]


def test_no_directory_and_an_empty_one(put, tmp_path):
    """An empty one is mostly another than was meant. check() is of the one that GRAFT_CONFIG names."""
    told = "has no file that graft reads: the defaults are in force"
    assert check() == ([f"note   {tmp_path}/elsewhere {told}"], None)
    assert check(tmp_path) == ([f"note   {tmp_path} {told}"], None)
    assert isinstance(check(tmp_path / "nowhere")[1], UsageError)
