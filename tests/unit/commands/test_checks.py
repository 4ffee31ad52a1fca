"""Checks of `graft doctor` that this machine does not fail by itself."""

import pytest

from graft.commands import checks


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
    monkeypatch.setattr(checks, "MODPROBE", setting)
    if not expected:
        assert "gtp, ovpn" in checks._tunnels()
        return
    with pytest.raises(checks.Lack, match="gtp, ovpn: whoever has CAP_NET_ADMIN"):
        checks._tunnels()


def test_whom_users_toml_means(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CONFIG", str(tmp_path / "graftd.toml"))
    assert checks._users().startswith("as ordinary programs of theirs")
    path = tmp_path / "users.toml"
    path.touch(0o644)
    path.write_text("[users.daemon]\nports = [80]\n[groups.daemon]\nports = [80]\n")
    assert checks._users() == f"{path}: 1 users, 1 groups"
    path.write_text("[users.dmn]\nports = [80]\n[users.root]\nports = [80]\n[groups.dmn]\nports = [80]\n")
    with pytest.raises(checks.Lack, match=r"nobody is meant by \[users\.dmn\], \[users\.root\], \[groups\.dmn\]"):
        checks._users()


def test_no_modprobe_loads_nothing(tmp_path, monkeypatch):
    setting = tmp_path / "setting"
    setting.write_text("/nonexistent\n")
    monkeypatch.setattr(checks, "MODPROBE", setting)
    assert checks._tunnels()
    monkeypatch.setattr(checks, "MODPROBE", tmp_path / "missing")
    assert checks._tunnels()
