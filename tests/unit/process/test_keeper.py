"""The descriptor store between graftd and its keeper: sd_notify(3) one way, LISTEN_FDS the other."""

import ast
import grp
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from graft.bench.lab import wait_for
from graft.interpreter import ROOT
from graft.log import log
from graft.process import keeper as module
from graft.process.keeper import Keeper
from graft.process.store import Store, exec_with


@pytest.fixture
def keeper(monkeypatch, tmp_path):
    """A keeper whose graftd is this process."""

    def nobody(_name):
        raise KeyError

    monkeypatch.setattr(grp, "getgrnam", nobody)
    lock = os.open(tmp_path / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    made = Keeper(tmp_path, ["/bin/false"], lock)
    made.bind([])
    made.child = os.getpid()
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("GRAFT_KEEPER", "1")
    monkeypatch.setattr(Store, "inherited", staticmethod(lambda: [("notify", os.dup(made.told.fileno()))]))
    yield made
    for fd in (lock, *made.alive, *(fd for _, fd in made.store)):
        os.close(fd)
    for _, sock in (*made.sockets, ("notify", made.notify), ("told", made.told)):
        sock.close()
    made.poll.close()


def say(keeper, message, *fds):
    socket.send_fds(keeper.told, [message], fds)
    keeper.receive()


def same(one, other):
    return os.path.sameopenfile(one, other)


def names(keeper):
    return [name for name, _ in keeper.store]


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_sockets(keeper):
    assert [name for name, _ in keeper.sockets] == ["admin", "agent", "user"]
    modes = {name: (keeper.directory / name).stat().st_mode & 0o777 for name in ("graftd.sock", "agent.sock", "user.sock")}
    assert modes == {"graftd.sock": 0o660, "agent.sock": 0o666, "user.sock": 0o666}
    assert sorted(p.name for p in keeper.directory.iterdir()) == ["agent.sock", "graftd.sock", "keeper.lock", "user.sock"]
    for name in ("graftd.sock", "agent.sock", "user.sock"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(keeper.directory / name))


def test_what_graftd_stores(keeper):
    """Through graftd's own half, by name, in order; more than one may have a name."""
    store = Store()
    assert store.kept
    reading, writing = os.pipe()
    for name, fd in (("netns-1", reading), ("place-2", writing), ("netns-1", reading)):
        store.put(name, fd)
        keeper.receive()
    assert names(keeper) == ["netns-1", "place-2", "netns-1"]
    assert [same(fd, of) for (_, fd), of in zip(keeper.store, (reading, writing, reading), strict=True)] == [True] * 3
    assert not any(os.get_inheritable(fd) for _, fd in keeper.store)
    store.remove("netns-1")
    keeper.receive()
    assert names(keeper) == ["place-2"]
    store.remove("nothing")
    keeper.receive()
    assert names(keeper) == ["place-2"]
    os.close(reading)
    os.close(writing)
    store.sock.close()


def test_several_descriptors_and_no_name(keeper):
    reading, writing = os.pipe()
    say(keeper, b"FDSTORE=1\n", reading, writing)
    say(keeper, b"FDSTORE=1\nFDNAME=a:b\n", reading)
    assert names(keeper) == ["stored", "stored", "a_b"]
    os.close(reading)
    os.close(writing)


def test_descriptors_that_are_not_to_be_stored_are_closed(keeper):
    reading, writing = os.pipe()
    before = descriptors()
    say(keeper, b"STATUS=busy", reading, writing)
    assert (keeper.store, descriptors()) == ([], before)
    os.close(reading)
    os.close(writing)


def test_a_store_that_is_full(keeper, monkeypatch):
    monkeypatch.setattr(module, "STORE_MAX", 1)
    reading, writing = os.pipe()
    say(keeper, b"FDSTORE=1\nFDNAME=first", reading)
    before = descriptors()
    say(keeper, b"FDSTORE=1\nFDNAME=second", writing)
    assert (names(keeper), descriptors()) == (["first"], before)
    os.close(reading)
    os.close(writing)


def test_ready(keeper):
    store = Store()
    assert not keeper.ready
    store.ready()
    keeper.receive()
    assert keeper.ready
    store.sock.close()


@pytest.fixture
def killed(monkeypatch):
    """The PIDs that were killed."""
    found = []
    monkeypatch.setattr(os, "kill", lambda pid, number: found.append((pid, number)))
    return found


def test_a_child_without_a_sign_of_life_is_killed(keeper, killed):
    say(keeper, b"READY=1")
    for _ in range(module.SILENCE_SECONDS):
        keeper.look()
    assert killed == []
    keeper.look()
    assert killed == [(os.getpid(), signal.SIGKILL)]


def test_every_message_is_a_sign_of_life(keeper, killed, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    store = Store()
    store.ready()
    keeper.receive()
    for second in range(300):
        store.alive(float(second))
        keeper.receive()
        keeper.look()
    assert killed == []
    store.sock.close()


def test_a_start_may_take_longer(keeper, killed):
    for _ in range(module.START_SILENCE_SECONDS):
        keeper.look()
    assert killed == []
    keeper.look()
    assert killed


@pytest.mark.parametrize(("told", "seconds"), [("", module.SILENCE_SECONDS), ("0", 0), ("5", 5), ("-1", module.SILENCE_SECONDS), ("x", module.SILENCE_SECONDS)])
def test_patience(keeper, killed, monkeypatch, caplog, told, seconds):
    monkeypatch.setenv("GRAFT_WATCHDOG", told)
    monkeypatch.setattr(log, "propagate", True)
    keeper.patience = module._patience()
    assert keeper.patience == seconds
    assert ("is no number of seconds; 30 is in force" in caplog.text) == (told in ("-1", "x"))
    say(keeper, b"READY=1")
    for _ in range(seconds or 1000):
        keeper.look()
    assert killed == []


def test_the_patience_changes_while_graftd_runs(keeper, killed, monkeypatch):
    """What graft.toml says, until it says nothing any more; the environment wins."""
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", "")
    store, before = Store(), keeper.patience
    for told, seconds in ((5, 5), (0, 0), (None, 30)):
        store.expect(told)
        store.expect(told)
        keeper.receive()
        assert (keeper.patience, store.signs) == (seconds, seconds / 4)
    monkeypatch.setenv("GRAFT_WATCHDOG", "7")
    store.expect(5)
    keeper.receive()
    say(keeper, b"WATCHDOG_USEC=9000000")
    assert (keeper.patience, store.signs) == (before, 7.5)
    store.sock.close()


def test_no_watchdog(monkeypatch):
    for usec, pid in (("", ""), ("0", ""), ("x", ""), ("5000000", "1")):
        monkeypatch.setenv("WATCHDOG_USEC", usec)
        monkeypatch.setenv("WATCHDOG_PID", pid)
        store = Store()
        assert not store.signs
        store.sock.close()


def test_nothing_to_receive(keeper):
    keeper.receive()
    assert keeper.store == []


def test_a_keeper_that_is_stopped_keeps_nobody_waiting(keeper):
    """What does not fit into the socket's queue is sent later, in order."""
    store = Store()
    reading, writing = os.pipe()
    count = 0
    while len(store.waiting) < 3:
        store.put(f"n-{count}", reading)
        count += 1
        assert count < 10000
    for _ in range(count - 3):
        keeper.receive()
    store.flush()
    for _ in range(3):
        keeper.receive()
    assert names(keeper) == [f"n-{n}" for n in range(count)]
    assert not store.waiting
    os.close(reading)
    os.close(writing)
    store.sock.close()


def test_no_keeper(monkeypatch):
    """Without one nothing is stored, and nothing fails."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    store = Store()
    store.put("x", 0)
    store.ready()
    assert (store.kept, len(store.waiting)) == (False, 0)
    store.sock.close()


def test_a_hang_up_is_seen(keeper):
    """A listener reports it when its last process is gone; what cannot be polled stays until it is removed."""
    ours, theirs = socket.socketpair()
    with open(__file__) as file:
        say(keeper, b"FDSTORE=1\nFDNAME=file", file.fileno())
    say(keeper, b"FDSTORE=1\nFDNAME=listener", ours.fileno())
    assert keeper.poll.poll(0) == []
    theirs.close()
    stored = keeper.store[1][1]
    assert keeper.poll.poll(0) == [(stored, select.EPOLLHUP)]
    ours.close()


GRAFTD = """
import json, os, socket, sys, time
sys.path.insert(0, {root!r})
from graft.process.store import Store, exec_with
store = Store()
inherited = store.inherited()
told = {{"names": [n for n, _ in inherited], "keeper": os.environ["GRAFT_KEEPER"], "pid": os.getpid(), "ppid": os.getppid()}}
told["text"] = [os.pread(fd, 99, 0).decode() for n, fd in inherited if n == "kept"]
told["inheritable"] = [os.get_inheritable(fd) for _, fd in inherited]
with open({told!r}, "a") as file: file.write(json.dumps(told) + chr(10))
with open({told!r}) as file: lives = len(file.readlines())
{act}
"""
KEEPER = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from graft.process.keeper import Keeper
from graft.process.store import Store, exec_with
directory = Path({directory!r})
lock = os.open(directory / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
keeper = Keeper(directory, [sys.executable, "-I", "-c", {graftd!r}], lock)
keeper.bind(Store.inherited())
reading, keeper.guard = os.pipe2(os.O_CLOEXEC)  # the test needs none
keeper.run()
"""


def run(tmp_path, act):
    """The status of a keeper with a graftd that does @act, and what each graftd has told."""
    told = str(tmp_path / "told")
    graftd = GRAFTD.format(root=ROOT, told=told, act=act)
    code = KEEPER.format(root=ROOT, directory=str(tmp_path), graftd=graftd)
    status = subprocess.run([sys.executable, "-I", "-c", code], timeout=60).returncode
    with open(told) as file:
        return status, [json.loads(line) for line in file]


ALWAYS = ["keeper", "lock", "notify", "guard"]


def test_graftd_is_started_again_with_what_it_stored(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("of the first")
    act = f"""
if lives == 1:
    store.ready()
    store.put("kept", os.open({str(kept)!r}, os.O_RDONLY))
    os.kill(os.getpid(), 9)
if lives == 2: sys.exit(3)
"""
    status, (first, second, third) = run(tmp_path, act)
    assert status == 0
    assert first["names"] == ["admin", "agent", "user", *ALWAYS]
    assert (first["text"], first["keeper"], set(first["inheritable"])) == ([], "1", {False})
    for later in (second, third):
        assert later["names"] == ["admin", "agent", "user", "kept", *ALWAYS]
        assert later["text"] == ["of the first"]
        assert later["ppid"] == first["ppid"]
    assert len({first["pid"], second["pid"], third["pid"]}) == 3


def test_a_graftd_that_never_came_up_is_not_started_again(tmp_path):
    status, lives = run(tmp_path, "sys.exit(1)")
    assert (status, len(lives)) == (1, 1)


def test_what_hung_up_is_not_handed_on(tmp_path):
    """The store's copy of a listener goes when its processes have, while no graftd was there to see it."""
    act = """
if lives == 1:
    ours, theirs = socket.socketpair()
    store.ready()
    store.put("listener", ours.fileno())
    wanted, keeper = f"socket:[{os.fstat(ours.fileno()).st_ino}]", f"/proc/{os.getppid()}/fd"
    while all(os.readlink(f"{keeper}/{n}") != wanted for n in os.listdir(keeper)): time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""
    status, (_, second) = run(tmp_path, act)
    assert (status, second["names"]) == (0, ["admin", "agent", "user", *ALWAYS])


def test_a_graftd_that_dies_often_is_started_slowly(keeper, monkeypatch):
    """START_LIMIT times at once, then with a pause; it is never given up."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(Keeper, "start_guard", lambda _self: None)
    for n in range(module.START_LIMIT + 2):
        keeper.start()
        os.waitpid(keeper.child, 0)
        assert len(pauses) == max(0, n + 1 - module.START_LIMIT)
    assert set(pauses) == {module.PAUSE}


@pytest.mark.parametrize("child", [-1, 0])
def test_a_signal_while_there_is_no_graftd(keeper, killed, child):
    """kill(-1) would end every process of the machine: while fork(2) fails, the child's PID is -1."""
    keeper.child = child
    with pytest.raises(SystemExit):
        keeper._pass_on(signal.SIGTERM, None)
    assert not killed


def test_a_signal_for_a_graftd_that_has_just_ended(keeper, monkeypatch):
    def gone(_pid, _number):
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", gone)
    keeper.child = 12345
    keeper._pass_on(signal.SIGTERM, None)


def test_names_of_thousands():
    """execve(2) takes no string of more than 128 KiB: with one, no graftd came back beside some 2,000 containers."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from graft.process.store import Store; print([n for n, _ in Store.inherited()])"
    wanted = [f"{n}-{'x' * 3000}" for n in range(100)]
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(writing, 1)
        os.environ["GRAFT_FDNAMES_7"] = "of an earlier start"
        exec_with([sys.executable, "-I", "-c", code], [(name, 0) for name in wanted])
    os.close(writing)
    with open(reading) as file:
        assert ast.literal_eval(file.read()) == wanted
    assert os.waitpid(pid, 0)[1] == 0


def test_the_sockets_of_a_graftd_whose_keeper_has_died(keeper, tmp_path):
    """The next keeper takes them over as they are: nobody's connection is refused."""
    directory = tmp_path / "next"
    directory.mkdir()
    reading, writing = os.pipe()
    lock = os.dup(keeper.lock)
    following = Keeper(directory, ["/bin/false"], lock)
    passed = [(name, os.dup(sock.fileno())) for name, sock in keeper.sockets]
    guard = os.dup(writing)
    following.bind([*passed, ("netns-7", os.dup(reading)), ("lock", lock), ("guard", guard)])
    assert [name for name, _ in following.sockets] == ["admin", "agent", "user"]
    assert (names(following), following.guard) == (["netns-7"], guard)
    assert not (directory / "graftd.sock").exists()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "graftd.sock"))
        wait_for(lambda: select.select([following.sockets[0][1]], [], [], 0)[0], "the connection")
    for _, sock in (*following.sockets, ("notify", following.notify)):
        sock.close()
    for fd in (reading, writing, lock, guard, *following.alive, following.store[0][1]):
        os.close(fd)
    following.poll.close()
