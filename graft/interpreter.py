"""The argv of graft's own processes that are written in Python."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def python_command(entry: str) -> list[str]:
    """The argv that runs @entry ("from graft.x import f; f()") with this interpreter and this tree of modules."""
    return [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, sys.argv[1]); {entry}", ROOT]
