"""What engines attach to namespaces: addresses and ports that are taken, whichever of the two comes first."""

import os
import subprocess
import time

import pytest

from graft.errors import Refused
from graft.kernel import netns as namespaces
from graft.rules.address import parse_address
from graft.rules.own_address import network_of, parse_own
from graft.rules.publication import parse_publication
from graft.rules.tables import OWNER
from graft.tenants import attachments, publish, registry
from graft.tenants.attachment import Attachment, Expected
from graft.tenants.tenant import Member
from tests.unit.fakes import FakeHost, free_port, make_registry, make_tenant, refused


@pytest.fixture
def stack(monkeypatch):
    return FakeHost(monkeypatch, ["192.0.2.9"])


@pytest.fixture
def reg(monkeypatch, tmp_path, stack):
    return make_registry(monkeypatch, tmp_path)


def attachment(reg, key="docker/1", network="front", netns=1000, address="10.77.0.5/16", *published):
    made = Attachment(key, network)
    made.netns, made.cookie = netns, netns + 1
    made.addresses = [network_of(address, attachments.number(reg, network))] if address else []
    made.publications = [parse_publication(text) for text in published]
    return made


def expected(name="coming", where=(0, 0), published=(), owned=(), until=60.0):
    pidfd = os.pidfd_open(os.getpid())
    wanted = [parse_publication(text) for text in published]
    return Expected(pidfd, name, where, wanted, [parse_own(a) for a in owned], False, time.monotonic() + until)


def owners(reg):
    return {key: OWNER.unpack(value)[:2] for key, value in reg.kernel.maps["holders"].entries.items()}


# -- add, attach, join --


def test_the_attachment_comes_first(reg, stack):
    port = free_port()
    mine = attachment(reg, "docker/1", "front", 1000, "10.77.0.5/16", f"127.0.0.1:{port}:80")
    attachments.add(reg, mine)
    assert (list(reg.attachments), "10.77.0.5" in stack, reg.networks) == (["docker/1"], True, ["front"])
    assert owners(reg) == {}
    tenant = make_tenant(reg)
    attachments.attach(reg, tenant)
    reg.apply(tenant)
    assert tenant.attached == [mine]
    assert list(tenant.endpoints) == [f"tcp-{port}"]
    assert owners(reg) == {parse_address("10.77.0.5").raw: (tenant.id, 1)}
    attachments.attach(reg, tenant)  # what it has it is not given again
    assert (tenant.attached, len(tenant.publications)) == ([mine], 1)


def test_the_container_comes_first(reg):
    tenant, other = make_tenant(reg), make_tenant(reg, "other", 2000)
    mine = attachment(reg)
    attachments.add(reg, mine)
    attachments.join(reg, mine)
    assert (tenant.attached, other.attached) == ([mine], [])
    assert owners(reg) == {parse_address("10.77.0.5").raw: (tenant.id, 1)}


def test_networks_are_numbered(reg):
    assert [attachments.number(reg, name) for name in ("front", "back", "front")] == [1, 2, 1]


def test_a_users_container_gets_nothing(reg):
    """Who may make a namespace with the inode of another must not get that one's address."""
    attachments.add(reg, attachment(reg))
    tenant = make_tenant(reg, trusted=False)
    attachments.attach(reg, tenant)
    assert tenant.attached == []


def test_a_namespace_with_a_used_inode_gets_nothing(reg):
    attachments.add(reg, attachment(reg))
    tenant = make_tenant(reg)
    tenant.table.cookie += 1
    attachments.attach(reg, tenant)
    assert tenant.attached == []


@pytest.mark.parametrize("holder", ["given", "attached", "expected"])
def test_an_address_that_a_container_has(reg, holder):
    if holder == "given":
        attachments.give(reg, make_tenant(reg, "first", 1), [parse_own("10.77.0.5")])
        says = "the address of container 'first'"
    elif holder == "attached":
        attachments.add(reg, attachment(reg, "docker/0", "back", 1))
        says = "in use in network 'back'"
    else:
        attachments.expect(reg, "id", expected("first", owned=["10.77.0.5"]))
        says = "the address of container 'first'"
    before = dict(reg.attachments)
    refused("EADDRINUSE", lambda: attachments.add(reg, attachment(reg)), f"10.77.0.5 is {says}")
    assert reg.attachments == before
    attachments.forget_expected(reg)


