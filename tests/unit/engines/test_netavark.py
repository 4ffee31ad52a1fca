"""graft-netavark: networks that are made and refused, what graftd is asked for, and what Podman is told."""

import io
import ipaddress
import json
import os
import sys

import pytest

from graft import client
from graft.engines import netavark
from graft.engines.netavark import PluginError, create, setup, teardown
from graft.errors import Refused

NETWORK = {"name": "gnet", "id": "ab" * 32, "driver": "graft", "dns_enabled": True, "ipam_options": {"driver": "host-local"}}
SUBNETS = [{"subnet": "10.1.0.0/24", "gateway": "10.1.0.1"}, {"subnet": "fd01::/64", "gateway": "fd01::1"}]


@pytest.fixture(autouse=True)
def networks(monkeypatch, tmp_path):
    """Where Podman keeps its networks."""
    monkeypatch.setattr(netavark, "NETWORKS", str(tmp_path))
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """The requests that graftd gets."""
    requests = []
    monkeypatch.setattr(client, "call", lambda name, **fields: requests.append({"order": name, **fields}))
    return requests


def options(**more):
    return {
        "container_id": "c" * 64,
        "container_name": "web",
        "network": {**NETWORK, "subnets": SUBNETS},
        "network_options": {"interface_name": "eth0", "static_ips": ["10.1.0.9"], "aliases": ["web", "www"], **more},
    }


def test_a_network_as_it_was_asked_for():
    made = create({**NETWORK, "subnets": [{"subnet": "10.1.0.0/24"}, {"subnet": "10.2.0.0/24", "gateway": "10.2.0.9"}]})
    assert made["subnets"] == [
        {"subnet": "10.1.0.0/24", "gateway": "10.1.0.1"}, {"subnet": "10.2.0.0/24", "gateway": "10.2.0.9"}
    ]  # fmt: skip
    assert {key: made[key] for key in NETWORK} == NETWORK


def test_subnets_are_chosen_beside_those_that_are_taken(networks, monkeypatch):
    (first,) = create(dict(NETWORK))["subnets"]
    (networks / "other.json").write_text(json.dumps({"subnets": [first]}))
    (networks / "broken.json").write_text("{")
    (second,) = create(dict(NETWORK))["subnets"]
    assert first["subnet"] != second["subnet"]
    assert second["subnet"].startswith(("10.98.", "10.99."))
    monkeypatch.setattr(netavark, "networks_of_the_host", lambda: [ipaddress.ip_network("10.98.0.0/16")])
    assert create(dict(NETWORK))["subnets"][0]["subnet"].startswith("10.99."), "the host has a route to the others"
    (networks / "all.json").write_text(json.dumps({"subnets": [{"subnet": "10.98.0.0/15"}]}))
    with pytest.raises(PluginError, match=r"all subnets of 10\.98\.0\.0/15 are in use"):
        create(dict(NETWORK))
    both = create({**NETWORK, "ipv6_enabled": True, "subnets": [{"subnet": "10.1.0.0/24"}]})["subnets"]
    assert [subnet["subnet"][:2] for subnet in both] == ["10", "fd"]


@pytest.mark.parametrize("subnet", ["10.1.0.0/24", "10.1.0.128/25", "10.0.0.0/8", "fd01::/48"])
def test_a_subnet_that_another_network_has(networks, subnet):
    """Podman does not look, of a plugin's networks, and would give one address twice."""
    (networks / "front.json").write_text(json.dumps({"subnets": SUBNETS}))
    with pytest.raises(PluginError, match=r"network 'front' has "):
        create({**NETWORK, "subnets": [{"subnet": "192.0.2.0/24"}, {"subnet": subnet}]})
    assert create({**NETWORK, "subnets": [{"subnet": "10.1.1.0/24"}, {"subnet": "fd01:0:0:1::/64"}]})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"internal": True}, "--internal is not supported"),
        ({"ipam_options": {"driver": "dhcp"}}, "IPAM driver 'dhcp' is not supported"),
        ({"network_interface": "br9"}, "leave out --interface-name"),
        ({"routes": [{"destination": "10.9.0.0/24", "gateway": "10.1.0.2"}]}, "leave out --route"),
        ({"network_dns_servers": ["9.9.9.9"]}, "leave out --dns"),
        ({"options": {"mtu": "1400"}}, "option 'mtu' is unknown"),
    ],
)
def test_what_a_network_has_not(what, message):
    with pytest.raises(PluginError, match=message):
        create({**NETWORK, **what})


