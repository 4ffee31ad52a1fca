"""No kernel tunnel takes a container's UDP socket (csrc/tunnels.bpf.c).

The modules are those of Debian's kernel, which is booted in emulation: `make test-kernel` sets GRAFT_MODULES.
"""

import errno
import lzma
import os
import subprocess
from pathlib import Path

import pytest

from graft.bench.lab import laboratory
from graft.kernel.libbpf import TUNNELS_OBJECT, try_load
from tests.conftest import need_root, python

MODULES = os.environ.get("GRAFT_MODULES", "")
INSMOD = os.environ.get("GRAFT_INSMOD", "insmod").split()
LOADED = ("net/ipv4/udp_tunnel.ko", "net/ipv6/ip6_udp_tunnel.ko", "drivers/net/gtp.ko")

# RTM_NEWLINK of a kind, as rtnetlink(7) has it; prints the errno of the answer
PROGRAM = """
import os, socket, struct, sys
def attribute(kind, data):
    return (struct.pack("=HH", len(data) + 4, kind) + data).ljust((len(data) + 7) & ~3, b"\\0")
def link(name, *infos):
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attribute(3, name.encode() + b"\\0") + b"".join(
        attribute(18 | 0x8000, info) for info in infos)
    return struct.pack("=IHHII", len(body) + 16, 16, 0x605, 1, 0) + body
def told(message):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as door:
        try: door.send(message)
        except OSError as error: return -error.errno
        return struct.unpack_from("=i", door.recv(4096), 16)[0]
udp = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
fds = b"".join(attribute(n + 1, struct.pack("=I", one.fileno())) for n, one in enumerate(udp))
def kind(name, data=b""): return attribute(1, name.encode()) + attribute(2, data)
gtp = kind("gtp", fds + attribute(3, struct.pack("=I", 16)))
bridge = kind("bridge")
for message in (
    link("g1", gtp),  # plain
    link("g2", bridge, gtp),  # the last attribute counts
    link("g3", attribute(1, b"bridge") + gtp),
    link("b1", bridge) + link("g4", gtp),  # behind another message
    link("g5", kind("gtp\\0bridge", fds + attribute(3, struct.pack("=I", 16)))),
    link("g6", kind("nobody knows it")),
    link("b2", bridge),
    link("v1", kind("veth\\0")),
):
    print(told(message))
"""


def insert(module, work):
    """Load a module of MODULES, which Debian compresses from 6.12 on, and not every insmod reads that."""
    file = Path(MODULES, module)
    if not file.exists():
        file = work / file.name
        file.write_bytes(lzma.decompress(Path(MODULES, f"{module}.xz").read_bytes()))
    subprocess.run([*INSMOD, file], check=True)


@pytest.mark.kernel
def test_no_device_takes_a_containers_socket(tmp_path):
    need_root()
    if not MODULES:
        pytest.skip("it takes the module gtp, which 'make test-kernel' has")
    for module in LOADED:
        if not Path("/sys/module", Path(module).stem).exists():
            insert(module, tmp_path)
    assert try_load(TUNNELS_OBJECT) == 2
    with laboratory("tunnel") as lab:
        refused = f"{-errno.EPERM}\n"
        inside = lab.graft("run", *python(PROGRAM), check=True).stdout
        assert inside == refused * 6 + "0\n0\n"
        outside = lab.client(*python(PROGRAM), check=True).stdout.splitlines()
        assert outside[0] == "0"  # the attack is one
        assert outside[6:] == ["0", "0"]
