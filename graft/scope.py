"""How the processes of a wrapper inside a container are told from the container's others.

A process tree has one seccomp listener (seccomp(2), EBUSY), so such a wrapper runs under the container's. It
marks itself by its timer slack: 50 us, the default, and as many nanoseconds more as graftd's number for it. That
is inherited by fork(2), kept by execve(2) and by programs that close all descriptors, clear their environment or
leave their session, and shown in /proc/PID/timerslack_ns. Nothing is protected by it: a process that forges it
gets rules that it could have asked for. A real-time thread has no timer slack, and has the container's own rules.
"""

from graft import linux

SCOPE_SLACK = 50_000


def enter(number: int) -> None:
    """Mark this thread, and what it starts. Raises OSError."""
    linux.set_timer_slack(SCOPE_SLACK + number)