def test_setup(asked):
    ports = [
        {"host_ip": "", "host_port": 8080, "container_port": 80, "protocol": "tcp", "range": 1},
        {"host_ip": "127.0.0.1", "host_port": 9000, "container_port": 90, "protocol": "tcp,udp", "range": 3},
        {"host_ip": "::1", "host_port": 53, "container_port": 53, "protocol": "udp"},
    ]
    told = setup({**options(static_ips=["10.1.0.9", "fd01::9"]), "port_mappings": ports}, os.devnull)
    assert told == {
        "dns_search_domains": [],
        "dns_server_ips": ["10.1.0.1"],
        "interfaces": {
            "eth0": {
                "mac_address": "00:00:00:00:00:00",
                "subnets": [{"ipnet": "10.1.0.9/24", "gateway": "10.1.0.1"}, {"ipnet": "fd01::9/64", "gateway": "fd01::1"}],
            }
        },
    }
    (request,) = asked
    assert request["publish"] == [
        "8080:80/tcp", "127.0.0.1:9000-9002:90-92/tcp", "127.0.0.1:9000-9002:90-92/udp", "[::1]:53:53/udp"
    ]  # fmt: skip
    assert (request["addresses"], request["names"]) == (["10.1.0.9/24", "fd01::9/64"], ["web", "www"])
    assert (request["resolver"], request["network"]) == ("10.1.0.1", "gnet")
    teardown(options())
    assert asked[1] == {"order": "detach", "start": False, "key": request["key"]}


def test_setup_without_names_and_what_it_refuses(asked):
    without = options()
    without["network"] = {**without["network"], "dns_enabled": False}
    assert setup(without, os.devnull)["dns_server_ips"] == []
    assert asked[0]["resolver"] == ""
    alone = options(static_ips=["fd01::9"])
    assert setup(alone, os.devnull)["dns_server_ips"] == ["fd01::1"], "of IPv6 where there is no other"
    assert asked[1]["resolver"] == "fd01::1"
    for more, message in (
        ({"static_mac": "aa:bb:cc:dd:ee:ff"}, "leave out --mac-address"),
        ({"static_ips": ["10.7.0.1"]}, "10.7.0.1 is in no subnet of network 'gnet'"),
    ):
        with pytest.raises(PluginError, match=message):
            setup(options(**more), os.devnull)
    with pytest.raises(PluginError, match="/nowhere: No such file or directory"):
        setup(options(), "/nowhere")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("words", "text", "error"),
    [
        (["setup"], "{}", "usage: graft-netavark"),
        (["remove"], "{}", "usage: graft-netavark"),
        ([], "", "usage: graft-netavark"),
        (["create"], "nonsense", "what came from netavark is malformed"),
        (["setup", os.devnull], "{}", "what came from netavark is malformed"),
        (["create"], "[]", "what came from netavark is malformed"),
        (["setup", os.devnull], json.dumps(options()), "-p 80:80: taken: publish another"),
    ],
)
def test_errors_are_told_as_netavark_has_them(monkeypatch, capsys, words, text, error):
    def refuse(*_words, **_fields):
        raise Refused("-p 80:80: taken", hint="publish another")

    monkeypatch.setattr(client, "call", refuse)
    monkeypatch.setattr(sys, "argv", ["graft-netavark", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert netavark.main() == 1
    assert json.loads(capsys.readouterr().out)["error"].startswith(f"graft: {error}")


def test_info(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["graft-netavark", "info"])
    assert netavark.main() == 0
    assert json.loads(capsys.readouterr().out)["api_version"] == "1.0.0"
