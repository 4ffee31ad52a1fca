"""Files in /etc/graft are read again when they change: endpoints of the host, and what containers may ask for."""

import json
import os
import signal

import pytest

from graft.bench.lab import GRAFT, GRAFTD, HOST4, SECOND4, Lab, wait_for
from tests.conftest import python

SERVE = (
    "import socket; s = socket.socket(); s.setsockopt(1,2,1); s.bind(('0.0.0.0', 80)); s.listen(); print(flush=True)\n"
    "while True: c = s.accept()[0]; c.sendall(b'hi'); c.close()"
)
BIND = "import socket\ntry: socket.socket().bind(('0.0.0.0', 80)); print('bound')\nexcept OSError as e: print(e.errno)"
WAIT = 6.0  # seconds: a change is taken within two


@pytest.fixture
def filed(own_lab: Lab):
    """A laboratory with a file of endpoints that its graftd has read."""
    path = own_lab.config.with_name("endpoints.toml")
    path.write_text(f'web = "type ipv4 addr {HOST4} port 8930"\nout = "type ipv4 addr {SECOND4} port dynamic"\n')
    path.chmod(0o644)
    own_lab.start_daemon()
    assert set(shown(own_lab)) == {"web", "out"}
    return path


def shown(lab, *where):
    """Endpoints by name, as `graft endpoint show` prints them."""
    lines = lab.graft("endpoint", "show", *where).stdout.splitlines()
    return {line.split()[0]: line for line in lines}


def logged(lab, text):
    return (lab.run_dir / "graftd.log").read_text().count(text)


@pytest.mark.core
def test_an_endpoint_of_the_file_moves(own_lab, filed):
    """A running container keeps what it was given; what starts later has what the file says then."""
    first = own_lab.spawn_graft("--name", "first", "-i", "0.0.0.0:80=web", *python(SERVE), stdout=-1)
    first.stdout.readline()
    assert own_lab.listening(8930)
    new = filed.with_suffix(".new")
    new.write_text(f'web = "type ipv4 addr {HOST4} port 8931"\n')
    new.rename(filed)
    wait_for(lambda: set(shown(own_lab)) == {"web"} and "port 8931" in shown(own_lab)["web"], "the new file", WAIT)
    second = own_lab.spawn_graft("--name", "second", "-i", "0.0.0.0:80=web", *python(SERVE), stdout=-1)
    second.stdout.readline()
    ask = "import socket, sys\nfor p in sys.argv[1:]: print(socket.create_connection((sys.argv[0] and '{}', int(p)), 3).recv(9))"
    assert own_lab.client(*python(ask.format(HOST4)), "8930", "8931").stdout == "b'hi'\n" * 2
    own_lab.refused((GRAFT, "run", "-e", "0.0.0.0/0=out", "true"), 1, "'out'")
    for process in (first, second):
        own_lab.end(process)


def test_a_container_names_no_endpoint_that_it_was_not_given(own_lab, filed):
    """Neither by a wrapper, nor by AF_GRAFT, nor by the API; the host's own programs have their table."""
    assert own_lab.graft("-i", "0.0.0.0:80=web", "--", *python(BIND)).stdout == "bound\n"
    inside = own_lab.graft("run", "--egress", "none", "--name", "box", GRAFT, "-i", "0.0.0.0:80=web", "--", *python(BIND))
    assert (inside.returncode, "endpoint 'web'" in inside.stderr, inside.stdout) == (1, True, "")
    assert "web" not in own_lab.graft("run", GRAFT, "endpoint", "show").stdout
    family = "import socket\ntry: socket.socket(46, 1).bind(b'web')\nexcept OSError as e: print('refused')"
    assert "refused" in own_lab.graft("run", *python(family)).stdout
    given = own_lab.graft("run", "-i", "0.0.0.0:80=web", GRAFT, "-i", "0.0.0.0:80=out", "--", *python(BIND))
    assert (given.returncode, given.stdout) == (1, ""), "one that was given is no word for another"


