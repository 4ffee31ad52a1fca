"""The other machine of a sequence: it echoes at port 7, and visits servers when program.py asks it to.

usage: python3 outside.py PATH; PATH is where its unix socket is made. Each line there is an order in JSON, answered by a
line: visit (connect to an address, or send it a datagram), hear (what the last visitor was answered), end (close them all).
"""

import contextlib
import errno
import json
import selectors
import socket
import struct
import sys

ECHO = 7


class Outside:
    """The echo servers, and the visitors."""

    def __init__(self, path):
        self.select = selectors.DefaultSelector()
        self.visitors = {}  # by who has ordered them
        stream = socket.create_server(("::", ECHO), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
        datagram = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        datagram.bind(("::", ECHO))
        orders = socket.socket(socket.AF_UNIX)
        orders.bind(path)
        orders.listen()
        for server, what in ((stream, self.accept), (datagram, self.datagram), (orders, self.take)):
            server.setblocking(False)
            self.select.register(server, selectors.EVENT_READ, what)

    def accept(self, server):
        client, _ = server.accept()
        client.setblocking(False)
        self.select.register(client, selectors.EVENT_READ, self.stream)

    def stream(self, client):
        try:
            text = client.recv(4096)
            client.sendall(text)
        except OSError:
            text = b""
        if not text:
            self.select.unregister(client)
            client.close()

    def datagram(self, server):
        with contextlib.suppress(OSError):
            text, who = server.recvfrom(4096)
            server.sendto(text, who)

    def take(self, server):
        client, _ = server.accept()
        lines = client.makefile()
        self.visitors[client] = []
        self.select.register(client, selectors.EVENT_READ, lambda c: self.order(c, lines))

    def order(self, client, lines):
        line = lines.readline()
        if not line:
            self.select.unregister(client)
            self.end(self.visitors.pop(client))
            client.close()
            return
        order = json.loads(line)
        client.sendall((json.dumps(getattr(self, order.pop("do"))(self.visitors[client], **order)) + "\n").encode())

    def visit(self, visitors, kind, to, text):
        address, port = to
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM if kind == "STREAM" else socket.SOCK_DGRAM)
        visitors.append(sock)
        sock.settimeout(1)
        try:
            sock.connect((address, port))
            sock.sendall(text.encode())
        except TimeoutError:
            return "nobody answers"
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "0"

    def hear(self, visitors, wait):
        if not visitors:
            return "no visitor"
        sock = visitors[-1]
        sock.settimeout(wait)
        try:
            text = sock.recv(4096)
            return [text.decode(), *sock.getpeername()[:2]]
        except TimeoutError:
            return "nothing"
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def end(self, visitors):
        for sock in visitors:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        visitors.clear()
        return "0"

    def serve(self):
        while True:
            for key, _ in self.select.select():
                key.data(key.fileobj)


if __name__ == "__main__":
    Outside(sys.argv[1]).serve()
