"""Other families, other processes' descriptors, and graft's own processes."""

import contextlib
import ctypes
import errno
import os
import resource
import socket
import struct
import subprocess
import threading
import time

from .common import CLIENT, HOST, SECOND, TCP, UDP, V4, attack, libc
from .netns import NR_BPF


@attack
def packet_socket_sees_only_lo():
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    s.bind(("veth0", 0))


@attack
def raw_socket_reaches_nothing():
    """HOST may be an address of the container's own netns as well, which then answers itself."""
    s = socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    for where in (CLIENT, SECOND):
        try:
            s.sendto(b"\x08\0" + bytes(6), (where, 0))
            return where
        except OSError as error:
            refused = error
    raise refused


@attack
def netlink_sees_only_lo():
    told = subprocess.run(("ip", "-o", "link"), capture_output=True, text=True).stdout
    return ",".join(line.split(":")[1].strip() for line in told.splitlines())


@attack
def netlink_changes_nothing():
    done = subprocess.run(("ip", "address", "add", "10.77.0.9/24", "dev", "veth0"), capture_output=True, text=True)
    return "OK" if done.returncode == 0 else "FAILED"


@attack
def bpf():
    attr = struct.pack("=IIII", 1, 4, 4, 1) + bytes(112)
    if libc.syscall(NR_BPF, 0, attr, len(attr)) < 0:
        raise OSError(ctypes.get_errno(), "bpf")


@attack
def join_the_hosts_namespace():
    fd = os.open("/proc/1/ns/net", os.O_RDONLY)
    if libc.setns(fd, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


@attack
def descriptor_to_an_ungrafted_process():
    """Whoever gets the socket stands under the same policy."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, TCP)
    s = socket.socket(V4, TCP)
    child = os.fork()
    if not child:
        libc.unshare(0x10000000)
        _, fds, _, _ = socket.recv_fds(theirs, 9, 1)
        with socket.socket(fileno=fds[0]) as got:
            try:
                got.bind((HOST, 22))
                got.listen()
                theirs.send(b"OK")
            except OSError as error:
                theirs.send(errno.errorcode[error.errno or 0].encode())
        os._exit(0)
    socket.send_fds(ours, [b"x"], [s.fileno()])
    told = ours.recv(99).decode()
    os.waitpid(child, 0)
    return told


def ordered(door, op):
    s = socket.socket(socket.AF_UNIX, TCP)
    s.settimeout(2)
    s.connect(os.environ["GRAFT_RUN_DIR"] + f"/{door}.sock")
    s.sendall(b'{"op":"%s","version":"0.1.0"}\n' % op.encode())
    told = s.recv(65536)
    return "EPERM" if b'"EPERM"' in told else f"OK {told!r}"


@attack
def admin_socket():
    return ordered("graftd", "ps")


@attack
def user_socket():
    """The orders of users without root, by a process of a container, whatever its uid is."""
    return ordered("user", "hello")


@attack
def keepers_socket():
    s = socket.socket(socket.AF_UNIX, UDP)
    s.connect(os.environ["GRAFT_RUN_DIR"] + "/notify.sock")


@attack
def supervisors_socket():
    """A process of the container says that it is a graft-sup without a graftd."""
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.settimeout(2)
    s.connect(os.environ["GRAFT_RUN_DIR"] + "/helpers.sock")
    fd = os.memfd_create("forged")
    os.truncate(fd, 128 + 64 * 128)
    os.pwrite(fd, struct.pack("=IIIIQIIQQII32s", 2, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, b"x" * 32), 0)
    socket.send_fds(s, [b"graft-sup"], [fd, fd, fd])
    return {b"n": "REFUSED", b"y": "OK"}.get(s.recv(1), "CLOSED")


def agent(message, fds=()):
    s = socket.socket(socket.AF_UNIX, TCP)
    s.settimeout(5)
    s.connect(os.environ["GRAFT_RUN_DIR"] + "/agent.sock")
    with contextlib.suppress(OSError):
        socket.send_fds(s, [message[:65536]], fds)
        s.sendall(message[65536:])
    told = b""
    with contextlib.suppress(OSError):
        while piece := s.recv(65536):
            told += piece
    return "OK" if b'"ok"' in told else "REFUSED"


@attack
def agent_message_malformed():
    return agent(b'{"ociVersion": 1, "fds": {}, "metadata": [' + b"\xff" * 100 + b"]}")


@attack
def agent_message_deep():
    return agent(b'{"fds":' + b"[" * 100000 + b"]" * 100000 + b"}")


@attack
def agent_message_huge():
    return agent(b'{"fds": ["' + b"x" * (2 << 20) + b'"]}')


@attack
def agent_message_publishes():
    return agent(
        b'{"ociVersion":"1","fds":["seccompFd"],"pid":1,"metadata":"{\\"publish\\":[\\"22:22\\"]}",'
        b'"state":{"id":"x","pid":1}}',
        [os.open("/dev/null", os.O_RDONLY)],
    )


@attack
def agent_message_names_anothers_process():
    return agent(
        b'{"ociVersion":"1","fds":["seccompFd"],"pid":1,"metadata":"{}","state":{"id":"x","pid":1}}',
        [os.open("/dev/null", os.O_RDONLY)],
    )


@attack
def forged_metadata():
    told = b'{"ociVersion":"1","fds":["seccompFd"],"pid":1,"metadata":"{\\"seal\\":\\"' + b"0" * 64
    return agent(told + b'\\"}","state":{"id":"x","pid":1}}', [os.open("/dev/null", os.O_RDONLY)])


@attack
def flood_of_connections():
    kept = []
    for _ in range(600):
        s = socket.socket(socket.AF_UNIX, TCP)
        s.setblocking(False)
        with contextlib.suppress(OSError):
            s.connect(os.environ["GRAFT_RUN_DIR"] + "/agent.sock")
        kept.append(s)
    return "SERVED" if socket.socket(V4, TCP).fileno() > 2 else "LOST"


@attack
def flood_of_calls():
    def work():
        while not over:
            with contextlib.suppress(OSError), socket.socket(V4, TCP) as s:
                s.listen()

    over = []
    threads = [threading.Thread(target=work) for _ in range(64)]
    for t in threads:
        t.start()
    time.sleep(0.3)
    over.append(1)
    for t in threads:
        t.join()
    return "SERVED"


@attack
def links_in_the_run_directory():
    os.symlink("/etc/passwd", os.environ["GRAFT_RUN_DIR"] + "/state.new")


@attack
def run_directory_is_not_ours():
    os.rename(os.environ["GRAFT_RUN_DIR"] + "/agent.sock", os.environ["GRAFT_RUN_DIR"] + "/other.sock")


@attack
def nested_namespace():
    """Deeper down the policy is the same."""
    if libc.unshare(0x40000000 | 0x10000000):
        raise OSError(ctypes.get_errno(), "unshare")
    socket.create_connection((HOST, 9101), 1)


@attack
def descriptor_limit_of_nothing():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    socket.socket(V4, TCP)
