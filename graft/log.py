"""graftd's log: standard error, with journald's priority prefix under systemd (sd-daemon(3))."""

import logging
import os

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if "JOURNAL_STREAM" in os.environ:
            return f"<{_PRIORITY.get(record.levelno, 6)}>{text}"
        return f"graftd: {text}"


log = logging.getLogger("graftd")
_handler = logging.StreamHandler()
_handler.setFormatter(_Formatter("%(message)s"))
log.addHandler(_handler)
log.setLevel(os.environ.get("GRAFT_LOG", "INFO").upper())