def test_the_last_good_file_holds(own_lab, filed):
    """A fault is logged once, with its line; `graft doctor` tells it; nothing of a wrong file is in force."""
    good = filed.read_text()
    filed.write_text(f'{good}new = "type local"\nweb2 = "type ipv4 addr nonsense port 80"\n')
    fault = f"{filed}, line 4: web2: 'nonsense' is not"
    own_lab.wait_logged(fault)
    assert set(shown(own_lab)) == {"web", "out"}
    found = {f["name"]: f for f in json.loads(own_lab.graft("doctor", "-j").stdout)}
    assert not found["configuration"]["good"]
    assert fault in json.dumps(found["configuration"])
    before = wait_for(own_lab.daemon_pid, "graftd")
    os.kill(before, signal.SIGKILL)  # the next one has them from the state
    wait_for(lambda: own_lab.daemon_pid() not in (0, before) and set(shown(own_lab)) == {"web", "out"}, "the next graftd")
    own_lab.refused((GRAFT, "endpoint", "add", "web", "type", "local"), 1, "endpoint 'web' exists")
    own_lab.refused((GRAFT, "endpoint", "del", "web"), 1, f"endpoint 'web' stands in {filed}, line 1 (remove it there)")
    filed.write_text("broken = \n")
    own_lab.wait_logged(f"{filed}, line 1: Invalid value (column")
    filed.chmod(0o666)
    own_lab.wait_logged(f"{filed}: others than root may write it")
    filed.chmod(0o644)
    filed.write_text(f'{good}new = "type local"\n')
    wait_for(lambda: set(shown(own_lab)) == {"web", "out", "new"}, "the good file", WAIT)
    filed.unlink()
    wait_for(lambda: not shown(own_lab), "the end of the file", WAIT)
    assert logged(own_lab, fault) == 2, "once by each of two graftds"


def test_endpoints_of_a_file_do_not_keep_graftd(own_lab):
    """One that was started on demand ends, although its file has endpoints, and leaves nothing."""
    path = own_lab.config.with_name("endpoints.toml")
    path.write_text('cache = "type local"\n')
    path.chmod(0o644)
    assert own_lab.graft("run", "true").returncode == 0
    assert "cache" in own_lab.graft("endpoint", "show").stdout
    wait_for(lambda: not own_lab.pins().exists(), "the idle exit", 15)
    wait_for(lambda: not (own_lab.run_dir / "state.json").exists(), "the end of the state")


def test_the_configuration_is_read_again(own_lab):
    """Addresses are checked by the new one; a running container keeps its own; a fault changes nothing."""
    own_lab.start_daemon()
    pid = wait_for(own_lab.daemon_pid, "graftd")

    def force():
        found = {f["name"]: f for f in json.loads(own_lab.graft("doctor", "-j").stdout)}
        return found["in force"]["found"]

    own_lab.config.write_text('addresses = ["10.9.0.0/16"]\nreserved_ports = [8940]\nreserve_listening = false\n')
    wait_for(lambda: "addresses: 10.9.0.0/16; reserved ports: 8940" in force(), "the new file", WAIT)
    udp = "import socket\nfor p in (8940, 8941):\n try: socket.socket(2, 2).bind(('10.9.0.1', p)); print('bound')\n except OSError as e: print(e.errno)"
    assert own_lab.graft("run", "--ip", "10.9.0.1", *python(udp)).stdout == "98\nbound\n"
    own_lab.config.write_text("addresses = [\n")
    own_lab.wait_logged(f"{own_lab.config}, line 1: Invalid value (")
    assert "addresses: 10.9.0.0/16; reserved ports: 8940" in force()
    own_lab.config.write_text("reserved_ports = [8941]\n")
    wait_for(lambda: "addresses: none; reserved ports: 8941" in force(), "the next file", WAIT)
    assert own_lab.graft("run", "--ip", "10.9.0.1", "--force-ip", *python(udp)).stdout == "bound\n98\n"
    assert own_lab.daemon_pid() == pid


def started(lab, *words):
    """A container that `graft run` starts with @words: its UDP limit, and whether it is direct."""
    box = lab.spawn_graft("--name", "box", *words, "sh", "-c", "echo up; exec sleep 100", stdout=-1)
    box.stdout.readline()
    most = json.loads(lab.graft("inspect", "box").stdout)["limits"]["udp"]["max"]
    direct = ", direct" in lab.graft("ps").stdout
    lab.end(box)
    wait_for(lambda: lab.containers() == [], "the end of the container")
    return most, direct


