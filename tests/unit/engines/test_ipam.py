"""Docker's IPAM driver: what dockerd was given stays given, also when another graftd answers."""

import ipaddress
import json
from typing import Any

import pytest

from graft.engines import ipam
from graft.engines.ipam import Ipam
from graft.engines.libnetwork import decode
from graft.errors import Refused
from graft.tenants.registry import Registry
from graft.tenants.state import dump, restore
from graft.tenants.tenant import Known
from tests.unit.fakes import FakeKernel


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr(ipam, "networks_of_the_host", lambda: [ipaddress.ip_network("10.89.1.0/24")])
    kernel: Any = FakeKernel()
    return Registry(kernel, tmp_path / "state.json")


def ask(one, method, **request):
    return getattr(one, method)(decode(json.dumps(request).encode()), 0)


def next_graftd(registry):
    known = Known()
    restore(known, json.loads(json.dumps(dump(registry))))
    registry.pools = known.pools
    return Ipam(registry)


def address(one, pool, **more):
    return ask(one, "request_address", PoolID=pool, **more)["Address"]


def test_a_range_and_what_is_taken_outlive_graftd(registry):
    one = Ipam(registry)
    pool = ask(one, "request_pool", Pool="10.1.0.0/24", SubPool="10.1.0.128/25")["PoolID"]
    assert not registry.saved
    gateway = {"RequestAddressType": "com.docker.network.gateway"}
    assert address(one, pool, Address="10.1.0.200", Options=gateway) == "10.1.0.200/24"
    assert address(one, pool, Address="10.1.0.130") == "10.1.0.130/24"
    for _ in range(2):
        one = next_graftd(registry)
        with pytest.raises(Refused, match=r"10\.1\.0\.130 is in use"):
            address(one, pool, Address="10.1.0.130")
    assert [address(one, pool) for _ in range(2)] == ["10.1.0.131/24", "10.1.0.132/24"]
    ask(one, "release_address", PoolID=pool, Address="10.1.0.130")
    assert address(next_graftd(registry), pool) == "10.1.0.130/24"


def test_dockerd_asks_again_for_what_it_has(registry):
    """As it does when it starts: nothing of what others took meanwhile is given away."""
    one = Ipam(registry)
    assert ask(one, "capabilities")["RequiresRequestReplay"]
    pool = ask(one, "request_pool", Pool="10.1.0.0/24", SubPool="10.1.0.128/25")["PoolID"]
    address(one, pool, Address="10.1.0.130")
    assert ask(one, "request_pool", Pool="10.1.0.0/24", SubPool="10.1.0.128/25")["PoolID"] == pool
    assert address(one, pool) == "10.1.0.131/24"


def test_networks_without_a_subnet_have_one_each(registry):
    """Also if another graftd answers for the second, and beside what the host has routes to."""
    pools = [ask(Ipam(registry), "request_pool")["PoolID"]]
    pools += [ask(next_graftd(registry), "request_pool")["PoolID"] for _ in range(2)]
    assert pools == ["10.89.0.0/24", "10.89.2.0/24", "10.89.3.0/24"]
    ask(Ipam(registry), "release_pool", PoolID=pools[0])
    assert ask(next_graftd(registry), "request_pool")["PoolID"] == pools[0]


def test_a_pool_that_was_not_saved_is_known_by_its_prefix(registry):
    assert address(Ipam(registry), "10.7.0.0/24") == "10.7.0.2/24"
