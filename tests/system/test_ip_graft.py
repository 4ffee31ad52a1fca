"""ip-graft: the grammar, the output and the refusals of `ip graft`, and ip(8)'s habits."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from graft.bench.lab import HOST4, IP_GRAFT, ROOT, wait_for
from tests.conftest import lack


def ip_graft(lab, *words, **options):
    return lab.host(IP_GRAFT, *words, **options)


@pytest.fixture(autouse=True)
def empty_afterwards(lab):
    yield
    lab.delete_endpoints([line.split()[0] for line in ip_graft(lab, "show").stdout.splitlines()])


def test_help_is_upstreams_usage(lab):
    usage = ip_graft(lab, "help").stdout
    assert "type { ipv4 | ipv6 } addr ADDR port { PORT | dynamic }" in usage
    assert "type unix path PATH" in usage
    assert "[ netns { PID | NETNSNAME } ]" in usage
    assert "PORT := { 0..65535 | dynamic }" in usage
    assert ip_graft(lab, "--help").stdout == usage
    assert ip_graft(lab, "-V").stdout.startswith("ip-graft ")


def test_every_kind_is_added_and_shown(lab):
    commands = [
        "add ep-test type ipv4 addr 127.0.0.1 port 8080",
        "add ep-out type ipv4 addr 127.0.0.1 port dynamic",
        "add ep-zero type ipv4 addr 0.0.0.0 port 0",
        "add ep-six addr ::1 port 8080 type ipv6",
        f"add ep-unix type unix path {lab.work}/x.sock",
        f"add ep-pid type ipv4 addr {HOST4} port 1 netns {os.getpid()}",
        f"add ep-name type ipv6 addr :: port 65535 netns {lab.client_ns}",
    ]
    for command in commands:
        result = ip_graft(lab, *command.split())
        assert (result.returncode, result.stdout, result.stderr) == (0, "", ""), command
    expected = [
        f"ep-name type ipv6 addr :: port 65535 netns {lab.client_ns}",
        "ep-out type ipv4 addr 127.0.0.1 port dynamic",
        f"ep-pid type ipv4 addr {HOST4} port 1 netns {os.getpid()}",
        "ep-six type ipv6 addr ::1 port 8080",
        "ep-test type ipv4 addr 127.0.0.1 port 8080",
        f"ep-unix type unix path {lab.work}/x.sock",
        "ep-zero type ipv4 addr 0.0.0.0 port dynamic",
    ]
    assert ip_graft(lab, "show").stdout.splitlines() == expected
    assert lab.graft("endpoint", "show").stdout.splitlines() == expected
    assert ip_graft(lab, "sh", "ep-out").stdout.splitlines() == expected[1:2]
    shown = {e["name"]: e for e in json.loads(ip_graft(lab, "-j", "show").stdout)}
    assert shown["ep-unix"]["path"] == f"{lab.work}/x.sock"
    assert shown["ep-name"]["netns"] == lab.client_ns
    assert json.loads(lab.graft("endpoint", "show", "-j").stdout) == list(shown.values())


def test_the_table_is_that_of_the_namespace_it_runs_in(lab):
    """The talk's line, as typed."""
    name = f"{lab.tag}-t"
    lab.ip("netns", "add", name)
    try:
        env = {**lab.env, "PATH": f"{ROOT / 'bin'}:{os.environ['PATH']}"}
        typed = f"ip netns exec {name} ip-graft add ep-test type ipv4 addr 127.0.0.1 port 8080"
        assert lab.host(*typed.split(), env=env).returncode == 0
        shown = lab.host("ip", "netns", "exec", name, "ip-graft", "show", env=env)
        assert shown.stdout == "ep-test type ipv4 addr 127.0.0.1 port 8080\n"
        assert ip_graft(lab, "show").stdout == ""
        for outside in (
            ip_graft(lab, "-n", name, "show"),
            ip_graft(lab, "-netns", name, "show"),
            lab.graft("--netns", name, "endpoint", "show"),
            lab.graft("endpoint", "show", "--netns", f"/run/netns/{name}"),
        ):
            assert outside.stdout == shown.stdout
        assert ip_graft(lab, "-n", name, "del", "ep-test").returncode == 0
        assert ip_graft(lab, "-n", name, "show").stdout == ""
    finally:
        lab.ip("netns", "del", name)


