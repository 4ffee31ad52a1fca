"""What a hostile program in a container tries with ordinary calls. Runs inside; see ../test_attacks.py.

usage: main() with the arguments HOST CLIENT SECOND HOST6 OTHER ATTACKS: it reads names from stdin, tries each in a child of
its own, and prints what came of it, one line each: the name of an errno, or OK, or a word of the attack's.
"""

import contextlib
import errno
import os
import signal
import subprocess
import sys

from . import (  # noqa: F401 - they register their attacks
    accepted,
    beside,
    destinations,
    doors,
    families,
    lengths,
    made,
    netns,
    options,
    others,
    ports,
    sources,
)
from .common import ATTACKS, CLIENT, COMPILED, HOST

PATIENCE = 50 + 10 * int(float(os.environ.get("GRAFT_SLOWNESS", "1")))  # seconds an attack may take


def run(name):
    """The outcome of one attack, in a child that may not outlive it."""
    if name not in ATTACKS:
        done = subprocess.run((COMPILED, name, HOST, CLIENT), capture_output=True, text=True, timeout=PATIENCE)
        return done.stdout.strip() or f"status {done.returncode}"
    try:
        return ATTACKS[name]() or "OK"
    except TimeoutError:
        return "TIMEOUT"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def main():
    print("up", flush=True)
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.setsid()
            signal.alarm(PATIENCE)
            os.write(writing, run(line.strip()).encode())
            os._exit(0)
        os.close(writing)
        if os.waitpid(child, 0)[1]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # or its children would hold the pipe
        with open(reading) as told:
            print(told.read() or "DIED", flush=True)

