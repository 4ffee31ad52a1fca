"""Options of lengths that the kernel refuses, or that a hook sees a part of; options that are changed meanwhile."""

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import struct
import threading
import time
from functools import partial

from .common import ATTACKS, HOST, LO, TCP, UDP, V4, V6, attack, libc, option
from .netns import wrong
from .ports import by_chance

V6ONLY = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
ATTACKS |= {
    "udp_reuseaddr_of_no_length": option(1, 2, b""),
    "udp_reuseaddr_of_one_byte": option(1, 2, b"\1"),
    "udp_reuseport_of_three_bytes": option(1, 15, b"\1\0\0"),
    "udp_encap": option(17, 100, 2),
    "udp_encap_by_udplite": option(136, 100, 2),
    "level_of_mptcp": option(284, 1, 1),
    "option_of_a_newer_kernel": option(1, 85, 1),
    "so_priority_over_a_page": option(1, 12, (7).to_bytes(4, "little") + bytes(8188)),
}
ATTACKS |= {
    "tcp_ulp_over_a_page": partial(option(6, 31, b"smc".ljust(8192, b"\0")), kind=TCP),
    "tcp_ulp_that_begins_well": partial(option(6, 31, b"tls-no"), kind=TCP),
}


def bind_to_any(s):
    """Bind where a rule may give IPv6 alone. TAKEN: what is sent over IPv4 to the published ports arrives."""
    s.bind(("::", 54))
    return "TAKEN" if hears_ipv4(s, 0.2) else "HELD"


def hears_ipv4(s, seconds):
    """Does what is sent over IPv4 to the published ports arrive at @s?"""
    s.settimeout(seconds)
    with socket.socket(V4, UDP) as sender, contextlib.suppress(OSError):
        for port in range(8060, 8068):
            sender.sendto(b"x", (HOST, port))
        s.recv(1)
        return True
    return False


def short_v6only(length):
    def tries():
        with socket.socket(V6, UDP) as s:
            value = ctypes.create_string_buffer(b"\1" + bytes(length))
            if libc.setsockopt(s.fileno(), *V6ONLY, value, length) == 0:
                return "TAKEN"
            return bind_to_any(s)

    return tries


ATTACKS |= {f"v6only_of_{length}_bytes": short_v6only(length) for length in (0, 1, 3)}


@attack
def v6only_beside_the_bind():
    """Another thread sets it and clears it while the bind is decided and done."""
    for _ in range(300):
        with socket.socket(V6, UDP) as s:
            s.setsockopt(*V6ONLY, 1)

            def change(s=s):
                for value in (0, 1) * 6 + (0,):
                    with contextlib.suppress(OSError):
                        s.setsockopt(*V6ONLY, value)

            thread = threading.Thread(target=change)
            thread.start()
            with contextlib.suppress(OSError):
                s.bind(("::", 54))
            thread.join()
            if not s.getsockopt(*V6ONLY) and s.getsockname()[1] and hears_ipv4(s, 0.1):
                return "TAKEN"
    return "HELD"


def changing(first, second):
    """8192 bytes that another process changes all the time, and how to end it."""
    text = mmap.mmap(-1, 8192)
    child = os.fork()
    if child == 0:
        while True:
            text[: len(first)] = first
            text[: len(second)] = second
    return ctypes.c_char.from_buffer(text), child


@attack
def race_so_priority_over_a_page():
    text, child = changing(b"\0", b"\x64")
    try:
        with socket.socket(V4, UDP) as s:
            for _ in range(20000):
                libc.setsockopt(s.fileno(), 1, 12, ctypes.byref(text), 8192)
                if s.getsockopt(1, 12) > 6:
                    return "SET"
    finally:
        os.kill(child, signal.SIGKILL)
    return "HELD"


@attack
def race_v6only_over_a_page():
    text, child = changing(b"\0", b"\1")
    try:
        for _ in range(50):
            with socket.socket(V6, UDP) as s:
                libc.setsockopt(s.fileno(), *V6ONLY, ctypes.byref(text), 8192)
                with contextlib.suppress(OSError):
                    if bind_to_any(s) == "TAKEN":
                        return "TAKEN"
    finally:
        os.kill(child, signal.SIGKILL)
    return "HELD"


@attack
def udp_port_by_chance_after_a_failed_bind():
    """The options hold for the port that a bind names. This one fails, and the kernel then chooses another."""
    taken = socket.socket(V4, UDP)
    taken.bind(("127.0.0.1", 5353))

    def fail(s):
        with contextlib.suppress(OSError):
            s.bind(("127.0.0.1", 5353))
        s.sendto(b"", LO)

    return by_chance(fail)


def packet_by_a_timestamp(sends):
    """What comes back with a time stamp of a sent datagram: nothing else, or the packet, with hardware addresses."""
    with socket.socket(V4, UDP) as server, socket.socket(V4, UDP) as s:
        server.bind(("127.0.0.1", 5354))
        sends(s)
        for _ in range(50):
            with contextlib.suppress(BlockingIOError):
                data, told, _, _ = s.recvmsg(4096, 1024, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
                return "PACKET" if data else "ALONE" if told else "NOTHING"
            time.sleep(0.01)
    return "NEVER"


STAMPS = 0x2 | 0x10 | 0x100  # of sending and of the queue, by software


@attack
def packet_by_a_timestamp_of_a_socket():
    def sends(s, name, value):
        s.setsockopt(1, name, value)
        s.sendto(b"x", ("127.0.0.1", 5354))

    flags = struct.pack("=i", STAMPS)
    tries = [(name, flags + more) for name in (37, 65) for more in (b"", bytes(4), bytes(9000))]
    told = {f"{name}-{len(value)}": packet_by_a_timestamp(partial(sends, name=name, value=value)) for name, value in tries}
    return wrong(told, "ALONE") or "ALONE"


@attack
def packet_by_a_timestamp_of_a_message():
    """A control message asks for the stamp, and the socket says with what."""

    def sends(s):
        s.sendmsg([b"x"], [(1, 37, struct.pack("=I", STAMPS & ~0x10))], 0, ("127.0.0.1", 5354))

    return packet_by_a_timestamp(sends)
