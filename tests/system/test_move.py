"""`graft endpoint move` and `graft rule move`: a listener is handed over, and no connection is refused or reset."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from functools import partial

import pytest

from graft.bench.lab import GRAFT, HOST4, HOST6, SECOND4, wait_for
from graft.client import exchange
from graft.errors import GraftError
from tests.conftest import python
from tests.system.traffic import another

# Answers with its name and the port that accept() shows. "stop" on its standard input ends it once nobody waits.
SERVER = """
import os, select, socket, sys
name, hosts = sys.argv[1], sys.argv[2].split(',')
def listener(at):
    host, _, port = at.rpartition(':')
    six = ':' in host
    s = socket.socket(socket.AF_INET6 if six else socket.AF_INET)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if six and len(hosts) > 1: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((host.strip('[]'), int(port))); s.listen(1024); s.setblocking(False)
    return s
listeners = [listener(at) for at in hosts]
print('ready', flush=True)
while True:
    for s in select.select([*listeners, 0], [], [])[0]:
        if s == 0:
            word = os.read(0, 99).decode().strip()
            if word in ('', 'stop'): sys.exit()
            [l.close() for l in listeners]; listeners = []
            if word == 'again': listeners = [listener(at) for at in hosts]
            print(word, flush=True)
            continue
        try: c, _ = s.accept()
        except BlockingIOError: continue
        c.setblocking(True)
        if c.recv(1): c.sendall(f'{name} {c.getsockname()[1]}'.encode())
        c.close()
"""
# Connects as often as it is told, 0: until its standard input ends, from several threads, and tells what came of it
STORM = """
import collections, json, socket, sys, threading
each, targets = int(sys.argv[1]), [at.rpartition(':') for at in sys.argv[2:]]
told, over = collections.Counter(), threading.Event()
def work(host, port):
    for n in range(each) if each else iter(over.is_set, True):
        try:
            with socket.create_connection((host, int(port)), 20) as c:
                c.setsockopt(1, 13, b'\\1\\0\\0\\0\\0\\0\\0\\0')  # SO_LINGER: no port is left in TIME_WAIT
                c.sendall(b'?'); told[c.recv(99).decode() or 'nothing'] += 1
        except OSError as error:
            told[str(error)] += 1
threads = [threading.Thread(target=work, args=(host.strip('[]'), port)) for host, _, port in targets for _ in range(2)]
[t.start() for t in threads]
if not each: sys.stdin.read(); over.set()
[t.join() for t in threads]; print(json.dumps(told))
"""
BOTH = "0.0.0.0:80,[::]:80"


def serve(lab, name, *options, at=BOTH, by=None):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    argv = ("--name", name, *options, *python(SERVER), name, at)
    process = lab.spawn_by(by, *argv, **pipes) if by else lab.spawn_graft(*argv, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def tell(process, word):
    process.stdin.write(word)
    process.stdin.flush()
    if word != "stop":
        assert process.stdout.readline().strip() == word


def ask(lab, host, port, client=True):
    """Who answers there, and what went wrong."""
    code = f"import socket; c = socket.create_connection(({host!r}, {port}), 5); c.sendall(b'?'); print(c.recv(99).decode())"
    done = (lab.client if client else lab.host)(*python(code))
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def move(lab, op, source, target, **what):
    """As the command does it, without the tenth of a second that it takes to start."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(lab.run_dir / "graftd.sock"))
        return exchange(sock, op, {"source": source, "target": target, **what})


def storm(lab, each, *targets, client=True):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return lab.spawn(*python(STORM), str(each), *targets, client=client, **pipes)


def swing(lab, storms, step, least=100):
    """Move back and forth until the storms are over, at least @least times; what they have met."""
    moves = 0
    while moves < least or any(one.poll() is None for one in storms):
        step("blue", "green") if moves % 2 == 0 else step("green", "blue")
        moves += 1
    met: dict[str, int] = {}
    for one in storms:
        for what, count in json.loads(one.communicate()[0]).items():
            met[what] = met.get(what, 0) + count
    return met


