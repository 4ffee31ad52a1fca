"""What the commands say: output, JSON, exit statuses, and one line for whatever is wrong."""

import json
import signal
import subprocess
import time

import pytest

from graft.bench.lab import GRAFT, GRAFTD, HOST4, ROOT, wait_for
from tests.conftest import python


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("run", "-p", "80", "true"), 2, "-p: publication '80' names one port"),
        (("run", "-p", "99999:80", "true"), 2, "'99999' is not a port"),
        (("run", "-i", "0.0.0.0:80", "true"), 2, "-i: ingress rule '0.0.0.0:80', character 11: lacks '='"),
        (("run", "-e", "10.0.0.1/8=x", "true"), 2, "-e: egress rule '10.0.0.1/8=x', character 1: '10.0.0.1' has bits set after the prefix"),
        (("run", "-i", "0.0.0.0:80=nope", "true"), 1, "unknown endpoint 'nope'"),
        (("run", "--egress", "some", "true"), 2, "'some' is not one of 'host', 'none'"),
        (("run", "--name", "a b", "true"), 2, "container name 'a b' is not valid"),
        (("run", "--name", "12", "true"), 2, "looks like a pid"),
        (("run", "--netns", "nowhere", "true"), 1, "network namespace 'nowhere' does not exist"),
        (("run", "--netns", "/etc/passwd", "true"), 1, "is not a network namespace"),
        (("run", "--netns", "4194303", "true"), 1, "does not exist"),
        (("run", "--netns", "", "true"), 2, "'--netns': the name is empty"),
        (("--netns=", "run", "true"), 2, "'--netns': the name is empty"),
        (("run", "-p", "[::1]:80", "true"), 2, "-p: publication '[::1]:80' names one port (the form is"),
        (("run",), 2, "Missing argument 'COMMAND...'"),
        (("run", ""), 2, "the command is empty"),
        (("run", "--frobnicate", "true"), 2, "No such option '--frobnicate'"),
        (("run", "no-such-command"), 127, "command 'no-such-command' not found"),
        (("run", "/etc/passwd"), 126, "command '/etc/passwd' is not executable"),
        (("run", "/etc"), 126, "command '/etc' is a directory"),
        (("runn", "true"), 2, "unknown command 'runn' (did you mean 'run'?)"),
        (("ps", "extra"), 2, "Got unexpected extra argument (extra) (see 'graft ps --help')"),
        (("endpoint", "add", "a-name-of-17-byte", "type", "ipv4", "addr", HOST4, "port", "1"), 2, "17 bytes long"),
        (("endpoint", "add", "", "type", "ipv4", "addr", HOST4, "port", "1"), 2, "endpoint name is empty"),
        (("endpoint", "add", "x", "type", "ipv5", "addr", HOST4, "port", "1"), 2, "endpoint type 'ipv5' is unknown"),
        (("endpoint", "add", "x", "type", "ipv6", "addr", HOST4, "port", "1"), 2, "is not an ipv6 address"),
        (("endpoint", "add", "x", "type", "ipv4", "addr", HOST4), 2, "'port' is missing"),
        (("endpoint", "add", "x", "type", "ipv4", "addr", HOST4, "port"), 2, "'port' lacks its value"),
        (("endpoint", "add", "x", "type", "ipv4", "addr", HOST4, "port", "70000"), 2, "'70000' is not a port"),
        (("endpoint", "add", "x", "kind", "ipv4"), 2, "unknown word 'kind'"),
        (("endpoint", "del", "nope"), 1, "endpoint 'nope' does not exist in this namespace ('graft endpoint show' lists them)"),
        (("endpoint", "show", "nope"), 1, "endpoint 'nope' does not exist"),
        (("inspect", "nope"), 1, "no container named 'nope'"),
        (("rule", "show", "nope"), 1, "no container and no network namespace is named 'nope'"),
        (("rule", "move", "-p", "80:80", "--from", "nope", "--to", "nope2"), 1, "no container and no network namespace is named 'nope'"),
        (("stats", "nope"), 1, "no container named 'nope'"),
        (("rule", "add", "nope"), 2, "no rule is given"),
    ],
)
def test_bad_input(lab, words, status, says):
    lab.graft("endpoint", "show", check=True)
    result = lab.graft(*words)
    assert (result.returncode, result.stderr.count("\n")) == (status, 1), result.stderr
    assert result.stderr.startswith("graft: ")
    assert says in result.stderr
    assert result.stdout == ""
    assert lab.containers() == []


