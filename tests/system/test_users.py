"""`graft run` and the other commands by ordinary users, by the user socket (graft/daemon/users.py)."""


import json
import os
import select
import shlex
import shutil
import signal
import sys
import time

import pytest

from graft.bench.lab import GRAFT, GRAFTD, HOST4, wait_for
from tests.conftest import need, need_root, python
from tests.users import UIDS, users_laboratory

SERVER = "import socket; s = socket.create_server(({host!r}, {port})); print('up', flush=True)\nwhile 1: c, a = s.accept(); c.sendall(a[0].encode()); c.close()"
ASK = "import socket; print(socket.create_connection(({host!r}, {port}), 5).recv(99).decode())"


@pytest.fixture(scope="module")
def users():
    need_root()
    need("setpriv", "newuidmap")
    with users_laboratory() as lab:
        lab.start_daemon()
        lab.wait_logged(" ready, ")  # else it reads at its start what a test grants, and does not log that
        yield lab


@pytest.fixture
def own_users():
    need_root()
    need("setpriv", "newuidmap")
    with users_laboratory() as lab:
        yield lab


def serve(lab, user, *options, host="0.0.0.0", port=80):
    process = lab.spawn_by(user, *options, *python(SERVER.format(host=host, port=port)), stdout=-1)
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("user", UIDS)
def test_the_command_is_its_user(users, user):
    shown = users.by(user, "run", "sh", "-c", "id -u; id -g; grep CapEff /proc/self/status", check=True).stdout.split()
    assert shown == [str(UIDS[user]), str(UIDS[user]), "CapEff:", "0000000000000000"]


def test_a_published_server_sees_the_real_client(users):
    server = serve(users, "alice", "-p", "8080:80")
    assert users.client(*python(ASK.format(host=HOST4, port=8080))).stdout == "10.77.0.2\n"
    users.end(server)


def test_two_users_have_a_loopback_each(users):
    both = [serve(users, user, "--name", "svc", host="127.0.0.1", port=5000) for user in ("alice", "bob")]
    for user in ("alice", "bob"):
        told = users.by(user, "run", "--netns", "svc", *python(ASK.format(host="127.0.0.1", port=5000)))
        assert told.stdout == "127.0.0.1\n", told.stderr
    for server in both:
        users.end(server)


def test_a_firewall_sees_the_user(users):
    """What root forbids a user holds for their containers, whoever makes the sockets: graft-sup, and graftd without."""
    users.host("nft", "add", "table", "inet", "users", check=True)
    try:
        chain = "{ type filter hook output priority 0; }"
        users.host("nft", "add", "chain", "inet", "users", "out", chain, check=True)
        users.host("nft", "add", "rule", "inet", "users", "out", "meta skuid alice tcp dport 7000 reject with tcp reset", check=True)
        server = users.spawn(*python(SERVER.format(host="10.77.0.2", port=7000)), client=True, stdout=-1)
        assert server.stdout.readline() == "up\n"
        ask = python(ASK.format(host="10.77.0.2", port=7000))
        assert "ConnectionRefusedError" in users.by("alice", "run", *ask).stderr
        assert users.by("bob", "run", *ask).stdout == "10.77.0.1\n"
        holder = users.spawn_by("alice", "--name", "frozen", "sleep", "60")
        wait_for(lambda: users.helper_pids(), "a graft-sup")
        without = "import os, signal, sys, time\n[os.kill(int(pid), signal.SIGKILL) for pid in sys.argv[1:]]\n"
        users.host(sys.executable, "-c", without, *users.helper_pids(), check=True)
        assert "ConnectionRefusedError" in users.by("alice", "run", "--netns", "frozen", *ask).stderr
        users.end(holder)
        users.end(server)
    finally:
        users.host("nft", "delete", "table", "inet", "users", check=True)