@pytest.mark.core
def test_there_and_back(lab):
    blue, green = serve(lab, "blue", "-p", "8080:80"), serve(lab, "green", at="0.0.0.0:80,[::]:80")
    for has, other in (("blue", "green"), ("green", "blue")):
        assert ask(lab, HOST4, 8080) == f"{has} 80"
        assert move(lab, "rule-move", has, other, publish=["8080:80"]) == {"waiting": 0}
    assert ask(lab, HOST6, 8080) == "blue 80"
    lab.end(blue)
    lab.end(green)


def test_a_publication_while_ten_thousand_connect(lab):
    """A hundred moves; from another machine and from the host itself, over IPv4 and IPv6."""
    blue = serve(lab, "blue", "-p", "8080:80")
    green = serve(lab, "green", "--direct", at="[::]:80")
    storms = [storm(lab, 1250, f"{HOST4}:8080", f"[{HOST6}]:8080"), storm(lab, 1250, "127.0.0.1:8080", "[::1]:8080", client=False)]
    met = swing(lab, storms, lambda a, b: move(lab, "rule-move", a, b, publish=["8080:80"]))
    assert met.keys() == {"blue 80", "green 80"}, met
    assert sum(met.values()) == 10_000
    assert min(met.values()) > 1000, met
    lab.end(blue)
    lab.end(green)


def test_an_endpoint_while_ten_thousand_connect(lab):
    lab.add_endpoints({"ep-four": f"type ipv4 addr {HOST4} port 8081", "ep-six": f"type ipv6 addr {HOST6} port 8081"})
    blue = serve(lab, "blue", "--direct", "-i", "0.0.0.0:80=ep-four", "-i", "[::]:80=ep-six")
    green = serve(lab, "green")
    storms = [storm(lab, 2500, f"{HOST4}:8081", f"[{HOST6}]:8081")]

    def step(source, target):
        for name in ("ep-four", "ep-six"):
            move(lab, "endpoint-move", source, target, name=name)

    met = swing(lab, storms, step)
    assert met.keys() == {"blue 80", "green 80"}, met
    assert sum(met.values()) == 10_000
    assert min(met.values()) > 1000, met
    lab.delete_endpoints(["ep-four", "ep-six"])
    lab.end(blue)
    lab.end(green)


def test_the_giver_may_close_as_soon_as_the_command_ends(lab):
    """What it has not accepted is accepted before: each time it closes its listeners at once, and nobody is reset."""
    blue, green = serve(lab, "blue", "-p", "8080:80"), serve(lab, "green")
    processes = {"blue": blue, "green": green}
    storms = [storm(lab, 1000, f"{HOST4}:8080", f"[{HOST6}]:8080")]

    def step(source, target):
        assert move(lab, "rule-move", source, target, publish=["8080:80"]) == {"waiting": 0}
        tell(processes[source], "close")
        tell(processes[source], "again")

    met = swing(lab, storms, step, 15)
    assert met.keys() == {"blue 80", "green 80"}, met
    assert sum(met.values()) == 4_000
    lab.end(blue)
    lab.end(green)


def test_nobody_else_gets_the_port(lab):
    """Neither while the first one has it, nor when graftd holds it instead, nor by SO_REUSEADDR."""
    blue, green = serve(lab, "blue", "-p", "8080:80"), serve(lab, "green")
    assert lab.graft("rule", "move", "-p", "8080:80", "--from", "blue", "--to", "green").stderr == ""
    bind = python("import socket; s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('', 8080)); s.listen()")
    assert "Address already in use" in lab.host(*bind).stderr
    lab.graft("rule", "del", "green", "-p", "8080:80", check=True)
    assert ask(lab, HOST4, 8080) == "blue 80", "open sockets stay"
    tell(blue, "close")
    lab.graft("rule", "add", "blue", "-p", "8080:80", check=True)
    tell(blue, "again")
    lab.graft("rule", "move", "-p", "8080:80", "--from", "blue", "--to", "green", check=True)
    tell(blue, "close")
    wait_for(lambda: "graftd" in lab.host("ss", "-tlnp", "sport = :8080").stdout, "graftd's hold")
    assert "Address already in use" in lab.host(*bind).stderr
    lab.refused((GRAFT, "run", "-p", "8080:81", "true"), 1, "host port is published by container 'green'")
    lab.graft("rule", "del", "green", "-p", "8080:80", check=True)
    assert lab.host(*bind).stderr == ""
    lab.end(blue)
    lab.end(green)