def test_an_address_of_the_hosts_own(reg, stack):
    wanted = attachment(reg, "docker/1", "front", 1000, "192.0.2.9/24")
    refused("EADDRINUSE", lambda: attachments.add(reg, wanted), "192.0.2.9 is the host's own address")
    assert (reg.attachments, "192.0.2.9" in stack) == ({}, True)


def test_what_nobody_has_is_swept(reg, stack):
    """Of a graftd that was killed, with its state or without: its mark, or what its state says; nothing of the host's."""
    attachments.add(reg, attachment(reg))
    attachments.give(reg, make_tenant(reg, "other", 7), [parse_own("10.88.0.5")])
    left = [parse_address(text) for text in ("10.77.0.9", "10.88.0.6", "fd00::7")]
    for address in left:
        stack.add_address(address)
    reg.added.add(left[0])  # an earlier release's, without a mark
    stack.marked = [*left[1:], *reg.added - {left[0]}]
    reg.added.discard(parse_address("10.88.0.5"))  # its graftd was killed before it wrote that down
    assert reg.sweep() == sorted(left)
    assert {str(address) for address in stack.addresses} == {"192.0.2.9", "10.77.0.5", "10.88.0.5"}
    assert {str(address) for address in reg.added} == {"10.77.0.5", "10.88.0.5"}
    assert reg.sweep() == []


def test_who_is_alone(reg):
    mine, other = attachment(reg), attachment(reg, "docker/2", "back", 2000, "10.78.0.5/16")
    for each in (mine, other):
        attachments.add(reg, each)
    assert attachments.alone(reg) == [mine, other]
    tenant = make_tenant(reg)
    attachments.join(reg, mine)
    assert (tenant.attached, attachments.alone(reg)) == ([mine], [other])


def test_an_attachment_that_fails_half_way(reg, stack, monkeypatch):
    mine = attachment(reg)
    mine.addresses.append(parse_own("2001:db8::5"))
    before = stack.add_address

    def add(address):
        if not address.v4:
            raise Refused("no IPv6")
        return before(address)

    monkeypatch.setattr(registry, "add_address", add)
    with pytest.raises(Refused, match="no IPv6"):
        attachments.add(reg, mine)
    assert (reg.attachments, reg.added, "10.77.0.5" in stack) == ({}, set(), False)


def test_ports_of_attachments_are_taken(reg):
    port = free_port()
    mine = attachment(reg, "docker/1", "front", 1000, "10.77.0.5/16", f"127.0.0.1:{port}:80")
    mine.names = ["db"]
    attachments.add(reg, mine)
    wanted = parse_publication(f"127.0.0.1:{port}:81")
    refused("EADDRINUSE", lambda: publish.publish(reg, make_tenant(reg, "x", 1), [wanted]), "published by container 'db'")
    make_tenant(reg).attached.append(mine)
    refused("EADDRINUSE", lambda: publish.publish(reg, reg.by_name("x"), [wanted]), "published by container 'web'")
    twice = attachment(reg, "docker/2", "back", 2, "10.78.0.5/16", *(f"127.0.0.1:{n}:80" for n in (free_port(), free_port())))
    refused("EINVAL", lambda: attachments.add(reg, twice), "the container's port is published already")


# -- detach, leave, hand on --


def test_detach(reg, stack):
    port = free_port()
    mine = attachment(reg, "docker/1", "front", 1000, "10.77.0.5/16", f"127.0.0.1:{port}:80")
    attachments.add(reg, mine)
    tenant = make_tenant(reg)
    attachments.join(reg, mine)
    assert reg.kernel.maps["ingress"].entries
    attachments.detach(reg, "docker/1")
    assert (tenant.attached, tenant.publications, tenant.endpoints) == ([], [], {})
    assert (reg.kernel.maps["ingress"].entries, owners(reg)) == ({}, {})
    assert (reg.attachments, reg.added, "10.77.0.5" in stack) == ({}, set(), False)
    assert stack.ended == [parse_address("10.77.0.5")]
    attachments.detach(reg, "docker/1")  # which is not there


def test_an_attachment_that_is_left_keeps_its_address(reg, stack):
    mine = attachment(reg)
    attachments.add(reg, mine)
    tenant = make_tenant(reg)
    attachments.join(reg, mine)
    attachments.leave(reg, mine)
    assert (tenant.attached, owners(reg)) == ([], {})
    assert (mine.netns, mine.cookie, "10.77.0.5" in stack) == (0, 0, True)
    attachments.attach(reg, tenant)
    assert tenant.attached == []


