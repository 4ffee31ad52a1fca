"""How Sphinx makes the site of the documents (`make site`): the Markdown of the tree as it is, as GitHub reads it.

The order in the margin is that of docs/README.md. A link that leads nowhere is an error there, as `-W` has it.
"""

import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs/README.md"

project = "graft"
author = "the authors of graft"
release = version = re.search(r'__version__ = "(.*)"', (ROOT / "graft/__init__.py").read_text())[1]  # type: ignore[index]
extensions = ["myst_parser"]
root_doc = "README"
source_suffix = {".md": "markdown"}
include_patterns = ["*.md", "docs/*.md", "docs/*.svg", "docs/*.png", "docs/pictures/*.svg", "man/*.md"]
myst_enable_extensions = ["deflist"]  # of the manual pages
myst_heading_anchors = 4
myst_links_external_new_tab = False
html_theme = "furo"
html_title = f"graft {release}"
html_show_copyright = html_show_sphinx = False
html_copy_source = False


def _listed() -> dict[str, list[str]]:
    """The pages by their heading in docs/README.md, in its order, as Sphinx names them."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in INDEX.read_text().splitlines():
        if line and not line.startswith(("|", "[", "#")):
            heading = re.split("[:;]", line)[0] if line.endswith(":") else "Manual pages"
        for target in re.findall(r"\]\(([^)#]+\.md)\)", line):
            name = (INDEX.parent / target).resolve().relative_to(ROOT).with_suffix("")
            pages = found.setdefault(heading, [])
            if str(name) not in pages:
                pages.append(str(name))
    return found


def _add_contents(_app: Any, name: str, source: list[str]) -> None:
    """Give the first page what the margin is made of; the documents themselves are for GitHub as well."""
    if name == root_doc:
        for heading, pages in {"": ["docs/README"], **_listed()}.items():
            source[0] += "\n```{toctree}\n:hidden:\n" + (f":caption: {heading}\n" if heading else "")
            source[0] += "\n" + "\n".join(f"/{page}" for page in pages) + "\n```\n"


def _put_index(app: Any, error: Exception | None) -> None:
    """Whoever opens the directory gets the first page."""
    if not error and app.builder.format == "html":
        shutil.copyfile(app.outdir / "README.html", app.outdir / "index.html")


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _add_contents)
    app.connect("build-finished", _put_index)
