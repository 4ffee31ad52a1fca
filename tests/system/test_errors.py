"""The errno of calls that the kernel refuses whatever the rules say: the same program on the host and under graft."""

from graft.bench.lab import CLIENT4, CLIENT6
from tests.conftest import python

CODE = f"""
import ctypes, errno, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
v4, v6, tcp, udp = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
def inet(address, port=9, family=v4): return struct.pack('=H', family) + struct.pack('>H', port) + socket.inet_aton(address) + bytes(8)
def inet6(address, port=9, family=v6):
    return struct.pack('=H', family) + struct.pack('>HI', port, 0) + socket.inet_pton(v6, address) + bytes(4)
def tell(sock, *calls):
    told = []
    for call, name in calls:
        failed = libc.sendto(sock.fileno(), b'x', 1, 0, name, len(name)) < 0 if call == 'send' else getattr(libc, call)(sock.fileno(), name, len(name))
        told.append(errno.errorcode[ctypes.get_errno()] if failed else 'done')
    print(*told)
    sock.close()
for kind in (tcp, udp):
    tell(socket.socket(v4, kind), ('connect', inet6('::1')), ('connect', inet('127.0.0.1')), ('connect', inet6('::1')))
    tell(socket.socket(v6, kind), ('connect', inet6('::1', family=99)), ('bind', inet6('::1', family=99)))
    tell(socket.socket(v4, kind), ('bind', inet('127.0.0.1', family=0)), ('bind', inet('127.0.0.1', family=99)))
    tell(socket.socket(v4, kind), ('bind', inet('127.0.0.1')), ('bind', inet('127.0.0.1', family=99)), ('bind', inet('192.0.2.1')))
    tell(socket.socket(v6, kind), ('bind', inet6('::1', 3001)), ('connect', inet6('::ffff:127.0.0.1')), ('bind', inet6('2001:db8::1')))
    tell(socket.socket(v6, kind), ('bind', inet6('::ffff:127.0.0.1', 3002)), ('connect', inet6('{CLIENT6}')), ('connect', inet6('::1')))
    only = socket.socket(v6, kind)
    only.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    tell(only, ('bind', inet6('::ffff:192.0.2.1')), ('connect', inet6('::ffff:127.0.0.1')), ('connect', inet6('::ffff:{CLIENT4}')))
    tell(socket.socket(v4, kind), ('bind', inet('127.0.0.1', 3003)), ('connect', inet('{CLIENT4}')))
tell(socket.socket(v4, udp), ('connect', inet('127.0.0.1', 3004)), ('connect', inet('{CLIENT4}')))
tell(socket.socket(v4, udp), ('bind', inet('127.0.0.1', 3005)), ('send', inet('{CLIENT4}')))
tell(socket.socket(v6, udp), ('bind', inet6('::1', 3006)), ('send', inet6('::ffff:127.0.0.1')))
tell(socket.socket(v6, udp), ('bind', inet6('::ffff:127.0.0.1', 3007)), ('send', inet6('{CLIENT6}')), ('send', inet6('::1')))
with socket.create_server(('127.0.0.1', 3008)) as server, socket.create_connection(('127.0.0.1', 3008)) as client:
    tell(server.accept()[0], ('bind', inet('127.0.0.1', 3009)), ('bind', inet('0.0.0.0', 0)))
for family, level in ((v4, 0), (v6, 0), (v6, 41), (v4, 41), (v4, 6), (v4, 1)):
    sock, length = socket.socket(family, tcp), ctypes.c_uint32(4)
    for number in (63, 79, 126, 150, 199, 300, 70000):
        for call, size in (('getsockopt', ctypes.byref(length)), ('setsockopt', 4)):
            failed = getattr(libc, call)(sock.fileno(), level, number, bytes(8), size)
            print(level, number, call, errno.errorcode[ctypes.get_errno()] if failed else 'done')
"""


def test_errors_are_the_kernels(lab):
    host = lab.host(*python(CODE))
    assert host.returncode == 0, host.stderr
    assert "EINVAL" in host.stdout
    assert lab.graft("run", *python(CODE)).stdout == host.stdout