def test_ports_are_handed_on(reg):
    """Docker offers a container's ports to each of its networks; the first has them, and leaves them to the next."""
    port = free_port()
    offer = [{"HostPort": port}]
    first = attachment(reg, "docker/1", "front", 1000, "10.77.0.5/16", f"127.0.0.1:{port}:80")
    second, other = attachment(reg, "docker/2", "back", 1000, "10.78.0.5/16"), attachment(reg, "docker/3", "back", 2000, "")
    for each in (first, second, other):
        each.offered = offer
        attachments.add(reg, each)
    tenant = make_tenant(reg)
    attachments.attach(reg, tenant)
    twins = attachments.twins_inside(reg, first)
    assert twins == [second]
    publications = list(first.publications)
    attachments.hand_on(reg, first, twins)
    assert (first.publications, second.publications) == ([], publications)
    assert (tenant.attached, tenant.publications) == ([second], publications)
    assert len(reg.kernel.maps["ingress"].entries) == 1


# -- what is expected --


def test_ports_of_a_container_that_is_coming_are_taken(reg):
    port = free_port()
    attachments.expect(reg, "id", expected(published=[f"127.0.0.1:{port}:80"]))
    wanted = parse_publication(f"127.0.0.1:{port}:80")
    tenant = make_tenant(reg)
    refused("EADDRINUSE", lambda: publish.publish(reg, tenant, [wanted]), "published by container 'coming'")
    attachments.no_longer_expect(reg, "id")
    publish.publish(reg, tenant, [wanted])
    assert reg.expected == {}


def test_the_container_that_was_expected_may_have_its_ports(reg):
    port = free_port()
    tenant = make_tenant(reg)
    attachments.expect(reg, "id", expected(where=(1000, 1001), published=[f"127.0.0.1:{port}:80"]))
    publish.publish(reg, tenant, [parse_publication(f"127.0.0.1:{port}:80")])
    attachments.no_longer_expect(reg, "id")


def test_expected_beside_the_attachments_of_its_namespace(reg):
    """The network driver was asked first: the same port inside is published twice."""
    attachments.add(reg, attachment(reg, "docker/1", "front", 1000, "", f"127.0.0.1:{free_port()}:80"))
    coming = expected(where=(1000, 1001), published=[f"127.0.0.1:{free_port()}:80"])
    refused("EINVAL", lambda: attachments.expect(reg, "id", coming), "the container's port is published already")
    assert reg.expected == {}
    os.close(coming.pidfd)


@pytest.mark.parametrize("why", ["the creator has ended", "it has taken too long"])
def test_what_is_no_longer_expected(reg, why):
    with subprocess.Popen(["sleep", "60"]) as creator:
        until = 60.0 if why == "the creator has ended" else -1.0
        coming = expected(until=until)._replace(pidfd=os.pidfd_open(creator.pid))
        kept = expected("kept")
        attachments.expect(reg, "a", coming)
        attachments.expect(reg, "b", kept)
        assert coming.holds() == (until > 0)
        if until > 0:
            creator.kill()
            creator.wait()
        attachments.forget_expected(reg)
        creator.kill()
    assert reg.expected == {"b": kept}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(coming.pidfd)
    attachments.no_longer_expect(reg, "b")


# -- whose namespace has ended --


def test_attachments_of_namespaces_that_have_ended_go(reg, monkeypatch, tmp_path):
    alive = {2000}
    monkeypatch.setattr(namespaces, "netns_alive", lambda netns, _label: netns in alive)
    mounted = tmp_path / "sandbox"
    mounted.touch()
    old = {}
    for n, (key, netns, sandbox) in enumerate(
        (("running", 1000, ""), ("alive", 2000, ""), ("ended", 3000, ""), ("young", 4000, ""), ("mounted", 0, mounted), ("unmounted", 0, "/gone"))
    ):
        old[key] = attachment(reg, key, "front", netns, f"10.77.1.{n + 1}/16")
        old[key].sandbox = [str(sandbox)] if sandbox else []
        old[key].since -= 0 if key == "young" else 2 * attachments.FORGOTTEN_SECONDS
        attachments.add(reg, old[key])
    tenant = make_tenant(reg, members={"id": Member("docker", "web", "/")})
    attachments.attach(reg, tenant)
    attachments.forget_dead(reg)
    assert set(reg.attachments) == {"running", "alive", "young", "mounted"}
    assert reg.by_container("id") is tenant
    assert reg.added == {own.address for key in reg.attachments for own in old[key].addresses}
