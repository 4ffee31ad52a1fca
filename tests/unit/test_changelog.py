"""NEWS.md in the forms of Debian and of Keep a Changelog."""

import pytest

from scripts.changelog import debian, keep, parse

NEWS = """# News

## 0.2.0 (unreleased)

New:
- One
  thing.

Fixed:
- Another.

## 0.1.0 (2026-11-27)

New:
- `graft run`.

Kernels: Linux 6.1.
"""


def test_debian(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795000000")
    first, second = debian(parse(NEWS), "0.2.0~dev7").split("\n\ngraft ", 1)[0], debian(parse(NEWS), "")
    assert first.splitlines()[:4] == ["graft (0.2.0~dev7) unstable; urgency=medium", "", "  * New: One thing.", "  * Fixed: Another."]
    assert "graft (0.2.0) unstable" in second
    assert "  * New: `graft run`.\n  * Kernels: Linux 6.1.\n\n -- graft maintainers" in second
    assert second.endswith("Fri, 27 Nov 2026 12:00:00 +0000\n")


def test_keep():
    assert keep(parse(NEWS)).split("\n\n", 2)[2].split("\n") == [
        "## [Unreleased] - 0.2.0", "", "### Added", "", "- One thing.", "", "### Fixed", "", "- Another.", "",
        "## [0.1.0] - 2026-11-27", "", "### Added", "", "- `graft run`.", "", "Kernels: Linux 6.1.", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [("## 1.0 (soon)", "NEWS.md:1: '## 1.0 (soon)'"), ("## 1.0 (unreleased)\n- x", "NEWS.md:2: an item"), ("# News\nx", "NEWS.md:2: 'x'"), ("", "NEWS.md has no")],
)
def test_what_is_none_of_it(text, line):
    with pytest.raises(SystemExit, match=line.replace("(", r"\(").replace(")", r"\)")):
        parse(text)


def test_this_tree():
    from scripts.changelog import NEWS as path

    assert parse(path.read_text())[0].groups
