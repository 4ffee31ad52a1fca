"""The page of metrics is made once for all who ask for it while it is made, and for a while after."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from graft.daemon.metrics import OPENMETRICS, PLAIN
from graft.daemon.pages import SPARE, Pages
from graft.daemon.web import PATIENCE, Asked


@pytest.fixture
def served(monkeypatch):
    """The pages, the counts that graftd was asked for, and a clock."""
    counts: list[Any] = []
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    readers = type("Readers", (), {"__len__": lambda _: 0, "closed": 0, "lost": 0})()
    tenancy = SimpleNamespace(readers=readers, counting=SimpleNamespace(ask=counts.append), loop=None)
    return Pages(tenancy), counts, clock  # type: ignore[arg-type]


def ask(served, accept: str = "") -> list[Any]:
    """Ask for metrics; the list has the answer, when there is one."""
    answers: list[Any] = []
    served._metrics(Asked("/metrics", "", {"accept": accept}), answers.append)
    return answers


def test_many_ask(served):
    page, counts, clock = served
    waiting = [ask(page), ask(page), ask(page, "application/openmetrics-text")]
    assert len(counts) == 1
    clock.now += 0.1
    counts[0]([])
    assert [answers[0].kind for answers in waiting] == [PLAIN, PLAIN, OPENMETRICS]
    assert ask(page) == waiting[0]
    assert len(counts) == 1
    clock.now += 0.1 * SPARE
    assert not ask(page)
    assert len(counts) == 2


def test_numbers_that_never_come(served):
    page, counts, clock = served
    ask(page)
    clock.now += PATIENCE + 1
    answers = ask(page)
    assert len(counts) == 2
    counts[1]([])
    assert answers
