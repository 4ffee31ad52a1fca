"""A container's netns, entered from outside, and programs of containers that are dialled there."""

import json
import os
import socket
from pathlib import Path

from graft.bench.lab import wait_for
from graft.kernel import linux
from tests.conftest import python

TICKS = os.sysconf("SC_CLK_TCK")

# listens at each "ADDRESS PORT" of its arguments, and tells each client the addresses that it sees
TELLS = """
import selectors, socket, sys
ears = selectors.DefaultSelector()
for at in sys.argv[1:]:
    address, port = at.split()
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.bind((address, int(port)))
    sock.listen(512)
    ears.register(sock, 1)
print("ready", flush=True)
while True:
    for key, _ in ears.select():
        peer = key.fileobj.accept()[0]
        peer.sendall(f"{peer.getpeername()[0]} {peer.getsockname()[:2]}".encode())
        peer.close()
"""

# one client after the other: takes all until its end, then gives it back and a mark
RETURNS = """
import socket
sock = socket.create_server(("127.0.0.1", 80))
print("ready", flush=True)
while True:
    peer = sock.accept()[0]
    parts = []
    while part := peer.recv(65536):
        parts.append(part)
    for part in parts:
        peer.sendall(part)
    peer.sendall(b"whole")
    peer.close()
"""

# gives back what it gets, to any number of clients
ECHOES = """
import asyncio
async def serve(reader, writer):
    while part := await reader.read(65536):
        writer.write(part)
        await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 80, backlog=512)
    print("ready", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


class Inside:
    """A container's netns, entered from outside: sockets of this process in it."""

    def __init__(self, lab, name="web"):
        found = json.loads(lab.graft("inspect", name, check=True).stdout)
        self.pid, self.path = found["pid"], found["netns_path"]
        self.netns = os.open(self.path, os.O_RDONLY)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.netns)

    def dial(self, address, port):
        with linux.inside_netns(self.netns):
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        sock.settimeout(20)
        sock.connect((address, port))
        return sock

    def told(self, address, port):
        """What the server at this port tells; None if the connection is refused."""
        try:
            with self.dial(address, port) as sock:
                return everything(sock).decode()
        except ConnectionRefusedError:
            return None


def everything(sock):
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def relays(lab):
    return lab._processes("graft-relay")


def start(lab, program, *arguments, options=("--name", "web")):
    """A container that has said that it is ready, and whose netns has its entrance."""
    process = lab.spawn_graft(*options, *python(program), *arguments, stdout=-1)
    assert process.stdout.readline() == "ready\n"
    inside = Inside(lab, options[options.index("--name") + 1])
    wait_for(lambda: has_entrance(lab, inside.path), "the entrance")
    return process, inside


def has_entrance(lab, netns):
    return "192.0.0.8" in lab.host("nsenter", f"--net={netns}", "ss", "-tlnH").stdout


def cpu_seconds(pid):
    """The processor time that a process has used, its threads' together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
