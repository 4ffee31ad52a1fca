"""Direct containers without a kernel: which cgroups get what listeners need."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graft.kernel import direct
from graft.tenants.direct import DirectContainers


@pytest.fixture
def containers(monkeypatch):
    """Those of a pod, of which one has ended; and the cgroups that got it."""
    attached: list[Path] = []

    def let_listen(_programs: Any, cgroup: Path) -> bool:
        if cgroup.name == "gone":
            raise FileNotFoundError(2, "No such file or directory", str(cgroup))
        attached.append(cgroup)
        return True

    monkeypatch.setattr(direct, "let_listen", let_listen)
    monkeypatch.setattr(direct, "directory_of", lambda path: Path(f"/cgroup{path}"))
    pod, trapped = SimpleNamespace(id=1, cgroups=["/gone", "/there"]), SimpleNamespace(id=2, cgroups=[])
    registry: Any = SimpleNamespace(tenants={1: pod, 2: trapped})
    kernel: Any = SimpleNamespace(for_direct=lambda: None)
    return DirectContainers(registry, kernel, Path("/nowhere")), attached


def test_once_for_each_that_is_there(containers):
    ours, attached = containers
    for _ in range(2):
        ours.let_listen(1)
    assert attached == [Path("/cgroup/there")]


def test_neither_for_others_nor_for_those_that_have_ended(containers):
    ours, attached = containers
    ours.let_listen(2)
    ours.let_listen(3)
    assert attached == []
