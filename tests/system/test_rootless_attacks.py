"""What a user may not do at the doors of rootless engines: with another's seal, process, namespace, network or key."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft.bench.lab import GRAFT, ROOT, wait_for
from graft.engines.seal import is_sealed
from tests.conftest import need
from tests.system.rootless import RootlessPodman, shown, users_of

GRANTED = '[users.alice]\naddresses = ["10.99.1.0/24"]\n[users.bob]\naddresses = ["10.99.2.0/24"]\n'
PRELUDE = f"""
import json, os, socket, sys
sys.path.insert(0, {str(ROOT)!r})
from graft import client
from graft.errors import GraftError
from graft.kernel import linux
CONFIG = {{"ociVersion": "1.0.2", "process": {{"args": ["x"]}}, "root": {{"path": "/"}},
           "linux": {{"namespaces": [{{"type": "network"}}]}}}}
def order(op, *fds, **fields):
    try:
        print(json.dumps(client.call(op, start=False, fds=fds, **fields)))
    except GraftError as error:
        print(error.message)
def prepare(*fds, **fields):
    order("prepare", *fds, **{{"config": CONFIG, "engine": "podman", "id": "c1", "name": "c1", **fields}})
def attach(fd, **fields):
    order("attach", fd, **{{"key": "cni/c1/eth0", "network": "graft", **fields}})
def netns(pid="self"):
    return os.open(f"/proc/{{pid}}/ns/net", os.O_RDONLY)
def bring(metadata, pid, number="c1"):
    '''As a runtime, but from here: a listener of a filter that traps nothing, in a child.'''
    ends = socket.socketpair()
    if os.fork() == 0:
        linux.no_new_privs()
        from graft.kernel.cbpf import Assembler, RET_ALLOW, RET_K
        a = Assembler(); a.op(RET_K, RET_ALLOW)
        listener = linux.seccomp_listener(a.assemble(), wait_killable=False)
        socket.send_fds(ends[1], [b"1"], [listener]); ends[1].recv(1); os._exit(0)
    _, (listener,), _, _ = socket.recv_fds(ends[0], 1, 1)
    state = {{"ociVersion": "1.0.2", "fds": ["seccompFd"], "pid": pid, "metadata": metadata,
              "state": {{"ociVersion": "1.0.2", "id": number, "status": "creating", "pid": pid, "bundle": "/"}}}}
    with client.connect_agent(start=False) as sock:
        try:
            print(json.dumps(client.converse(sock, state, (listener,))))
        except GraftError as error:
            print(error.message)
    ends[0].send(b"1")
"""


@pytest.fixture(scope="module")
def users():
    need("podman", "runc", "slirp4netns")
    with users_of(granted=GRANTED) as found:
        yield found


@pytest.fixture
def host(users):
    yield users.lab
    wait_for(lambda: not users.lab.containers(), "the end of all containers")


def told(user, code, *words, inside=False):
    """What a program of the user's prints; @inside: of one in a user namespace and netns of its own."""
    enter = ("unshare", "--user", "--map-root-user", "--net") if inside else ()
    done = user(*enter, sys.executable, "-I", "-c", PRELUDE + code, *words, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sealed_for(user, **fields):
    """The listenerMetadata that graftd seals for a container of the user's."""
    config = json.loads(told(user, f"prepare(**{fields!r})"))
    return config["linux"]["seccomp"]["listenerMetadata"]


@pytest.fixture
def sleeper(users):
    """A process of a user's in namespaces of its own; by the user's name."""
    started = {}

    def start(name):
        process = users[name].spawn("unshare", "--user", "--map-root-user", "--net", "sleep", "1000")
        wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "the sleeper")
        started[name] = process
        return process

    yield start
    for process in started.values():
        users.lab.end(process)


def lives(process):
    return process.poll() is None


def test_a_seal_is_the_users_own(users, host, sleeper):
    """bob has alice's seal, and a process of his own, or hers, to put under it."""
    seal = sealed_for(users["alice"], settings={"graft.publish": "8950:80"})
    assert is_sealed(seal, host.run_dir)
    for name in ("alice", "bob"):
        process = sleeper(name)
        assert told(users["bob"], f"bring({seal!r}, {process.pid})") == "this seal is another user's"
        assert lives(process)
    assert not host.containers()


