"""What a process is called, in a process of its own."""

import subprocess
import sys

import pytest

from graft.interpreter import ROOT, python_command

LOOK = """
import os, sys
from graft.log import log
from graft.process.title import set_title
set_title({name})
shown = open('/proc/self/cmdline', 'rb').read(), open('/proc/self/comm').read()
log.warning('here')
print(ascii((*shown, sys.executable, sys.argv, bool(os.environ['PATH']), __import__('msgspec').__name__)))
"""


def run(expression, *more):
    command = [*python_command(f"exec({LOOK.format(name=expression)!r})"), *more]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return eval(result.stdout), result.stderr


@pytest.mark.parametrize("name", ["graftd", "graft-keeper", "a-name-of-more-than-15-bytes"])
def test_title(name):
    """The name is all that is shown, and what Python has found by its arguments it has still."""
    (cmdline, comm, executable, argv, path, package), stderr = run(repr(name), "more")
    assert (cmdline, comm) == (name.encode() + b"\0", name[:15] + "\n")
    assert (executable, argv, path, package) == (sys.executable, ["-c", ROOT, "more"], True, "msgspec")
    assert stderr == f"{name}: here\n"


def test_a_title_that_has_no_room():
    """The environment behind the arguments is not touched."""
    (cmdline, comm, *_, path, _), _ = run("'x' * 5000")
    assert cmdline.startswith(sys.executable.encode() + b"\0-I\0-c\0")
    assert (comm, path) == ("x" * 15 + "\n", True)
