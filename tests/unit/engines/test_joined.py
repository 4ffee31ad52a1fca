"""Paths of network namespaces that another process names."""

import pytest

from graft.engines.joined import below


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/run/netns/x", "/run/netns/x"),
        ("/var/run/netns/x", "/run/netns/x"),
        ("/var/run/../run/./netns//x", "/run/netns/x"),
        ("/relative/netns/x", "/run/netns/x"),
        ("/../../run/netns/x", "/run/netns/x"),
        ("/none/x", "/none/x"),
        ("/proc/self/ns/net", "/proc/self/ns/net"),
    ],
)
def test_links_stay_below(tmp_path, path, found):
    (tmp_path / "run/netns").mkdir(parents=True)
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("/run")
    (tmp_path / "relative").symlink_to("run")
    (tmp_path / "loop").symlink_to("/loop")
    assert below(str(tmp_path), path) == f"{tmp_path}{found}"
    assert below(str(tmp_path), "/loop/x").startswith(str(tmp_path))


def test_a_link_on_the_way_is_the_hosts_own_too():
    assert below("", "/proc/self/ns/net") == "/proc/self/ns/net"
