"""contrib/kubernetes/daemonset.yaml: what its init container does with what a ConfigMap says of a node."""

import os
import subprocess

import pytest
import yaml

from graft.bench.lab import ROOT

NSENTER = '#!/bin/bash\nshift 4; echo "$@" >"$OUT"; printf "%s|%s" "$subnet" "$network" >>"$OUT"\n'
LISTED = "etc/cni/graft.d/10-graft.conflist"


def install(tmp_path, *, told=None, listed=False):
    """Run the init container's command with @told in the ConfigMap, on a node that has a list of networks or none."""
    (spec,) = yaml.safe_load((ROOT / "contrib/kubernetes/daemonset.yaml").read_text())["spec"]["template"]["spec"]["initContainers"]
    assert {mount["mountPath"] for mount in spec["volumeMounts"]} == {"/node", "/subnets"}
    for name in ("bin", "subnets", "stage", f"node/{os.path.dirname(LISTED)}"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bin/nsenter").write_text(NSENTER)
    (tmp_path / "bin/nsenter").chmod(0o755)
    (tmp_path / "stage/graft").touch()
    if told is not None:
        (tmp_path / "subnets/node1").write_text(told)
    if listed:
        (tmp_path / "node" / LISTED).touch()
    *shell, script = spec["command"]
    for place in ("/subnets", "/stage", "/node"):
        script = script.replace(place, f"{tmp_path}{place}")
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "NODE": "node1", "OUT": f"{tmp_path}/out"}
    done = subprocess.run((*shell, script), env=env, capture_output=True, text=True)
    out = tmp_path / "out"
    return done, out.read_text() if out.exists() else ""


@pytest.mark.parametrize(
    ("told", "listed", "subnet", "network"),
    [
        ("10.244.1.0/24 10.244.0.0/16\n", False, "10.244.1.0/24", "10.244.0.0/16"),
        ("10.244.1.0/24 10.244.0.0/16", False, "10.244.1.0/24", "10.244.0.0/16"),
        ("10.244.1.0/24", True, "10.244.1.0/24", ""),
        (None, True, "", ""),
    ],
)
def test_a_node_gets_its_subnet(tmp_path, told, listed, subnet, network):
    done, out = install(tmp_path, told=told, listed=listed)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.endswith(f"\n{subnet}|{network}")
    assert 'graft install containerd --yes --reload ${subnet:+--subnet "$subnet"} ${network:+--network "$network"}' in out
    assert (tmp_path / "node/graft").exists()


@pytest.mark.parametrize("told", [None, "", "\n"])
def test_a_node_without_one_is_refused(tmp_path, told):
    """Two nodes with one subnet would send connections to each other's pods. Nothing is installed."""
    done, out = install(tmp_path, told=told)
    assert done.returncode == 1
    assert "the ConfigMap graft-subnets has no 'node1': SUBNET of its pods, and NETWORK of all nodes'\n" in done.stderr
    assert out == ""
    assert not (tmp_path / "node/graft").exists()
