"""A table that a script prints, and writes into a document between two markers."""

import sys
from pathlib import Path


def print_or_write(table: str, document: Path, begin: str, end: str) -> None:
    """Print @table, or with --write put it into @document between the markers @begin and @end. Raises OSError."""
    if "--write" not in sys.argv[1:]:
        sys.stdout.write(table)
        return
    before, _, rest = document.read_text().partition(begin)
    document.write_text(before + begin + table + end + rest.partition(end)[2])