def test_from_everywhere(lab):
    """From another machine, from the host, and from containers of both modes."""
    blue, green = serve(lab, "blue", "-p", "8080:80"), serve(lab, "green")
    lab.graft("rule", "move", "-p", "8080:80", "--from", "blue", "--to", "green", check=True)
    code = "import socket, sys\nfor host in sys.argv[1:]:\n c = socket.create_connection((host, 8080), 5); c.sendall(b'?'); print(c.recv(99).decode())"
    everywhere = (*python(code), HOST4, HOST6, SECOND4)
    assert lab.client(*everywhere).stdout == "green 80\n" * 3
    assert lab.host(*everywhere, "127.0.0.1", "::1").stdout == "green 80\n" * 5
    for options in ((), ("--direct",), ("--netns", "blue"), ("--netns", "green")):
        done = lab.graft("run", *options, *everywhere)
        assert done.stdout == "green 80\n" * 3, (options, done.stderr)
    lab.end(blue)
    lab.end(green)


def test_who_has_it_begins_again(lab):
    """Its server is where it was before the move, whatever the other one does; without a server the port is closed."""
    blue, green = serve(lab, "blue", "-p", "8080:80"), serve(lab, "green")
    lab.graft("rule", "move", "-p", "8080:80", "--from", "blue", "--to", "green", check=True)
    tell(green, "close")
    assert "refused" in ask(lab, HOST4, 8080), "blue does not get it back"
    tell(blue, "close")
    tell(blue, "again")
    assert "refused" in ask(lab, HOST4, 8080)
    tell(green, "again")
    assert ask(lab, HOST4, 8080) == ask(lab, HOST6, 8080) == "green 80"
    lab.graft("rule", "move", "-p", "8080:80", "--from", "green", "--to", "blue", check=True)
    assert ask(lab, HOST4, 8080) == ask(lab, HOST6, 8080) == "blue 80"
    lab.end(green)
    assert ask(lab, HOST4, 8080) == "blue 80"
    lab.end(blue)


def test_graftd_is_killed_in_the_middle(own_lab):
    """The one or the other has it, and connections do not notice; the next graftd goes on from there."""
    blue, green = serve(own_lab, "blue", "-p", "8080:80"), serve(own_lab, "green", "--direct")
    killing, done = threading.Event(), threading.Event()

    def kill():
        for _ in range(2):
            killing.wait(20)
            pid = wait_for(own_lab.daemon_pid, "graftd")
            os.kill(pid, signal.SIGKILL)
            wait_for(partial(another, own_lab.daemon_pid, pid), "the next graftd", 30)
            time.sleep(0.3)
        done.set()

    killer = threading.Thread(target=kill)
    killer.start()
    connecting = storm(own_lab, 0, f"{HOST4}:8080", f"[{HOST6}]:8080")
    while not done.is_set():
        for pair in (("blue", "green"), ("green", "blue")):
            try:
                move(own_lab, "rule-move", *pair, publish=["8080:80"])
            except (GraftError, OSError):
                continue
        killing.set()
    killer.join()
    met = json.loads(connecting.communicate("")[0])
    assert met.keys() == {"blue 80", "green 80"}, met
    assert sum(met.values()) > 1000
    shown = {one["name"]: one["publish"] for one in json.loads(own_lab.graft("ps", "-j").stdout)}
    has, other = ("blue", "green") if shown["blue"] else ("green", "blue")
    assert (shown[has], shown[other]) == (["8080:80/tcp"], [])
    assert ask(own_lab, HOST4, 8080) == f"{has} 80"
    own_lab.graft("rule", "move", "-p", "8080:80", "--from", has, "--to", other, check=True)
    assert ask(own_lab, HOST4, 8080) == f"{other} 80"
    own_lab.end(blue)
    own_lab.end(green)


