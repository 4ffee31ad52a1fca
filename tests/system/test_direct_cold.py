"""Sockets of a direct container that are made for its programs, in its own netns (graft/trap/cold.py, graft-sup)."""

import pytest

from tests.conftest import python, quick_calls

UNIX_SOCKETS = """
import ctypes, fcntl, os
libc = ctypes.CDLL(None, use_errno=True)
for kind in (*range(12), 1 << 8, 1 | 1 << 14, 2 | 0o4000, 5 | 0o2000000, 1 | 0o2004000):
    for protocol in (0, 1, 2, -1):
        fd = libc.socket(1, kind, protocol)
        if fd < 0:
            print(kind, protocol, ctypes.get_errno())
            continue
        made = os.fstat(fd)
        flags = fcntl.fcntl(fd, fcntl.F_GETFD), fcntl.fcntl(fd, fcntl.F_GETFL)
        print(kind, protocol, made.st_uid, made.st_gid, oct(made.st_mode), *flags)
        os.close(fd)
"""


@pytest.mark.parametrize("user", ["0:0", "1000:1001"])
def test_unix_sockets_are_as_on_the_host(lab, user):
    """graft-sup makes them, whatever the arguments are."""
    code = python(UNIX_SOCKETS)
    uid, gid = user.split(":")
    on_host = lab.host("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *code).stdout
    before = quick_calls(lab)
    assert lab.graft("run", "--direct", "--user", user, *code).stdout == on_host
    assert quick_calls(lab) >= before + 17 * 4


def test_a_pair_is_nobodys(lab):
    """SO_PEERCRED of a pair tells who has made it, which is graftd."""
    code = (
        "import socket, struct; a, b = socket.socketpair(); pid, uid, gid = struct.unpack('3i', a.getsockopt(1, 17, 12)); print(uid, gid);"
        "import os; print(os.fstat(a.fileno()).st_uid)"
    )
    peer, owner = lab.graft("run", "--direct", "--user", "65534", *python(code), check=True).stdout.splitlines()
    assert owner == "65534"
    assert all(int(number) >= 0x70000000 for number in peer.split())


def test_who_may_ping(lab):
    """By the groups of the caller, in the range of the container's netns."""
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP); print('made')"
    words = ("--direct", "--sysctl", "net.ipv4.ping_group_range=1000 1000")
    assert lab.graft("run", *words, "--user", "65534:1000", *python(code)).stdout == "made\n"
    assert "PermissionError" in lab.graft("run", *words, "--user", "65534:1001", *python(code)).stderr
