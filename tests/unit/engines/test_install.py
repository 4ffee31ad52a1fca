"""graft install and uninstall: shown, idempotent, reversible, and nobody else's lines touched."""

import ipaddress
import json
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from graft import client
from graft.bench.lab import ROOT
from graft.commands.engine import check_unused
from graft.commands.main import graft
from graft.engines import install, swarm
from graft.engines.install import (
    BACKUP,
    BEGIN,
    CRI_TABLES,
    ENGINES,
    Options,
    check_version,
    containerd,
    docker,
    podman,
)
from graft.errors import Failure, Refused


@pytest.fixture(autouse=True)
def podmans(monkeypatch):
    """The backend of Podman's networks, which need not be installed."""
    kinds = ["cni"]
    monkeypatch.setattr(install, "backend", lambda: kinds[-1])
    return kinds


DAEMON = '{\n    "log-driver": "journald",\n    "runtimes": {"nvidia": {"path": "/usr/bin/nvidia"}}\n}\n'
CONTAINERD = 'version = 2\n\n# kept\n[plugins."io.containerd.grpc.v1.cri".cni]\n  bin_dir = "/usr/lib/cni"\n'


def tree(root):
    return {
        str(p.relative_to(root)): p.readlink() if p.is_symlink() else p.read_text()
        for p in sorted(root.rglob("*"))
        if p.is_symlink() or (p.is_file() and not p.name.endswith(BACKUP))
    }


def change(engine, root, *, install):
    plan = ENGINES[engine](Options(root), install=install)
    for one in plan.changes:
        one.make()
    return plan


@pytest.fixture
def root(tmp_path):
    for name, text in (("etc/docker/daemon.json", DAEMON), ("etc/containerd/config.toml", CONTAINERD)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "usr/lib/cni").mkdir(parents=True)
    return tmp_path


def test_an_engine_that_is_in_use(monkeypatch, tmp_path):
    """Without graft's plugin it could not take its containers down."""
    started = []

    def status(op, *, start):
        started.append((op, start))
        return {"engines": {"docker": [f"web{n}" for n in range(6)], "podman": [], "containerd": ["db"]}}

    monkeypatch.setattr(client, "call", status)
    monkeypatch.setenv("GRAFT_RUN_DIR", str(tmp_path))
    with pytest.raises(Refused) as found:
        check_unused("docker")
    assert str(found.value) == (
        "6 of docker's use graft: web0, web1, web2, web3, web4, ... "
        "(end them first, or give --force: the engine cannot take them down then)"
    )
    (tmp_path / "state.json").touch()  # of a graftd that was killed, or runs
    check_unused("podman")
    assert started == [("status", False), ("status", True)]

    def refuses(op, *, start):
        raise Failure("no", code="ECONNREFUSED" if not start else "EPIPE")

    monkeypatch.setattr(client, "call", refuses)
    with pytest.raises(Failure):
        check_unused("containerd")
    (tmp_path / "state.json").unlink()
    check_unused("containerd")


@pytest.mark.parametrize("engine", ENGINES)
def test_there_and_back(root, engine):
    before = tree(root)
    assert change(engine, root, install=True).changes
    during = tree(root)
    assert during != before
    assert not change(engine, root, install=True).changes
    change(engine, root, install=False)
    assert not change(engine, root, install=False).changes
    after = tree(root)
    if engine == "docker":  # dockerd's file is JSON: its layout is ours, its content is not
        assert json.loads(after.pop("etc/docker/daemon.json")) == json.loads(before.pop("etc/docker/daemon.json"))
    assert after == before


def test_docker(root):
    change("docker", root, install=True)
    document = json.loads((root / "etc/docker/daemon.json").read_text())
    assert document["log-driver"] == "journald"
    assert set(document["runtimes"]) == {"nvidia", "graft"}
    assert Path(document["runtimes"]["graft"]["path"]).name == "graft-runtime"
    assert (root / "etc/docker/daemon.json.before-graft").read_text() == DAEMON
    for runtime, wanted in (("crun", ["--graft-runtime=crun"]), ("", ["--graft-runtime=crun"]), ("runc", None)):
        for one in docker(Options(root, runtime), install=True).changes:
            one.make()
        entry = json.loads((root / "etc/docker/daemon.json").read_text())["runtimes"]["graft"]
        assert entry.get("runtimeArgs") == wanted, "what was chosen stays, until another is"