def test_what_graftd_takes_from_the_file_changes_while_it_runs(own_lab):
    """Limits, metrics, log and the mode of `graft run`; a wrong file changes none of them, and reload says so."""
    own_lab.start_daemon()
    pid = wait_for(own_lab.daemon_pid, "graftd")
    reload = (GRAFTD, "--reload")

    config = 'limits = "udp=7"\nlog = "debug"\n[metrics]\nlisten = "127.0.0.1:9435"\n'
    own_lab.config.write_text(config)
    assert own_lab.host(*reload).returncode == 0
    assert started(own_lab) == (7, False)
    assert started(own_lab, "--limit", "udp=9") == (9, False), "the command line wins"
    assert "graft_containers" in own_lab.host("curl", "-sS", "http://127.0.0.1:9435/metrics").stdout
    own_lab.config.write_text(config.replace("9435", "9436").replace("udp=7", "udp=8"))
    os.kill(pid, signal.SIGHUP)
    wait_for(lambda: own_lab.host("curl", "-sS", "http://127.0.0.1:9436/metrics").returncode == 0, "the page", WAIT)
    assert own_lab.host("curl", "-sS", "http://127.0.0.1:9435/metrics").returncode == 7
    own_lab.config.write_text(config.replace("127.0.0.1:9435", "192.0.2.77:9436\"\npublic = true\n# ").replace("udp=7", "udp=9"))
    own_lab.refused(reload, 1, f"{own_lab.config}, line 4: metrics.listen: 192.0.2.77:9436: Cannot assign requested address")
    assert started(own_lab) == (8, False)
    own_lab.config.write_text(config.replace("udp=7", "utp=7"))
    own_lab.refused(reload, 1, f"{own_lab.config}, line 1: limits: limit 'utp=7': unknown")
    own_lab.refused((GRAFT, "config", "check", own_lab.work), 1, "1 fault: of a file that has one nothing is taken")
    assert started(own_lab) == (8, False)
    own_lab.config.write_text("[run]\ndirect = true\n")
    assert own_lab.host(*reload).returncode == 0
    assert own_lab.host("curl", "-sS", "http://127.0.0.1:9436/metrics").returncode == 7
    assert started(own_lab) == (4096, True)
    assert started(own_lab, "--no-direct") == (4096, False)
    own_lab.config.write_text("[run]\ndirect = \n")
    assert started(own_lab) == (4096, True), "graftd knows what was"
    own_lab.refused((GRAFT, "run", "--direct", "--no-direct", "true"), 2, "exclude each other")
    assert own_lab.daemon_pid() == pid


def test_options_of_graftd_win(own_lab):
    own_lab.config.write_text('limits = "udp=7,sockets=70"\n[metrics]\nlisten = "127.0.0.1:9435"\n')
    own_lab.env |= {"GRAFT_LIMITS": "udp=5", "GRAFT_METRICS": "127.0.0.1:9436"}
    own_lab.start_daemon()
    assert started(own_lab) == (5, False)
    assert own_lab.host("curl", "-sS", "http://127.0.0.1:9436/metrics").returncode == 0
    assert own_lab.host("curl", "-sS", "http://127.0.0.1:9435/metrics").returncode == 7


def test_endpoints_of_a_directory(own_lab, filed):
    """All files are one: an endpoint moves between them, one that stands in two is told, and what is held stays."""
    web = filed.read_text().splitlines()[0]
    directory = filed.with_name("endpoints.d")
    directory.mkdir(0o755)
    more = directory / "more.toml"
    more.write_text(f"{web}\n")
    own_lab.refused((GRAFTD, "--reload"), 1, f"{more}, line 1: web: it stands in {filed}, line 1 as well")
    assert set(shown(own_lab)) == {"web", "out"}
    filed.unlink()
    assert own_lab.host(GRAFTD, "--reload").returncode == 0
    assert set(shown(own_lab)) == {"web"}
    own_lab.refused((GRAFT, "endpoint", "del", "web"), 1, f"endpoint 'web' stands in {more}, line 1 (remove it there)")
    held = own_lab.spawn_graft("--name", "holder", "-i", "0.0.0.0:80=web", *python(SERVE), stdout=-1)
    held.stdout.readline()
    more.unlink()
    assert own_lab.host(GRAFTD, "--reload").returncode == 0
    assert shown(own_lab) == {}
    assert "web" in shown(own_lab, "--netns", "holder")
    ask = f"import socket; print(socket.create_connection(('{HOST4}', 8930), 3).recv(9))"
    assert own_lab.client(*python(ask)).stdout == "b'hi'\n"
    own_lab.end(held)
    directory.chmod(0o777)
    more.write_text(f"{web}\n")
    own_lab.refused((GRAFTD, "--reload"), 1, f"{more}: others than root may write in {directory}")
