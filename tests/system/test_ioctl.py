"""ioctl() on devices: what goes on to work on a program's own sockets, and what sockets from elsewhere are asked."""

import socket

import pytest

from graft.bench.lab import GRAFT, HOST4, wait_for
from tests.conftest import need, python

LINKS = """
import array, fcntl, socket, struct
def links(sock):
    room = array.array('B', bytes(4000))
    told = fcntl.ioctl(sock.fileno(), 0x8912, struct.pack('=i4xQ', len(room), room.buffer_info()[0]))
    count = struct.unpack_from('=i', told)[0] // 40
    return ' '.join(room.tobytes()[n * 40 : n * 40 + 16].split(b'\\0')[0].decode() for n in range(count))
def up(sock, name=b'lo'):
    flags = fcntl.ioctl(sock.fileno(), 0x8913, struct.pack('16s24x', name))
    fcntl.ioctl(sock.fileno(), 0x8914, flags[:16] + struct.pack('=H22x', flags[16] | flags[17] << 8 | 1))
"""


@pytest.fixture
def path(lab):
    where = lab.work / "own.sock"
    yield where
    where.unlink(missing_ok=True)


@pytest.mark.parametrize("who", ["root", "userns"])
def test_a_namespace_inside_is_the_programs_own(lab, who):
    """A sandbox in the container makes a netns, and sets its loopback up by ioctl()."""
    need("unshare")
    code = LINKS + "s = socket.socket(); print(links(s)); up(s); up(s); print(links(s))"
    unshared = ("unshare", "--net", *(("--user", "--map-root-user") if who == "userns" else ()))
    result = lab.graft("run", *unshared, *python(code))
    assert result.stdout == "\nlo\n", result.stderr


def test_own_sockets_are_asked_and_changed(lab):
    """By root with all of root's capabilities, whose requests graftd carries out."""
    need("ip")
    code = LINKS + (
        "import subprocess\n"
        "subprocess.run('ip link add d0 type veth peer name d1; ip address add 10.99.0.1/24 dev d0', shell=True, check=True)\n"
        "for s in (socket.socket(2, 3, 1), socket.socket(16, 3), socket.socket(1, 2), socket.socket(17, 3)):\n"
        "  up(s, b'd0'); print(links(s))\n"
        "raw = socket.socket(2, 3, 1)\n"
        "name = array.array('B', b'd0'.ljust(16, b'\\0'))\n"
        "ip = lambda a: struct.pack('=HH4s8x', 2, 0, socket.inet_aton(a))\n"
        "route = struct.pack('=8x16s16s16sH2x4x8x8xh6xQQQH6x', ip('10.98.0.0'), ip('0.0.0.0'), ip('255.255.0.0'), 1, 0, name.buffer_info()[0], 0, 0, 0)\n"
        "fcntl.ioctl(raw.fileno(), 0x890b, route)\n"
        "fcntl.ioctl(raw.fileno(), 0x8922, struct.pack('16si20x', b'd0', 1300))\n"
        "ethtool = array.array('B', struct.pack('=I192x', 3))\n"
        "fcntl.ioctl(raw.fileno(), 0x8946, struct.pack('=16sQ16x', b'd0', ethtool.buffer_info()[0]))\n"
        "print(ethtool.tobytes()[4:36].split(b'\\0')[0].decode())\n"
        "print(socket.if_nameindex()[0], subprocess.run(('ip', '-o', 'route', 'show', 'dev', 'd0'), capture_output=True, text=True).stdout.split()[0])\n"
        "print(open('/sys/class/net/d0/mtu').read(), end='')\n"
    )
    result = lab.graft("run", "--interface", "none", *python(code))
    assert result.stdout == "lo d0\n" * 4 + "veth\n(1, 'lo') 10.98.0.0/16\n1300\n", result.stderr


@pytest.mark.parametrize("way", ["accepted", "passed"])
def test_sockets_from_the_host_show_the_container(lab, path, way):
    """A unix socket that a server accepted is in its client's netns; one that was passed in is in its maker's."""
    how = "c" if way == "accepted" else "socket.recv_fds(c, 9, 1)[1][0]"
    code = LINKS + (
        f"s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen(); c, _ = s.accept()\n"
        f"theirs = {how}\n"
        "theirs = theirs if isinstance(theirs, socket.socket) else socket.socket(fileno=theirs)\n"
        "print(links(theirs))\n"
        "try: up(theirs); print('changed')\n"
        "except OSError as e: print(e.errno)\n"
    )
    server = lab.spawn(GRAFT, "run", "--interface", "none", *python(code), stdout=-1)
    with socket.socket(socket.AF_UNIX) as client, socket.socket() as given:
        wait_for(lambda: client.connect_ex(str(path)) == 0, "the server")
        if way == "passed":
            socket.send_fds(client, [b"x"], [given.fileno()])
        assert server.communicate(timeout=20)[0] == "lo\n1\n"


def test_a_wrapper_at_home_keeps_what_the_host_has(lab):
    code = LINKS + (
        "server = socket.socket(); server.setsockopt(1, 2, 1); server.bind(('0.0.0.0', 7999)); server.listen(); print('up', flush=True)\n"
        "print('veth0' in links(server.accept()[0]), 'veth0' in links(socket.socket(16, 3)))"
    )
    lab.add_endpoints({"home-ep": f"type ipv4 addr {HOST4} port 7999"})
    try:
        server = lab.spawn(GRAFT, "-i", "0.0.0.0:7999=home-ep", "--", *python(code), stdout=-1)
        assert server.stdout.readline() == "up\n"
        lab.client(*python(f"import socket; socket.create_connection(({HOST4!r}, 7999)).recv(1)"))
        assert server.communicate(timeout=20)[0] == "True True\n"
    finally:
        lab.delete_endpoints(["home-ep"])


def test_ifconfig(lab):
    """It asks by an internet socket, which is grafted: it shows the container, and changes nothing."""
    need("ifconfig")
    result = lab.graft("run", "sh", "-c", "ifconfig lo; ifconfig -a; ifconfig lo down")
    assert result.stdout.count("LOOPBACK") == 2, result.stderr
    assert result.stderr == "SIOCSIFFLAGS: Operation not permitted\n"
