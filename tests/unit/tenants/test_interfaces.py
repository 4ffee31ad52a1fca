"""The seconds that a start waits for its addresses: what the environment says, if that is a number of seconds."""

import pytest

from graft.tenants import interfaces


@pytest.mark.parametrize(
    ("told", "seconds"), [("", 1), ("0", 0), ("2.5", 2.5), ("abc", 1), ("-1", 1), ("nan", 1), ("inf", 1), ("1e9", 1)]
)
def test_patience(monkeypatch, told, seconds):
    monkeypatch.setenv("GRAFT_ADDRESS_WAIT", told)
    assert interfaces.patience(1.0) == seconds
