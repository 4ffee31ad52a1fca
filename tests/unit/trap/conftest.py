"""The bench that units of the listeners and the dispatcher share."""

import os

import pytest

from tests.unit.trap.bench import Bench


@pytest.fixture
def bench(monkeypatch, tmp_path):
    made = Bench(monkeypatch, tmp_path)
    yield made
    for watched in made.made:
        os.close(watched.listener.other)
