"""What the registry writes into the kernel's maps, and in which order; what it refuses."""

import errno
import json
import os
import socket
from typing import Any

import pytest

from graft.errors import Failure
from graft.kernel.programs import TENANT
from graft.rules import tables
from graft.rules.address import ANY4, ANY6, Address, parse_address
from graft.rules.endpoint import EndpointWords, make_endpoint, parse_egress, parse_ingress
from graft.rules.limits import Limits
from graft.rules.publication import parse_publication
from graft.rules.slices import SLICE_GROUP, in_names
from graft.tenants import publish, registry
from graft.tenants.registry import Registry
from graft.tenants.tenant import OWNER_BASE, SLICES, WRAPPER, Member, Table
from tests.unit.fakes import FakeHost, FakeKernel, free_port, make_registry, make_tenant, refused

INET4 = EndpointWords("ipv4", addr="192.0.2.1", port="dynamic")


@pytest.fixture
def reg(monkeypatch, tmp_path):
    return make_registry(monkeypatch, tmp_path)


def ruled(ingress):
    """The entries that come of rules, and not of the names of endpoints."""
    return {k: v for k, v in ingress.items() if not in_names(Address(tables.INGRESS_KEY.unpack(k)[5]))}


def identifier(tenant):
    return tenant.id.to_bytes(4, "little")


def test_a_change_that_fails_leaves_nothing_behind(reg):
    tenant = make_tenant(reg, "a")
    before = tenant.rules()
    tenant.members["0123"] = Member("docker", "web", "")
    tenant.table.endpoints["x"] = None
    tenant.restore(before)
    assert (tenant.members, tenant.endpoints) == ({}, {})


# -- admit, install, remove --