def test_docker_for_swarm(root):
    """Services have the default runtime. One that somebody else has chosen is not replaced."""
    path = root / "etc/docker/daemon.json"
    for one in docker(Options(root, swarm=True), install=True).changes:
        one.make()
    assert json.loads(path.read_text())["default-runtime"] == "graft"
    assert not docker(Options(root, swarm=True), install=True).changes
    assert not docker(Options(root), install=True).changes, "without --swarm nothing of it is taken back"
    change("docker", root, install=False)
    assert json.loads(path.read_text()) == json.loads(DAEMON)
    path.write_text('{"default-runtime": "nvidia"}')
    with pytest.raises(Refused, match="has the default runtime 'nvidia'"):
        docker(Options(root, swarm=True), install=True)
    assert not docker(Options(root), install=False).changes
    assert json.loads(path.read_text()) == {"default-runtime": "nvidia"}
    done = CliRunner().invoke(graft, ["install", "podman", "--swarm", "--dry-run", "--root", str(root)])
    assert done.exit_code


def test_the_plugins_description(tmp_path):
    told = swarm.description(tmp_path / "graft.sock")
    assert told["entrypoint"] == ["/graft-plugin", f"{tmp_path}/graft.sock", "/run/docker/plugins/graft.sock"]
    assert told["interface"] == {
        "types": ["docker.networkdriver/1.0", "docker.ipamdriver/1.0"],
        "socket": "graft.sock",
    }


def test_podman_and_containerd_share_the_plugin(root):
    change("podman", root, install=True)
    change("containerd", root, install=True)
    link = root / "usr/lib/cni/graft-cni"
    change("podman", root, install=False)
    assert link.is_symlink()
    change("podman", root, install=True)
    change("containerd", root, install=False)
    assert link.is_symlink()
    change("podman", root, install=False)
    assert not link.is_symlink()


def test_containerd_reads_it(root):
    change("containerd", root, install=True)
    path = root / "etc/containerd/config.toml"
    assert "# kept" in path.read_text()
    cri = tomllib.loads(path.read_text())["plugins"]["io.containerd.grpc.v1.cri"]
    assert cri["containerd"]["runtimes"]["graft"]["options"]["BinaryName"].endswith("/graft-runtime")
    if shutil.which("containerd"):
        dumped = subprocess.run(("containerd", "-c", path, "config", "dump"), capture_output=True, text=True)
        document = tomllib.loads(dumped.stdout)
        runtimes = document["plugins"][CRI_TABLES[document["version"]]]["containerd"]["runtimes"]
        assert (runtimes["graft"]["cni_conf_dir"], "runc" in runtimes) == ("/etc/cni/graft.d", True)


@pytest.mark.parametrize("version", [2, 3])
def test_containerds_handler_has_the_options_of_the_runtime_that_it_stands_in_for(root, version):
    """As kubeadm's documents have them; containerd 2 has another table and a list of directories."""
    table = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}[version]
    place = {2: 'bin_dir = "/usr/lib/cni"', 3: 'bin_dirs = ["/usr/lib/cni", "/opt/cni/bin"]'}[version]
    runtimes = f'plugins."{table}".containerd.runtimes'
    path = root / "etc/containerd/config.toml"
    path.write_text(
        f"""version = {version}
[plugins."{table}".cni]
  {place}
[plugins."{table}".containerd]
  default_runtime_name = "other"
[{runtimes}.other]
  runtime_type = "io.containerd.runc.v2"
  base_runtime_spec = "/etc/containerd/cri-base.json"
  privileged_without_host_devices = true
  pod_annotations = ["theirs.*"]
  cni_conf_dir = "/theirs"
[{runtimes}.other.options]
  BinaryName = "/usr/bin/other"
  SystemdCgroup = true
  ShimCgroup = "/shim"
[{runtimes}.kata]
  runtime_type = "io.containerd.kata.v2"
"""
    )
    change("containerd", root, install=True)
    made = tomllib.loads(path.read_text())["plugins"][table]["containerd"]["runtimes"]
    assert set(made) == {"other", "kata", "graft"}
    options = made["graft"]["options"]
    assert (options["SystemdCgroup"], options["ShimCgroup"]) == (True, "/shim")
    assert options["BinaryName"].endswith("/graft-runtime")
    assert {name: value for name, value in made["graft"].items() if name != "options"} == {
        "runtime_type": "io.containerd.runc.v2",
        "base_runtime_spec": "/etc/containerd/cri-base.json",
        "privileged_without_host_devices": True,
        "pod_annotations": ["graft", "graft.*"],  # path.Match() of Go: the first is none of the second
        "container_annotations": ["graft", "graft.*"],
        "cni_conf_dir": "/etc/cni/graft.d",
    }
    assert (root / "usr/lib/cni/graft-cni").is_symlink()
    path.write_text(path.read_text().replace('default_runtime_name = "other"', 'default_runtime_name = "kata"'))
    change("containerd", root, install=True)
    made = tomllib.loads(path.read_text())["plugins"][table]["containerd"]["runtimes"]
    assert set(made["graft"]["options"]) == {"BinaryName"}


