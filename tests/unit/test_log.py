"""What others make graftd write: short, on one line, not without end."""

import logging

from graft.log import BURST, LENGTH, _Limit, log, one_line


def test_one_line():
    assert one_line("a\nforged: line\x1b[2J\0é") == "a\\x0aforged: line\\x1b[2J\\x00é"
    assert len(one_line("x" * 5000)) == LENGTH + 3


def test_limit():
    limit = _Limit()
    record = logging.LogRecord("graftd", logging.WARNING, "", 0, "said %s", ("x",), None)
    passed = sum(limit.filter(record) for _ in range(int(BURST) * 3))
    assert BURST <= passed < BURST + 20
    limit.at -= 10
    assert limit.filter(record)
    assert "lines before it were dropped" in record.getMessage()
    assert log.handlers[0].filters
