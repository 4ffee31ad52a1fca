"""The host's servers that an attack may reach or join; tells who has been there, when a line is read from stdin."""

import json
import selectors
import socket
import sys

HOST = sys.argv[1]
seen: list[list[str]] = []
servers: dict[int, socket.socket] = {}
waiting = selectors.DefaultSelector()


def server(kind, address, *options, family=socket.AF_INET):
    s = socket.socket(family, kind)
    for option in options:
        s.setsockopt(socket.SOL_SOCKET, option, 1)
    s.bind(address)
    s.setblocking(False)
    if kind == socket.SOCK_STREAM:
        s.listen()
    servers[s.fileno()] = s
    waiting.register(s, selectors.EVENT_READ, (kind, address))


for port, where in ((9100, "0.0.0.0"), (9101, "127.0.0.1")):
    server(socket.SOCK_STREAM, (where, port), socket.SO_REUSEADDR, socket.SO_REUSEPORT)
server(socket.SOCK_STREAM, ("::1", 9101), family=socket.AF_INET6)
server(socket.SOCK_DGRAM, ("0.0.0.0", 9102))
server(socket.SOCK_DGRAM, ("::1", 9102), family=socket.AF_INET6)
server(socket.SOCK_DGRAM, ("0.0.0.0", 40000), socket.SO_REUSEADDR)
server(socket.SOCK_STREAM, "\0graft-attack-host", family=socket.AF_UNIX)
server(socket.SOCK_DGRAM, "\0graft-attack-datagrams", family=socket.AF_UNIX)
waiting.register(sys.stdin, selectors.EVENT_READ, None)
print("up", flush=True)
while True:
    for key, _ in waiting.select():
        if key.data is None:
            if not sys.stdin.readline():
                sys.exit()
            print(json.dumps(seen), flush=True)
            seen.clear()
        elif key.data[0] == socket.SOCK_STREAM:
            connection, peer = servers[key.fd].accept()
            connection.close()
            seen.append([str(key.data[1]), peer[0] if peer else ""])
        else:
            peer = servers[key.fd].recvfrom(4096)[1]
            seen.append([str(key.data[1]), peer[0] if peer else ""])
