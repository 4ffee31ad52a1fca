"""Who enters a container's network namespace and dials localhost reaches the container's own servers."""

import contextlib
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from graft.bench.lab import GRAFTD, HOST4, wait_for
from graft.daemon.forwards import IDLE_SECONDS
from graft.kernel import linux
from tests.conftest import python
from tests.system.inside import ECHOES, RETURNS, TELLS, Inside, everything, relays, start


@pytest.mark.core
def test_nsenter_reaches_the_containers_servers(lab):
    """At each address of the loopback, under the port that the program knows, as a program of the container would."""
    served = ("127.0.0.1 80", "127.0.0.2 81", "::1 82", "0.0.0.0 83", ":: 84", "0.0.0.0 9000")
    _, inside = start(lab, TELLS, *served, options=("--name", "web", "-p", "8099:9000"))
    with inside:
        assert inside.told("127.0.0.1", 80) == "127.0.0.1 ('127.0.0.1', 80)"
        assert inside.told("127.0.0.2", 81) == "127.0.0.1 ('127.0.0.2', 81)"
        assert inside.told("::1", 82) == "::1 ('::1', 82)"
        assert inside.told("127.0.0.1", 83) == "127.0.0.1 ('127.0.0.1', 83)"
        assert inside.told("127.0.0.1", 84) == "::ffff:127.0.0.1 ('::ffff:127.0.0.1', 84)"
        assert inside.told("::1", 84) == "::1 ('::1', 84)"
        assert inside.told("127.0.0.1", 9000) == "127.0.0.1 ('127.0.0.1', 9000)"
        refused = [("::1", 80), ("127.0.0.1", 81), ("127.0.0.1", 82), ("::1", 83), ("127.0.0.1", 8099), ("127.0.0.1", 1)]
        assert [inside.told(*at) for at in refused] == [None] * len(refused)


def test_programs_as_typed(lab):
    _, inside = start(lab, TELLS, "127.0.0.1 80")
    enter = ("nsenter", "-t", inside.pid, "-n")
    lab.spawn_graft("--netns", "web", "python3", "-m", "http.server", "--bind", "127.0.0.1", "8000", stdout=-3, stderr=-3)
    wait_for(lambda: "Directory listing" in lab.host(*enter, "curl", "-s", "http://localhost:8000/").stdout, "http.server")
    assert lab.host(*enter, "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/80; cat <&3").stdout.startswith("127.0.0.1")
    assert "Connection refused" in lab.host(*enter, "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/81").stderr


def test_large_transfers_and_their_ends(lab):
    """16 MiB in, the end of it, and 16 MiB back."""
    _, inside = start(lab, RETURNS)
    data = os.urandom(1 << 20) * 16
    with inside, inside.dial("127.0.0.1", 80) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock) == data + b"whole"


def test_many_at_once(lab):
    _, inside = start(lab, ECHOES)
    with inside:
        clients = [inside.dial("127.0.0.1", 80) for _ in range(100)]
        for number, client in enumerate(clients):
            client.sendall(str(number).encode())
        assert [client.recv(16) for client in clients] == [str(number).encode() for number in range(100)]
        assert len(relays(lab)) == 1
        for client in clients:
            client.shutdown(socket.SHUT_WR)
        assert [client.recv(16) for client in clients] == [b""] * 100


def test_a_server_comes_and_goes(lab):
    program = """
import socket, sys
for line in sys.stdin:
    if line == "open\\n":
        sock = socket.create_server(("127.0.0.1", 80), backlog=8)
    else:
        sock.close()
    print("ready", flush=True)
"""
    process = lab.spawn_graft("--name", "web", *python(program), stdin=-1, stdout=-1)

    def order(line):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"

    order("open")
    with Inside(lab) as inside:
        wait_for(lambda: _answers(inside), "the server")
        order("close")
        assert not _answers(inside)
        order("open")
        assert _answers(inside)
    process.stdin.close()


def _answers(inside):
    try:
        inside.dial("127.0.0.1", 80).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.core
def test_a_reset_is_passed_on(lab):
    program = """
import socket, struct
sock = socket.create_server(("127.0.0.1", 80))
print("ready", flush=True)
while True:
    peer = sock.accept()[0]
    peer.recv(1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    peer.close()
"""
    _, inside = start(lab, program)
    with inside, inside.dial("127.0.0.1", 80) as sock:
        sock.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_urgent_data_comes_among_the_rest(lab):
    _, inside = start(lab, ECHOES)
    with inside, inside.dial("127.0.0.1", 80) as sock:
        sock.sendall(b"a")
        sock.send(b"b", socket.MSG_OOB)
        sock.sendall(b"c")
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock) == b"abc"


def test_an_own_address(lab):
    _, inside = start(lab, TELLS, "0.0.0.0 80", options=("--name", "web", "--ip", "10.77.0.50"))
    lab.host("nsenter", "-t", inside.pid, "-n", "ip", "address", "add", "10.1.2.3/32", "dev", "lo", check=True)
    with inside:
        assert inside.told("10.77.0.50", 80) == "10.77.0.50 ('10.77.0.50', 80)"
        assert inside.told("10.1.2.3", 80) == "127.0.0.1 ('127.0.0.1', 80)"  # no container's: this one's loopback


def test_an_address_of_the_hosts(lab):
    """It is on the netns's lo. What the container has there is a socket of the host's, and not what is dialled in here."""
    _, inside = start(lab, TELLS, f"{HOST4} 5000", "127.0.0.1 5001", "0.0.0.0 5002", options=("--name", "web", "-p", "5000:5000"))
    with inside:
        assert [inside.told(HOST4, port) for port in (5000, 5001)] == [None, None]
        assert inside.told(HOST4, 5002) == "127.0.0.1 ('127.0.0.1', 5002)"


