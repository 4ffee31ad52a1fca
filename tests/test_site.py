"""The site of the documents: every page is in it, no link leads nowhere, and it asks nobody else for anything."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import lack

ROOT = Path(__file__).parents[1]
BUILD = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html", "-c", "docs/site")


def build(root, out):
    for name in ("sphinx", "myst_parser", "furo"):
        if not importlib.util.find_spec(name):
            lack(f"the Python package {name} is not installed")
    return subprocess.run((*BUILD, ".", out), cwd=root, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert (done.returncode, done.stderr) == (0, "")
    return out


def test_every_document_is_a_page(site):
    listed = subprocess.run(("git", "ls-files", "-co", "--exclude-standard", "*.md"), cwd=ROOT, capture_output=True, text=True)
    pages = [name for name in listed.stdout.split() if name.count("/") == 0 or name.startswith(("docs/", "man/"))]
    assert len(pages) > 25
    margin = (site / "index.html").read_text().partition('class="sidebar-tree"')[2].partition("</div>\n</div>")[0]
    for name in pages:
        page = name.removesuffix(".md") + ".html"
        assert (site / page).is_file(), page
        assert page == "README.html" or f'href="{page}"' in margin, f"{page} is not in the margin"


def test_markdown_is_read_as_github_reads_it(site):
    news = (site / "NEWS.html").read_text()
    assert re.search(r"<p>New:</p>\s*<ul", news), "a list right after a line is one"
    assert "<dt>" in (site / "man/graftd.8.html").read_text()
    assert "<table" in (site / "docs/operations.html").read_text()


def test_it_asks_nobody_else(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"|<link[^>]*rel="stylesheet"[^>]*href="([^"]+)"', page.read_text())
        assert not [one or two for one, two in loaded if "//" in (one or two)], page


def test_a_link_that_leads_nowhere_is_told(tmp_path):
    for name in ("docs/site/conf.py", "graft/__init__.py", "docs/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs/README.md").write_text("# Documents\n\nWhoever:\n")
    (tmp_path / "README.md").write_text("# It\n\n[gone](docs/gone.md) [there](docs/README.md#nowhere) ![picture](gone.svg)\n")
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    for told in ("docs/gone.md", "nowhere", "gone.svg"):
        assert told in done.stderr
