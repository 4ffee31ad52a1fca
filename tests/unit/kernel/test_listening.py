"""Which ports have the wildcard address: of the kernel's own tables, in this test's namespace or in text."""

import socket

import pytest

from graft.kernel import listening

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
LINE = "   0: {} 00000000:0000 {} 00000000:00000000 00:00000000 00000000 {:>5}        0 1 1 0000000000000000\n"
ANY4, ANY6 = "0" * 8, "0" * 32


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Tables of sockets: of each kind lines of (address, port, state, uid)."""
    monkeypatch.setattr(listening, "TABLES", tmp_path)
    monkeypatch.setattr(listening, "ephemeral_ports", lambda: (32768, 60999))

    def write(**kinds):
        for kind, rows in kinds.items():
            lines = [LINE.format(f"{address}:{port:04X}", state, uid) for address, port, state, uid in rows]
            (tmp_path / kind).write_text(HEAD + "".join(lines))
        return listening.wildcard_ports(0x70000000)

    return write


def test_ports_on_the_wildcard(tables):
    found = tables(
        tcp=[(ANY4, 22, "0A", 0), ("0100007F", 631, "0A", 0), (ANY4, 8080, "0A", 0x70000001), (ANY4, 40000, "0A", 1000)],
        tcp6=[(ANY6, 10250, "0A", 0), (ANY6[:-8] + "01000000", 25, "0A", 0), (ANY6, 10250, "01", 0), (ANY6, 1, "0A", 0)],
        udp=[(ANY4, 53, "07", 0), (ANY4, 68, "01", 0), (ANY4, 40000, "07", 0), (ANY4, 5353, "07", 0x70000000)],
    )
    assert found == {(6, 22), (6, 40000), (6, 10250), (17, 53)}  # what stands after a connection is none of the listeners


def test_without_ipv6(tables):
    assert tables(tcp=[], udp=[]) == set()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_kernels_tables(family):
    with socket.socket(family) as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
        assert (6, port) not in listening.wildcard_ports(0x70000000)
        listener.listen()
        assert (6, port) in listening.wildcard_ports(0x70000000)
        assert (6, port) not in listening.wildcard_ports(0)
