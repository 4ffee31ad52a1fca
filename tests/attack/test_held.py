"""A program holds the kernel's lock of its socket, for as long as it likes, while graftd has the socket as well.

It sends from memory that nobody gives: userfaultfd(2), as root may; a file system of the program's own does the same for
whoever may mount one.
"""

import subprocess

import pytest

from tests.conftest import python

# Maps a page that userfaultfd(2) is to give, and never does; a thread sends it.
HOLDS = """
import ctypes, os, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True); libc.mmap.restype = ctypes.c_void_p
NR = {'x86_64': 323, 'aarch64': 282}[os.uname().machine]
uffd = libc.syscall(NR, 0)
if uffd < 0: print('none', os.strerror(ctypes.get_errno()), flush=True); sys.exit()
api = ctypes.create_string_buffer(struct.pack('QQQ', 0xaa, 0, 0), 24)
assert libc.ioctl(uffd, ctypes.c_ulong(0xc018aa3f), api) == 0
at = libc.mmap(None, 4096, 3, 0x22, -1, 0)
register = ctypes.create_string_buffer(struct.pack('QQQQ', at, 4096, 1, 0), 32)
assert libc.ioctl(uffd, ctypes.c_ulong(0xc020aa00), register) == 0
pair = socket.create_server(('127.0.0.1', 0)); sock = socket.create_connection(pair.getsockname())
threading.Thread(target=lambda: libc.send(sock.fileno(), ctypes.c_void_p(at), 4096, 0), daemon=True).start()
time.sleep(0.5)
"""
LISTENS = HOLDS + """
threading.Thread(target=lambda: libc.listen(sock.fileno(), 1), daemon=True).start()
time.sleep(0.5); print('held', flush=True); time.sleep(600)
"""
SENDS = HOLDS + """
u = socket.socket(socket.AF_UNIX); u.connect(os.environ['GRAFT_RUN_DIR'] + '/agent.sock')
socket.send_fds(u, [b'{"op": "no such order"}'], [sock.fileno()]); u.settimeout(20); u.recv(300)
print('held', flush=True); time.sleep(600)
"""
PERMIT = """
import os, socket
def permits(sock):
    u = socket.socket(socket.AF_UNIX); u.connect(os.environ['GRAFT_RUN_DIR'] + '/agent.sock'); u.settimeout(20)
    socket.send_fds(u, [b'{"op": "permit", "name": "db"}'], [sock.fileno()]); return u
"""
PERMITS = HOLDS + PERMIT + """
asked = [permits(sock) for _ in range(20)]
time.sleep(0.5); print('held', flush=True); time.sleep(600)
"""


@pytest.mark.parametrize("code", [LISTENS, SENDS, PERMITS], ids=["listens", "sends", "permits"])
def test_graftd_goes_on(own_lab, code):
    lab = own_lab
    lab.graft("endpoint", "add", "db", "type", "ipv4", "addr", "127.0.0.1", "port", "7000", check=True)
    holds = lab.spawn_graft("--name", "holds", "-e", "192.0.2.7/32=db", *python(code), stdout=-1)
    said = holds.stdout.readline()
    if said.startswith("none"):
        pytest.skip(f"userfaultfd(2): {said}")
    assert said == "held\n"
    try:
        assert "holds" in lab.graft("ps", check=True, timeout=10).stdout
        serves = ("run", *python("import socket; socket.create_server(('127.0.0.1', 5)); print('serves')"))
        assert lab.graft(*serves, check=True, timeout=20).stdout == "serves\n"
        asks = ("run", "-e", "192.0.2.7/32=db", *python(PERMIT + "print(permits(socket.socket()).recv(300).decode())"))
        assert '"address"' in lab.graft(*asks, check=True, timeout=20).stdout
    except subprocess.TimeoutExpired:
        pytest.fail("graftd waits for the lock")
    finally:
        lab.end(holds)  # which gives it back
