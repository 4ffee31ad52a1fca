"""`graft run --learn`: a process beside the command, which prints at its end what the run would have to be allowed.

Without --learn no process stays beside the command. Here one does: it gives signals on to the command and ends as the
command ends, by its status or by its signal.
"""

import contextlib
import os
import signal
import sys
import time
from typing import Any

from graft import client
from graft.errors import GraftError
from graft.text import plain

PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
OF_TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # the terminal sends them to the command as well
PATIENCE = 2.0  # seconds for graftd to see the end


def stay() -> int:
    """Fork: the child returns, with a descriptor to write the container's name to, and becomes the command.

    The parent waits for its end, prints what has been learnt, and ends as the command did.
    """
    name, told = os.pipe()
    child = os.fork()
    if not child:
        os.close(name)
        return told
    os.close(told)
    for number in PASSED_ON:
        signal.signal(number, lambda got, _frame: os.kill(child, got))
    for number in OF_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    with os.fdopen(name, "rb") as pipe:
        container = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if container:
        _print(container)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL, which has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def _print(container: str) -> None:
    """Print the policy on standard error: standard output is the command's."""
    try:
        until = time.monotonic() + PATIENCE
        found: dict[str, Any] = client.call("learnt", start=False, name=container)
        while found["running"] and time.monotonic() < until:
            time.sleep(0.05)
            found = client.call("learnt", start=False, name=container)
    except GraftError as error:
        print(f"graft: --learn: {plain(str(error))}", file=sys.stderr)
        return
    print("\n".join(lines(found)), file=sys.stderr, flush=True)


def lines(found: dict[str, Any]) -> list[str]:
    """A policy file of what graftd has learnt: `reached`, `sorted`, `looked_up`, `running`."""
    entries = [f'    "{plain(entry)}",' for entry in found["reached"]]
    if entries:
        told = ["# what this run has reached; as a file: graft run --policy FILE", "allow = [", *entries, "]"]
    else:
        told = ["# this run has reached nothing: graft run --egress none"]
    if found["running"]:
        told.insert(1, "# the container still runs: so far")
    told += [
        f"# by UDP alone, as programs do to sort addresses, and send nothing: {plain(entry)}"
        for entry in found["sorted"]
    ]
    told += [f"# looked up, and not connected to: {plain(name)}" for name in found["looked_up"]]
    return told
