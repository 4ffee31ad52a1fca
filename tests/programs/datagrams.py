"""UDP over the loopback, as a program sees it: one line a case. A test compares the host's lines with a container's.

Ports that the kernel chose are written as "any": they differ from run to run.
"""

import ctypes
import errno
import itertools
import socket
import struct

V4, V6, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_DGRAM
SERVER, CLIENT, CLOSED = 5300, 5301, 5302
# family and address of a server, family of a client, and where that sends to
PAIRS = (
    (V4, "0.0.0.0", V4, "127.0.0.1"),
    (V4, "0.0.0.0", V4, "0.0.0.0"),
    (V4, "0.0.0.0", V6, "::ffff:127.0.0.1"),
    (V4, "127.0.0.1", V4, "127.0.0.1"),
    (V4, "127.0.0.1", V6, "::1"),
    (V4, "127.0.0.1", V6, "::"),
    (V6, "::1", V6, "::1"),
    (V6, "::1", V4, "127.0.0.1"),
    (V6, "::", V6, "::1"),
    (V6, "::", V6, "::"),
    (V6, "::", V4, "127.0.0.1"),
    (V6, "::", V4, "0.0.0.0"),
    (V6, "::", V6, "::ffff:127.0.0.1"),
    (V6, "::ffff:127.0.0.1", V6, "::ffff:127.0.0.1"),
    (V6, "::ffff:127.0.0.1", V6, "::"),
    (V6, "::ffff:0.0.0.0", V4, "127.0.0.1"),
)
BINDS = {
    V4: ("", "0.0.0.0 any", f"0.0.0.0 {CLIENT}", "127.0.0.1 any", f"127.0.0.1 {CLIENT}"),
    V6: ("", ":: any", f":: {CLIENT}", "::1 any", "::ffff:127.0.0.1 any", "::ffff:0.0.0.0 any"),
}
libc = ctypes.CDLL(None, use_errno=True)


def name(address):
    """An address as text, without the kernel's ports."""
    return f"{address[0]} {address[1] if address[1] in (0, SERVER, CLIENT, CLOSED) else 'any'}"


def tried(call, *arguments):
    """What a call returns, or its errno."""
    try:
        value = call(*arguments)
    except TimeoutError:
        return "nothing"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    if isinstance(value, tuple):
        return name(value if isinstance(value[0], str) else value[-1])
    return "ok" if value is None else value


def make(family, bind="", only6=None):
    """A UDP socket, bound to "ADDRESS PORT" if that is given; its errno if that fails."""
    sock = socket.socket(family, UDP)
    sock.settimeout(0.03)  # over the loopback a datagram is there when send(2) returns
    if only6 is not None:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only6)
    if bind:
        address, port = bind.split()
        sock.bind((address, 0 if port == "any" else int(port)))
    return sock


def disconnect(sock):
    """connect(2) with AF_UNSPEC."""
    done = libc.connect(sock.fileno(), struct.pack("=H26x", 0), 28 if sock.family == V6 else 16)
    return "ok" if done == 0 else errno.errorcode[ctypes.get_errno()]


def conversation(server, client, target, connect):
    """What both see of a question and its answers."""
    to = (target, server.getsockname()[1])
    if connect:
        told = [tried(client.connect, to)]
        if told != ["ok"]:
            return told
        told += [name(client.getsockname()), name(client.getpeername()), tried(client.send, b"?")]
    else:
        told = [tried(client.sendto, b"?", to)]
    if told[-1] != 1:
        return told
    client_port = client.getsockname()[1]
    try:
        _, source = server.recvfrom(9)
    except TimeoutError:
        return [*told, "nothing"]
    told += [name(source), source[1] == client_port, tried(server.sendto, b"!", source)]
    answer = tried(client.recvfrom, 9)
    told.append(answer)
    if connect:
        told += [tried(client.sendmsg, [b"?"]), tried(server.recvmsg, 9)]
        told += [tried(server.sendmsg, [b"!"], [], 0, source), tried(client.recv, 9)]
    return told


def pairs():
    """Every server and client."""
    for port, (family, address, other, target), connect in itertools.product(
        (str(SERVER), "any"), PAIRS, (False, True)
    ):
        for bind, only6 in [(bind, None) for bind in BINDS[other]] + ([("", 1)] if target == "::1" else []):
            with make(family, f"{address} {port}") as server:
                what = f"{address} {port} <- {'connect' if connect else 'sendto'} {target} by {bind or other.name}{' only6' * bool(only6)}"
                try:
                    client = make(other, bind, only6)
                except OSError as error:
                    print(what, error.errno)
                    continue
                with client:
                    print(what, *conversation(server, client, target, connect), sep=", ")


def names():
    """A socket by itself: before and after connect(), refused, disconnected, connected to itself."""
    for family, loopback, wildcard in ((V4, "127.0.0.1", "0.0.0.0"), (V6, "::1", "::"), (V6, "::ffff:127.0.0.1", "::")):
        with make(family, f"{loopback} {SERVER}") as server, make(family) as client:
            to = (loopback, SERVER)
            print(loopback, name(client.getsockname()), tried(client.connect, to), tried(client.getsockname), sep=", ")
            print(loopback, disconnect(client), tried(client.getsockname), tried(client.getpeername), sep=", ")
            print(loopback, tried(client.sendto, b"?", to), tried(server.recv, 9), tried(client.connect, to), sep=", ")
            print(loopback, tried(client.connect, (loopback, CLOSED)), tried(client.getpeername), sep=", ")
            print(loopback, tried(client.send, b"?"), tried(client.recv, 9), tried(client.connect, to), sep=", ")
            print(loopback, tried(client.getpeername), tried(client.send, b"?"), tried(server.recv, 9), sep=", ")
        for bind in (f"{loopback} {CLIENT}", f"{loopback} any", f"{wildcard} {CLIENT}", f"{wildcard} any"):
            with make(family, bind) as sock:
                itself = (loopback, sock.getsockname()[1])
                print("itself", bind, tried(sock.sendto, b"x", itself), tried(sock.recvfrom, 9), sep=", ")
                print("itself", bind, tried(sock.connect, itself), tried(sock.getsockname), sep=", ")
                print("itself", bind, tried(sock.send, b"x"), tried(sock.recvfrom, 9), sep=", ")
    for first, second in itertools.permutations(("127.0.0.1", "0.0.0.0", "::1", "::"), 2):
        for reuse in (False, True):
            with make(V6 if ":" in first else V4) as one, make(V6 if ":" in second else V4) as two:
                for sock in (one, two):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
                one.bind((first, SERVER))
                print("both", first, second, reuse, tried(two.bind, (second, SERVER)), sep=", ")


pairs()
names()