def test_a_namespaces_table_ends_with_it(lab):
    """Even where the next namespace gets its inode."""
    name = f"{lab.tag}-t"
    for _ in range(5):
        lab.ip("netns", "add", name)
        assert ip_graft(lab, "-n", name, "show").stdout == ""
        ip_graft(lab, "-n", name, "add", "ep", "type", "ipv4", "addr", HOST4, "port", "1", check=True)
        lab.ip("netns", "del", name)


def test_a_pid_means_what_it_means_to_the_caller(lab):
    """netns 1 in a PID namespace of its own is that one's first process."""
    lab.graft("endpoint", "show", check=True)
    script = f"{IP_GRAFT} add ep-one type ipv4 addr {HOST4} port 8401 netns 1"
    lab.host("unshare", "--pid", "--fork", "--mount-proc", "--net", "sh", "-c", f"ip link set lo up; nsenter --net=/run/netns/{lab.host_ns} {script}; true", check=True)
    (shown,) = json.loads(ip_graft(lab, "-j", "show").stdout)
    assert shown["netns"] == "1"
    bound = lab.graft("-i", "0.0.0.0:80=ep-one", "--", "/usr/bin/python3", "-c", "import socket; socket.socket().bind(('0.0.0.0',80))")
    assert bound.returncode == 1
    assert "Cannot assign requested address" in bound.stderr, "that namespace, which lives on for the endpoint, has no such address"


def test_batch(lab):
    text = f"""
# endpoints of a web server
add ep-a type ipv4 addr {HOST4} port 1   # the first
add ep-b type ipv4 \\
    addr {HOST4} port 2
del ep-a
show
"""
    result = ip_graft(lab, "-batch", "-", input=text)
    assert (result.returncode, result.stdout) == (0, f"ep-b type ipv4 addr {HOST4} port 2\n"), result.stderr
    file = lab.work / "batch"
    file.write_text("add ep-c type unix path /run/c.sock\nadd ep-d type ipv5 addr 1.2.3.4 port 1\n")
    bad = ip_graft(lab, "-batch", file)
    assert (bad.returncode, bad.stderr) == (2, f"ip-graft: {file}, line 2: endpoint type 'ipv5' is unknown (ipv4, ipv6, unix or local)\n")
    assert "ep-c" not in ip_graft(lab, "show").stdout, "grammar is checked before anything is done"
    file.write_text("add ep-e type ipv4 addr 1.2.3.4 port 1\nadd ep-b type ipv4 addr 1.2.3.4 port 1\n")
    taken = ip_graft(lab, "-batch", file)
    assert (taken.returncode, taken.stderr.count("\n")) == (1, 1)
    assert f"{file}, line 1 to 2: endpoint 'ep-b' exists" in taken.stderr
    assert "ep-e" not in ip_graft(lab, "show").stdout
    forced = ip_graft(lab, "-force", "-batch", file)
    assert (forced.returncode, forced.stderr.count("\n")) == (1, 1)
    assert "ep-e" in ip_graft(lab, "show").stdout
    missing = ip_graft(lab, "-batch", "/no/such/file")
    assert (missing.returncode, missing.stderr) == (1, "ip-graft: batch file '/no/such/file': No such file or directory\n")


def test_many_endpoints_at_once(lab):
    lines = "".join(f"add e{n} type ipv4 addr {HOST4} port {n}\n" for n in range(1, 10001))
    assert ip_graft(lab, "-b", "-", input=lines).returncode == 0
    assert len(ip_graft(lab, "show").stdout.splitlines()) == 10000
    assert ip_graft(lab, "-b", "-", input="".join(f"del e{n}\n" for n in range(1, 10001))).returncode == 0
    assert ip_graft(lab, "show").stdout == ""


