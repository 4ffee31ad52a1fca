"""What others make graftd write: short, on one line, not without end."""

import logging
import os
import sys

import pytest

from graft.log import BURST, _Formatter, _Limit, log


@pytest.mark.parametrize(
    ("program", "line", "journal"),
    [("graftd", "graftd: it failed", "<4>it failed"), ("graft-keeper", "graft-keeper: it failed", "<4>graft-keeper: it failed")],
)
def test_lines_name_their_process(monkeypatch, program, line, journal):
    record = logging.LogRecord("graftd", logging.WARNING, "", 0, "it %s", ("failed",), None)
    formatter = _Formatter("%(message)s")
    formatter.program = program
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")  # a parent's: this process writes elsewhere
    assert formatter.format(record) == line
    stderr = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    assert formatter.format(record) == journal


def test_a_traceback_has_no_foreign_lines():
    """Its own line ends stay; what an exception says is one line."""
    try:
        raise ValueError("odd\x1b[2J\u202etext")
    except ValueError:
        record = logging.LogRecord("graftd", logging.ERROR, "", 0, "it\nfailed", (), sys.exc_info())
    told = _Formatter("%(message)s").format(record).splitlines()
    assert told[0].endswith("it\\x0afailed")
    assert told[-1] == "ValueError: odd\\x1b[2J\\u202etext"


def test_limit():
    limit = _Limit()
    record = logging.LogRecord("graftd", logging.WARNING, "", 0, "said %s", ("x",), None)
    passed = sum(limit.filter(record) for _ in range(int(BURST) * 3))
    assert BURST <= passed < BURST + 20
    limit.at -= 10
    assert limit.filter(record)
    assert "lines before it were dropped" in record.getMessage()
    assert log.handlers[0].filters