def test_a_range_and_an_address_of_its_own(lab):
    """Each port of a range goes to the same port of the other's, whose container has an address of its own."""
    at = ",".join(f"0.0.0.0:{port}" for port in (100, 105, 110))
    blue = serve(lab, "blue", "-p", "9000-9010:100-110", at=at)
    green = serve(lab, "green", "--ip", "10.88.7.7", at=at)
    lab.graft("rule", "move", "-p", "9000-9010:100-110", "--from", "blue", "--to", "green", check=True)
    assert [ask(lab, HOST4, 9000 + n) for n in (0, 5, 10)] == ["green 100", "green 105", "green 110"]
    assert "refused" in ask(lab, HOST4, 9001)
    lab.end(green)
    assert [ask(lab, HOST4, 9000 + n) for n in (0, 5, 10)] == ["blue 100", "blue 105", "blue 110"], "open sockets stay"
    lab.end(blue)


def test_what_is_seen(lab):
    blue, green = serve(lab, "blue", "-p", "8080:80"), serve(lab, "green", at="0.0.0.0:80,[::]:80")
    lab.graft("rule", "move", "-p", "8080:80", "--from", "blue", "--to", "green", check=True)
    shown = lab.graft("rule", "show", "green").stdout.splitlines()
    assert shown[:3] == ["publish 8080:80/tcp", "ingress 0.0.0.0:80=tcp-8080 tcp moved", "ingress [::]:80=tcp6-8080 tcp moved"]
    assert "publish" not in lab.graft("rule", "show", "blue").stdout
    code = f"import socket, sys; c = socket.create_connection(({HOST4!r}, 8080), 5); print(flush=True); sys.stdin.read(); c.sendall(b'?'); c.recv(99)"
    client = lab.spawn(*python(code), client=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    client.stdout.readline()
    found = json.loads(lab.graft("sockets", "-j", "green").stdout)
    one = next(one for one in found if one["accepted"])
    assert (one["local"], one["local_real"], one["state"]) == (f"{HOST4}:80", f"{HOST4}:8080", "ESTAB")
    client.communicate("", timeout=20)
    stats = {one["name"]: one for one in json.loads(lab.graft("stats", "-j").stdout)}
    assert (stats["green"]["accepted"], stats["blue"]["accepted"]) == (1, 0)
    lab.end(blue)
    lab.end(green)


def test_a_server_that_is_waited_for(lab):
    blue = serve(lab, "blue", "-p", "8080:80")
    green = serve(lab, "green")
    tell(green, "close")
    words = ("rule", "move", "-p", "8080:80", "--from", "blue", "--to", "green")
    lab.refused((GRAFT, *words), 1, "container 'green' has no server at 0.0.0.0:80, where 'blue' has one (start it first, or give --wait SECONDS)")
    waits = lab.spawn(GRAFT, *words, "--wait", "30")
    time.sleep(0.5)
    assert ask(lab, HOST4, 8080) == "blue 80"
    tell(green, "again")
    assert waits.wait(20) == 0
    assert ask(lab, HOST4, 8080) == "green 80"
    lab.end(blue)
    lab.end(green)


def test_a_giver_that_does_not_accept(lab):
    """The move is done, and the command says who still waits there."""
    code = "import socket, sys; s = socket.create_server(('', 80)); print('ready', flush=True); sys.stdin.readline()\nwhile True: c, _ = s.accept(); c.sendall(b'late'); c.close()"
    blue = lab.spawn_graft("--name", "blue", "-p", "8080:80", *python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert blue.stdout.readline() == "ready\n"
    green = serve(lab, "green", at="0.0.0.0:80")
    early = lab.spawn(*python(f"import socket; c = socket.create_connection(({HOST4!r}, 8080), 5); print(flush=True); c.settimeout(30); print(c.recv(99).decode())"), client=True, stdout=subprocess.PIPE)
    early.stdout.readline()
    done = lab.graft("rule", "move", "-p", "8080:80", "--from", "blue", "--to", "green")
    assert (done.returncode, done.stderr) == (1, "graft: it is handed over, but 1 connection waits for 'blue' to accept ('graft sockets blue' shows what is open)\n")
    assert ask(lab, HOST4, 8080) == "green 80"
    blue.stdin.write("\n")
    blue.stdin.flush()
    assert early.communicate(timeout=20)[0] == "late\n"
    lab.end(blue)
    lab.end(green)


REFUSALS = {
    "not held": ("ep-b", "blue", "green", "container 'blue' does not hold endpoint 'ep-b' ('graft rule show blue' lists what it holds)"),
    "not published": ("8099:80", "blue", "green", "-p 8099:80/tcp is not published by 'blue'"),
    "a publication's": ("tcp-8080", "blue", "green", "endpoint 'tcp-8080' belongs to a publication (graft rule move -p ...)"),
    "udp": ("53:53/udp", "blue", "green", "-p 53:53/udp: a UDP socket answers from the port that it is bound to"),
    "unix": ("ep-unix", "blue", "green", "endpoint 'ep-unix' is of type unix: its clients find its server by a path"),
    "dynamic": ("ep-any", "blue", "green", "endpoint 'ep-any' is dynamic"),
    "several": ("ep-many", "blue", "green", "endpoint 'ep-many' stands for several ports of 'blue'"),
    "itself": ("8080:80", "blue", "blue", "'blue' holds it already"),
    "no such": ("8080:80", "blue", "red", "red"),
    "a long range": ("20000-22000:20000-22000", "blue", "green", "2001 ports are too many to move (at most 1024)"),
    "published there": ("8080:80", "blue", "taken", "-p 8080:80/tcp: the container's port is published already (-p 8085:80/tcp)"),
    "another's": ("ep-twice", "blue", "green", f"container 'blue' does not serve at {HOST4}:8700: container 'taken' does"),
    "other endpoint": ("ep-other", "blue", "taken", "container 'taken' has another endpoint 'ep-other'"),
}


def test_refusals(lab):
    """One line each, and nothing has changed."""
    names = {"ep-any": f"{HOST4} port dynamic", "ep-many": f"{HOST4} port 8600", "ep-twice": f"{HOST4} port 8700", "ep-other": f"{HOST4} port 8800", "ep-b": f"{HOST4} port 8900"}
    lab.add_endpoints({**{name: f"type ipv4 addr {where}" for name, where in names.items()}, "ep-unix": f"type unix path {lab.work}/b.sock"})
    rules = ("0.0.0.0:6001=ep-unix", "0.0.0.0:6002=ep-any", "0.0.0.0:6003-6005=ep-many", "0.0.0.0:6007=ep-twice", "0.0.0.0:6008=ep-other")
    taken = serve(lab, "taken", "-p", "8085:80", "-i", "0.0.0.0:6007=ep-twice", at="0.0.0.0:80,0.0.0.0:6007")
    blue = serve(lab, "blue", "-p", "8080:80", "-p", "53:53/udp", "-p", "20000-22000:20000-22000", *(word for rule in rules for word in ("-i", rule)))
    green = serve(lab, "green")
    lab.graft("endpoint", "add", "ep-other", "type", "ipv4", "addr", HOST4, "port", "1", "--netns", "taken", check=True)
    before = [lab.graft("rule", "show", name, "-j").stdout for name in ("blue", "green", "taken")]
    for what, (name, source, target, told) in REFUSALS.items():
        order = ("rule-move", {"publish": [name]}) if ":" in name else ("endpoint-move", {"name": name})
        with pytest.raises(GraftError) as found:
            move(lab, order[0], source, target, **order[1])
        assert told in str(found.value), what
    words = ("endpoint", "move", "ep-b", "--from", "blue", "--to", "green")
    assert lab.refused((GRAFT, *words), 1, "container 'blue' does not hold endpoint 'ep-b'").stderr.count("\n") == 1
    lab.refused((GRAFT, "rule", "move", "--from", "blue", "--to", "green"), 2, "Missing option '-p'")
    assert [lab.graft("rule", "show", name, "-j").stdout for name in ("blue", "green", "taken")] == before
    assert ask(lab, HOST4, 8080) == "blue 80"
    lab.delete_endpoints([*names, "ep-unix"])
    for process in (blue, green, taken):
        lab.end(process)
