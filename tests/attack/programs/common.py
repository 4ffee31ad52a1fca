"""What attacks share. In a container this package is `programs`, with the addresses of the laboratory as arguments."""

import ctypes
import socket
import struct
import sys
from collections.abc import Callable

HOST, CLIENT, SECOND, HOST6, OTHER, COMPILED = sys.argv[1:] if __package__ == "programs" else ("10.0.0.1", "10.0.0.2", "10.0.0.3", "::1", "", "")
CLIENT6 = "2001:db8:77::2"
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
V4, V6 = socket.AF_INET, socket.AF_INET6
CHANCES = 12000
LO = ("127.0.0.1", 9)
ATTACKS: dict[str, Callable[[], str | None]] = {}
libc = ctypes.CDLL(None, use_errno=True)


def attack(function):
    ATTACKS[function.__name__] = function
    return function


def disconnect(sock):
    address = struct.pack("=H14x", 0)
    if libc.connect(sock.fileno(), address, len(address)):
        raise OSError(ctypes.get_errno(), "disconnect")


def option(level, name, value):
    """An attack that sets an option."""

    def tries(family=V4, kind=UDP):
        socket.socket(family, kind).setsockopt(level, name, value)

    return tries


def accepted():
    """An accepted socket, and its peer."""
    with socket.socket(V4, TCP) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        c = socket.create_connection(server.getsockname())
        return server.accept()[0], c
