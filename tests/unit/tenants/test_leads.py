"""What is written into the map `led` while something is moved, and in which order."""

import pytest

from graft.rules.address import ANY4, ANY6, Address
from graft.rules.endpoint import Endpoint, IngressRule
from graft.tenants.leads import Leads
from tests.unit.fakes import make_registry, make_tenant

TCP = (6,)


@pytest.fixture
def reg(monkeypatch, tmp_path):
    return make_registry(monkeypatch, tmp_path)


def give(tenant, port, span=1, name="p"):
    tenant.endpoints[name] = Endpoint(name, Address(ANY4), port, span, published=True)
    tenant.ingress.append(IngressRule(Address(ANY4), 80, 79 + span, name, TCP))
    tenant.led.add(name)


def bits(reg):
    words = reg.kernel.maps["led_ports"].entries.items()
    return {64 * int.from_bytes(k, "little") + n for k, v in words for n in range(64) if int.from_bytes(v, "little") >> n & 1}


def test_a_move_writes_one_entry_and_deletes_none(reg):
    blue, green = make_tenant(reg, "blue", 1), make_tenant(reg, "green", 2)
    give(blue, 8080)
    reg.apply(blue)
    assert bits(reg) == {8080}
    reg.kernel.log.clear()
    blue.ingress.clear()
    give(green, 8080)
    reg.apply(green)
    reg.apply(blue)
    assert [(how, name) for how, name, *_ in reg.kernel.log if name.startswith("led")] == [("update", "led")]
    assert reg.kernel.log[0][:2] == ("update", "led"), "before anything else"
    assert blue.led == set(), "it has no such rule"
    assert reg.leads.of(green.endpoints["p"]) == {green.id}
    reg.remove(green)
    assert (reg.kernel.maps["led"].entries, bits(reg)) == ({}, set())


def test_a_map_that_is_full_is_as_before(reg):
    blue = make_tenant(reg, "blue", 1)
    give(blue, 8000)
    reg.apply(blue)
    before = dict(reg.kernel.maps["led"].entries)
    reg.kernel.maps["led"].room = 2
    give(blue, 9001, 14, "q")
    with pytest.raises(OSError, match="No space"):
        reg.apply(blue)
    assert (reg.kernel.maps["led"].entries, bits(reg)) == (before, {8000})


def test_the_next_graftd_writes_what_the_one_before_did_not(reg):
    """It was killed between state.json and the map, or the other way round."""
    blue = make_tenant(reg, "blue", 1)
    give(blue, 8000, 3)
    reg.apply(blue)
    reg.leads = Leads(reg.kernel.maps)
    blue.ingress.clear()
    give(blue, 8001)
    reg.reconcile()
    assert bits(reg) == {8001}
    assert len(reg.kernel.maps["led"].entries) == 1
    assert reg.leads.of(Endpoint("x", Address(ANY4), 7990, 12)) == {blue.id}
    assert reg.leads.of(Endpoint("x", Address(ANY6), 8001)) == reg.leads.of(Endpoint("x", Address(ANY4), 8002)) == set()


def test_a_port_is_held_once_it_is_free(reg):
    """And given up before the entry is: nothing ever arrives there."""
    import socket

    with socket.create_server(("0.0.0.0", 0)) as blues:
        port = blues.getsockname()[1]
        green = make_tenant(reg, "green", 1)
        give(green, port)
        reg.apply(green)
        reg.leads.hold()
        assert not reg.leads.held
    reg.leads.hold()
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("0.0.0.0", port))
    assert [at[1] for at in reg.leads.held] == [port]
    green.ingress.clear()
    reg.apply(green)
    socket.create_server(("0.0.0.0", port)).close()