@pytest.mark.parametrize(
    ("engine", "path", "text", "message"),
    [
        ("docker", "etc/docker/daemon.json", '{"a": ', "daemon.json: Expecting value"),
        ("docker", "etc/docker/daemon.json", "[]", "is no configuration of dockerd"),
        ("containerd", "etc/containerd/config.toml", "version = ", "config.toml: Invalid value"),
        ("containerd", "etc/containerd/config.toml", "version = 1\n", "has version 1, and graft knows 2 and 3 .convert it"),
        ("containerd", "etc/containerd/config.toml", "version = 4\n", "has version 4, and graft knows 2 and 3 .write"),
        ("containerd", "etc/containerd/config.toml", f"version = 2\n{BEGIN}\n", "one of graft's two marks is"),
    ],
)
def test_a_file_that_is_not_understood_stays(root, engine, path, text, message):
    (root / path).write_text(text)
    with pytest.raises(Refused, match=message):
        change(engine, root, install=True)
    assert (root / path).read_text() == text


def test_a_subnet_that_was_chosen_stays(root):
    for one in podman(Options(root, subnet="10.98.0.0/16"), install=True).changes:
        one.make()
    assert not podman(Options(root), install=True).changes


RANGES = {"type": "host-local", "ranges": [[{"subnet": "10.244.3.0/24"}], [{"subnet": "fd00:3::/64"}]]}


@pytest.mark.parametrize(
    ("ipam", "options", "after"),
    [
        ({"type": "host-local", "subnet": "10.244.3.0/24"}, {}, None),
        (RANGES, {}, None),
        (RANGES, {"subnet": "fd00:3::/64"}, None),
        (RANGES, {"subnet": "10.244.4.0/24"}, {"type": "host-local", "subnet": "10.244.4.0/24"}),
        ({"type": "calico-ipam"}, {}, None),
        ({"type": "calico-ipam"}, {"network": "10.0.0.0/8"}, None),
    ],
)
def test_a_list_that_others_have_changed_stays(root, ipam, options, after):
    """docs/kubernetes.md has the administrator write `network`, and install again when the runtime changes."""
    for one in containerd(Options(root, subnet="10.244.3.0/24", network="10.244.0.0/16"), install=True).changes:
        one.make()
    path = root / "etc/cni/graft.d/10-graft.conflist"
    document = json.loads(path.read_text())
    assert (document["plugins"][0]["network"], document["plugins"][0]["resolver"]) == ("10.244.0.0/16", False)
    document["plugins"][0] |= {"ipam": ipam, "theirs": 7}
    document["plugins"].append({"type": "bandwidth"})
    path.write_text(json.dumps(document))
    for one in containerd(Options(root, **options), install=True).changes:
        one.make()
    found = json.loads(path.read_text())
    document["plugins"][0] |= {"ipam": after or ipam, "network": options.get("network", "10.244.0.0/16")}
    assert found == document
    assert not containerd(Options(root, **options), install=True).changes


def test_podman_with_netavark(root, podmans):
    """Its own kind of network and plugin, and the subnet that was chosen before Podman was upgraded."""
    for one in podman(Options(root, subnet="10.98.0.0/16"), install=True).changes:
        one.make()
    podmans.append("netavark")
    for one in podman(Options(root), install=True).changes:
        one.make()
    assert not podman(Options(root), install=True).changes
    network = json.loads((root / "etc/containers/networks/graft.json").read_text())
    assert (network["driver"], network["subnets"]) == ("graft", [{"subnet": "10.98.0.0/16", "gateway": "10.98.0.1"}])
    assert (root / "usr/local/lib/netavark/graft").readlink().name == "graft-netavark"
    assert not list(root.rglob("*graft*.conflist"))
    assert not (root / "usr/lib/cni/graft-cni").is_symlink()
    change("podman", root, install=False)
    assert not [name for name in tree(root) if "netavark" in name or "networks" in name]


def test_podman_whose_netavark_has_no_plugins(root, podmans):
    podmans.append("")
    change("podman", root, install=True)
    assert not list(root.rglob("*graft*.conflist"))
    assert not (root / "etc/containers/networks").exists()
    assert (root / "usr/share/containers/oci/hooks.d/graft.json").exists()