def test_a_seal_names_no_process_of_others(users, host, sleeper):
    """alice's seal, brought by alice: bob's process is not taken, and is not killed in her name either; nor is root's."""
    seal = sealed_for(users["alice"])
    theirs = sleeper("bob")
    roots = host.spawn("unshare", "--net", "sleep", "1000")
    at_home = host.spawn("sleep", "1000")
    for process in (theirs, roots, at_home):
        told(users["alice"], f"bring({seal!r}, {process.pid})")
        wait_for(lambda: "is ended: " in (host.run_dir / "graftd.log").read_text(), "the refusal")
        assert lives(process)
    assert not host.containers()


def test_roots_process_in_a_users_namespace_is_not_killed(users, host, sleeper):
    """root looks into alice's namespace; her seal is refused there for another reason, and would end what it names."""
    seal = sealed_for(users["alice"], id="c9", settings={"graft.publish": "8951:80"})
    mine = sleeper("alice")
    looking = host.spawn("nsenter", "--net", "-t", mine.pid, "sleep", "1000")
    holder = host.spawn("/usr/bin/python3", "-c", "import socket; s = socket.create_server(('', 8951)); input()", stdin=subprocess.PIPE)
    host.wait_listening(8951)
    told(users["alice"], f"bring({seal!r}, {looking.pid}, 'c9')")
    host.wait_logged("8951")
    assert lives(looking)
    told(users["alice"], f"bring({seal!r}, {mine.pid}, 'c9')")
    wait_for(lambda: not lives(mine), "the user's own process, which must not go on without a policy")
    host.end(holder)


def test_a_seal_that_was_changed(users, host):
    seal = json.loads(sealed_for(users["alice"]))
    for change in ({"uid": users["bob"].uid}, {"uid": 0}, {"publish": ["8952:80"]}, {"seal": "0" * 64}):
        text = json.dumps({**seal, **change})
        said = told(users["alice"], f"bring({text!r}, os.getpid())", inside=True)
        assert "only root may" in said, (change, said)
    assert not host.containers()


def test_without_a_process(users, host):
    """crun's exec names none: the container must be a container of that user's."""
    podman = RootlessPodman(users["bob"], "runc")
    podman.install()
    podman.run("-d", "--name", "his", "--annotation", "graft=on", "--network", "none", argv=("/busybox", "sleep", "1000"))
    number = podman("inspect", "-f", "{{.Id}}", "his").stdout.strip()
    seal = sealed_for(users["alice"])
    told(users["alice"], f"bring({seal!r}, 0, {number!r})")
    host.wait_logged("there is no such container")
    assert not shown(users["alice"])
    podman.clear()


@pytest.mark.parametrize("number", ["c1@0", "../c1", "", "c" * 129])
def test_ids_that_are_none(users, host, number):
    assert told(users["alice"], f"prepare(id={number!r})") == "this is no container of Docker or Podman"


def test_another_engine(users, host):
    assert told(users["alice"], "prepare(engine='cri')") == "this is no container of Docker or Podman"


def test_namespaces_of_others(users, host, sleeper):
    """By their descriptors: bob's, handed to alice, which a unix socket could do; the host's; root's."""
    theirs = sleeper("bob")
    roots = host.spawn("unshare", "--net", "sleep", "1000")
    wait_for(lambda: Path(f"/proc/{roots.pid}/comm").read_text() == "sleep\n", "root's namespace")
    for pid in (theirs.pid, roots.pid, host.spawn("sleep", "1000").pid):
        fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        code = f"{PRELUDE}prepare({fd}); attach({fd}); order('attached', {fd})"
        command = users["alice"].command(sys.executable, "-I", "-c", code)
        handed = subprocess.run(command, capture_output=True, text=True, env=host.env, pass_fds=(fd,))
        os.close(fd)
        said = handed.stdout.splitlines()
        assert said == ["this network namespace is not yours"] * 2 + ["this namespace is on no network of graft's"], handed.stderr
    assert not host.containers()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"addresses": ["10.77.0.9/24"]}, "10.77.0.9: not granted to you"),
        ({"addresses": ["10.99.2.5/24"]}, "10.99.2.5: not granted to you"),
        ({"resolver": "10.99.2.1"}, "10.99.2.1: not granted to you"),
        ({"resolver": "127.0.0.53"}, "127.0.0.53: not granted to you"),
        ({"publish": ["80:80"]}, "port 80/tcp is below 1024"),
        ({"names": ["n"] * 65}, "there are too many"),
        ({"addresses": ["10.99.1.5/24"] * 17}, "17 addresses are too many"),
        ({"key": "k" * 256}, "a name is too long"),
    ],
)
def test_networks(users, host, fields, text):
    assert text in told(users["alice"], f"attach(netns(), **{fields!r})", inside=True)
    assert "10.99." not in host.host("ip", "address").stdout


