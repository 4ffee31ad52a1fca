"""What a program has of the netns that it lives in, which of a direct container is the host's, without an internet socket."""

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import socket
import struct
import subprocess
from pathlib import Path

from .common import HOST, TCP, UDP, V4, attack, libc

HOSTS_NAME = "\0graft-attack-host"  # of the witness
HOSTS_DATAGRAMS = "\0graft-attack-datagrams"
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x2000000, 0x10000000, 0x20000000, 0x40000000
TUNSETIFF, PPPIOCNEWUNIT, PPPIOCATTACH, PPPIOCATTCHAN = 0x400454CA, 0xC004743E, 0x4004743D, 0x40047438
NR_SOCKET, NR_SOCKETPAIR, NR_IOCTL, NR_BPF = {"x86_64": (41, 53, 16, 321), "aarch64": (198, 199, 29, 280)}[os.uname().machine]


def call(number, *arguments):
    """A system call, whose arguments have 64 bits each. Raises OSError."""
    result = libc.syscall(ctypes.c_long(number), *(a if isinstance(a, bytes) or hasattr(a, "_type_") else ctypes.c_ulong(a) for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"call {number}")
    return result


def unshare(flags):
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def cookie(sock):
    return sock.getsockopt(socket.SOL_SOCKET, 71, 8)


def in_a_child(tries, *arguments):
    """The outcome of an attack in a child process, as errno's name or what it returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            told = tries(*arguments) or "OK"
        except OSError as error:
            told = errno.errorcode.get(error.errno or 0, "?")
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading) as told:
        return told.read() or "DIED"


def wrong(outcomes, *right):
    """The outcomes that are none of @right, by what was tried; "" if there are none."""
    return " ".join(f"{what}:{told}" for what, told in outcomes.items() if told not in right)


def outcome(tries, *arguments):
    try:
        return str(tries(*arguments) or "OK")
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


# -- unix sockets --


@attack
def abstract_name_of_the_hosts_is_free():
    """In the host's netns the name is taken."""
    with socket.socket(socket.AF_UNIX, TCP) as s:
        s.bind(HOSTS_NAME)


@attack
def abstract_name_by_datagrams():
    with socket.socket(socket.AF_UNIX, UDP) as s:
        s.sendto(b"x", HOSTS_DATAGRAMS)


@attack
def abstract_name_by_autobind():
    """The kernel's own choice is a name of the same table."""
    with socket.socket(socket.AF_UNIX, UDP) as s, socket.socket(socket.AF_UNIX, UDP) as other:
        s.bind("")
        other.sendto(b"x", s.getsockname())
        name = s.getsockname()[1:].decode()
        return "HOSTS" if f"@{name}" in Path("/proc/1/net/unix").read_text() else "OWN"


def pairs(use):
    """An attack on socketpair() of every type, with flags and with upper halves set."""

    def tries():
        for kind, flags in itertools.product((1, 2, 5), (0, 0x80000, 0x800, 0x80800, 1 << 40)):
            fds = (ctypes.c_int * 2)()
            call(NR_SOCKETPAIR, 1 | 1 << 33, kind | flags, 0, ctypes.addressof(fds))
            with socket.socket(fileno=fds[0]) as a, socket.socket(fileno=fds[1]) as b:
                a.send(b"x")
                if b.recv(9) != b"x":
                    return f"type {kind} carries nothing"
                told = use(a)
                if told:
                    return told
        return "OWN"

    return tries


@attack
def socketpair_is_the_containers():
    with socket.socket(socket.AF_UNIX, UDP) as own:
        return pairs(lambda sock: None if cookie(sock) == cookie(own) else "HOSTS")()


@attack
def socketpair_binds_to_the_hosts_name():
    return pairs(lambda sock: outcome(sock.bind, HOSTS_NAME).replace("OK", ""))()


@attack
def socketpair_sends_to_the_hosts_name():
    def sends(sock):
        if sock.type != UDP:
            return None
        told = {outcome(sock.sendto, b"x", HOSTS_DATAGRAMS), outcome(sock.connect, HOSTS_DATAGRAMS)}
        return None if told == {"ECONNREFUSED"} else str(told)

    return pairs(sends)()


@attack
def socketpair_without_a_place():
    """Where the two numbers cannot be written nothing is made, and no descriptor stays."""
    before = os.listdir("/proc/self/fd")
    page = ctypes.c_void_p(libc.mmap(None, 4096, 1, 0x22, -1, 0))  # it can only be read
    for place in (0, 8, page.value or 0, 1 << 63):
        told = outcome(call, NR_SOCKETPAIR, 1, 1, 0, place)
        if told != "EFAULT":
            return told
    return "SERVED" if os.listdir("/proc/self/fd") == before else "LEFT"


libc.mmap.restype = ctypes.c_void_p


@attack
def socketpair_of_internet_families():
    told = {f"{family}-{kind}": outcome(socket.socketpair, family, kind) for family in (2, 10) for kind in (1, 2, 3, 10)}
    return wrong(told, "ENOTSUP", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "EPERM") or "REFUSED"


# -- every family --


@attack
def every_family_is_the_containers():
    """A socket of any family, type and protocol that there is has the netns of the others."""
    found = {}
    with socket.socket(V4, UDP) as own:
        for family, kind in itertools.product(range(64), (1, 2, 3, 4, 5, 6, 10)):
            for protocol in range(33 if family == 16 else 8):
                with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as sock:
                    if cookie(sock) != cookie(own):
                        found[f"{family}-{kind}-{protocol}"] = "HOSTS"
    return wrong(found) or "OWN"


@attack
def every_protocol_of_the_internet():
    """What is neither TCP nor UDP is the container's own, or there is none of it."""
    found = {}
    for family, kind, protocol in itertools.product((2, 10), (1, 2, 3, 5), (*range(256), 262)):
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as sock:
            sock.settimeout(0.2)
            to = (HOST, 9102) if family == 2 else (f"::ffff:{HOST}", 9102)
            if (kind, protocol) not in ((1, 0), (1, 6), (1, 262), (2, 0), (2, 17)):
                told = outcome(sock.setsockopt, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"veth0\0")
                if told not in ("ENODEV", "EPERM"):
                    found[f"{family}-{kind}-{protocol}"] = told
                if kind != 3 and protocol != 136:  # UDP-Lite's connect() to an address of the host's may be permitted
                    with contextlib.suppress(OSError):
                        sock.connect(to)
                        sock.send(b"x")
                        found[f"{family}-{kind}-{protocol}"] = "SENT"
    return wrong(found) or "OWN"


@attack
def registers_have_upper_halves():
    """The kernel takes the lower half of each; the filter must not be told another story."""
    upper = 7 << 32
    for family, kind, protocol in ((1, 1, 0), (16, 3, 0), (17, 3, 0), (2, 3, 255), (10, 3, 255), (2, 10, 0)):
        with contextlib.suppress(PermissionError):
            number = call(NR_SOCKET, family | upper, kind | upper, protocol | upper)
            with socket.socket(fileno=number) as sock, socket.socket(V4, UDP) as own:
                if cookie(sock) != cookie(own):
                    return f"HOSTS {family}-{kind}"
    return "OWN"


@attack
def packet_sockets_of_every_kind_see_no_device():
    told = {}
    own = socket.socket(V4, UDP)
    for family, kind in ((17, 2), (17, 3), (17, 10), (2, 10)):
        with contextlib.suppress(PermissionError), socket.socket(family, kind, socket.htons(3)) as s:
            if kind != 10:  # of those the type knows no such option, and shows what it hears of
                told[f"{family}-{kind}"] = outcome(s.setsockopt, 263, 1, struct.pack("=iHH8s", 2, 1, 0, b""))
            if cookie(s) != cookie(own):
                return "HOSTS"
    return wrong(told, "ENODEV") or "OWN"


@attack
def packets_of_af_xdp():
    with socket.socket(44, 3) as s:
        address = struct.pack("=HHIII", 44, 0, 2, 0, 0)
        if libc.bind(s.fileno(), address, len(address)):
            raise OSError(ctypes.get_errno(), "bind")


# -- netlink --


def netlink(protocol, message, *more):
    """The answers to a message, with a header of its own for each."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as s:
        s.settimeout(2)
        s.bind((0, 0))
        for one in (message, *more):
            s.sendto(one, (0, 0))
            while True:
                data = s.recv(1 << 18)
                while len(data) >= 16:
                    length, kind, flags = struct.unpack_from("=IHH", data)
                    if kind == 2:
                        error = -struct.unpack_from("=i", data, 16)[0]
                        if error:
                            raise OSError(error, "netlink")
                    yield kind, data[16:length]
                    last = not flags & 2 or kind in (2, 3)
                    data = data[(length + 3) & ~3 :]
                if last:
                    break


def header(kind, flags, body):
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


def attribute(kind, value):
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21


def diag(kind, flags, port=0):
    found = struct.pack("=BBBBI", V4, 6, 0, 0, 0xFFFFFFFF) + struct.pack(">HH", port, 0) + bytes(32) + struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
    return header(kind, flags, found)


@attack
def netlink_lists_the_hosts_listeners():
    ports = {struct.unpack_from(">H", body, 4)[0] for kind, body in netlink(4, diag(SOCK_DIAG_BY_FAMILY, 0x301)) if kind == 20}
    return "HOSTS" if ports & {9100, 9101} else "OWN"


@attack
def netlink_destroys_the_hosts_listener():
    list(netlink(4, diag(SOCK_DESTROY, 5, 9100)))


@attack
def netlink_lists_the_hosts_unix_sockets():
    question = struct.pack("=BBHIIIII", 1, 0, 0, 0xFFFFFFFF, 0, 1, 0xFFFFFFFF, 0xFFFFFFFF)
    told = b"".join(body for _, body in netlink(4, header(SOCK_DIAG_BY_FAMILY, 0x301, question)))
    return "HOSTS" if HOSTS_NAME.encode() in told else "OWN"


def ns_by_id():
    """Give the netns that this process lives in a number in that of its netlink sockets, and ask there for devices."""
    there = os.open("/proc/self/ns/net", os.O_RDONLY)
    named = header(88, 5, struct.pack("=B3x", 0) + attribute(3, struct.pack("=I", there)) + attribute(1, struct.pack("=i", 7)))
    with contextlib.suppress(FileExistsError):
        list(netlink(0, named))
    asked = header(18, 0x301, bytes(16) + attribute(46, struct.pack("=i", 7)))
    return b"".join(body for _, body in netlink(0, asked))


@attack
def netlink_names_the_netns_of_the_process():
    told = ns_by_id()
    return "HOSTS" if b"veth0\0" in told else "OWN"


def moves_a_device(attributes):
    """Make a device, and put it into the netns of a process."""

    def tries():
        kind = attribute(18, attribute(1, b"dummy"))
        list(netlink(0, header(16, 0x605, bytes(16) + attribute(3, b"intruder0\0") + kind + attributes())))
        return "OWN" if b"intruder0" in subprocess.run(("ip", "link"), capture_output=True).stdout else "HOSTS"

    return tries


for _how, _made in {
    "pid": lambda: attribute(19, struct.pack("=I", os.getpid())),
    "init": lambda: attribute(19, struct.pack("=I", 1)),
    "descriptor": lambda: attribute(28, struct.pack("=I", os.open("/proc/self/ns/net", os.O_RDONLY))),
}.items():
    _tries = moves_a_device(_made)
    _tries.__name__ = f"device_moved_by_{_how}"
    attack(_tries)


@attack
def netlink_of_every_protocol():
    """What the host alone has nobody answers for; what there is asks for capabilities."""
    told = {}
    for protocol in range(32):
        body = struct.pack("=BB2x", 1, 1)
        told[protocol] = outcome(lambda p, b: list(netlink(p, header(1000, 5, b))) and "ANSWERED", protocol, body)
    right = ("ENOTSUP", "ECONNREFUSED", "EPROTONOSUPPORT", "EPERM", "EINVAL", "EOPNOTSUPP", "ENOENT", "ETIMEDOUT", "ESOCKTNOSUPPORT", "None", "timed out", "OK", "ANSWERED")
    return wrong(told, *right) or "REFUSED"


@attack
def netlink_sends_uevents():
    """A program of the host would take them for the kernel's."""
    with socket.socket(socket.AF_NETLINK, UDP, 15) as s, socket.socket(socket.AF_NETLINK, UDP, 15) as host:
        host.bind((0, 1))
        s.sendto(b"add@/devices/x\0ACTION=add\0DEVPATH=/devices/x\0SUBSYSTEM=net\0SEQNUM=1\0", (0, 1))
        return "OWN" if cookie(s) == cookie(host) else "HOSTS"


@attack
def netlink_sets_auditing():
    list(netlink(9, header(1001, 5, struct.pack("=IIII48x", 1, 0, 0, 0))))


# -- devices --


def opened(path):
    return os.open(path, os.O_RDWR)


@attack
def tun_of_every_form():
    """Only the lower half of the request's register counts."""
    told = {}
    for flags, upper in itertools.product((1, 2, 0x1001, 0x1102), (0, 1, 1 << 31)):
        ifreq = ctypes.create_string_buffer(struct.pack("=16sH22x", b"intruder%d", flags))
        fd = opened("/dev/net/tun")
        told[f"{flags:x}-{upper:x}"] = outcome(call, NR_IOCTL, fd, TUNSETIFF | upper << 32, ctypes.addressof(ifreq))
        os.close(fd)
    return wrong(told, "EPERM") or "EPERM"


@attack
def tun_tells_its_netns():
    fd = opened("/dev/net/tun")
    told = {hex(request): outcome(fcntl.ioctl, fd, request, 0) for request in (0x894C, 0x54E3)}
    return wrong(told, "EPERM", "ENOTTY", "EBADFD") or "REFUSED"


@attack
def ppp_units():
    fd = opened("/dev/ppp")
    told = {hex(request): outcome(fcntl.ioctl, fd, request, b"\xff" * 4) for request in (PPPIOCNEWUNIT, PPPIOCATTACH, PPPIOCATTCHAN)}
    return wrong(told, "EPERM") or "EPERM"
