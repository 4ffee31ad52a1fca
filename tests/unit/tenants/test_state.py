"""state.json: what is written is read again, also what an earlier release has written."""

import dataclasses
import json
from pathlib import Path

import pytest

from graft.rules.limits import Limits
from graft.rules.request import Request
from graft.tenants.state import dump, restore
from graft.tenants.tenant import API, CONTAINER, WRAPPER, Known, Member, Table, Tenant

RELEASE_0_1 = Path(__file__).with_name("state-4.json")  # written by release 0.1; no field of a tenant has its default
ADDED = {"asked", "brought", "cgroup", "device", "gid", "heard", "led", "lost_listener", "more_cgroups", "netns_made", "networked", "no_netadmin", "shown", "user", "wide"}  # keys of a tenant since then


@pytest.fixture
def document():
    return json.loads(RELEASE_0_1.read_text())


def again(known: Known) -> Known:
    """What the next graftd knows after @known was written to a file."""
    restored = Known()
    restore(restored, json.loads(json.dumps(dump(known))))
    restored.places = known.places  # those are opened again by Registry.restore_places()
    return restored


def test_what_an_earlier_release_wrote(document):
    known = Known()
    restore(known, document)
    web, curl, api = known.tenants.values()
    assert (web.kind, curl.kind, api.kind) == (CONTAINER, WRAPPER, API)
    assert (web.id, web.slice_number, web.name, web.netns, web.place, web.uid) == (3, 12, "web", 4026532001, 1, 1000)
    assert [(str(r), r.protocols) for r in web.ingress] == [
        ("0.0.0.0:80-90=ep-http", (6,)),
        ("[::]:443=ep-http", (6, 17)),
    ]
    assert [str(r) for r in web.egress] == ["10.0.0.0/8=ep-http"]
    assert [str(p) for p in web.publications] == ["9000-9010:9000-9010/tcp", "[2001:db8::1]:53:53/udp"]
    assert (web.egress_host, web.strict, web.trusted, web.traps_addresses) == (False, True, False, True)
    assert [str(a) for a in web.resolvers] == ["127.0.0.53"]
    assert [str(own.address) for own in web.given] == ["10.88.0.5", "fd00::5"]
    assert web.attached == [known.attachments["docker/e1"]]
    assert web.members == {"0123": Member("docker", "web", "/var/lib/docker/containers/0123")}
    assert (web.argv, web.pid, web.started) == (["nginx", "-g", "daemon off;"], 4711, 1700000000.25)
    assert (web.limits, web.asked) == (Limits(100, 10), Request())
    assert web.paths == {"/run/app.sock": (64, 1234, 1700000000123456789)}
    assert (curl.parent, curl.scope, curl.verbose, known.scopes) == (web, 6, True, {6: curl})
    assert (api.in_host_netns, api.followers, api.parent) == (True, {4712, 4713}, None)
    assert web.table.endpoints["tcp-9000"].published
    assert known.lost_places == {1: (4026532111, "blue")}


def test_the_earlier_release_can_read_it(document):
    """All that it wrote is written the same way, so a downgrade finds its own."""
    known = Known()
    restore(known, document)
    written = json.loads(json.dumps(dump(known)))
    assert written.pop("places") == []
    assert written.pop("real_paths")
    assert written.pop("users_file") is None
    assert written.pop("pools") == {}
    del document["places"]
    for attachment in written["attachments"]:
        assert attachment.pop("local") == []
    for tenant in written["tenants"]:
        tenant["followers"].sort()
        for key in ADDED:
            del tenant[key]
    for attachment in written["attachments"]:
        assert attachment.pop("subnets") == []
        assert attachment.pop("uid") == 0
    assert written == document


def test_there_and_back():
    known = Known()
    known.users_file = "[users.alice]"
    table = known.tables[7] = Table(7, 8, "pid 9")
    for number in (1, 2):
        known.tenants[number] = Tenant(number, number, f"t{number}", table)
    known.tenants[1].asked = Request(publish=("8080:80",), egress_default="none")
    restored = again(known)
    for number, tenant in known.tenants.items():
        for field in dataclasses.fields(Tenant):
            if field.name != "table":
                assert getattr(restored.tenants[number], field.name) == getattr(tenant, field.name), field.name


def test_a_field_that_is_added_later(document):
    """A file without it gives it its default; a file with one that is not known is read as well."""
    for tenant in document["tenants"]:
        del tenant["verbose"]
        tenant["later"] = 1
        tenant["asked"] = {"publish": ["8080:80"], "later": ["x"]}
    known = Known()
    restore(known, document)
    assert [t.verbose for t in known.tenants.values()] == [False] * 3
    assert known.tenants[3].asked == Request(publish=("8080:80",))


def test_every_field_of_a_tenant_has_a_default_but_what_it_is():
    needed = [
        f.name
        for f in dataclasses.fields(Tenant)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    assert needed == ["id", "slice_number", "name", "table"]
