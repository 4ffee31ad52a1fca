"""SO_REUSEPORT works among sockets of one uid: a container's stay with theirs, and nobody shares a port of the host's."""


import pytest

from tests.attack.test_attacks import PROFILES
from tests.conftest import python

PORT, RANGE = 40000, "39950 40049"  # of which containers have the lower half of UDP's
SERVER = f"import socket; s = socket.socket(2, 2); s.setsockopt(1, 15, 1); s.bind(('0.0.0.0', {PORT - 30})); print('up', flush=True); input()"
# Binds UDP sockets that share, until it is told to stop; they have been given the server's uid if that works
BINDS = """
import contextlib, os, socket, sys
taken = socket.socket(2, 2); taken.bind(('127.0.0.1', 5353))
while sys.stdin.readline():
    kept = []
    for n in range(30):
        s = socket.socket(2, 2); s.setsockopt(1, 15, 1); kept.append(s)
        if sys.argv[1] == 'on':  # the bind prepares it, and fails
            with contextlib.suppress(OSError): s.bind(('127.0.0.1', 5353))
        with contextlib.suppress(PermissionError): os.fchown(s.fileno(), 0, -1)
        with contextlib.suppress(OSError): s.bind(('0.0.0.0', 20000 + n))
    print('bound', flush=True); sys.stdin.readline()
    for s in kept: s.close()
    print('closed', flush=True)
"""


@pytest.mark.parametrize("mode", ["off", "on"], ids=["trap", "direct"])
def test_a_port_of_the_kernels_choice_is_shared_with_nobody(own_lab, mode):
    lab = own_lab
    lab.env["GRAFT_DIRECT"] = mode
    lab.host("sysctl", "-q", f"net.ipv4.ip_local_port_range={RANGE}", check=True)
    server = lab.spawn(*python(SERVER), stdin=-1, stdout=-1)
    assert server.stdout.readline() == "up\n"
    thief = lab.spawn_graft("--egress", "host", *PROFILES["root"], *python(BINDS), mode, stdin=-1, stdout=-1)

    def says(word):
        thief.stdin.write("\n")
        thief.stdin.flush()
        assert thief.stdout.readline() == word

    for _ in range(20):
        says("bound\n")
        there = lab.host("ss", "-uanH", f"sport = :{PORT - 30}").stdout
        assert there.count("\n") == 1, there
        says("closed\n")
    taken = "import socket; s = socket.socket(2, 2); s.setsockopt(1, 15, 1); s.bind(('', 20000)); t = socket.socket(2, 2); t.setsockopt(1, 15, 1); t.bind(('', 20000)); print('shared')"
    assert lab.graft("run", "--egress", "host", *python(taken), check=True).stdout == "shared\n"  # its own it may share


def test_ping_has_its_filter(own_lab):
    """SO_ATTACH_FILTER is refused for sockets on the host's stack, and not for those of the container's own netns."""
    code = "import ctypes, socket, struct\nraw = struct.pack('HBBI', 6, 0, 0, 65535); keep = ctypes.create_string_buffer(raw, 8)\n"
    code += "value = struct.pack('HL', 1, ctypes.addressof(keep))\n"
    code += "for s in (socket.socket(2, 3, 1), socket.socket(17, 3, 0), socket.socket(2, 2), socket.socket(10, 1)):\n"
    code += "  try: s.setsockopt(1, 26, value); print('OK')\n  except OSError as e: print(e.strerror)"
    for mode in ("--direct", "--no-direct"):
        told = own_lab.graft("run", mode, *python(code), check=True).stdout
        assert told == "OK\nOK\n" + "Operation not permitted\n" * 2
