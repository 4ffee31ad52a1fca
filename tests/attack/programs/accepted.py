"""Device requests on sockets that graft has not made itself: accepted ones, and such that a thread swaps meanwhile."""

import array
import ctypes
import fcntl
import os
import socket
import struct
import threading

from .common import ATTACKS, LO, TCP, UDP, V4, accepted, attack
from .options import DEVICE_REQUESTS

VETH = struct.pack("16s240x", b"veth0")
UP = struct.pack("16sH238x", b"veth0", 0x1143)
SIOCGSKNS = 0x894C
TRIES = 600


def ask(request, argument=0):
    """Ask by an accepted socket."""
    sock, _peer = accepted()
    return fcntl.ioctl(sock.fileno(), request, argument)


def device(request):
    def tries():
        ask(request, VETH)

    return tries


ATTACKS |= {f"accepted_{name}": device(request) for name, request in DEVICE_REQUESTS.items()}


@attack
def accepted_lists_the_devices():
    buffer = array.array("B", bytes(4000))
    asked = struct.pack("=i4xQ", len(buffer), buffer.buffer_info()[0])
    count = struct.unpack_from("=i", ask(0x8912, asked))[0] // 40
    names = (buffer.tobytes()[n * 40 : n * 40 + 16].split(b"\0")[0].decode() for n in range(count))
    return ",".join(dict.fromkeys(names))  # a device has a line for each of its addresses


@attack
def accepted_gives_the_hosts_namespace():
    ask(SIOCGSKNS)


@attack
def accepted_tells_the_driver():
    """SIOCETHTOOL with a question that anybody may ask."""
    question = ctypes.create_string_buffer(struct.pack("=I", 3), 196)
    ifreq = struct.pack("=16sQ16x", b"veth0", ctypes.addressof(question))
    ask(0x8946, ifreq)
    return question.raw[4:36].split(b"\0")[0].decode()


def no_socket():
    return os.fdopen(os.open("/dev/null", os.O_RDONLY))


def swapped(request, argument, base=None):
    """An accepted socket is put at the number of an own one, or of none at all, while the request is under way."""

    def tries():
        theirs, _peer = accepted()
        ours = base() if base else socket.socket(socket.AF_UNIX, UDP)
        number = os.dup(ours.fileno())
        done = False

        def swap():
            while not done:
                os.dup2(theirs.fileno(), number)
                os.dup2(ours.fileno(), number)

        swapper = threading.Thread(target=swap)
        swapper.start()
        won = False
        try:
            for _ in range(TRIES):
                try:
                    told = fcntl.ioctl(number, request, argument)
                except OSError:
                    continue
                if request == SIOCGSKNS:
                    won = won or os.fstat(told).st_ino != os.stat("/proc/self/ns/net").st_ino
                    os.close(told)
                else:
                    won = True
        finally:
            done = True
            swapper.join()
        return "OK" if won else "NEVER"

    return tries


SWAPS = {
    "swap_reads_the_hardware_address": (0x8927, VETH),
    "swap_changes_the_flags": (0x8914, UP),
    "swap_gives_the_namespace": (SIOCGSKNS, 0),
    "swap_under_no_socket": (0x8914, UP, no_socket),
    "swap_reads_under_no_socket": (0x8927, VETH, no_socket),
}
ATTACKS |= {name: swapped(*words) for name, words in SWAPS.items()}


@attack
def accepted_and_own_ones_do_not_differ():
    """Whichever socket is asked, lo is the container's."""
    with socket.socket(socket.AF_UNIX, TCP) as own, socket.socket(V4, UDP) as grafted:
        grafted.connect(LO)
        theirs, _peer = accepted()
        for sock in (own, grafted, theirs):
            index = struct.unpack_from("=i", fcntl.ioctl(sock.fileno(), 0x8933, struct.pack("16s24x", b"lo")), 16)[0]
            if index != socket.if_nametoindex("lo"):
                return "OTHERS"
    return "OWN"