def test_the_netnss_own_server_is_left_alone(lab):
    _, inside = start(lab, TELLS, "127.0.0.1 80")
    with inside:
        with linux.inside_netns(inside.netns):
            debug = socket.create_server(("127.0.0.1", 90))
        with debug, inside.dial("127.0.0.1", 90):
            debug.settimeout(10)
            assert debug.accept()[0]
        assert inside.told("127.0.0.1", 80)


def test_what_comes_by_a_device_is_not_led(lab):
    """A device in the netns, such as another plugin's, is no way round what is published."""
    _, inside = start(lab, TELLS, "0.0.0.0 80")
    enter = ("nsenter", "-t", inside.pid, "-n", "ip")
    lab.host("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", inside.pid, check=True)
    lab.host("ip", "address", "add", "10.78.0.1/24", "dev", "up0", check=True)
    lab.host("ip", "link", "set", "up0", "up", check=True)
    lab.host(*enter, "address", "add", "10.78.0.2/24", "dev", "eth0", check=True)
    lab.host(*enter, "link", "set", "eth0", "up", check=True)
    dial = python("import socket, sys; socket.create_connection(('10.78.0.2', 80), 10)")
    try:
        wait_for(lambda: "refused" in lab.host(*dial).stderr, "the device")
        with inside:
            assert inside.told("10.78.0.2", 80)
    finally:
        lab.host("ip", "link", "del", "up0", check=True)


def test_graftd_is_killed(own_lab):
    """A connection that is open goes on, and one that comes meanwhile is served by the next graftd."""
    lab = own_lab
    _, inside = start(lab, ECHOES)
    with inside, inside.dial("127.0.0.1", 80) as before:
        before.sendall(b"1")
        assert before.recv(1) == b"1"
        os.kill(lab.daemon_pid(), signal.SIGKILL)
        with inside.dial("127.0.0.1", 80) as after:
            before.sendall(b"2")
            assert before.recv(1) == b"2"
            after.sendall(b"3")
            assert after.recv(1) == b"3"
        lab.graft("ps", check=True)
        lab.host(GRAFTD, "--replace", check=True)
        before.sendall(b"4")
        assert before.recv(1) == b"4"
        assert _answers(inside)


def test_the_keeper_is_killed(own_lab):
    """graftd becomes the keeper and starts another graftd: what is open goes on, and what comes is served."""
    lab = own_lab
    _, inside = start(lab, ECHOES)
    with inside, inside.dial("127.0.0.1", 80) as before:
        before.sendall(b"1")
        assert before.recv(1) == b"1"
        keeper = lab.keeper_pid()
        os.kill(keeper, signal.SIGKILL)
        wait_for(lambda: lab.keeper_pid() != keeper and lab.containers(), "another keeper and its graftd")
        relay = relays(lab)
        with inside.dial("127.0.0.1", 80) as after:
            after.sendall(b"2")
            assert after.recv(1) == b"2"
        before.sendall(b"3")
        assert before.recv(1) == b"3"
        assert relays(lab) == relay


def sockets_of(pid):
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(fd))
    return [name for name in found if name.startswith("socket:")]


def test_a_container_ends(lab):
    """What is open inside its netns ends with it; its relay and its descriptors as well."""
    start(lab, ECHOES, options=("--name", "other"))
    before = len(sockets_of(lab.daemon_pid()))
    process, inside = start(lab, ECHOES)
    with inside, inside.dial("127.0.0.1", 80) as sock:
        sock.sendall(b"1")
        assert sock.recv(1) == b"1"
        assert len(relays(lab)) == 1
        lab.end(process, signal.SIGKILL)
        wait_for(lambda: not relays(lab), "the relay's end")
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        assert not _answers(inside)
    wait_for(lambda: len(sockets_of(lab.daemon_pid())) <= before, "graftd's sockets")
    assert lab.containers() == ["other"]


def test_a_relay_has_no_rights_and_ends_when_idle(lab):
    _, inside = start(lab, ECHOES)
    with inside, inside.dial("127.0.0.1", 80) as sock:
        sock.sendall(b"1")
        assert sock.recv(1) == b"1"
        (relay,) = relays(lab)
        status = Path(f"/proc/{relay}/status").read_text()
        found = dict(line.split(":\t", 1) for line in status.splitlines())
        assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} <= {"0" * 16, found["CapBnd"]}
        assert (int(found["CapPrm"], 16), found["NoNewPrivs"], found["Groups"].strip()) == (0, "1", "")
        assert len(set(found["Uid"].split())) == 1
        assert int(found["Uid"].split()[0]) > 0x70000000
        assert Path(f"/proc/{relay}/environ").stat().st_uid == 0  # it is not dumpable
        kinds = sorted(os.readlink(fd).split(":")[0] for fd in Path(f"/proc/{relay}/fd").iterdir())
        assert kinds[-3:] == ["socket"] * 3  # the channel and the pair
        assert len(kinds) == 6  # and /dev/null, the log, epoll
        assert re.search(r"^Max open files +600 +600 ", Path(f"/proc/{relay}/limits").read_text(), re.MULTILINE)
        assert Path(f"/proc/{relay}/cgroup").read_text().endswith(f"0::/{lab.tag}-relay\n")
        assert Path(f"/proc/{relay}/oom_score_adj").read_text() == "0\n"
    wait_for(lambda: not relays(lab), "the idle relay's end", IDLE_SECONDS + 5)
    with Inside(lab) as again:
        assert _answers(again)
