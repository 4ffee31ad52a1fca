"""The stage on which programs are compared; GRAFT_PROGRAMS names the Debian that has them (make test-programs)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.bench.lab import Lab
from tests.conftest import lack
from tests.named.place import Stage, routed
from tests.system.conftest import httpgo as httpgo

ROOT = os.environ.get("GRAFT_PROGRAMS")


@pytest.fixture(scope="session")
def routes(lab: Lab) -> Iterator[None]:
    """The client's routes to the containers' own addresses."""
    routed(lab, "add")
    yield
    routed(lab, "del")


@pytest.fixture
def stage(lab: Lab, routes: None, request: pytest.FixtureRequest) -> Stage:
    """Programs of the system, or of the Debian that GRAFT_PROGRAMS names; a test that is marked `tree` needs that."""
    if request.node.get_closest_marker("tree") and not ROOT:
        lack("this needs the programs of make test-programs")
    return Stage(lab, Path(ROOT) if ROOT else None)
