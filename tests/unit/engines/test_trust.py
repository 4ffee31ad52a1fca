"""What of the settings of engines' containers is believed."""

import pytest

from graft.engines import bundle, trust
from graft.engines.container import Container
from graft.errors import Refused, UsageError
from graft.rules.address import parse_prefix
from graft.rules.configuration import ANNOTATIONS, FREE, Configuration
from graft.rules.limits import Limits
from graft.rules.own_address import parse_own
from graft.rules.publication import parse_publication
from graft.rules.request import LABELS
from graft.tenants.attachment import Attachment
from tests.unit.fakes import make_registry, make_tenant

FILE = "/etc/graft/graft.toml"
TAKING = [
    ("graft", "8080:80", "graft.publish"),
    ("graft.publish", "8080:80", "graft.publish"),
    ("graft.ingress", "0.0.0.0:80=web", "graft.ingress"),
    ("graft.endpoint.web", "80", "graft.endpoint.web"),
    ("graft.egress", "none,10.0.0.0/8=out", "graft.egress"),
    ("graft.ip", "8.8.8.8", "graft.ip"),
    ("graft.limit", "sockets=70000", "graft.limit"),
    ("graft.limit", "udp=9,ports=5000", "graft.limit"),
    ("graft.resolver", "127.0.0.53", "graft.resolver"),
    ("graft.netadmin", "on", "graft.netadmin"),
    ("graft.direct", "on", "graft.direct"),
]
HARMLESS = [
    ("graft", "on"),
    ("graft", ""),
    ("graft.egress", "none"),
    ("graft.egress", "host"),
    ("graft.limit", "sockets=100,udp=10"),
    ("graft.family", "on"),
    ("graft.sysctl", "ignore"),
    ("graft.interface", "net0"),
    ("graft.allow", "pypi.org:443"),
    ("graft.learn", "on"),
    ("graft.policy", "build"),
    ("graft.names", "on"),
    ("graft.interface", "none"),
    ("graft.netadmin", "off"),
    ("graft.publish", ""),
]


def believed(key, value, *annotations, engine="cri"):
    configuration = Configuration(annotations=annotations)
    trust.check_believed(Container(engine, "id", "web", {key: value}), configuration, Limits(), FILE)


@pytest.mark.parametrize(("key", "value", "word"), TAKING)
def test_what_a_pod_may_not_take(key, value, word):
    with pytest.raises(Refused) as found:
        believed(key, value, *(a for a in ANNOTATIONS if a != word and a != "graft.endpoint"))
    assert str(found.value) == (
        f"annotation '{key}={value}': pods may not use {word} on this node "
        f'({FILE}, [pods], annotations = ["{word}"] allows it)'
    )
    assert found.value.code == "EPERM"
    believed(key, value, word)
    for engine in ("docker", "podman", "oci"):  # whoever runs these is root
        believed(key, value, engine=engine)


def test_all_endpoints_or_one():
    believed("graft.endpoint.web", "80", "graft.endpoint")
    with pytest.raises(Refused):
        believed("graft.endpoint.web", "80", "graft.endpoint.db")


@pytest.mark.parametrize(("key", "value"), HARMLESS)
def test_what_takes_nothing(key, value):
    believed(key, value)


def test_every_annotation_is_judged():
    assert {word.removeprefix("graft.").partition(".")[0] for _, _, word in TAKING} == {*LABELS, "netadmin", "endpoint"} - {*FREE}
    assert {*FREE} <= {key.removeprefix("graft.") for key, _ in HARMLESS}
    with pytest.raises(UsageError, match="unknown setting"):
        believed("graft.color", "red")


def test_pods_of_other_runtimes_are_pods():
    for annotation in ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType", "io.kubernetes.pod.uid"):
        assert bundle.identify({"annotations": {annotation: "x", "graft.ip": "8.8.8.8"}}, "id").engine == "cri"
    assert bundle.identify({"annotations": {"graft.ip": "8.8.8.8"}}, "id").engine == "oci"


def placed(address, *given, allowed=(), engine="docker"):
    trust.check_addresses(
        Container(engine, "id", "web", {}), [parse_own(address)], map(parse_prefix, given), map(parse_prefix, allowed), FILE
    )


def test_addresses_of_the_containers_network():
    placed("10.79.0.5", "10.79.0.0/24")
    placed("10.79.0.5", "10.78.0.0/24", "10.79.0.0/24")
    placed("fd00::5", "10.79.0.0/24", "fd00::/64")
    placed("10.79.0.5", "10.79.0.5/32")
    for engine, what in (("docker", "label"), ("podman", "annotation"), ("cri", "annotation")):
        with pytest.raises(Refused) as found:
            placed("169.254.169.254", "10.79.0.0/24", engine=engine)
        assert str(found.value) == (
            f"{what} 'graft.ip=169.254.169.254': not in the container's network (10.79.0.0/24) "
            f'(take one of it; or {FILE}, addresses = ["169.254.169.254"] allows it)'
        )
    with pytest.raises(Refused, match=r"not in a network of the container"):
        placed("10.79.0.5")


@pytest.mark.parametrize("address", ["10.79.0.0", "10.79.0.1", "10.79.0.255"])
def test_addresses_of_the_network_itself(address):
    with pytest.raises(Refused, match=f"'graft.ip={address}': the gateway's or a broadcast address of 10.79.0.0/24"):
        placed(address, "10.79.0.0/24")


def test_addresses_that_the_administrator_allows():
    placed("10.79.0.1", "10.79.0.0/24", allowed=["10.79.0.1"])
    placed("203.0.113.7", allowed=["203.0.113.0/28", "fd00::/8"])
    placed("fd00::7", allowed=["203.0.113.0/28", "fd00::/8"])
    with pytest.raises(Refused):
        placed("203.0.113.16", allowed=["203.0.113.0/28"])


def test_ports_of_the_node():
    reserved = Configuration(reserved_ports=((10248, 10250),)).reserved({(17, 53)})
    for text, port in (("10250:80", 10250), ("10240-10260:1-21/udp", 10248), ("127.0.0.1:53:53/udp", 53)):
        with pytest.raises(Refused) as found:
            trust.check_ports([parse_publication("8080:80"), parse_publication(text)], reserved, FILE)
        assert f": port {port} is the node's, not a pod's (publish another host port; {FILE}, reserved_ports" in str(found.value)
    trust.check_ports(map(parse_publication, ("10251:80", "53:53", "8080:10250")), reserved, FILE)
    assert Configuration(reserved_ports=(), reserve_listening=False).reserved({(17, 53)}) == set()


def test_which_networks_the_engine_gives(monkeypatch, tmp_path):
    reg = make_registry(monkeypatch, tmp_path)
    for key, netns, text, within in (
        ("cni/a/eth0", 7, "10.1.0.2/24", "10.0.0.0/8"),
        ("cni/b/eth0", 8, "10.2.0.2/24", ""),
        ("docker/a", 0, "10.3.0.2/24", ""),
        ("docker/b", 1000, "10.4.0.2/24", ""),
    ):
        attachment = reg.attachments[key] = Attachment(key, "n")
        attachment.netns = attachment.cookie = netns
        attachment.give(text, 1, within)
    tenant = make_tenant(reg)
    tenant.attached.append(reg.attachments["docker/b"])

    def given(**known):
        return [str(prefix) for prefix in trust.given_to(reg, Container("x", "id", "n", {}, **known))]

    assert given(where=(7, 7)) == ["10.1.0.0/24"]  # not all of 10.0.0.0/8, where other nodes' pods are
    assert given(network="gnet") == ["10.3.0.0/24"]
    assert given() == []