REFUSALS = {
    "a port below the limit": (("run", "-p", "80:80", "true"), "port 80/tcp is below 1024, where root alone binds (use one from 1024 on, or root may grant it: "),
    "an address": (("run", "--ip", "10.77.0.9", "true"), "--ip 10.77.0.9: not granted to you (root may grant it: "),
    "direct": (("run", "--direct", "true"), "only root may start a direct container (omit --direct)"),
    "another's id": (("run", "--user", "0:70000", "true"), "--user: gid 70000 is not among your ids"),
    "no such container": (("inspect", "nobodys"), "no container named 'nobodys'"),
    "a netns": (("run", "--netns", "/proc/1/ns/net", "true"), "no container named '/proc/1/ns/net'"),
    "a rule for nobody": (("rule", "add", "nobodys", "-p", "8000:80"), "no container named 'nobodys'"),
    "an endpoint at a low port": (("endpoint", "add", "low", "type", "ipv4", "addr", "10.77.0.1", "port", "90"), "endpoint 'low': port 90/tcp is below 1024"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(users, what):
    argv, told = REFUSALS[what]
    users.refused(users.command("alice", GRAFT, *argv), 1, told)


def test_a_default_that_is_roots(users):
    argv = ("env", "GRAFT_DIRECT=on", GRAFT, "run", "true")
    users.refused(users.command("alice", *argv), 1, "GRAFT_DIRECT=on: only root may start a direct container (unset it)")


def test_a_user_without_subordinate_ids(users):
    users.refused(users.command("carol", GRAFT, "run", "--user", "33", "true"), 1, "--user: uid 33 is not among your ids (root may give you some: usermod --add-subuids")
    assert users.by("carol", "run", "--user", "0", "id", "-u", check=True).stdout == "0\n"


def test_another_user_of_ones_ids(users):
    assert users.by("alice", "run", "--user", "33:34", "sh", "-c", "id -u; id -g", check=True).stdout == "33\n34\n"
    told = users.by("alice", "run", "--user", "0", "cat", "/proc/self/uid_map", check=True).stdout.split()
    assert told == ["0", "2001", "1", "1", "300000", "65536"]


def test_ports_of_others_are_not_named(users):
    server = serve(users, "alice", "--name", "secret", "-p", "8090:80")
    for argv in (("run", "-p", "8090:80", "true"), ("run", "-p", "10.77.0.1:8090:81", "true")):
        done = users.refused(users.command("bob", GRAFT, *argv), 1, "host port is in use (publish another host port)")
        assert "secret" not in done.stderr
        assert "alice" not in done.stderr
    assert "secret" in users.by("alice", "run", "-p", "8090:80", "true").stderr
    assert "'secret@alice'" in users.graft("run", "-p", "8090:80", "true").stderr
    users.end(server)


def test_ones_own_container_has_the_name_that_one_gave_it(users):
    server = serve(users, "alice", "--name", "mine", "-p", "8090:80")
    for argv, told in {
        ("run", "--name", "mine", "true"): "a container named 'mine' is running",
        ("rule", "del", "mine", "-p", "8099:80"): "-p 8099:80/tcp is not published by 'mine' ('graft rule show CONTAINER' lists what is)",
        ("run", "-p", "8090:80", "true"): "container 'mine'",
    }.items():
        users.refused(users.command("alice", GRAFT, *argv), 1, told)
    users.end(server)


def test_each_sees_their_own(users):
    servers = [serve(users, user, "--name", "same", "-p", f"{8100 + n}:80") for n, user in enumerate(("alice", "bob"))]
    for n, user in enumerate(("alice", "bob")):
        shown = json.loads(users.by(user, "ps", "-j", check=True).stdout)
        assert [(c["name"], c["publish"]) for c in shown] == [("same", [f"{8100 + n}:80/tcp"])]
        assert json.loads(users.by(user, "inspect", "same", check=True).stdout)["name"] == "same"
    assert users.by("carol", "ps", "-j").stdout == "[]\n"
    whole = {c["name"] for c in json.loads(users.graft("ps", "-j").stdout)}
    assert whole >= {"same@alice", "same@bob"}
    users.graft("rule", "add", "same@bob", "-p", "8111:81", check=True)
    assert "8111:81" in users.by("bob", "rule", "show", "same").stdout
    pid = next(c["pid"] for c in json.loads(users.graft("ps", "-j").stdout) if c["name"] == "same@bob")
    for argv in (("rule", "show", str(pid)), ("run", "--netns", str(pid), "true"), ("inspect", "same@bob")):
        assert users.by("alice", *argv).returncode == 1
    for server in servers:
        users.end(server)


def test_rules_of_ones_own(users):
    server = serve(users, "alice", "--name", "web", port=81)
    users.by("alice", "rule", "add", "web", "-p", "8120:81", check=True)
    users.refused(users.command("alice", GRAFT, "rule", "add", "web", "-p", "81:81"), 1, "port 81/tcp is below 1024")
    again = serve(users, "alice", "--netns", "web", port=82)
    users.by("alice", "rule", "add", "web", "-p", "8122:82", check=True)
    users.end(again)
    users.by("alice", "rule", "del", "web", "-p", "8122:82", check=True)
    users.end(server)


def test_endpoints_of_ones_own(users):
    users.by("alice", "endpoint", "add", "out", "type", "ipv4", "addr", "10.77.0.3", "port", "dynamic", check=True)
    users.by("bob", "endpoint", "add", "out", "type", "ipv4", "addr", "10.77.0.1", "port", "dynamic", check=True)
    server = users.spawn(*python(SERVER.format(host="10.77.0.2", port=7001)), client=True, stdout=-1)
    assert server.stdout.readline() == "up\n"
    for user, source in (("alice", "10.77.0.3"), ("bob", "10.77.0.1")):
        told = users.by(user, "run", "-e", "10.77.0.0/24=out", *python(ASK.format(host="10.77.0.2", port=7001)))
        assert told.stdout == f"{source}\n", told.stderr
    users.refused(users.command("carol", GRAFT, "run", "-e", "10.77.0.0/24=out", "true"), 1, "names an unknown endpoint 'out'")
    assert "10.77.0.3" in users.by("alice", "endpoint", "show", "out").stdout
    assert users.by("alice", "endpoint", "show", "--hosts", check=True).stdout.endswith(" out.graft\n")
    (shown,) = json.loads(users.by("alice", "endpoint", "show", "out", "-j", check=True).stdout)
    code = "import socket; print(socket.gethostbyname('out.graft'))"
    found = users.by("alice", "run", "--names", "-e", "192.0.2.0/24=out", *python(code), check=True)
    assert found.stdout == f"{shown['name_addr']}\n", "as a container is told that has the endpoint"
    for user in ("alice", "bob"):
        users.by(user, "endpoint", "del", "out", check=True)
    assert users.by("alice", "endpoint", "show").stdout == ""
    users.end(server)


def test_egress_none(users):
    code = ASK.format(host="10.77.0.2", port=7002)
    assert "Network is unreachable" in users.by("alice", "run", "--egress", "none", *python(code)).stderr


GRANTS = f"""
[default]
containers = 2
[users.alice]
ports = ["unprivileged", "80", "443-445/tcp"]
addresses = ["10.77.0.64/26"]
endpoints = ["hosts"]
limits = "sockets=10"
[groups.{"graft-team"}]
egress = "none"
endpoints = ["hosts"]
"""


@pytest.fixture
def granted(users):
    users.grant(GRANTS)
    users.graft("endpoint", "add", "hosts", "type", "ipv4", "addr", "10.77.0.3", "port", "dynamic", check=True)
    yield users
    users.graft("endpoint", "del", "hosts", check=True)
    users.grant("")


def test_granted_ports_and_addresses(granted):
    server = serve(granted, "alice", "-p", "80:80", "-p", "444:81")
    assert granted.client(*python(ASK.format(host=HOST4, port=80))).stdout == "10.77.0.2\n"
    granted.end(server)
    granted.refused(granted.command("alice", GRAFT, "run", "-p", "444:80/udp", "true"), 1, "port 444/udp is below 1024")
    server = serve(granted, "alice", "--ip", "10.77.0.70", "-p", "8000:8000")
    assert granted.client(*python(ASK.format(host="10.77.0.70", port=80))).stdout == "10.77.0.2\n"
    granted.refused(granted.command("bob", GRAFT, "run", "-p", "10.77.0.70:8081:80", "true"), 1, "is the address of a container")
    granted.end(server)
    granted.refused(granted.command("alice", GRAFT, "run", "--ip", "10.77.0.1", "true"), 1, "not granted to you")


def test_granted_numbers(granted):
    both = [granted.spawn_by("carol", "sleep", "60") for _ in range(2)]
    wait_for(lambda: len(json.loads(granted.by("carol", "ps", "-j").stdout)) == 2, "both")
    granted.refused(granted.command("carol", GRAFT, "run", "true"), 1, "you have 2 containers, of 2 that are granted to you (end one, or root may grant more: ")
    for process in both:
        granted.end(process)
    code = "import socket\nmade = []\ntry:\n  while 1: made.append(socket.socket())\nexcept OSError as e: print(len(made), e.strerror)"
    assert granted.by("alice", "run", *python(code)).stdout == "10 Too many open files in system\n"
    assert granted.by("alice", "run", "--limit", "sockets=9", *python(code)).stdout.startswith("9 ")
    granted.refused(granted.command("alice", GRAFT, "run", "--limit", "udp=5,sockets=11", "true"), 1,
                    "limit sockets=11: at most sockets=10 is granted to you (root may grant more: ")  # fmt: skip
    granted.grant(GRANTS.replace("containers = 2", "containers = 0"))
    granted.refused(granted.command("carol", GRAFT, "run", "true"), 1, "you may have no containers (root may grant some: ")


def test_granted_egress_by_group(granted):
    server = granted.spawn(*python(SERVER.format(host="10.77.0.2", port=7003)), client=True, stdout=-1)
    assert server.stdout.readline() == "up\n"
    ask = python(ASK.format(host="10.77.0.2", port=7003))
    assert "Network is unreachable" in granted.by("bob", "run", *ask).stderr
    granted.refused(granted.command("bob", GRAFT, "run", "--egress", "host", "true"), 1, "egress host is not granted to you")
    assert granted.by("bob", "run", "-e", "10.77.0.0/24=hosts", *ask).stdout == "10.77.0.3\n"
    granted.by("bob", "endpoint", "add", "mine", "type", "ipv4", "addr", "10.77.0.1", "port", "dynamic", check=True)
    granted.refused(granted.command("bob", GRAFT, "run", "-e", "0.0.0.0/0=mine", "true"), 1, "endpoint 'mine' is not granted to you")
    granted.refused(granted.command("bob", GRAFT, "endpoint", "add", "hosts", "type", "ipv4", "addr", "10.77.0.1", "port", "dynamic"), 1, "is one of the host's")
    granted.by("bob", "endpoint", "del", "mine", check=True)
    assert granted.by("alice", "run", *ask).stdout == "10.77.0.1\n"
    granted.end(server)
    granted.graft("endpoint", "add", "roots", "type", "ipv4", "addr", "10.77.0.1", "port", "dynamic", check=True)
    assert "roots " in granted.by("alice", "endpoint", "show").stdout
    for option, rule in (("-e", "0.0.0.0/0=roots"), ("-i", "0.0.0.0:80=roots")):
        granted.refused(granted.command("alice", GRAFT, "run", option, rule, "true"), 1, "endpoint 'roots' is one of the host's, and not granted to you (root may grant it: ")
    granted.graft("endpoint", "del", "roots", check=True)
    granted.refused(granted.command("alice", GRAFT, "run", "-e", "0.0.0.0/0=roots", "true"), 1, "names an unknown endpoint 'roots'")


def test_a_wrong_file_changes_nothing(granted):
    server = serve(granted, "alice", "-p", "80:80")
    granted.grant(GRANTS.replace("containers = 2", "\ncontainer = 2"))
    log = (granted.run_dir / "graftd.log").read_text()
    assert "users.toml, line 4: unknown key 'default.container'" in log
    again = serve(granted, "alice", "-p", "445:80")
    assert granted.client(*python(ASK.format(host=HOST4, port=445))).stdout == "10.77.0.2\n"
    for process in (server, again):
        granted.end(process)


def test_a_wrong_file_takes_no_refusal_back(own_users):
    """Not when graftd ends and comes back either. One that starts anew knows nothing better, and grants nothing."""
    lab = own_users
    refused = "you may have no containers (root may grant some: "
    lab.grant("[users.alice]\ncontainers = 0\n[users.bob]\nlimits = 'rate=5mbit'\n")
    lab.start_daemon()
    lab.refused(lab.command("alice", GRAFT, "run", "true"), 1, refused)
    found = {f["name"]: f for f in json.loads(lab.by("bob", "doctor", "-j", check=True).stdout)}
    assert found["granted numbers"]["found"] == "64 containers, 64 private loopbacks, 5mbit rate each"
    lab.refused(lab.command("bob", GRAFT, "run", "--limit", "rate=6mbit", "true"), 1, "at most rate=5mbit is granted to you")
    file = lab.config.with_name("users.toml")
    lab.grant("[users.alice\n")
    before = lab.daemon_pid()
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: lab.daemon_pid() not in (0, before), "the next graftd")
    lab.refused(lab.command("alice", GRAFT, "run", "true"), 1, refused)
    assert lab.by("bob", "run", "id", "-u").stdout == "2002\n"
    lab.host(GRAFTD, "--stop", check=True)
    lab.daemon.wait(20)
    shutil.rmtree(lab.run_dir)
    lab.start_daemon()
    for user in ("alice", "bob"):
        lab.refused(lab.command(user, GRAFT, "run", "true"), 1, refused)
    lab.wait_logged(f"{file}: until it is right, users without root get nothing")
    lab.grant("")
    assert lab.by("alice", "run", "id", "-u").stdout == "2001\n"


LATENCY = """
import fcntl, socket, time
s = socket.socket(); flags = bytearray(40); took = []
for _ in range(1000):
    began = time.perf_counter_ns()
    try: fcntl.ioctl(s, 0x8913, flags)  # SIOCGIFFLAGS of no device: graftd answers
    except OSError: pass
    took.append(time.perf_counter_ns() - began)
    time.sleep(.0005)
print(sorted(took)[500])
"""
STORM = """
import fcntl, os, socket
for _ in range(7):
    if not os.fork(): break
s = socket.socket(); flags = bytearray(40); print('up', flush=True)
while os.getppid() != 1:
    try: fcntl.ioctl(s, 0x8913, flags)
    except OSError: pass
"""


@pytest.mark.alone
def test_a_storm_of_one_users_calls_is_not_anothers(users):
    """Eight processes of alice's call as fast as they can; bob's calls take at most twice as long as without."""
    ratios = []
    for _ in range(3):
        alone = int(users.by("bob", "run", *python(LATENCY), check=True).stdout)
        storm = users.spawn_by("alice", *python(STORM), stdout=-1, start_new_session=True)
        assert storm.stdout.readline() == "up\n"
        beside = int(users.by("bob", "run", *python(LATENCY), check=True).stdout)
        os.killpg(storm.pid, signal.SIGKILL)
        storm.wait()
        ratios.append(beside / alone)
    assert sorted(ratios)[1] <= 2, ratios


def test_graftd_ends_and_comes_back(users):
    """A user's container, its publication and the user's table outlive graftd."""
    users.by("alice", "endpoint", "add", "kept", "type", "ipv4", "addr", "10.77.0.3", "port", "9000", check=True)
    server = serve(users, "alice", "--name", "lasting", "-p", "8130:80")
    before = users.daemon_pid()
    users.host("kill", "-9", str(before), check=True)
    wait_for(lambda: users.daemon_pid() not in (0, before), "another graftd")
    assert users.client(*python(ASK.format(host=HOST4, port=8130))).stdout == "10.77.0.2\n"
    assert [c["name"] for c in json.loads(users.by("alice", "ps", "-j").stdout)] == ["lasting"]
    assert "kept" in users.by("alice", "endpoint", "show").stdout
    users.by("alice", "endpoint", "del", "kept", check=True)
    users.end(server)


def test_addresses_are_there(users):
    """What a program finds that asks for the host's addresses, as under root's graft run."""
    shown = [run.stdout for run in (users.by("alice", "run", "ip", "-4", "-o", "address"), users.graft("run", "ip", "-4", "-o", "address"))]
    assert shown[0] == shown[1]
    assert "10.77.0.1" in shown[0]


def test_doctor_as_a_user(granted):
    found = {f["name"]: f for f in json.loads(granted.by("alice", "doctor", "-j", check=True).stdout)}
    assert all(f["good"] for f in found.values()), found
    assert found["granted ports"]["found"] == "from 1024 on, 80, 443-445/tcp"
    assert found["granted addresses"]["found"] == "10.77.0.64/26"
    assert found["granted numbers"]["found"] == "2 containers, 64 private loopbacks, 10 sockets each"
    assert found["granted connections"]["found"] == "as the host; endpoints of the host: hosts"
    assert found["granted by"]["found"] == str(granted.config.with_name("users.toml"))
    found = {f["name"]: f for f in json.loads(granted.by("carol", "doctor", "-j", check=True).stdout)}
    free = "100000-165535"
    assert found["subordinate ids"]["remedy"] == f"usermod --add-subuids {free} --add-subgids {free} carol"
    assert "as the host" in found["granted connections"]["found"]


NEED_GRAFTD = (("run", "true"), ("log",), ("log", "-f"), ("stats",), ("inspect", "web"), ("rule", "show", "web"), ("endpoint", "show"),
               ("endpoint", "add", "a", "type", "local"), ("endpoint", "del", "a"))  # fmt: skip


def test_no_graftd(users):
    none = ("env", "GRAFT_RUN_DIR=/nonexistent", GRAFT)
    told = "graftd is not running (root may start it: systemctl enable --now graftd.socket graftd-agent.socket"
    for words in NEED_GRAFTD:
        users.refused(users.command("alice", *none, *words), 125, told)
    done = users.host(*users.command("alice", *none, "doctor"))
    assert done.returncode == 1
    assert "granted" not in done.stdout, "it is graftd that knows"


def test_a_graftd_of_an_earlier_release(users):
    """It has no user socket."""
    old = users.work / "old"
    old.mkdir()
    for name in ("graftd.sock", "agent.sock"):
        (old / name).touch(0o600)
    told = "the graftd that runs serves root alone (root may renew it: graftd --replace)"
    users.refused(users.command("alice", "env", f"GRAFT_RUN_DIR={old}", GRAFT, "run", "true"), 1, told)


LIMITED = """
import ctypes, os, sys
begin, told = os.pipe()
child = os.fork()
if not child:
    ctypes.CDLL(None).unshare(0x10000000)  # CLONE_NEWUSER
    os.write(told, b"1")
    while open("/proc/self/uid_map").read() == "" or open("/proc/self/gid_map").read() == "": pass
    open("/proc/sys/user/max_user_namespaces", "w").write("0")
    os.execvp(sys.argv[1], sys.argv[1:])
os.read(begin, 1)
for kind in "uid", "gid": open(f"/proc/{child}/{kind}_map", "w").write("0 0 4000")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_host_without_user_namespaces(users):
    """Where a limit forbids them, as one of an outer user namespace does here."""
    done = users.host(sys.executable, "-c", LIMITED, *users.command("alice", GRAFT, "run", "true"))
    assert (done.returncode, done.stderr) == (1, "graft: this host allows no user namespaces (root may allow them: sysctl user.max_user_namespaces=10000)\n")


TRIES = """
import socket, sys
for where in (('10.77.0.2', 9), ('10.77.0.3', 9)):
    try: socket.create_connection(where, 2)
    except OSError: pass
print('tried', flush=True); sys.stdin.read()
"""


def test_what_ones_containers_do(users):
    """`graft log`, `sockets` and `stats` show one's own, by one's own names; `--allow` and `--learn` are everybody's."""
    both = [users.spawn_by(user, "--name", "same", "--egress", "none", *python(TRIES), stdin=-1, stdout=-1) for user in ("alice", "bob")]
    assert [process.stdout.readline() for process in both] == ["tried\n"] * 2
    for user in ("alice", "bob"):
        log = [json.loads(line) for line in users.by(user, "log", "-j", check=True).stdout.splitlines()]
        assert {(line["container"], line["op"], line["asked"]) for line in log} == {("same", "connect", "10.77.0.2:9"), ("same", "connect", "10.77.0.3:9")}
        assert users.by(user, "log", "same@alice").returncode == 1
        assert [one["name"] for one in json.loads(users.by(user, "stats", "-j", check=True).stdout)] == ["same"]
    assert users.by("carol", "log", "-j").stdout == ""
    assert users.by("carol", "stats", "-j").stdout == "[]\n"
    server = serve(users, "alice", "--name", "open", "-p", "8140:80")
    shown = json.loads(users.by("alice", "sockets", "-j", check=True).stdout)
    assert {one["container"] for one in shown} == {"open"}
    assert json.loads(users.by("bob", "sockets", "-j", check=True).stdout) == []
    users.end(server)
    ask = ASK.format(host="10.77.0.2", port=9)
    assert "Network is unreachable" in users.by("alice", "run", "--allow", "10.77.0.3", *python(ask)).stderr
    assert '"10.77.0.2:9"' in users.by("alice", "run", "--learn", *python(ask)).stderr
    for process in both:
        users.end(process)


def test_follow_the_log_of_ones_own(users):
    """Line by line, also what is allowed; what another user's containers do is not in it."""
    own = users.spawn_by("alice", "--name", "mine", "sh", stdin=-1)
    wait_for(lambda: "mine" in users.by("alice", "ps").stdout, "it")
    follow = users.spawn(*users.command("alice", GRAFT, "log", "-f", "-a", "-j"), stdout=-1)
    ask = " ".join(map(shlex.quote, python(ASK.format(host="10.77.0.2", port=9))))
    deadline = time.monotonic() + 20
    seen: list[dict[str, str]] = []
    while time.monotonic() < deadline and not seen:
        users.by("bob", "run", "--name", "theirs", *python(ASK.format(host="10.77.0.2", port=9)))
        own.stdin.write(f"{ask} 2>/dev/null\n")
        own.stdin.flush()
        if select.select([follow.stdout], [], [], 2)[0]:
            seen.append(json.loads(follow.stdout.readline()))
    assert (seen[0]["container"], seen[0]["op"], seen[0]["asked"], seen[0]["verdict"]) == ("mine", "connect", "10.77.0.2:9", "allowed")
    for process in (follow, own):
        users.end(process)


def test_readers_have_shares(users):
    """One user cannot take all places at the log."""
    mine = [users.spawn(*users.command("bob", GRAFT, "log", "-f"), stdout=-1) for _ in range(4)]
    wait_for(lambda: len(_connections(users)) >= 4, "four readers")
    users.refused(users.command("bob", GRAFT, "log", "-f"), 1, "read the log already")
    for process in mine:
        users.end(process)


def _connections(users):
    return [line for line in users.host("ss", "-xpH", "src", str(users.run_dir / "user.sock")).stdout.splitlines() if "ESTAB" in line]
