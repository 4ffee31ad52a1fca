"""contrib/kubernetes/policy.yaml: its expressions decide as the node does, and pods are refused with the reason.

Kubernetes' API server evaluates the Common Expression Language with `join` and its like added
(https://kubernetes.io/docs/reference/using-api/cel/).
"""

import cel
import pytest
import yaml

from graft.bench.lab import ROOT
from graft.engines import trust
from graft.engines.container import POLICY, Container
from graft.errors import Refused
from graft.rules.configuration import Configuration
from graft.rules.limits import Limits
from graft.rules.request import LABELS

VALUES = {
    "egress": "10.0.0.0/8=x", "publish": "80:80", "limit": "sockets=1", "interface": "net0", "sysctl": "ignore",
    "ip": "10.0.0.9", "resolver": "127.0.0.53", "ingress": "0.0.0.0:80=web", "allow": "example.org", POLICY: "agents",
}  # fmt: skip
ALLOWED = {"labels": {"graft-annotations": "allowed"}}
POLICY_DOCUMENT, BINDING = yaml.safe_load_all((ROOT / "contrib/kubernetes/policy.yaml").read_text())
SPEC = POLICY_DOCUMENT["spec"]


def refusals(annotations, namespace, **spec):
    """What the API server answers to who creates the pod; nothing: it is created."""
    metadata = {"name": "web", "namespace": "shop"} | ({} if annotations is None else {"annotations": annotations})
    known = {"object": {"metadata": metadata, "spec": spec}, "namespaceObject": {"metadata": namespace}, "variables": {}}

    def value(expression):
        return cel.evaluate(expression, cel.Context(variables=known, functions={"join": lambda texts, by: by.join(texts)}))

    for one in SPEC["variables"]:
        known["variables"][one["name"]] = value(one["expression"])
    failed = [one for one in SPEC["validations"] if value(one["expression"]) is not True]
    return [value(one["messageExpression"]) if "messageExpression" in one else one["message"] for one in failed]


def the_node_refuses(key, text):
    container = Container("cri", "c", "c", {key: text})
    try:
        trust.check_believed(container, Configuration(), Limits(sockets=9, udp=9, ports=9), "")
    except Refused:
        return True
    return False


@pytest.mark.parametrize("label", [*LABELS, POLICY, "family", "netadmin", "endpoint.web"])
def test_an_annotation(label):
    key, text = f"graft.{label}", VALUES.get(label, "80" if label.startswith("endpoint") else "on")
    told = refusals({key: text, "other": "x"}, {})
    assert bool(told) == the_node_refuses(key, text)
    if told:
        assert told == [
            f"pods of namespace shop may not have {key}: it takes ports, addresses or places of the node; ask for the label "
            "graft-annotations=allowed on the namespace"
        ]
    assert refusals({key: text}, ALLOWED) == []


@pytest.mark.parametrize(
    ("annotations", "namespace", "allowed"),
    [
        (None, {}, True),
        ({}, {"labels": {}}, True),
        ({"graft.egress": "none"}, {}, True),
        ({"graft": "80:80"}, {}, False),
        ({"grafted": "80:80", "graft_publish": "80:80"}, {}, True),
        ({"graft.new": "x"}, {}, False),
        ({"graft.publish": "80:80"}, {"labels": {"graft-annotations": "no"}}, False),
        ({"graft.publish": "80:80"}, {"labels": {"other": "allowed"}}, False),
    ],
)
def test_who_is_allowed(annotations, namespace, allowed):
    assert (refusals(annotations, namespace) == []) == allowed


def test_every_annotation_that_takes_something_is_named():
    (told,) = refusals({"graft.publish": "80:80", "graft.ip": "10.0.0.9", "graft.names": "on"}, {})
    assert {"graft.publish", "graft.ip"} < set(told.replace(",", " ").replace(":", " ").split())
    assert "graft.names" not in told


@pytest.mark.parametrize("spec", [{}, {"runtimeClassName": "graft"}, {"hostNetwork": True}, {"runtimeClassName": "graft", "hostNetwork": False}])
def test_the_hosts_network(spec):
    assert refusals(None, ALLOWED, **spec) == []
    (told,) = refusals(None, ALLOWED, **{**spec, "runtimeClassName": "graft", "hostNetwork": True})
    assert told.startswith("hostNetwork: true and runtimeClassName: graft exclude each other")


def test_it_is_bound():
    assert BINDING["spec"]["policyName"] == POLICY_DOCUMENT["metadata"]["name"]
    assert BINDING["spec"]["validationActions"] == ["Deny"]
