"""Mark the processes of a `graft run` inside a container, to tell them from the container's other processes.

A process tree can have only one seccomp listener (seccomp(2), EBUSY), so the inner wrapper's programs run under the
container's. The wrapper marks itself by its timer slack (prctl(2)): the default of 50 us, plus graftd's number for it
in nanoseconds. fork(2) inherits the timer slack, and execve(2) keeps it. So do programs that close all descriptors,
clear their environment or leave their session. graftd reads it from /proc/PID/timerslack_ns.

The mark protects nothing: a process that forges it gets rules that it could have asked for. A real-time thread has no
timer slack, so it has the container's own rules.
"""

from graft.kernel import linux

SCOPE_SLACK = 50_000


def enter(number: int) -> None:
    """Mark this thread and what it starts as of the wrapper @number, graftd's number for it. Raises OSError."""
    linux.set_timer_slack(SCOPE_SLACK + number)
