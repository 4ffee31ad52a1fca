"""Addresses of 127.0.0.0/8, as a program sees them: one line a case. A test compares the host's lines with a container's.

Ports that the kernel chose are written as "any": they differ from run to run.
"""

import errno
import itertools
import socket

V4, V6, TCP, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
PORT = 5400
SERVERS = ("127.0.0.1", "127.0.0.2", "127.200.1.9", "0.0.0.0", "::", "::1", "::ffff:127.0.0.2")
ASKED = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.200.1.9", "0.0.0.0", "::1", "::ffff:127.0.0.2", "::ffff:127.0.0.3")
CLIENTS = (None, "127.0.0.1", "127.0.0.2", "127.0.0.4", "0.0.0.0")


def name(address):
    """An address as text, without the kernel's ports."""
    return f"{address[0]} {address[1] if address[1] in (0, PORT, PORT + 1) else 'any'}"


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


def make(kind, address, port, reuse=0):
    """A socket that is bound there; None: that is not bound. Raises OSError."""
    sock = socket.socket(V6 if address and ":" in address else V4, kind)
    sock.settimeout(0.01)
    try:
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, reuse, 1)
        if address:
            sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def families():
    """Pairs of a client's address and one that it asks, of one family."""
    for bound, asked in itertools.product(CLIENTS, ASKED):
        if ":" not in asked or bound is None:
            yield bound, asked


def connections():
    """Who is found where, and what both ends are called."""
    for served in SERVERS:
        with make(TCP, served, PORT, socket.SO_REUSEADDR) as server:
            server.listen()
            for bound, asked in families():
                head = f"tcp {served} {bound} {asked}"
                with socket.socket(V6 if ":" in asked else V4, TCP) as client:
                    client.settimeout(2)
                    if bound:
                        client.bind((bound, 0))
                    told = tried(client.connect, (asked, PORT))
                    if told != "ok":
                        print(head, told)
                        continue
                    accepted, peer = server.accept()
                    with accepted:
                        same = peer == accepted.getpeername() and peer[1] == client.getsockname()[1]
                        print(head, *map(name, (client.getsockname(), client.getpeername(), accepted.getsockname(), peer)), same)


def datagrams():
    """The same over UDP, connected and not, with the answer."""
    for served in SERVERS:
        with make(UDP, served, PORT) as server:
            server.settimeout(0.01)
            for (bound, asked), connect in itertools.product(families(), (False, True)):
                head = f"udp {served} {bound} {asked} {connect}"
                with socket.socket(V6 if ":" in asked else V4, UDP) as client:
                    client.settimeout(0.01)
                    if bound:
                        client.bind((bound, 0))
                    if connect:
                        told = tried(client.connect, (asked, PORT))
                        print(head, told, tried(client.getsockname), tried(client.getpeername))
                        sent = tried(client.send, b"q")
                    else:
                        sent = tried(client.sendto, b"q", (asked, PORT))
                    print(head, sent, tried(server.recvfrom, 9))


def replies():
    """A server answers whom it has heard."""
    for served, bound, asked, connect in itertools.product(SERVERS[:4], CLIENTS, ASKED[:5], (False, True)):
        with make(UDP, served, PORT) as server, make(UDP, bound, 0) as client:
            if connect:
                client.connect((asked, PORT))
                client.send(b"q")
            else:
                client.sendto(b"q", (asked, PORT))
            try:
                _, peer = server.recvfrom(9)
            except TimeoutError:
                continue
            print(f"reply {served} {bound} {asked} {connect}", server.sendto(b"a", peer), tried(client.recvfrom, 9))


def binds():
    """Two binds of one port."""
    options = (0, socket.SO_REUSEADDR, socket.SO_REUSEPORT)
    for kind, first, second, reuse, listens in itertools.product((TCP, UDP), SERVERS, SERVERS, options, (False, True)):
        if kind == UDP and listens:
            continue
        with make(kind, first, PORT + 1, reuse) as one:
            if listens:
                one.listen()
            try:
                two = make(kind, second, PORT + 1, reuse)
            except OSError as error:
                print(f"bind {kind} {first} {second} {reuse} {listens}", errno.errorcode[error.errno or 0])
                continue
            with two:
                told = tried(two.listen) if listens else ""
                print(f"bind {kind} {first} {second} {reuse} {listens}", name(two.getsockname()), told)


def itself():
    """A socket that connects to where it is."""
    for kind, bound, asked in itertools.product((TCP, UDP), SERVERS[:4], ASKED[:5]):
        with make(kind, bound, PORT, socket.SO_REUSEADDR) as sock:
            told = tried(sock.connect, (asked, PORT))
            print(f"itself {kind} {bound} {asked}", told, name(sock.getsockname()) if told == "ok" else "", tried(sock.getpeername))


connections()
datagrams()
replies()
binds()
itself()