def test_endpoints(lab):
    add = ("endpoint", "add", "ep-http", "type", "ipv4", "addr", HOST4, "port", "80")
    assert lab.graft(*add).returncode == 0
    lab.refused((GRAFT, *add), 1, "endpoint 'ep-http' exists")
    assert (
        lab.graft("endpoint", "add", "ep6", "addr", "2001:db8::7", "type", "ipv6", "port", "dynamic").returncode == 0
    )
    assert lab.graft("endpoint", "show").stdout == (
        f"ep-http type ipv4 addr {HOST4} port 80\nep6 type ipv6 addr 2001:db8::7 port dynamic\n"
    )
    assert lab.graft("endpoint", "show", "ep6").stdout == "ep6 type ipv6 addr 2001:db8::7 port dynamic\n"
    (shown,) = json.loads(lab.graft("endpoint", "show", "-j", "ep-http").stdout)
    assert shown.pop("name_addr") == "250.112.171.229"
    assert shown == {"name": "ep-http", "type": "ipv4", "addr": HOST4, "port": 80, "span": 1, "published": False}
    assert lab.client(GRAFT, "endpoint", "show").stdout == "", "a table belongs to its namespace"
    assert lab.client(GRAFT, "endpoint", "del", "ep6").returncode == 1
    assert lab.client(GRAFT, "endpoint", "show", "--netns", lab.host_ns).stdout.count("\n") == 2
    for name in ("ep-http", "ep6"):
        assert lab.graft("endpoint", "del", name).returncode == 0
    assert lab.graft("endpoint", "show").stdout == ""


def test_ps_and_inspect(lab):
    lab.spawn_graft("--name", "web", "-p", "8080:80", "-p", "127.0.0.1:5353:53/udp", "sleep", "61")
    wait_for(lambda: lab.containers() == ["web"], "the container")
    head, row = lab.graft("ps").stdout.splitlines()
    assert head.split() == ["NAME", "PID", "STATUS", "ADDRESS", "PORTS", "ENDPOINTS", "COMMAND"]
    assert row.split()[2] == "running"
    assert row.split()[4:] == ["-", "8080:80/tcp,127.0.0.1:5353:53/udp", "-", "sleep", "61"]
    (listed,) = json.loads(lab.graft("ps", "-j").stdout)
    seen = json.loads(lab.graft("inspect", "web").stdout)
    assert listed.items() <= seen.items()
    assert seen["command"] == ["sleep", "61"]
    assert seen["loopback"]["ipv4"].startswith("127.")
    assert seen["loopback"]["ipv6"].startswith("fd67:7261:6674:")
    assert [e["name"] for e in seen["endpoints"]] == ["tcp-8080", "tcp6-8080", "udp-5353"]
    assert seen["refused"] == []
    taken = lab.refused((GRAFT, "run", "--name", "web", "true"), 1, "a container named 'web' is running")
    assert taken.stderr.count("\n") == 1


def test_help_and_version(lab):
    from graft import __version__
    from graft.commands.main import COMMANDS

    top = lab.graft("--help")
    assert top.returncode == 0
    assert all(name in top.stdout for name in COMMANDS)
    for words in (
        ("run",),
        ("endpoint", "add"),
        ("rule", "add"),
        ("ps",),
        ("inspect",),
        ("doctor",),
        ("completion",),
    ):
        result = lab.graft(*words, "--help")
        assert result.returncode == 0
        assert "graft " in result.stdout
    assert lab.graft("--version").stdout == f"graft {__version__}\n"
    assert lab.graft().returncode == 2


@pytest.mark.core
def test_doctor(lab):
    result = lab.graft("doctor")
    assert result.returncode == 0, result.stdout
    findings = {f["name"]: f for f in json.loads(lab.graft("doctor", "-j").stdout)}
    assert findings["BPF programs"]["found"].endswith("programs load")
    assert all(f["good"] for f in findings.values() if f["needed"])


def test_doctor_finds_what_is_missing(lab):
    """Without capabilities, without iproute2: each is named, and the status is 1."""
    weak = lab.host("setpriv", "--bounding-set=-all", "--inh-caps=-all", GRAFT, "doctor", "-j")
    assert weak.returncode == 1
    missing = {f["name"] for f in json.loads(weak.stdout) if f["needed"] and not f["good"]}
    assert {"namespaces", "seccomp notification", "BPF programs"} <= missing
    pathless = lab.host("env", "PATH=/nonexistent", "/bin/sh", GRAFT, "doctor", "-j")
    assert pathless.returncode != 0


def test_without_root(lab):
    lab.graft("endpoint", "show", check=True)
    python = subprocess.run(
        ("readlink", "-f", ROOT / ".venv/bin/python3"), capture_output=True, text=True
    ).stdout.strip()
    command = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, "-I", "-c")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, *{site_packages()!r}]; from graft.commands.main import main; sys.exit(main())"
    code = code.replace("sys.exit(main())", "sys.argv[1:] = {words}; sys.exit(main())")
    ran = lab.host(*command, code.format(words=["run", "true"]))
    if "Permission denied" in ran.stderr and "setpriv" in ran.stderr:
        pytest.skip("the interpreter of the test run is not executable by others")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert lab.host(*command, code.format(words=["endpoint", "show"])).returncode == 0, "the own table is anyone's to see"
    assert lab.host(*command, code.format(words=["ps", "-j"])).stdout == "[]\n"


