"""Checks of `graft doctor` that this machine does not fail by itself."""

import pytest

from graft.commands import checks, checks_host
from graft.kernel import features, libbpf


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("insmod /lib/modules/6.1.0/kernel/drivers/net/gtp.ko", ["gtp", "ovpn"]),
        ("install /bin/false", []),
        ("", []),
    ],
)
def test_tunnels_that_modprobe_would_load(tmp_path, monkeypatch, told, expected):
    program, setting = tmp_path / "modprobe", tmp_path / "setting"
    program.write_text(
        f"#!/bin/sh\n[ \"$*\" = '-n -v -b rtnl-link-gtp' ] || [ \"$4\" = rtnl-link-ovpn ] && echo '{told}'\n"
    )
    program.chmod(0o755)
    setting.write_text(f"{program}\n")
    monkeypatch.setattr(checks_host, "MODPROBE", setting)
    if not expected:
        assert "gtp, ovpn" in checks_host.tunnels()
        return
    with pytest.raises(checks_host.Lack, match="gtp, ovpn: whoever has CAP_NET_ADMIN"):
        checks_host.tunnels()


def test_whom_users_toml_means(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CONFIG", str(tmp_path / "graft.toml"))
    assert checks._users().startswith("as ordinary programs of theirs")
    path = tmp_path / "users.toml"
    path.touch(0o644)
    path.write_text("[users.daemon]\nports = [80]\n[groups.daemon]\nports = [80]\n")
    assert checks._users() == f"{path}: 1 users, 1 groups"
    path.write_text("[users.dmn]\nports = [80]\n[users.root]\nports = [80]\n[groups.dmn]\nports = [80]\n")
    with pytest.raises(checks_host.Lack, match=r"nobody is meant by \[users\.dmn\], \[users\.root\], \[groups\.dmn\]"):
        checks._users()


def test_no_modprobe_loads_nothing(tmp_path, monkeypatch):
    setting = tmp_path / "setting"
    setting.write_text("/nonexistent\n")
    monkeypatch.setattr(checks_host, "MODPROBE", setting)
    assert checks_host.tunnels()
    monkeypatch.setattr(checks_host, "MODPROBE", tmp_path / "missing")
    assert checks_host.tunnels()


def test_rules_of_the_hosts_routing(tmp_path, monkeypatch):
    rules = ["0: from all lookup local", "77: from all fwmark 0x1 lookup 9", "78: from all uidrange 1000-1000 prohibit"]
    program = tmp_path / "ip"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in rules))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(checks_host.Lack, match=r"^routing rules by fwmark: 77$"):
        checks_host.marks()
    with pytest.raises(checks_host.Lack, match=r"^routing rules by uidrange: 78$"):
        checks_host.uids()
    program.write_text(f"#!/bin/sh\necho '{rules[0]}'\n")
    assert checks_host.marks()
    assert checks_host.uids()


def test_a_kernel_that_lacks_something(monkeypatch):
    """The rest is tried on real kernels (docs/kernels.md)."""
    old = (features.Feature("a()", "5.11", "first", lambda: False), features.Feature("B", "5.18", "second", lambda: True))
    monkeypatch.setattr(features, "REQUIRED", old)
    with pytest.raises(checks_host.Lack, match=r"^without a\(\) \(Linux 5\.11\)$") as told:
        checks._features()
    assert told.value.remedy == "Linux 6.1 or newer"
    monkeypatch.setattr(features, "OPTIONAL", old)
    with pytest.raises(checks_host.Lack, match=r"^without a\(\) \(Linux 5\.11\)$") as told:
        checks._newer()
    assert told.value.remedy == "a(): first"
    monkeypatch.setattr(features, "REQUIRED", old[1:])
    assert "1 newest" in checks._features()


def test_features_of_this_kernel():
    """A probe of what cannot be there says so, and does not raise."""
    assert not features._call("uselib")() or features._call("mount_setattr")()
    assert not features._option(6, 250, 4)()
    assert features._option(6, 1, 4)()  # TCP_NODELAY
    assert {feature.there() for feature in features.OPTIONAL} <= {True, False}
    assert [f.linux for f in features.REQUIRED] == sorted((f.linux for f in features.REQUIRED), key=lambda v: [int(n) for n in v.split(".")])


def test_the_verifiers_last_word(monkeypatch):
    monkeypatch.setattr(libbpf, "complaints", ["libbpf: x", "1400: (85) call 187", "R1 is bad", "processed 9 insns", "-- END"])
    assert libbpf.verdict() == "R1 is bad"
    monkeypatch.setattr(libbpf, "complaints", ["libbpf: x"])
    assert libbpf.verdict() == ""
