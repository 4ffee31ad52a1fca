"""Run a command under the seccomp filter of bypass4netns, in a process of its own: main(SOCKET, COMMAND...).

bypass4netns takes its listener from an OCI runtime, which sends it to the profile's `listenerPath` with the state of
the container's process (ContainerProcessState of the runtime specification). This does the same, without a runtime.
The filter is that of bypass4netns's GetDefaultSeccompProfile. It traps sendmsg() and close() as well, so that the
process under it cannot send its own listener: a child from before takes it by pidfd_getfd(2) and sends it.
"""

import json
import os
import socket
import sys

from graft.kernel import linux
from graft.kernel.architecture import HERE
from graft.kernel.cbpf import JEQ_K, LD_W_ABS, OFFSET_ARCH, OFFSET_NR, RET_ALLOW, RET_K, RET_USER_NOTIF, Assembler

TRAPPED = tuple(HERE.numbers[name] for name in ("bind", "close", "connect", "sendmsg", "sendto", "setsockopt"))


def _filter() -> bytes:
    a = Assembler()
    a.op(LD_W_ABS, OFFSET_ARCH)
    a.op(JEQ_K, HERE.audit, false="allow")
    a.op(LD_W_ABS, OFFSET_NR)
    for number in TRAPPED:
        a.op(JEQ_K, number, true="notify")
    a.label("allow")
    a.op(RET_K, RET_ALLOW)
    a.label("notify")
    a.op(RET_K, RET_USER_NOTIF)
    return a.assemble()


def _send(agent: str, pid: int, number: int) -> None:
    """Send the listener, descriptor @number of process @pid, to bypass4netns. Raises OSError."""
    pidfd = os.pidfd_open(pid)
    listener = linux.pidfd_getfd(pidfd, number)
    state = {"ociVersion": "1.0.2", "id": f"bench-{pid}", "status": "creating", "pid": pid, "bundle": ""}
    message = {"ociVersion": "1.0.2", "fds": ["seccompFd"], "pid": pid, "metadata": "", "state": state}
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(agent)
        socket.send_fds(sock, [json.dumps(message).encode()], [listener])


def main(agent: str, *command: str) -> None:
    """Become @command. Raises OSError."""
    numbers, told = os.pipe()
    pid = os.getpid()
    child = os.fork()
    if not child:
        _send(agent, pid, int(os.read(numbers, 16)))
        os._exit(0)
    linux.no_new_privs()
    os.write(told, str(linux.seccomp_listener(_filter(), wait_killable=False)).encode())
    if os.waitpid(child, 0)[1]:
        sys.exit("bypass4netns did not take the listener")
    os.execvp(command[0], command)