def test_a_tenant_has_an_id_and_a_block_of_its_own(reg):
    first, second = make_tenant(reg, "a", 1), make_tenant(reg, "b", 2)
    assert second.id == first.id + 1
    assert second.slice_number == (first.slice_number // SLICE_GROUP % SLICES + 1) * SLICE_GROUP
    assert (first.owner, second.owner) == (OWNER_BASE + first.slice_number, OWNER_BASE + second.slice_number)
    assert reg.tenants == {first.id: first, second.id: second}
    assert (reg.by_name("b"), reg.by_netns(1), reg.by_name("c")) == (second, first, None)


def test_a_name_that_is_taken(reg):
    make_tenant(reg, "web")
    refused("EEXIST", lambda: reg.admit(Table(2, 2, ""), "web", []), "a container named 'web' is running")


def test_slices_are_used_in_turn(reg):
    """The block of a container that has ended comes last: its connections may be in TIME_WAIT."""
    reg.next_slice = (SLICES - 1) * SLICE_GROUP
    last = make_tenant(reg, "a", 1)
    assert last.slice_number == SLICES * SLICE_GROUP
    reg.remove(last)
    assert make_tenant(reg, "b", 2).slice_number == SLICE_GROUP


def test_a_tenant_of_an_earlier_graftd_has_the_numbers_around_its_own(reg):
    """It has one number, which may be any; a new tenant has all from a multiple of SLICE_GROUP on."""
    old = make_tenant(reg, "a", 1)
    old.slice_number, old.wide = 3 * SLICE_GROUP + 5, False
    reg.next_slice = 2 * SLICE_GROUP + 1
    assert make_tenant(reg, "b", 2).slice_number == 4 * SLICE_GROUP


def test_all_slices_are_used(reg, monkeypatch):
    monkeypatch.setattr(registry, "SLICES", 2)
    reg.next_slice = SLICE_GROUP
    assert {make_tenant(reg, "a", 1).slice_number, make_tenant(reg, "b", 2).slice_number} == {SLICE_GROUP, 2 * SLICE_GROUP}
    refused("ENOSPC", lambda: reg.admit(Table(3, 3, ""), "c", []), "2 containers are running")


def test_what_the_kernel_has_of_a_tenant(reg):
    tenant = make_tenant(reg, netns=1000, limits=Limits(10, 5))
    value = TENANT.pack(1001, tenant.slice_number, tables.TENANT_EGRESS, 0, bytes(4), ANY6)
    assert reg.kernel.maps["tenants"].entries == {identifier(tenant): value}
    assert reg.kernel.limits == {tenant.id: Limits(10, 5)}
    assert set(reg.kernel.entries()) == {"tenants", "egress", "slices"}
    assert reg.kernel.maps["egress"].entries == tenant.compile(reg.added).egress


def test_removal_leaves_nothing(reg):
    tenant = make_tenant(reg)
    publish.publish(reg, tenant, [parse_publication(f"127.0.0.1:{free_port()}:80")])
    reg.apply(tenant)
    assert reg.kernel.maps["ingress"].entries
    reg.remove(tenant)
    assert reg.kernel.entries() == {}
    assert reg.kernel.limits == {}
    assert (reg.tenants, reg.tables) == ({}, {})
    assert json.loads(reg.state.read_text())["tenants"] == []


def test_removal_keeps_the_users_endpoints(reg):
    tenant = make_tenant(reg)
    reg.add_endpoints(tenant.table, [("mine", INET4, 0)])
    publish.publish(reg, tenant, [parse_publication(f"127.0.0.1:{free_port()}:80")])
    reg.remove(tenant)
    assert {table.netns: list(table.endpoints) for table in reg.tables.values()} == {1000: ["mine"]}


def test_an_install_that_fails_leaves_nothing(reg):
    reg.kernel.maps["egress"].room = 0
    with pytest.raises(OSError, match="No space"):
        make_tenant(reg)
    assert (reg.kernel.entries(), reg.tenants) == ({}, {})


def test_wrappers_inside_end_with_their_container(reg):
    outer = make_tenant(reg, "outer")
    inner = make_tenant(reg, "inner", kind=WRAPPER, parent=outer)
    reg.take_scope(inner)
    beside = make_tenant(reg, "beside", kind=WRAPPER, parent=outer)  # it has a listener of its own
    assert reg.scopes == {inner.scope: inner}
    parent = TENANT.unpack(reg.kernel.maps["tenants"].entries[identifier(inner)])[3]
    assert parent == outer.id
    reg.remove(outer)
    assert (reg.tenants, reg.scopes) == ({beside.id: beside}, {})
    assert list(reg.kernel.maps["tenants"].entries) == [identifier(beside)]


def test_scopes_of_one_container_are_limited(reg, monkeypatch):
    monkeypatch.setattr(registry, "SCOPES_INSIDE", 1)
    outer = make_tenant(reg, "outer")
    first = make_tenant(reg, "first", kind=WRAPPER, parent=outer)
    reg.take_scope(first)
    second = make_tenant(reg, "second", kind=WRAPPER, parent=outer)
    refused("ENOSPC", lambda: reg.take_scope(second), "1 wrappers run in this container")
    assert second.scope == 0


# -- apply --


def test_first_what_is_new_then_the_flags_then_the_removal(reg):
    """A bind in between meets the old rule or the new one, never none."""
    tenant = make_tenant(reg)
    reg.add_endpoints(tenant.table, [("a", INET4, 0), ("b", INET4, 0)])
    old, new = parse_ingress("0.0.0.0:80=a"), parse_ingress("0.0.0.0:81=b")
    reg.add_rules(tenant, [old], [])
    reg.apply(tenant)
    before = set(ruled(reg.kernel.maps["ingress"].entries))
    reg.delete_rules(tenant, [old], [])
    reg.add_rules(tenant, [new], [])
    tenant.egress_host = False
    reg.kernel.log.clear()
    reg.apply(tenant)
    after = set(ruled(reg.kernel.maps["ingress"].entries))
    assert (len(before), len(after), before & after) == (2, 2, set())  # TCP and UDP
    steps = [(verb, name) for verb, name, *_ in reg.kernel.log]
    assert steps[:3] == [("update", "ingress"), ("update", "ingress"), ("update", "tenants")]
    assert set(steps[3:]) == {("delete", "ingress"), ("delete", "egress")}
    assert {key for verb, name, key in reg.kernel.log if (verb, name) == ("delete", "ingress")} == before
    flags = TENANT.unpack(reg.kernel.maps["tenants"].entries[identifier(tenant)])[2]
    assert flags == tables.TENANT_REPLIES


def test_what_is_unchanged_is_not_written(reg):
    tenant = make_tenant(reg)
    reg.kernel.log.clear()
    reg.apply(tenant)
    assert reg.kernel.log == [("update", "tenants", identifier(tenant))]


def test_a_map_that_is_full_keeps_what_it_had(reg):
    tenant = make_tenant(reg)
    reg.add_endpoints(tenant.table, [("a", INET4, 0), ("b", INET4, 0)])
    reg.add_rules(tenant, [parse_ingress("0.0.0.0:80=a")], [])
    reg.apply(tenant)
    before = {name: dict(entries) for name, entries in reg.kernel.entries().items()}
    installed = tenant.installed
    tenant.ingress = [rule._replace(endpoint="b") for rule in tenant.ingress]  # the same keys, other values
    tenant.table.endpoints["b"] = tenant.table.endpoints["b"]._replace(port=7)
    tenant.ingress.append(parse_ingress("0.0.0.0:81=a"))
    reg.kernel.maps["ingress"].room = 3
    with pytest.raises(OSError, match="No space") as found:
        reg.apply(tenant)
    assert found.value.errno == errno.ENOSPC
    assert reg.kernel.entries() == before
    assert tenant.installed is installed


def test_limits_are_given_once(reg):
    tenant = make_tenant(reg)
    reg.apply(tenant)
    assert [entry for entry in reg.kernel.log if entry[0] == "limit"] == [("limit", tenant.id)]


# -- publications --


def test_publish(reg):
    tenant, port = make_tenant(reg), free_port()
    publication = parse_publication(f"127.0.0.1:{port}:80")
    publish.publish(reg, tenant, [publication])
    (endpoint,) = tenant.endpoints.values()
    assert (endpoint.name, str(endpoint.address), endpoint.port) == (f"tcp-{port}", "127.0.0.1", port)
    assert (endpoint.span, endpoint.published, endpoint.imported) == (1, True, False)
    assert [str(rule) for rule in tenant.ingress] == [f"0.0.0.0:80=tcp-{port}"]
    assert tenant.ingress[0].protocols == (socket.IPPROTO_TCP,)
    assert tenant.publications == [publication]
    reg.apply(tenant)
    (value,) = reg.kernel.maps["ingress"].entries.values()
    address = parse_address("127.0.0.1").raw
    assert tables.INGRESS_VALUE.unpack(value) == (address, port, 80, 0, 0, 1)


def test_a_port_that_another_container_has(reg):
    port = free_port()
    publish.publish(reg, make_tenant(reg, "first", 1), [parse_publication(f"127.0.0.1:{port}:80")])
    second = make_tenant(reg, "second", 2)
    wanted = parse_publication(f"127.0.0.1:{port}:8080")
    refused("EADDRINUSE", lambda: publish.publish(reg, second, [wanted]), "published by container 'first'", f"127.0.0.1:{port}:80/tcp")
    everywhere = parse_publication(f"{port}:8080")  # the wildcard is that address as well
    refused("EADDRINUSE", lambda: publish.publish(reg, second, [everywhere]), "published by container 'first'")
    publish.publish(reg, second, [parse_publication(f"127.0.0.1:{free_port(socket.SOCK_DGRAM)}:80/udp")])


def test_a_port_that_a_process_has(reg):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wanted = parse_publication(f"127.0.0.1:{port}:80")
        tenant = make_tenant(reg)
        refused("EADDRINUSE", lambda: publish.publish(reg, tenant, [wanted]), f"127.0.0.1:{port}/tcp is in use by", f"(pid {os.getpid()})")
    publish.publish(reg, tenant, [wanted])


def test_a_publication_that_is_refused_changes_nothing(reg):
    """All of them or none."""
    tenant, port = make_tenant(reg), free_port()
    good, again = parse_publication(f"127.0.0.1:{port}:80"), parse_publication(f"127.0.0.1:{port}:81")
    refused("EADDRINUSE", lambda: publish.publish(reg, tenant, [good, again]), "published by container 'web'")
    assert (tenant.publications, tenant.ingress, tenant.endpoints) == ([], [], {})


def test_a_port_inside_is_published_once(reg):
    tenant = make_tenant(reg)
    publish.publish(reg, tenant, [parse_publication(f"127.0.0.1:{free_port()}:80")])
    again = parse_publication(f"127.0.0.1:{free_port()}:80")
    refused("EINVAL", lambda: publish.publish(reg, tenant, [again]), "the container's port is published already")


def test_an_address_that_is_not_the_hosts(reg):
    tenant = make_tenant(reg)
    wanted = parse_publication("192.0.2.77:8080:80")
    refused("EADDRNOTAVAIL", lambda: publish.publish(reg, tenant, [wanted]), "192.0.2.77 is not an address of this host")


def test_unpublish(reg):
    tenant, port = make_tenant(reg), free_port()
    kept, gone = parse_publication(f"127.0.0.1:{port}:80"), parse_publication(f"127.0.0.1:{free_port()}:81")
    publish.publish(reg, tenant, [kept, gone])
    reg.apply(tenant)
    publish.unpublish(tenant, gone)
    reg.apply(tenant)
    assert tenant.publications == [kept]
    assert list(tenant.endpoints) == [f"tcp-{port}"]
    assert [str(rule) for rule in tenant.ingress] == [f"0.0.0.0:80=tcp-{port}"]
    assert len(reg.kernel.maps["ingress"].entries) == 1
    refused("ENOENT", lambda: publish.unpublish(tenant, gone), "is not published by 'web'")


# -- rules and endpoints --


def test_endpoints_all_or_none(reg):
    tenant = make_tenant(reg)
    reg.add_endpoints(tenant.table, [("a", INET4, 0)])
    refused("EEXIST", lambda: reg.add_endpoints(tenant.table, [("b", INET4, 0), ("a", INET4, 0)]), "'a' exists")
    assert list(tenant.endpoints) == ["a"]
    refused("ENOENT", lambda: reg.delete_endpoints(tenant.table, ["a", "b"]), "'b' does not exist")
    assert list(tenant.endpoints) == ["a"]


def test_the_rules_of_an_endpoint_that_goes_stand_for_none(reg):
    """They stay, and work again when the endpoint is back."""
    tenant = make_tenant(reg)
    reg.add_endpoints(tenant.table, [("a", INET4, 0)])
    reg.add_rules(tenant, [parse_ingress("0.0.0.0:80=a")], [])
    reg.apply(tenant)
    before = ruled(reg.kernel.maps["ingress"].entries)
    reg.delete_endpoints(tenant.table, ["a"])
    assert reg.kernel.maps["ingress"].entries == dict.fromkeys(before, tables.NO_INGRESS)
    reg.add_endpoints(tenant.table, [("a", INET4, 0)])
    assert ruled(reg.kernel.maps["ingress"].entries) == before


def test_a_published_endpoint_is_the_publications(reg):
    tenant, port = make_tenant(reg), free_port()
    publish.publish(reg, tenant, [parse_publication(f"127.0.0.1:{port}:80")])
    refused("EBUSY", lambda: reg.delete_endpoints(tenant.table, [f"tcp-{port}"]), "belongs to a publication")
    leaving = parse_egress(f"10.0.0.0/8=tcp-{port}")
    refused("EACCES", lambda: reg.add_rules(tenant, [], [leaving]), "there to bind to, not to connect from")
    assert tenant.egress == []


def test_rules_all_or_none(reg):
    tenant = make_tenant(reg)
    reg.add_endpoints(tenant.table, [("a", INET4, 0)])
    good, unknown = parse_ingress("0.0.0.0:80=a"), parse_ingress("0.0.0.0:81=nope")
    refused("ENOENT", lambda: reg.add_rules(tenant, [good, unknown], []), "unknown endpoint 'nope'")
    assert tenant.ingress == []
    reg.add_rules(tenant, [good], [])
    refused("ENOENT", lambda: reg.delete_rules(tenant, [good, unknown], []), "does not exist")
    assert tenant.ingress == [good]


def test_a_rule_that_needs_another_socket(reg, tmp_path):
    """A filter that was installed without the swap path cannot learn it later."""
    tenant = make_tenant(reg)
    reg.add_endpoints(tenant.table, [("u", EndpointWords("unix", path=str(tmp_path / "s")), 0)])
    rule = parse_ingress("0.0.0.0:80=u")
    refused("EOPNOTSUPP", lambda: reg.add_rules(tenant, [rule], []), "'web' was started without such endpoints")
    tenant.traps_addresses = True
    reg.add_rules(tenant, [rule], [])
    reg.apply(tenant)
    assert {tables.INGRESS_VALUE.unpack(v)[4] for v in reg.kernel.maps["ingress"].entries.values()} == {tables.PLACE_UNIX}


# -- state --


def test_what_a_successor_knows(reg, monkeypatch):
    added = FakeHost(monkeypatch)
    tenant, port = make_tenant(reg, uid=7, egress_host=False, limits=Limits(100, 10)), free_port()
    reg.add_endpoints(tenant.table, [("a", INET4, 0)])
    reg.add_rules(tenant, [parse_ingress("0.0.0.0:81-90=a")], [parse_egress("10.0.0.0/8=a")])
    publish.publish(reg, tenant, [parse_publication(f"127.0.0.1:{port}:80")])
    reg.add_address(parse_address("10.88.0.5"))
    reg.apply(tenant)
    kernel: Any = FakeKernel()
    after = Registry(kernel, reg.state)
    after.load()
    after.reconcile()
    assert kernel.entries() == reg.kernel.entries()
    assert kernel.limits == reg.kernel.limits
    (kept,) = after.tenants.values()
    assert (kept.name, kept.uid, kept.egress_host, kept.publications) == ("web", 7, False, tenant.publications)
    assert (after.next_id, after.added, added.addresses) == (reg.next_id, reg.added, reg.added)


def test_reconcile_removes_what_nobody_accounts_for(reg):
    tenant = make_tenant(reg)
    wanted = {name: dict(entries) for name, entries in reg.kernel.entries().items()}
    stray = tenant.id + 5
    for name, size in (*tables.KEY_SIZES, ("tenants", 4)):
        key = stray.to_bytes(4, "little") if name == "tenants" else b"\xaa" * size
        reg.kernel.maps[name].update(key, b"old")
    reg.kernel.log.clear()
    reg.reconcile()
    assert reg.kernel.entries() == wanted
    assert reg.next_id == stray + 1  # its sockets, if any are left, are nobody's
    assert ("forget", stray) in reg.kernel.log


def test_state_of_another_version(reg):
    reg.state.write_text('{"version": 0}')
    with pytest.raises(Failure, match="of another version of graft"):
        reg.load()


def test_state_that_cannot_be_written_is_tried_again(reg, tmp_path):
    make_tenant(reg)
    assert reg.saved
    reg.state = tmp_path / "gone" / "state.json"
    reg.save()
    assert not reg.saved
    reg.state.parent.mkdir()
    reg.save()
    assert reg.saved
    assert [t["name"] for t in json.loads(reg.state.read_text())["tenants"]] == ["web"]


def test_own_addresses(reg, monkeypatch):
    """The kernel knows whose an address is; graft takes away only what it has put there."""
    stack = FakeHost(monkeypatch, ["192.0.2.9"])
    reg.add_address(parse_address("192.0.2.9"))
    reg.add_address(parse_address("10.88.0.5"))
    assert reg.added == {parse_address("10.88.0.5")}
    for text in ("192.0.2.9", "10.88.0.5"):
        reg.remove_address(parse_address(text))
    assert ("192.0.2.9" in stack, "10.88.0.5" in stack) == (True, False)
    reg.reserve(parse_address("10.0.0.1"))
    assert reg.kernel.maps["holders"].entries == {ANY4[:12] + bytes((10, 0, 0, 1)): tables.OWNER.pack(0, 0, 0, 0)}
    reg.release(parse_address("10.0.0.1"))
    assert reg.kernel.entries() == {}


# -- what an endpoint is there for --

HOME = {"in": "192.0.2.1", "out": "192.0.2.2", "both": "192.0.2.3", "default-source": "192.0.2.4"}


def importing(reg):
    """A container with endpoints of the host's, and a wrapper inside it."""
    container = make_tenant(reg, "a", 1)
    for name, address in HOME.items():
        container.endpoints[name] = make_endpoint(name, EndpointWords("ipv4", addr=address, port="dynamic"))._replace(imported=True)
    reg.add_rules(
        container,
        [parse_ingress(f"0.0.0.0:{n}={name}") for n, name in ((1, "in"), (2, "both"), (3, "default-source"))],
        [parse_egress(f"10.{n}.0.0/16={name}") for n, name in ((1, "out"), (2, "both"))],
    )
    reg.apply(container)
    wrapper = reg.admit(container.table, "w", [])
    wrapper.kind, wrapper.strict, wrapper.egress_host, wrapper.parent = WRAPPER, True, False, container
    return container, wrapper


def test_what_is_imported_is_for_what_the_rules_say(reg):
    container, wrapper = importing(reg)
    told = {name: (e.serves, e.leaves) for name, e in container.endpoints.items()}
    assert told == {"in": (True, False), "out": (False, True), "both": (True, True), "default-source": (True, False)}
    refused("EACCES", lambda: reg.add_rules(wrapper, [parse_ingress("0.0.0.0:9=out")], []), "to connect from")
    refused("EACCES", lambda: reg.add_rules(wrapper, [], [parse_egress("10.9.0.0/16=in")]), "to bind to")
    reg.add_rules(wrapper, [parse_ingress("0.0.0.0:9=in")], [parse_egress("10.9.0.0/16=out")])
    reg.install(wrapper)
    ingress, egress, *_ = wrapper.installed.maps()
    assert (len(ruled(ingress)), len(egress)) == (2, 1)  # TCP and UDP; default-source is no way out


def test_a_use_ends_with_its_rule(reg):
    """For the wrappers inside as well, in the kernel's maps; so does a successor find it."""
    container, wrapper = importing(reg)
    reg.add_rules(wrapper, [parse_ingress("0.0.0.0:9=in")], [parse_egress("10.9.0.0/16=out")])
    reg.install(wrapper)
    reg.delete_rules(container, [parse_ingress("0.0.0.0:1=in")], [parse_egress("10.1.0.0/16=out")])
    reg.apply(container)
    ingress, egress, *_ = wrapper.installed.maps()
    assert (set(ruled(ingress).values()), set(egress.values())) == ({tables.NO_INGRESS}, {tables.NO_EGRESS})
    container.endpoints["in"] = container.endpoints["in"]._replace(ingress=True)  # as from an older state.json
    reg.reconcile()
    assert not container.endpoints["in"].serves


def test_a_tables_own_endpoints_are_for_everything(reg):
    container = make_tenant(reg, "a", 1)
    reg.add_endpoints(container.table, [("own", INET4, 0)])
    assert (container.endpoints["own"].serves, container.endpoints["own"].leaves) == (True, True)
    publish.publish(reg, container, [parse_publication("127.0.0.1:8080:80")])
    assert [(e.serves, e.leaves) for e in container.endpoints.values() if e.published] == [(True, False)]
