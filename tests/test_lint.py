"""Lint, types, format and spelling are tests."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import lack

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def check(*command: str) -> None:
    if not Path(command[0]).exists() and not shutil.which(command[0]):
        lack(f"'{command[0]}' is not installed")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def files(*patterns: str) -> list[str]:
    listed = subprocess.run(("git", "ls-files", "-co", "--exclude-standard", *patterns), cwd=ROOT, capture_output=True)
    return listed.stdout.decode().split()


def test_ruff():
    check(str(BIN / "ruff"), "check", ".")


def test_format():
    check(str(BIN / "ruff"), "format", "--check", "graft", "scripts")


def test_mypy():
    check(str(BIN / "mypy"))


def test_codespell():
    check(str(BIN / "codespell"), *files("*.py", "*.c", "*.h", "*.md", "*.sh", "Makefile"))


def test_clang_format():
    check(str(BIN / "clang-format"), "--dry-run", "--Werror", *files("*.c", "*.h"))


def test_shellcheck():
    check("shellcheck", *files("*.sh", "bin/*"), ".ci/run")


def test_no_work_left_without_an_issue():
    words = ("TO" + "DO:", "FIX" + "ME", "XX" + "X:")
    for name in files("*.py", "*.c", "*.h", "*.sh"):
        text = (ROOT / name).read_text()
        assert not any(word in text for word in words), name


def test_links_in_the_documents():
    """A relative link in a document leads to a file."""
    import re

    for name in files("*.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text()):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"


def test_the_design_names_every_module():
    """The table "The user half" in docs/design.md is the tree, both ways, with a sentence for each module."""
    import re

    text = (ROOT / "docs/design.md").read_text().partition("## The user half")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w/]+)` \| (.+) \|$", text, re.MULTILINE)
    modules = {name.removeprefix("graft/").removesuffix(".py") for name in files("graft/*.py")}
    assert sorted(name for name, _ in rows) == sorted(m for m in modules if Path(m).name not in ("__init__", "__main__"))
    assert all(sentence.endswith(".") for _, sentence in rows)
