"""Carries out sequences of socket calls and says what came of each: the same program on a host and under graft.

usage: python3 program.py CONFIG; CONFIG is JSON: names (addresses by symbol), fixed (ports shown as they are), outside (the
path of outside.py's socket). It reads a line [patience, sequence] of JSON and answers with a line, a text for each call. With
patience, a number of seconds, it waits before whatever depends on what others do; without, it only looks.

Ports that the kernel chooses are shown as p1, p2 ... in the order in which they appear. Each socket of a sequence is closed
at its end by a reset, so that no connection is left which would be in the next one's way.
"""

import array
import ctypes
import errno
import json
import os
import select
import socket
import struct
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
FAMILIES = {"UNSPEC": 0, "INET": socket.AF_INET, "INET6": socket.AF_INET6}
TYPES = {"STREAM": socket.SOCK_STREAM, "DGRAM": socket.SOCK_DGRAM}
SIZE = 4096
DONTWAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
LOOK = 0.0005  # s, without patience
CONNECTING = 1  # s


def failed():
    """The name of the errno."""
    number = ctypes.get_errno()
    return errno.errorcode.get(number, f"errno {number}")


class Program:
    """One sequence; each method without an underscore is a call."""

    def __init__(self, config):
        self._names = config["names"]
        self._symbols = {address: symbol for symbol, address in self._names.items()}
        self._fixed = set(config["fixed"])
        self._outside = socket.socket(socket.AF_UNIX)
        self._outside.connect(config["outside"])
        self._answers = self._outside.makefile()
        self._buffer = ctypes.create_string_buffer(SIZE)
        self._name = ctypes.create_string_buffer(128)
        self._length = ctypes.c_uint32()
        self._begin(0)

    def _begin(self, patience):
        self._fds, self._ports, self._patience, self._visited = {}, {}, patience, False

    def run(self, patience, sequence):
        """The texts of a sequence's calls."""
        self._begin(patience)
        time.sleep(patience)
        try:
            return [self._call(call) for call in sequence]
        finally:
            self._reset()

    def _call(self, call):
        try:
            return getattr(self, call[0])(*call[1:])
        except KeyError:
            return "no such socket"

    def _reset(self):
        if self._visited:
            self._ask({"do": "end"})
        for fd in dict.fromkeys(self._fds.values()):
            libc.setsockopt(fd, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0), 8)
            os.close(fd)

    def _ask(self, what):
        self._outside.sendall((json.dumps(what) + "\n").encode())
        return json.loads(self._answers.readline())

    def _wait(self, fd, events):
        poll = select.poll()
        poll.register(fd, events)
        if poll.poll(1000 * (self._patience or LOOK)) and self._patience:
            time.sleep(LOOK)  # what is about to follow

    def _port(self, port):
        if not port or port in self._fixed:
            return str(port)
        return self._ports.setdefault(port, f"p{len(self._ports) + 1}")

    def _told(self, name, length):
        """A socket address as text."""
        if not length:
            return "-"
        family = int.from_bytes(name[:2], sys.byteorder)
        port = self._port(int.from_bytes(name[2:4], "big"))
        if family == socket.AF_INET and length == 16:
            ip = socket.inet_ntop(family, name[4:8])
            return f"{self._symbols.get(ip, ip)}:{port}"
        if family == socket.AF_INET6 and length == 28:
            ip = socket.inet_ntop(family, name[8:24])
            more = int.from_bytes(name[4:8], "big") or int.from_bytes(name[24:28], sys.byteorder)
            mapped = ip.removeprefix("::ffff:")
            ip = f"::ffff:{self._symbols[mapped]}" if ip != mapped and mapped in self._symbols else self._symbols.get(ip, ip)
            return f"[{ip}]:{port}" + (f" {name[4:8].hex()} {name[24:28].hex()}" if more else "")
        return f"family {family}, {length} bytes"

    def _address(self, where):
        """A struct sockaddr from [family, address, port or "=slot", optional length]."""
        family, address, port, *length = where
        if isinstance(port, str):
            port = self._own_port(self._fds[int(port[1:])])
        mapped = address.removeprefix("::ffff:")
        address = f"::ffff:{self._names[mapped]}" if mapped != address and mapped in self._names else self._names.get(address, address)
        head = FAMILIES[family].to_bytes(2, sys.byteorder) + port.to_bytes(2, "big")
        if ":" in address:
            text = head + bytes(4) + socket.inet_pton(socket.AF_INET6, address) + bytes(4)
        else:
            text = head + socket.inet_pton(socket.AF_INET, address) + bytes(8)
        return text[: length[0]].ljust(length[0], b"\0") if length else text

    def _own_port(self, fd):
        self._length.value = 128
        libc.getsockname(fd, self._name, ctypes.byref(self._length))
        return int.from_bytes(self._name.raw[2:4], "big")

    def socket(self, slot, family, kind):
        fd = libc.socket(FAMILIES[family], TYPES[kind], 0)
        if fd < 0:
            return failed()
        libc.setsockopt(fd, socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", CONNECTING, 0), 16)
        self._put(slot, fd)
        return "0"

    def _put(self, slot, fd):
        if slot in self._fds:
            os.close(self._fds[slot])
        self._fds[slot] = fd

    def close(self, slot):
        os.close(self._fds.pop(slot))
        return "0"

    def bind(self, slot, where):
        name = self._address(where)
        return failed() if libc.bind(self._fds[slot], name, len(name)) else "0"

    def connect(self, slot, where):
        """Of a blocking socket."""
        name = self._address(where)
        if not libc.connect(self._fds[slot], name, len(name)):
            return "0"
        return "nobody answers" if ctypes.get_errno() == errno.EINPROGRESS else failed()

    def begin(self, slot, where):
        """connect() of a socket that does not block, and its end: the error is the same, what it leaves is not."""
        name, fd = self._address(where), self._fds[slot]
        os.set_blocking(fd, False)
        done = libc.connect(fd, name, len(name))
        number = ctypes.get_errno()
        os.set_blocking(fd, True)
        if not done:
            return "0"
        if number != errno.EINPROGRESS:
            return errno.errorcode[number]
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if not poll.poll(1000 * CONNECTING):
            return "nobody answers"
        error = ctypes.c_int()
        self._length.value = 4
        libc.getsockopt(fd, socket.SOL_SOCKET, socket.SO_ERROR, ctypes.byref(error), ctypes.byref(self._length))
        return "0" if not error.value else errno.errorcode[error.value]

    def listen(self, slot, backlog):
        return failed() if libc.listen(self._fds[slot], backlog) else "0"

    def accept(self, slot, new):
        fd = self._fds[slot]
        self._wait(fd, select.POLLIN)
        self._length.value = 128
        os.set_blocking(fd, False)
        got = libc.accept4(fd, self._name, ctypes.byref(self._length), 0)
        told = failed()
        os.set_blocking(fd, True)
        if got < 0:
            return told
        self._put(new, got)
        return f"from {self._told(self._name.raw, self._length.value)}"

    def send(self, slot, text, where=None):
        name = self._address(where) if where else None
        text = text.encode()
        sent = libc.sendto(self._fds[slot], text, len(text), DONTWAIT, name, len(name) if name else 0)
        return failed() if sent < 0 else str(sent)

    def recv(self, slot, named):
        fd = self._fds[slot]
        self._wait(fd, select.POLLIN)
        self._length.value = 128
        got = libc.recvfrom(
            fd, self._buffer, SIZE, DONTWAIT, self._name if named else None, ctypes.byref(self._length) if named else None
        )
        if got < 0:
            return failed()
        text = self._buffer.raw[:got].decode()
        return f"'{text}' from {self._told(self._name.raw, self._length.value)}" if named else f"'{text}'"

    def name(self, slot):
        return self._ask_name(libc.getsockname, slot)

    def peer(self, slot):
        return self._ask_name(libc.getpeername, slot)

    def _ask_name(self, call, slot):
        self._length.value = 128
        if call(self._fds[slot], self._name, ctypes.byref(self._length)):
            return failed()
        return self._told(self._name.raw, self._length.value)

    def set(self, slot, level, option, value, length):
        """setsockopt() with @length bytes that begin with the number @value, or the text."""
        text = value.encode() if isinstance(value, str) else value.to_bytes(4, sys.byteorder, signed=True)
        text = text[:length].ljust(length, b"\0")
        return failed() if libc.setsockopt(self._fds[slot], level, option, text, length) else "0"

    def get(self, slot, level, option, length):
        ctypes.memset(self._buffer, 0, 256)
        self._length.value = length
        if libc.getsockopt(self._fds[slot], level, option, self._buffer, ctypes.byref(self._length)):
            return failed()
        return self._buffer.raw[: min(self._length.value, 256)].hex() or "nothing"

    def shutdown(self, slot, how):
        return failed() if libc.shutdown(self._fds[slot], how) else "0"

    def dup(self, slot, new):
        self._put(new, os.dup(self._fds[slot]))
        return "0"

    def hand(self, slot, new):
        """Send the socket to itself over a unix socket (SCM_RIGHTS)."""
        here, there = socket.socketpair()
        with here, there:
            here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self._fds[slot]]))])
            _, control, _, _ = there.recvmsg(1, socket.CMSG_SPACE(4))
            self._put(new, int.from_bytes(control[0][2], sys.byteorder))
        return "0"

    def fork(self, calls):
        """Let a child do the calls."""
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.write(write, json.dumps([self._call(call) for call in calls]).encode())
            os._exit(0)
        os.close(write)
        with open(read) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        return ", ".join(json.loads(text)) if text else "the child died"

    def visit(self, kind, where, text):
        """Somebody outside connects here, or sends a datagram, which says @text."""
        self._visited = True
        return self._ask({"do": "visit", "kind": kind, "to": [self._names[where[1]], where[2]], "text": text})

    def hear(self):
        """What the last visitor was answered."""
        told = self._ask({"do": "hear", "wait": self._patience or LOOK})
        return told if isinstance(told, str) else f"'{told[0]}' from {self._symbols.get(told[1], told[1])}:{self._port(told[2])}"


def main():
    """A line of JSON in, a line of JSON out."""
    program = Program(json.loads(sys.argv[1]))
    print("[]", flush=True)
    for line in sys.stdin:
        print(json.dumps([program.run(*one) for one in json.loads(line)]), flush=True)


if __name__ == "__main__":
    main()
