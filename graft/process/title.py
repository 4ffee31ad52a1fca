"""What a process is called: in comm (top, pgrep), in its arguments (ps, pgrep -f) and in its lines of the log.

graftd and its keeper are Python programs, and `python3 -I -c import sys; ...` tells nobody what they are. They cannot
be executed with an argv[0] of their own: by argv[0] Python finds itself and its packages. So each writes its name
over its arguments when it runs. The kernel allows for that (setproctitle(3bsd)): where the last byte of the arguments
is not NUL, /proc/PID/cmdline ends at the first NUL (fs/proc/base.c, get_mm_cmdline()).
"""

import ctypes

from graft.kernel import linux
from graft.log import log, set_program

GRAFTD = "graftd"
KEEPER = "graft-keeper"
GUARD = "graft-guard"
SUP = "graft-sup"
DEPUTY = "graft-deputy"
RELAY = "graft-relay"
SWEEPER = "graft-sweep"


def set_title(name: str) -> None:
    """Be called @name from now on. Threads that this one starts afterwards are called the same."""
    set_program(name)
    try:
        linux.set_name(name)
        _write_arguments(name.encode())
    except OSError as error:  # without /proc it is called what it was
        log.warning("%s keeps another name: %s", name, error)


def _write_arguments(text: bytes) -> None:
    start, end = _arguments()
    room = end - start
    if room < len(text) + 2:
        return
    ctypes.memmove(start, text.ljust(room - 1, b"\0") + b" ", room)


def _arguments() -> tuple[int, int]:
    """Where this process's arguments are: arg_start and arg_end of proc_pid_stat(5). Raises OSError."""
    with open("/proc/self/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[45]), int(fields[46])
