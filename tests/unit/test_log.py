"""What others make graftd write: short, on one line, not without end."""

import logging
import os
import socket
import subprocess
import sys

import pytest

from graft import log as module
from graft.log import BURST, _Formatter, _Handler, _Limit, entry, log


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


def test_an_entry_of_the_journal():
    """Lines of a value are no fields of their own (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/)."""
    assert entry({"MESSAGE": "it failed", "PRIORITY": "4"}) == b"MESSAGE=it failed\nPRIORITY=4\n"
    assert entry({"MESSAGE": "a\nUID=0"}) == b"MESSAGE\n\x07\0\0\0\0\0\0\0a\nUID=0\n"


def test_lines_in_the_journal_have_fields(monkeypatch, tmp_path):
    """Also when journald is gone, or does not read: then the line is on standard error, or lost, and nobody waits."""
    stderr = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    monkeypatch.setattr(module, "JOURNAL", str(tmp_path / "socket"))
    handler = _Handler(open(tmp_path / "stderr", "w"))  # noqa: SIM115
    handler.setFormatter(_Formatter("%(message)s"))
    record = logging.LogRecord("graftd", logging.INFO, "", 0, "container %s: %s", ("a\nb", "refused"), None)
    record.fields = {"VERDICT": "refused\nX=1"}
    handler.emit(record)
    assert (tmp_path / "stderr").read_text() == "<6>container a\\x0ab: refused\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "socket"))
        handler.emit(record)
        assert journal.recv(4096).decode().splitlines() == [
            "MESSAGE=container a\\x0ab: refused", "PRIORITY=6", "SYSLOG_IDENTIFIER=graftd",
            "CONTAINER=a\\x0ab", "VERDICT=refused\\x0aX=1",
        ]  # fmt: skip
        for _ in range(5000):
            handler.emit(record)
    assert len((tmp_path / "stderr").read_text().splitlines()) == 1
    assert handler.journal
    handler.journal.close()
    handler.stream.close()


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


TRIMS = """
import sys
from pathlib import Path
from graft import log
log.FILE_MAX, log.FILE_KEPT = 1000, 100
for n in range(int(sys.argv[2])): print(f"line {n:04}", file=sys.stderr, flush=True)
log.trim(Path(sys.argv[1])); print("after", file=sys.stderr)
"""


@pytest.mark.parametrize(("lines", "kept"), [(100, 101), (101, 10)])
def test_a_file_is_cut(tmp_path, lines, kept):
    """To whole lines from its end, in place: others write to it as well."""
    path, other = tmp_path / "graftd.log", tmp_path / "other"
    for own in (path, other):
        with open(own, "ab") as file:
            subprocess.run((sys.executable, "-c", TRIMS, path, str(lines)), stderr=file, check=True)
        told = own.read_text().splitlines()
        assert (len(told), told[-1]) == (kept if own == path else lines + 1, "after")
        assert told[-2] == f"line {lines - 1:04}"
