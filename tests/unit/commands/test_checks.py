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


def test_no_modprobe_loads_nothing(tmp_path, monkeypatch):
    setting = tmp_path / "setting"
    setting.write_text("/nonexistent\n")
    monkeypatch.setattr(checks, "MODPROBE", setting)
    assert checks._tunnels()
    monkeypatch.setattr(checks, "MODPROBE", tmp_path / "missing")
    assert checks._tunnels()