def site_packages():
    import sys

    return [p for p in sys.path if p.endswith("site-packages")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(lab, shell):
    assert "_GRAFT_COMPLETE" in lab.graft("completion", shell).stdout
    words = lab.graft(
        env={**lab.env, "_GRAFT_COMPLETE": "bash_complete", "COMP_WORDS": "graft in", "COMP_CWORD": "1"}
    )
    assert "inspect" in words.stdout
    assert "_GRAFTD_COMPLETE" in lab.graft("completion", shell, "graftd").stdout
    asked = {**lab.env, "_GRAFTD_COMPLETE": "bash_complete", "COMP_WORDS": "graftd --re", "COMP_CWORD": "1"}
    assert lab.host(GRAFTD, env=asked).stdout.split() == ["plain,--replace", "plain,--reload"]


def test_names_are_completed(lab):
    def complete(*words):
        env = {**lab.env, "_GRAFT_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(("graft", *words)), "COMP_CWORD": str(len(words))}
        return [line.partition(",")[2] for line in lab.graft(env=env).stdout.splitlines() if line]

    lab.add_endpoints({"ep-complete": "type local"})
    one = lab.spawn_graft("--name", "completed", "sleep", "60")
    wait_for(lambda: "completed" in lab.containers(), "the container")
    for words in (["inspect"], ["log"], ["sockets"], ["stats"], ["rule", "show"], ["endpoint", "move", "x", "--from"]):
        assert complete(*words, "compl") == ["completed"], words
    for words in (["run"], ["endpoint", "show"], []):
        assert complete(*words, "--netns", "compl") == ["completed"], words
    assert lab.host_ns in complete("run", "--netns", lab.host_ns[:-1])
    assert "ep-complete" in complete("endpoint", "del", "ep-c")
    assert "sleep" in complete("run", "-p", "80:80", "slee")
    for words in (["sleep", "REA"], ["./REA"]):
        assert complete("run", *words) == words[-1:], "a file: the shell knows which"
    assert complete("inspect", "nobody") == []
    assert [each["name"] for each in json.loads(lab.graft("stats", "-j", "completed", check=True).stdout)] == ["completed"]
    lab.end(one)
    lab.graft("endpoint", "del", "ep-complete", check=True)


def test_arguments_of_any_bytes_and_length(lab):
    enter = ["nsenter", f"--net=/run/netns/{lab.host_ns}", str(GRAFT), "run"]
    odd = subprocess.run([*enter, "printf", "%s", b"\xff\xfe"], env=lab.env, capture_output=True)
    assert odd.stdout == b"\xff\xfe", odd.stderr
    many = subprocess.run([*enter, "sh", "-c", "echo $#", *["é" * 20] * 9000], env=lab.env, capture_output=True)
    assert many.stdout == b"8999\n", many.stderr


def test_a_script_without_a_first_line(lab):
    script = lab.work / "script"
    script.write_text("echo from sh $1\n")
    script.chmod(0o755)
    assert lab.graft("run", script, "x").stdout == "from sh x\n"


def test_one_line_for_odd_input(lab):
    lab.graft("endpoint", "show", check=True)
    for words in (
        ("endpoint", "add", b"\xff", "type", "ipv4", "addr", "1.2.3.4", "port", "1"),
        ("endpoint", "add", "odd", "type", "unix", "path", b"/tmp/\xff"),
        ("run", "-p", "1" * 5000 + ":80", "true"),
        ("run", "-u", "²", "id"),
        ("run", "-u", "0:99999999999", "id"),
        ("run", "-u", "", "id"),
        ("run", "--name", "", "true"),
        ("run", "-p", "224.0.0.1:8077:80", "true"),
    ):
        argv = [w.decode(errors="surrogateescape") if isinstance(w, bytes) else w for w in words]
        result = subprocess.run(
            ["nsenter", f"--net=/run/netns/{lab.host_ns}", GRAFT, *argv], env=lab.env, capture_output=True, text=True
        )
        assert result.returncode in (1, 2), (words, result.stderr)
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith("graft: ")
    for redirection in (">&-", ">/dev/full"):
        result = lab.host("sh", "-c", f"{GRAFT} ps {redirection}")
        assert "Traceback" not in result.stderr
        assert result.stderr.count("\n") <= 1, result.stderr


def test_an_ignored_interrupt_stays_ignored(lab):
    """As a shell without job control, or nohup(1), has it for what runs in the background."""
    show = python("import signal; print(signal.getsignal(2) == signal.SIG_IGN)")
    told = lab.host("sh", "-c", 'trap "" INT; exec "$@"', "sh", GRAFT, "run", *show).stdout
    assert (told, lab.graft("run", *show).stdout) == ("True\n", "False\n")


def test_an_early_interrupt_is_silent(lab):
    for delay in (0.005, 0.015, 0.025, 0.035):
        process = lab.spawn_graft("sleep", "60", stderr=-1)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
        assert "Traceback" not in said
