"""The argv of graft's own processes that are written in Python."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The last place where modules are looked for: Debian's package has there what Debian 12 has no package of.
VENDORED = "/graft/vendored"


def python_command(entry: str) -> list[str]:
    """The argv that runs @entry ("from graft.x import f; f()") with this interpreter and this tree of modules."""
    search = f"import sys; sys.path.insert(0, sys.argv[1]); sys.path.append(sys.argv[1] + {VENDORED!r})"
    return [sys.executable, "-I", "-c", f"{search}; {entry}", ROOT]
