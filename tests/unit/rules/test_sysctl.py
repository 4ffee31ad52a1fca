"""What becomes of a container's sysctls: options of sockets, ports, or nothing."""

import re
import socket
import struct
from pathlib import Path

import pytest

from graft.errors import Refused
from graft.kernel import sysctl as kernel
from graft.rules import sysctl

HOST = (32768, 60999)
NAMES = {*sysctl.CARRIERS, *sysctl.LISTENING, *sysctl.OWN, sysctl.PORT_RANGE, sysctl.CONGESTION}


def carried(name, value):
    options = sysctl.options_for(name, value, HOST)
    assert options is not None
    return options


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("net.core.somaxconn=1024", ("net.core.somaxconn", "1024")),
        ("net/core/somaxconn=1024", ("net.core.somaxconn", "1024")),
        ("net.ipv4.conf.eth0/1.forwarding=1", ("net.ipv4.conf.eth0/1.forwarding", "1")),
        ("net/ipv4/conf/eth0.1/forwarding=1", ("net.ipv4.conf.eth0/1.forwarding", "1")),
        ("net.ipv4.ip_local_port_range= 40000\t 50000 ", ("net.ipv4.ip_local_port_range", "40000 50000")),
        ("net.ipv4.x=a=b", ("net.ipv4.x", "a=b")),
    ],
)
def test_parsed(text, parsed):
    assert sysctl.parse_sysctl(text) == parsed


def test_every_name_has_a_meaning():
    """What an option carries is an option at both ends of its range, and nothing beyond; nobody else has one."""
    for name, carrier in sysctl.CARRIERS.items():
        for value in (carrier.least, carrier.most):
            (option,) = carried(name, str(value))
            assert option[:3] == carrier[:3]
            assert option.raw == carrier.values.get(value, value).to_bytes(4, "little")
        for text in (str(carrier.least - 1), str(carrier.most + 1), "", "x", "1 2", "+1", "\u0663"):
            assert sysctl.options_for(name, text, HOST) is None
    for name, (least, most) in sysctl.LISTENING.items():
        assert sysctl.options_for(name, str(least), HOST) == sysctl.options_for(name, str(most), HOST) == []
        assert sysctl.options_for(name, str(most + 1), HOST) is None
    for name in sysctl.OWN:
        assert sysctl.options_for(name, "anything", HOST) == []
    assert sysctl.options_for(sysctl.CONGESTION, "x" * 16, HOST) is None
    assert sysctl.options_for("net.ipv4.tcp_sack", "1", HOST) is None


def test_graft_sup_has_room_for_all():
    """csrc/sup_sockets.c, OPTIONS and OPTION_TEXT."""
    text = (Path(__file__).parents[3] / "csrc/sup_sockets.c").read_text()
    room, length = (int(re.findall(rf"#define {name} +(\d+)", text)[0]) for name in ("OPTIONS", "OPTION_TEXT"))
    assert len(sysctl.CARRIERS) + 1 + 2 <= room  # the congestion control, and the ports of TCP and of UDP
    (longest,) = carried(sysctl.CONGESTION, "x" * 15)
    assert len(longest.raw) < length


def test_the_documents_have_them_all():
    """docs/differences.md, "Sysctls"."""
    text = (Path(__file__).parents[3] / "docs/differences.md").read_text()
    section = text.partition("\n## Sysctls\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(net[.\w]+)`", section, re.M)) == NAMES


@pytest.mark.parametrize(
    ("value", "tcp", "udp"),
    [
        ("40000 41023", (40000, 41023), (40000, 41023)),
        ("40000 41022", None, None),
        ("32768 59234", (32768, 59234), (32768, 46883)),
        ("45860 50000", (45860, 50000), (45860, 46883)),
        ("45861 50000", None, None),
        ("32767 40000", None, None),
        ("40000 59235", None, None),
        ("40030 40000", None, None),
        ("40000", None, None),
        ("40000 x", None, None),
    ],
)
def test_ports(value, tcp, udp):
    texts = (f"{sysctl.PORT_RANGE}={value}",)
    if tcp is None:
        assert sysctl.options_for(sysctl.PORT_RANGE, value, HOST) is None
        assert sysctl.private_ports(texts, HOST) == sysctl.PRIVATE_PORTS
        return
    options = carried(sysctl.PORT_RANGE, value)
    assert [(o.kinds, *struct.unpack("=HH", o.raw)) for o in options] == [(sysctl.TCP, *tcp), (sysctl.UDP, *udp)]
    assert sysctl.private_ports(texts, HOST) == tcp
    assert sysctl.socket_options(texts, HOST) == tuple(options)


def test_ports_of_a_host_with_others():
    """Where the kernel may choose lower ones, the bind hook may not; where it has few, a container has fewer."""
    assert sysctl.range_bounds((1024, 65535)) == (32768, 61439)
    assert sysctl.options_for(sysctl.PORT_RANGE, "10000 20000", (1024, 65535)) is None
    assert sysctl.range_bounds((50000, 50160)) == (50000, 50150)


def test_bits_of_private_ports():
    everything = sysctl.taken_ports(sysctl.PRIVATE_PORTS)
    assert everything == bytes(8 * sysctl.NUMBERS_WORDS)
    some = int.from_bytes(sysctl.taken_ports((40000, 40030)), "little")
    free = [n + sysctl.NUMBERS_FIRST for n in range(64 * sysctl.NUMBERS_WORDS) if not some >> n & 1]
    assert free == list(range(40000, 40031))


def test_kinds():
    kinds = [sysctl.kind_of(f, t) for f, t in ((socket.AF_INET, 1), (socket.AF_INET6, 1), (socket.AF_INET, 2), (socket.AF_INET6, 2))]
    assert kinds == [1, 2, 4, 8]


def test_nothing_is_refused_with_ignore():
    with pytest.raises(Refused, match="it acts on no socket"):
        kernel.check(("net.ipv4.nonesuch=1",), HOST)
    kernel.check(("net.ipv4.nonesuch=1", "ignore"), HOST)
    assert sysctl.socket_options(("net.ipv4.nonesuch=1", "net.ipv4.tcp_fin_timeout=0", "ignore"), HOST) == ()
