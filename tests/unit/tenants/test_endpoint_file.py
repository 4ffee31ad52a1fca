"""Endpoints of the host that stand in endpoints.toml: all of them or no change, and whose they are."""

import json

import pytest

from graft.daemon import admission
from graft.rules.endpoint import EndpointWords
from graft.tenants import endpoint_file
from graft.tenants.tenant import Table
from tests.unit.fakes import make_registry, make_tenant, refused

INET4 = EndpointWords("ipv4", addr="192.0.2.1", port="dynamic")


@pytest.fixture
def reg(monkeypatch, tmp_path):
    return make_registry(monkeypatch, tmp_path)


@pytest.fixture
def home(reg, monkeypatch):
    """The table of graftd's own netns, which endpoints.toml is for."""
    table = reg.tables[reg.home] = Table(reg.home, 1, "here")
    monkeypatch.setattr(endpoint_file, "home_table", lambda _reg: reg.tables.setdefault(reg.home, table))
    return table


def test_endpoints_of_the_file(reg, home):
    other = EndpointWords("ipv4", addr="192.0.2.9", port="80")
    reg.add_endpoints(home, [("mine", INET4, 0)])
    endpoint_file.take(reg, {"a": INET4, "b": INET4})
    assert {n: e.filed for n, e in home.endpoints.items()} == {"mine": False, "a": True, "b": True}
    endpoint_file.take(reg, {"b": other, "c": INET4})
    assert {n: str(e.address) for n, e in home.endpoints.items()} == {
        "mine": "192.0.2.1",
        "b": "192.0.2.9",
        "c": "192.0.2.1",
    }
    saved = {e["name"]: e.get("filed", False) for e in json.loads(reg.state.read_text())["tables"][0]["endpoints"]}
    assert saved == {"mine": False, "b": True, "c": True}
    refused("EBUSY", lambda: endpoint_file.check_deletion(home, ["mine", "b"]), "endpoint 'b' stands in ")
    endpoint_file.check_deletion(home, ["mine", "nobody"])
    assert endpoint_file.any_added(reg)
    reg.delete_endpoints(home, ["mine"])
    assert not endpoint_file.any_added(reg)
    endpoint_file.take(reg, {})
    assert (home.endpoints, reg.tables) == ({}, {})


def test_a_file_of_which_one_endpoint_is_refused_changes_nothing(reg, home, tmp_path):
    reg.add_endpoints(home, [("mine", INET4, 0)])
    endpoint_file.take(reg, {"a": INET4})
    before = dict(home.endpoints)
    refused("EEXIST", lambda: endpoint_file.take(reg, {"b": INET4, "mine": INET4}), "endpoint 'mine' exists")
    nowhere = EndpointWords("unix", path=str(tmp_path / "not-there/x.sock"))
    refused("ENOENT", lambda: endpoint_file.take(reg, {"b": INET4, "c": nowhere}), "there is no directory")
    assert home.endpoints == before


def test_a_container_keeps_what_it_was_given_of_the_file(reg, home):
    endpoint_file.take(reg, {"a": INET4})
    tenant = make_tenant(reg, netns=1000)
    admission.import_endpoints(tenant, ["a"], reg.home_endpoints())
    endpoint_file.take(reg, {"a": EndpointWords("ipv4", addr="192.0.2.9", port="80")})
    assert (str(tenant.endpoints["a"].address), tenant.endpoints["a"].filed) == ("192.0.2.1", False)
    later = make_tenant(reg, "later", netns=2000)
    assert "a" not in later.endpoints
    admission.import_endpoints(later, ["a"], reg.home_endpoints())
    assert str(later.endpoints["a"].address) == "192.0.2.9"