ADD = "add x type ipv4 addr 10.0.0.1 port 80"


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("add x type ipv5 addr 10.0.0.1 port 80", 2, "endpoint type 'ipv5' is unknown (ipv4, ipv6, unix or local)"),
        ("add x addr 10.0.0.1 port 80", 2, "'type' is missing"),
        ("add x type ipv4 port 80", 2, "'addr' is missing"),
        ("add x type ipv4 addr 10.0.0.1", 2, "'port' is missing"),
        ("add x type unix", 2, "'path' is missing"),
        ("add x type local path /run/x", 2, "'path' does not go with type local"),
        ("add x type local netns 1", 2, "'netns' does not go with type local"),
        ("add x type unix path /run/x addr 10.0.0.1 port 80", 2, "'path' does not go with 'addr' and 'port'"),
        ("add x type ipv4 addr 10.0.0.1 port 80 path /run/x", 2, "'path' does not go with 'addr' and 'port'"),
        ("add x type unix addr 10.0.0.1 port 80", 2, "'addr' does not go with type unix"),
        ("add x type ipv4 path /run/x", 2, "'addr' is missing"),
        ("add x type ipv4 addr 10.0.0.1 port 65536", 2, "'65536' is not a port (a number from 0 to 65535)"),
        ("add x type ipv4 addr 10.0.0.1 port -1", 2, "'-1' is not a port"),
        ("add x type ipv4 addr 10.0.0.1 port http", 2, "'http' is not a port"),
        ("add x type ipv4 addr ::1 port 80", 2, "'::1' is not an ipv4 address"),
        ("add x type ipv6 addr 10.0.0.1 port 80", 2, "'10.0.0.1' is not an ipv6 address"),
        ("add x type ipv4 addr 10.0.0 port 80", 2, "'10.0.0' is not an IP address"),
        (f"add x type unix path /{'x' * 107}", 2, "is 108 bytes long (a unix socket's has at most 107)"),
        ("add x type unix path relative.sock", 2, "path 'relative.sock' is not absolute"),
        ("add x type unix path /no/such/directory/x.sock", 1, "there is no directory '/no/such/directory'"),
        (f"{ADD} netns nowhere", 1, "network namespace 'nowhere' does not exist"),
        (f"{ADD} netns 4194303", 1, "network namespace '4194303' does not exist"),
        (f"{ADD} netns /etc/passwd", 1, "'/etc/passwd' is not a network namespace"),
        (f"{ADD} netns", 2, "'netns' lacks its value"),
        (f"{ADD} port 81", 2, "'port' is given twice"),
        (f"{ADD} colour red", 2, "unknown word 'colour'"),
        ("add", 2, "the endpoint's NAME is missing"),
        ("add sixteen-bytes-xx type ipv4 addr 10.0.0.1 port 80", 2, "16 bytes long (at most 15)"),
        ("del nope", 1, "endpoint 'nope' does not exist in this namespace"),
        ("del", 2, "the endpoint's NAME is missing"),
        ("del x y", 2, "unknown word 'y'"),
        ("show nope", 1, "endpoint 'nope' does not exist"),
        ("frobnicate", 2, "unknown command 'frobnicate'"),
        ("", 2, "no command is given"),
        ("-z show", 2, "unknown option '-z'"),
        ("-batch", 2, "'-batch' lacks its value"),
        ("-n nowhere show", 1, "no container and no network namespace is named 'nowhere'"),
    ],
)
def test_bad_input(lab, command, status, says):
    lab.graft("endpoint", "show", check=True)
    result = ip_graft(lab, *command.split())
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (status, 1, ""), result.stderr
    assert says in result.stderr
    if len(command.split()) > 2 and command.startswith("add x") and "-1" not in command.split():
        same = lab.graft("endpoint", *command.split())
        assert (same.returncode, same.stderr) == (status, result.stderr.replace("ip-graft: ", "graft: "))
    assert ip_graft(lab, "show").stdout == "", "nothing is half-added"


def test_it_starts_graftd_for_the_machine_and_not_for_a_namespace(tmp_path):
    """Without GRAFT_RUN_DIR, from inside 'ip netns exec', graftd comes up in the first process's namespaces."""
    if os.path.exists("/run/graft/graftd.sock"):
        lack("a graftd of this machine's own is running")
    name = f"graft-machine-{os.getpid()}"
    subprocess.run(("ip", "netns", "add", name), check=True)
    env = {key: value for key, value in os.environ.items() if key != "GRAFT_RUN_DIR"}
    graftd = str(ROOT / "bin" / "graftd")
    try:
        typed = ("ip", "netns", "exec", name, IP_GRAFT, "add", "ep-test", "type", "ipv4", "addr", "127.0.0.1", "port", "8080")
        done = subprocess.run(typed, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        shown = subprocess.run((IP_GRAFT, "-n", name, "show"), env=env, capture_output=True, text=True, timeout=60)
        assert shown.stdout == "ep-test type ipv4 addr 127.0.0.1 port 8080\n"
        keeper = int(Path("/run/graft/keeper.lock").read_text())
        assert os.stat(f"/proc/{keeper}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
        subprocess.run((IP_GRAFT, "-n", name, "del", "ep-test"), env=env, check=True, timeout=60)
    finally:
        subprocess.run((graftd, "--stop", "--force"), env=env, timeout=60)
        subprocess.run(("ip", "netns", "del", name), check=True)
        wait_for(lambda: not os.path.exists("/sys/fs/bpf/graft"), "graftd's end")