def test_the_key_of_another(users, host, sleeper):
    """alice's key does not meet bob's, nor root's."""
    theirs = sleeper("bob")
    code = "attach(netns(sys.argv[1]), addresses=['10.99.2.5/24'])"
    assert told(users["bob"], code, str(theirs.pid)) == "{}"
    for key in ("cni/c1/eth0", f"cni/c1/eth0@{users['bob'].uid}"):
        assert told(users["alice"], f"order('detach', key={key!r})") == "{}"
        assert told(users["alice"], f"order('attached', key={key!r})") == "the container is not attached"
    assert "10.99.2.5" in host.host("ip", "address").stdout
    assert told(users["bob"], "order('detach', key='cni/c1/eth0')") == "{}"
    assert "10.99.2.5" not in host.host("ip", "address").stdout


def test_numbers_of_them(users, host, sleeper):
    """One user's share does not take another's."""
    mine = sleeper("alice")
    code = "fd = netns(sys.argv[1])\nfor n in range(400): attach(fd, key=f'k{n}')\n"
    said = told(users["alice"], code, str(mine.pid)).splitlines()
    assert said.count("{}") == 256
    assert "you have 256 members of networks, of 256 that are granted to you" in said[-1]
    theirs = sleeper("bob")
    assert told(users["bob"], "attach(netns(sys.argv[1]))", str(theirs.pid)) == "{}"
    told(users["bob"], "order('detach', key='cni/c1/eth0')")
    told(users["alice"], "for n in range(400): order('detach', key=f'k{n}')")


@pytest.mark.parametrize("op", ["bundle", "hook", "exec", "start", "begin", "stop"])
def test_orders_of_roots_engines(users, host, op):
    fields = {
        "bundle": {"bundle": "/", "id": "c1"},
        "hook": {"config": {}},
        "exec": {"id": "c1", "process": {}},
        "start": {"id": "c1"},
        "begin": {"metadata": "", "state": {"id": "c1"}},
        "stop": {},
    }[op]
    assert told(users["alice"], f"order({op!r}, **{fields!r})") == "only root may do this"


def test_from_inside_a_container(users, host):
    code = PRELUDE + "prepare(); attach(netns())"
    command = (GRAFT, "run", sys.executable, "-I", "-c", code)
    said = users["alice"](*command, check=False)
    assert said.stdout.splitlines() == ["processes inside a container may not use the user socket"] * 2, said.stderr


def test_anothers_container_by_its_address(users, host):
    """Networks of two users are two, whatever they are called: neither names nor addresses lead across."""
    podmans = {}
    graft = ("--annotation", "graft=on", "--network", "graft")
    for name in ("alice", "bob"):
        podman = podmans[name] = RootlessPodman(users[name], "runc")
        podman.install()
        podman.run("-d", "--name", f"of-{name}", *graft, argv=("python3", "-m", "http.server", "80"))
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    address = podmans["alice"]("inspect", "-f", form, "of-alice").stdout.strip()
    assert address.startswith("10.99.1.")
    ask = ("curl", "-sS", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}")
    try:
        podmans["alice"].run("--rm", *graft, argv=(*ask, "--retry", "9", "--retry-connrefused", "http://of-alice/"))
        for where in (address, "of-alice"):
            done = podmans["bob"].run("--rm", *graft, argv=(*ask, f"http://{where}/"), check=False)
            assert done.stdout == "000", (where, done.stderr)
    finally:
        for podman in podmans.values():
            podman.clear()
