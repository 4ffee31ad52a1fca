"""Whom the resolver asks for a container: its engine's nameservers, or else the host's."""

import json
import socket
from types import SimpleNamespace

import pytest

from graft.engines import nameservers
from graft.engines.nameservers import Nameservers, where_to_ask
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


def test_podman_asks_by_itself(asked):
    assert asked("{}", json.dumps({"dns": ["10.0.0.2"]}), engine="podman") == ["192.0.2.53"]
