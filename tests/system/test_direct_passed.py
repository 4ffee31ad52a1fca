"""Sockets of direct containers in the hands of the host's processes, which no filter traps."""

import time

import pytest

from graft.bench.lab import CLIENT4, HOST4, wait_for
from tests.conftest import python

# Takes a socket that is passed to it, and does with it what @what says, when it is told
TAKER = """
import array, errno, socket, sys
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print('ready', flush=True)
c, _ = s.accept(); _, ancillary, *_ = c.recvmsg(1, 64); fd = array.array('i', ancillary[0][2])[0]; print('taken', flush=True)
sys.stdin.readline(); t = socket.socket(fileno=fd)
try: print({what} or 'OK', flush=True)
except OSError as e: print(errno.errorcode[e.errno], flush=True)
sys.stdin.readline()
"""
GIVE = "import array, socket, sys; u = socket.socket(socket.AF_UNIX); u.connect(sys.argv[1]); t = socket.socket(); u.sendmsg([b'x'], [(1, 1, array.array('i', [t.fileno()]))])"


def taker(lab, what):
    """A process of the host's with TAKER, and the path where it takes the socket."""
    path = lab.work / "out.sock"
    process = lab.spawn(*python(TAKER.replace("{what}", what)), str(path), stdin=-1, stdout=-1)
    assert process.stdout.readline() == "ready\n"
    return process, str(path)


def told(process):
    """What comes of it."""
    process.stdin.write("go\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_the_policy_stays_with_sockets_that_were_passed_out(own_lab):
    """A socket of a direct container outlives it, its cgroup and graftd: it is nobody's then, and reaches nothing."""
    lab = own_lab
    process, path = taker(lab, f"t.connect(({CLIENT4!r}, 9000))")
    lab.graft("run", "--direct", *python(GIVE), path, check=True)
    assert process.stdout.readline() == "taken\n"
    wait_for(lambda: not lab.direct_cgroups(), "the end of the cgroup")
    time.sleep(0.2)
    assert told(process) == "ENETUNREACH"


@pytest.mark.parametrize("listens", [False, True], ids=["client", "server"])
def test_a_listener_that_nobody_has_trapped_is_reached_by_nobody(own_lab, listens):
    """A process of the host's listens on a socket that was passed to it, unbound, whatever its container has listened to."""
    lab = own_lab
    process, path = taker(lab, "t.listen() or t.getsockname()[1]")
    first = "s = socket.create_server(('127.0.0.1', 0)); " if listens else ""
    code = GIVE.replace("t = socket", first + "t = socket") + "; sys.stdin.readline()"
    container = lab.spawn_graft("--direct", *python(code), path, stdin=-1)
    assert process.stdout.readline() == "taken\n"
    port = int(told(process))
    for asks, address in ((lab.client, HOST4), (lab.host, HOST4), (lab.host, "127.0.0.1")):
        done = asks(*python(f"import socket; socket.create_connection(({address!r}, {port}), 1)"))
        assert "Error" in done.stderr or "timed out" in done.stderr, done
    container.stdin.close()
    lab.end(process)


@pytest.mark.parametrize("published", [(), ("-p", "20000:20000", "-p", "20000:20000/udp")], ids=["private", "published"])
@pytest.mark.parametrize("kind", [1, 2], ids=["tcp", "udp"])
@pytest.mark.parametrize("family", [2, 10])
def test_a_socket_that_nobody_has_prepared_is_not_bound(own_lab, family, kind, published):
    """bind() is trapped where another thread may put another socket under the number; the policy asks the socket itself.

    One with the uid of the program, or with one of the program's choice, could share the port of a host's server.
    """
    lab = own_lab
    for binds_first, expected in ((False, "EPERM"), (True, "EINVAL")):
        process, path = taker(lab, "t.bind(('', 20000))")
        made = f"t = socket.socket({family}, {kind})" + ("; t.bind(('', 20000))" if binds_first else "")
        container = lab.spawn_graft("--direct", *published, *python(GIVE.replace("t = socket.socket()", made) + "; sys.stdin.readline()"), path, stdin=-1)
        assert process.stdout.readline() == "taken\n"
        assert told(process) == expected
        lab.end(container)
        lab.end(process)
        (lab.work / "out.sock").unlink()
