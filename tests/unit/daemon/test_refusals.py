"""Lines of refused calls for the journal: a few of each container, and a count of the others."""

from types import SimpleNamespace
from typing import Any

import pytest

from graft.daemon import refusals
from graft.kernel.denials import Event
from graft.rules.address import parse_address


def container(number, name) -> Any:
    return SimpleNamespace(id=number, name=name, endpoints={})


def event():
    real = bytes(16)
    asked = parse_address("192.0.2.1").raw
    return Event(7, "connect", "outside the egress rules", 101, 6, asked, 9, real, 0, "curl", 0.0, 33)


@pytest.fixture
def lines(monkeypatch):
    found = []
    now = SimpleNamespace(at=1000.0)
    monkeypatch.setattr(refusals, "is_journal", lambda: True)
    monkeypatch.setattr("graft.daemon.refusals.time.monotonic", lambda: now.at)
    monkeypatch.setattr("graft.daemon.refusals.log.info", lambda text, *args, extra: found.append((text % args, extra["fields"])))
    return SimpleNamespace(found=found, now=now)


def test_fields_and_limits(lines):
    ours, another = refusals.Refusals(), container(8, "b")
    tenant = container(7, "a")
    for _ in range(100):
        ours.tell(event(), tenant)
    assert len(lines.found) == refusals.BURST
    text, fields = lines.found[0]
    assert text == "container a: curl[33] connect tcp 192.0.2.1:9: refused ENETUNREACH, outside the egress rules"
    assert fields == {"VERDICT": "refused", "OPERATION": "connect", "ADDRESS": "192.0.2.1:9", "REASON": "outside the egress rules", "ERRNO": "101"}
    ours.tell(event(), another)  # one container takes nothing of another's
    assert lines.found[-1][0].startswith("container b: ")
    lines.now.at += 10
    ours.tell(event(), tenant)
    assert lines.found[-1][0].endswith("(80 more before it are not told)")
    ours.ended(tenant)
    assert (ours._missing, list(ours._own)) == ({}, [8])


def test_all_together(lines):
    ours = refusals.Refusals()
    for number in range(50):
        for _ in range(10):
            ours.tell(event(), container(number, "c"))
    assert len(lines.found) == refusals.ALL_BURST


def test_without_a_journal(lines, monkeypatch):
    monkeypatch.setattr(refusals, "is_journal", lambda: False)
    refusals.Refusals().tell(event(), container(7, "a"))
    assert lines.found == []