@pytest.mark.parametrize(
    ("told", "backend"),
    [("cni 4.3.1\n", "cni"), ("netavark 4.3.1\n", ""), ("netavark 4.5.0\n", "netavark"), ("netavark 5.4.2\n", "netavark")],
)
def test_what_podman_tells(monkeypatch, tmp_path, told, backend):
    monkeypatch.undo()
    (tmp_path / "podman").write_text(f"#!/bin/sh\nprintf '{told}'\n")
    (tmp_path / "podman").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert install.backend() == backend
    (tmp_path / "podman").write_text("#!/bin/sh\necho no storage >&2; exit 125\n")
    with pytest.raises(Failure, match="podman info: no storage"):
        install.backend()


def test_anothers_plugin_stays(root):
    (root / "usr/lib/cni/graft-cni").write_text("not ours")
    with pytest.raises(Refused, match="exists and is not graft's"):
        change("podman", root, install=True)


def test_the_commands(root):
    runner = CliRunner()
    before = tree(root)
    shown = runner.invoke(graft, ["uninstall", "docker", "--dry-run", "--root", str(root)])
    assert (shown.exit_code, shown.output) == (0, "docker: graft is not installed\n")
    for words, text in (
        (["install", "kubernetes"], "'kubernetes' is not one of"),
        (["install", "podman", "--subnet", "10.0.0.1/8"], "has host bits set"),
    ):
        done = runner.invoke(graft, words)
        assert (done.exit_code, text in done.output) == (2, True), done.output
    told = subprocess.run((ROOT / "bin/graft", "uninstall", "docker", "--root", root), capture_output=True, text=True)
    assert told.stdout == "docker: graft is not installed\n"
    assert tree(root) == before


def test_what_was_found_is_said(root, monkeypatch, tmp_path):
    """The version that is there, and the configuration that is changed."""
    words = {"dockerd": "Docker version 28.5.2+dfsg3, build x", "podman": "podman version 5.8.0", "containerd": "containerd github.com/containerd/containerd 2.1.4~ds2 x"}
    for program, said in words.items():
        (tmp_path / program).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    def first(engine):
        done = CliRunner().invoke(graft, ["install", engine, "--dry-run", "--root", str(root)])
        assert done.exit_code == 0, done.output
        return done.output.splitlines()[0]

    assert first("docker") == f"docker: found 28.5.2 ({tmp_path}/dockerd), {root}/etc/docker/daemon.json"
    assert first("podman") == f"podman: found 5.8.0 ({tmp_path}/podman), networks by cni"
    assert first("containerd") == f"containerd: found 2.1.4 ({tmp_path}/containerd), {root}/etc/containerd/config.toml of version 2"
    (root / "etc/docker/daemon.json").unlink()
    assert first("docker").endswith(f", no {root}/etc/docker/daemon.json yet")
    (tmp_path / "podman").write_text("#!/bin/sh\necho podman version 3.4.4\n")
    done = CliRunner().invoke(graft, ["install", "podman", "--dry-run", "--root", str(root)])
    assert str(done.exception) == "podman 3.4.4 is not supported (podman 4.0 or later)"


def test_old_engines_are_refused(monkeypatch, tmp_path):
    for said, message in (("Docker version 19.03.1, build x", "docker 19.03.1 is not supported"), ("what", "prints no version")):
        (tmp_path / "dockerd").write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / "dockerd").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(Refused, match=message):
            check_version("docker")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(Refused, match="dockerd is not installed"):
        check_version("docker")


def test_a_default_that_the_host_has_a_route_to(root, monkeypatch):
    """It is refused where it would be taken, and not where a list is kept."""
    change("containerd", root, install=True)
    path = root / "etc/cni/graft.d/10-graft.conflist"
    document = json.loads(path.read_text())
    document["plugins"].insert(0, {"type": "tuning"})
    document["plugins"][1]["ipam"] = {"type": "calico-ipam"}
    path.write_text(json.dumps(document))
    monkeypatch.setattr(install, "networks_of_the_host", lambda: [ipaddress.ip_network("10.0.0.0/8")])
    assert not change("containerd", root, install=True).changes, "graft's plugin need not be the first"
    path.unlink()
    with pytest.raises(Refused, match=r"10\.86\.0\.0/16, the default: this host has a route to 10\.0\.0\.0/8 .--subnet CIDR"):
        change("containerd", root, install=True)
    with pytest.raises(Refused, match=r"10\.97\.0\.0/16, the default"):
        change("podman", root, install=True)
    change("podman", root, install=False)
