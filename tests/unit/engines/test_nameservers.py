"""Whom the resolver asks for a container: its engine's nameservers, or else the host's."""

import json
import os
import socket
from types import SimpleNamespace

import pytest

from graft.engines import nameservers
from graft.engines.nameservers import Nameservers, named_by_engine, where_to_ask
from graft.kernel.addresses import nameservers_in
from graft.tenants.tenant import Member


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.setattr(nameservers, "nameservers", lambda: ["192.0.2.53"])

    def asked(container, daemon="{}", engine="docker"):
        (tmp_path / "hostconfig.json").write_text(container)
        (tmp_path / "daemon.json").write_text(daemon)
        member = Member(engine, "web", str(tmp_path) if engine == "docker" else "")
        tenant = SimpleNamespace(id=7, members={"web": member}, policy=None, asks_graft=False)
        return Nameservers(tmp_path / "daemon.json").of(tenant)  # type: ignore[arg-type]

    return asked


@pytest.mark.parametrize(
    ("container", "daemon", "told"),
    [
        ({"Dns": ["10.0.0.1", "fd00::1", "10.0.0.1"]}, {"dns": ["10.0.0.2"]}, ["10.0.0.1", "fd00::1"]),
        ({"Dns": []}, {"dns": ["10.0.0.2"]}, ["10.0.0.2"]),
        ({"Dns": None}, {}, ["192.0.2.53"]),
        ({"Dns": ["127.0.0.1", "::1", "0.0.0.0", "no address", 7]}, {}, ["192.0.2.53"]),
        ({"Dns": ["fe80::1%eth0", "10.0.0.1"]}, {}, ["fe80::1%eth0", "10.0.0.1"]),
        ({"Dns": 5}, {"dns": {"a": 1}}, ["192.0.2.53"]),
        ([], None, ["192.0.2.53"]),
    ],
)
def test_dockers(asked, container, daemon, told):
    assert asked(json.dumps(container), json.dumps(daemon)) == told


def test_files_that_are_none(asked):
    assert asked("{", "[" * 100_000) == ["192.0.2.53"]


def test_a_zone_is_a_device():
    assert where_to_ask("192.0.2.1") == ("192.0.2.1", 53)
    assert where_to_ask("fe80::1%lo") == ("fe80::1", 53, 0, socket.if_nametoindex("lo"))
    with pytest.raises(OSError, match="no interface with this name"):
        where_to_ask("fe80::1%no-such-device")


def test_a_file_of_the_hosts():
    text = "# nameserver 1.1.1.1\nnameserver fe80::1%eth0\nnameserver 192.0.2.1 # first\nnameserver name\nnameserver\nsearch x\n"
    assert nameservers_in(text) == ["fe80::1%eth0", "192.0.2.1"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nameserver 192.0.2.1\nnameserver 127.0.0.11\nnameserver fe80::1%eth0\n", ["192.0.2.1", "fe80::1%eth0"]),
        ("nameserver fe80::1\nnameserver ::\nnameserver 250.64.0.1\nnameserver fd67:7261:6674::1\n", []),
        ("nameserver 192.0.2.1\n" * 100, ["192.0.2.1"] * 8),
        ("#" * 70000 + "\nnameserver 192.0.2.1\n", []),
        ("\xff\0", []),
    ],
)
def test_what_an_engine_has_written(tmp_path, text, told):
    (tmp_path / "resolv.conf").write_text(text)
    config = {"mounts": [{"destination": "/etc/resolv.conf", "source": "/resolv.conf"}]}
    assert named_by_engine(config, str(tmp_path)) == told


def test_what_no_engine_has_written(tmp_path):
    """No file, one of another kind, and a link out of what the engine sees."""
    outside = tmp_path / "outside"
    outside.write_text("nameserver 192.0.2.1\n")
    root = tmp_path / "root"
    root.mkdir()
    os.mkfifo(root / "fifo")
    (root / "link").symlink_to(outside)
    (root / "directory").mkdir()
    for source in ("/fifo", "/link", "/directory", "/none", "relative", "", "/\0"):
        assert named_by_engine({"mounts": [{"destination": "/etc/resolv.conf", "source": source}]}, str(root)) == []
    assert named_by_engine({"mounts": None}, str(root)) == named_by_engine({}, str(root)) == []


def test_podman_asks_by_itself(asked):
    assert asked("{}", json.dumps({"dns": ["10.0.0.2"]}), engine="podman") == ["192.0.2.53"]
