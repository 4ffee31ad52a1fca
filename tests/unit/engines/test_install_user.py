"""graft install and uninstall by a user: in that user's configuration alone, beside what is in force."""

import contextlib
import json
import tomllib

import pytest

from graft import client
from graft.commands import engine
from graft.engines import install_user, rootless
from graft.engines.install import Options
from graft.errors import Refused


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's, with system-wide files below it; what graftd has granted, and Podman's backend, are set by name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(install_user, "SYSTEM", (str(tmp_path / "usr.conf"), str(tmp_path / "etc.conf")))
    monkeypatch.setattr(install_user, "backend", lambda: "netavark")
    grant(monkeypatch)
    return tmp_path


def grant(monkeypatch, *addresses):
    monkeypatch.setattr(client, "call", lambda _op, **_fields: {"granted": {"addresses": list(addresses)}})


def carried_out(plan):
    for change in plan.changes:
        change.make()


@pytest.mark.parametrize("kind", ["netavark", "cni"])
def test_podman_there_and_back(home, monkeypatch, kind):
    monkeypatch.setattr(install_user, "backend", lambda: kind)
    carried_out(install_user.podman(Options(), install=True))
    assert install_user.podman(Options(), install=True).changes == [], "installed already"
    own = home / ".config/containers/graft"
    assert {path.name for path in own.iterdir()} == {"graft", "graft-cni", "graft.json", "rootlessport"}
    assert (own / "rootlessport").resolve().name == "graft-runtime"
    conf = tomllib.loads((home / ".config/containers/containers.conf.d/graft.conf").read_text())
    assert conf["engine"]["hooks_dir"] == [str(own)]
    assert conf["engine"]["helper_binaries_dir"] == [str(own), *install_user.HELPERS]
    place = ".local/share/containers/storage/networks/graft.json" if kind == "netavark" else ".config/cni/net.d/88-graft.conflist"
    assert json.loads((home / place).read_text())["name"] == "graft"
    carried_out(install_user.podman(Options(), install=False))
    assert [path for path in home.rglob("*") if not path.is_dir()] == []
    assert install_user.podman(Options(), install=False).changes == []


def test_podmans_directories_stay_in_force(home):
    """The last file that says something counts; graft's own directory comes before, once."""
    (home / "usr.conf").write_text('[engine]\nhooks_dir = ["/usr/hooks"]\nhelper_binaries_dir = ["/usr/helpers"]\n')
    (home / "etc.conf.d").mkdir()
    (home / "etc.conf.d/a.conf").write_text('[engine]\nhooks_dir = ["/etc/hooks"]\n')
    (home / ".config/containers").mkdir(parents=True)
    (home / ".config/containers/containers.conf").write_text('[network]\ncni_plugin_dirs = ["/my/cni"]\n')
    for _ in range(2):
        carried_out(install_user.podman(Options(), install=True))
        conf = tomllib.loads((home / ".config/containers/containers.conf.d/graft.conf").read_text())
        own = str(home / ".config/containers/graft")
        assert conf["engine"] == {"hooks_dir": [own, "/etc/hooks"], "helper_binaries_dir": [own, "/usr/helpers"]}
        assert conf["network"]["cni_plugin_dirs"] == [own, "/my/cni"]


def test_a_file_of_podmans_that_is_wrong(home):
    (home / "etc.conf").write_text("[engine\n")
    with pytest.raises(Refused, match=r"etc\.conf: .*line 1"):
        install_user.podman(Options(), install=True)


def test_addresses_are_those_that_root_has_granted(home, monkeypatch):
    plan = install_user.podman(Options(), install=True)
    assert plan.found == "networks by netavark, no addresses are granted to you: containers have ports, and no names"
    grant(monkeypatch, "2001:db8::/64", "10.99.1.0/24")
    carried_out(install_user.podman(Options(), install=True))
    network = json.loads((home / ".local/share/containers/storage/networks/graft.json").read_text())
    assert network["subnets"] == [{"subnet": "10.99.1.0/24", "gateway": "10.99.1.1"}]


@pytest.mark.parametrize(
    ("granted", "uid", "subnet"),
    [
        ("10.96.0.0/12", 1000, "10.99.232.0/24"),
        ("10.96.0.0/12", 1001, "10.99.233.0/24"),
        ("10.96.0.0/12", 4096 + 1001, "10.99.233.0/24"),
        ("10.99.1.0/24", 1000, "10.99.1.0/24"),
        ("10.99.1.128/25", 1000, "10.99.1.128/25"),
    ],
)
def test_each_user_has_a_part_of_a_range(home, monkeypatch, granted, uid, subnet):
    grant(monkeypatch, granted)
    monkeypatch.setattr("os.getuid", lambda: uid)
    assert install_user.podman(Options(), install=True).found == f"networks by netavark, {subnet}"


@pytest.mark.parametrize(("subnet", "granted"), [("10.99.1.0/25", True), ("10.99.2.0/24", False), ("10.99.0.0/16", False)])
def test_a_network_that_is_asked_for_has_to_be_granted(home, monkeypatch, subnet, granted):
    grant(monkeypatch, "2001:db8::/64", "10.99.1.0/24")
    with contextlib.nullcontext() if granted else pytest.raises(Refused, match=f"--subnet {subnet}: not granted to you"):
        install_user.podman(Options(subnet=subnet), install=True)


def test_a_netavark_without_plugins(home, monkeypatch):
    monkeypatch.setattr(install_user, "backend", lambda: "")
    with pytest.raises(Refused, match="netavark has no plugins"):
        install_user.podman(Options(), install=True)


def test_docker_there_and_back(home):
    path = home / ".config/docker/daemon.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"log-driver": "journald"}\n')
    carried_out(install_user.docker(Options(), install=True))
    assert json.loads(path.read_text())["runtimes"]["graft"]["path"].endswith("graft-runtime")
    carried_out(install_user.docker(Options(), install=False))
    assert json.loads(path.read_text()) == {"log-driver": "journald"}


@pytest.fixture
def as_user(home, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(engine, "subordinate", lambda _kind: [(100000, 65536)])
    monkeypatch.setattr(rootless, "check_graftd", lambda: None)
    return home


def test_what_a_user_cannot_have(as_user, monkeypatch):
    with pytest.raises(Refused, match="containerd's pods are root's"):
        engine.plan_of("containerd", Options(), install=True)
    with pytest.raises(Refused, match="services of swarm are root's engine's"):
        engine.plan_of("docker", Options(swarm=True), install=True)
    monkeypatch.setattr(engine, "subordinate", lambda _kind: [])
    with pytest.raises(Refused, match="you have no subordinate ids, without which podman runs no image"):
        engine.plan_of("podman", Options(), install=True)


def test_roots_own_plan_is_another(as_user, tmp_path):
    paths = {change.path for change in engine.plan_of("docker", Options(tmp_path), install=True).changes}
    assert paths == {tmp_path / "etc/docker/daemon.json"}
