"""System tests end what they started, each."""

from collections.abc import Iterator

import pytest

from graft.bench.lab import Lab, wait_for
from tests.conftest import need_root


@pytest.fixture(autouse=True)
def _end_what_was_started(request: pytest.FixtureRequest) -> Iterator[None]:
    need_root()
    yield
    lab: Lab | None = next((request.getfixturevalue(n) for n in ("lab",) if n in request.fixturenames), None)
    if lab:
        for process in lab.started:
            lab.end(process)
        lab.started.clear()
        wait_for(lambda: not lab.containers(), "containers to end")
