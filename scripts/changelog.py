"""Print NEWS.md, the one source of what has changed, in another form: changelog.py debian|keep [--version VERSION].

    debian  debian/changelog, as deb-changelog(5) has it; --version is the first entry's, such as 0.2.0~dev581
    keep    CHANGELOG.md, as https://keepachangelog.com/en/1.1.0/ has it

A heading of NEWS.md is "## VERSION (DATE)" or "## VERSION (unreleased)"; below it stand groups ("New:", "Changed:",
"Fixed:", "Removed:", "Security:") of items, and paragraphs. What is not released yet has the date of
SOURCE_DATE_EPOCH or of the last commit, so that two builds of one tree are equal.
"""

import argparse
import os
import re
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

NEWS = Path(__file__).parent.parent / "NEWS.md"
MAINTAINER = "graft maintainers <maintainers@graft.invalid>"
HEADING = re.compile(r"^## (\d[\w.~+-]*) \((unreleased|\d{4}-\d\d-\d\d)\)$")
KEPT = {"New": "Added", "Changed": "Changed", "Deprecated": "Deprecated", "Removed": "Removed", "Fixed": "Fixed"}
KEPT |= {"Security": "Security"}
WIDTH = 78  # columns of an entry in debian/changelog


class Entry(NamedTuple):
    """One version. @date: ISO 8601, or "" if it is not released. @groups: (name, items); "" has the paragraphs."""

    version: str
    date: str
    groups: list[tuple[str, list[str]]]


def parse(text: str) -> list[Entry]:
    """The versions in @text, the newest first. Raises SystemExit with the line that is none of the grammar."""
    entries: list[Entry] = []
    for number, line in enumerate(text.splitlines(), 1):
        if heading := HEADING.match(line):
            entries.append(Entry(heading[1], "" if heading[2] == "unreleased" else heading[2], []))
        elif not entries:
            if line and line != "# News":
                raise SystemExit(f"NEWS.md:{number}: '{line}' stands before the first '## VERSION (DATE)'")
        elif line.startswith("#"):
            raise SystemExit(f"NEWS.md:{number}: '{line}' is no '## VERSION (DATE)', nor (unreleased)")
        else:
            _add(entries[-1].groups, line, number)
    if not entries:
        raise SystemExit("NEWS.md has no '## VERSION (DATE)'")
    return entries


def _add(groups: list[tuple[str, list[str]]], line: str, number: int) -> None:
    if line.endswith(":") and line[:-1] in KEPT:
        groups.append((line[:-1], []))
    elif line.startswith("- "):
        if not groups or not groups[-1][0]:
            raise SystemExit(f"NEWS.md:{number}: an item belongs below one of {', '.join(f'{k}:' for k in KEPT)}")
        groups[-1][1].append(line[2:])
    elif line.startswith("  ") and groups and groups[-1][1]:
        groups[-1][1][-1] += f" {line.strip()}"
    elif not line:
        if groups and groups[-1][1]:
            groups.append(("", []))  # what follows is a paragraph, unless it begins a group
    elif groups and not groups[-1][0]:
        groups[-1][1][:] = [" ".join((*groups[-1][1], line))]
    else:
        groups.append(("", [line]))


def _built() -> datetime:
    told = os.environ.get("SOURCE_DATE_EPOCH")
    if not told:
        command = ("git", "-C", str(NEWS.parent), "log", "-1", "--format=%ct")
        told = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "0"
    return datetime.fromtimestamp(int(told), UTC)


def debian(entries: list[Entry], version: str) -> str:
    """The text of debian/changelog. @version: of the first entry instead of its own; "" is its own."""
    told = []
    for n, entry in enumerate(entries):
        lines = [f"graft ({version if n == 0 and version else entry.version}) unstable; urgency=medium", ""]
        for name, items in entry.groups:
            for item in items:
                text = f"{name}: {item}" if name else item
                lines += textwrap.wrap(
                    text, WIDTH, initial_indent="  * ", subsequent_indent="    ", break_on_hyphens=False
                )
        when = datetime.fromisoformat(f"{entry.date}T12:00:00+00:00") if entry.date else _built()
        told.append("\n".join([*lines, "", f" -- {MAINTAINER}  {when:%a, %d %b %Y %H:%M:%S +0000}", ""]))
    return "\n".join(told)


def keep(entries: list[Entry]) -> str:
    """The text of CHANGELOG.md."""
    told = ["# Changelog\n\nThe form is that of [Keep a Changelog](https://keepachangelog.com/en/1.1.0/).\n"]
    for entry in entries:
        told.append(
            f"## [{entry.version}] - {entry.date}\n" if entry.date else f"## [Unreleased] - {entry.version}\n"
        )
        for name, items in entry.groups:
            if name and items:
                told.append(f"### {KEPT[name]}\n\n" + "\n".join(f"- {item}" for item in items) + "\n")
            elif items:
                told.append("\n\n".join(items) + "\n")
    return "\n".join(told)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=["debian", "keep"])
    parser.add_argument("--version", default="", help="of the first entry in debian/changelog")
    arguments = parser.parse_args()
    entries = parse(NEWS.read_text())
    sys.stdout.write(debian(entries, arguments.version) if arguments.form == "debian" else keep(entries))


if __name__ == "__main__":
    main()
