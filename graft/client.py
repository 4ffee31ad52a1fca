"""The commands' connection to graftd. It starts graftd if it is not running.

Every command imports this module, so it imports little itself.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from graft import __version__
from graft.errors import CLASSES, Failure, GraftError, Refused

START_TIMEOUT = 120.0  # on an emulated machine beside other work it takes half a minute
REPLY_TIMEOUT = 120.0
DIAL_SECONDS = 30
STARTS_MAX = 3
REPLY_MAX = 1 << 26
_acts_as_user = False
START = "systemctl enable --now graftd.socket graftd-agent.socket"  # where systemd runs


def run_directory() -> str:
    """The run directory, as graft.kernel.cgroup.run_dir() gives it, but without the cost of importing pathlib."""
    return os.environ.get("GRAFT_RUN_DIR", "/run/graft")


def act_as_user(*, anybody: bool = False) -> None:
    """Speak to graftd by the user socket from now on, unless this is root; with @anybody then as well: it is one of
    a user namespace.

    A member of the group `graft` may give orders by the other one as well; a container is its user's own, whoever
    that is.
    """
    global _acts_as_user
    _acts_as_user = (anybody or os.geteuid() != 0) and os.path.exists(f"{run_directory()}/user.sock")


def is_user() -> bool:
    """Does this process speak to graftd by the user socket: as a user without root, who has no other?"""
    if _acts_as_user:
        return True
    directory = run_directory()
    admin = f"{directory}/graftd.sock"
    return os.path.exists(f"{directory}/user.sock") and os.path.exists(admin) and not os.access(admin, os.W_OK)


def no_door() -> GraftError:
    """Why a user without root has no graftd to ask."""
    if os.path.exists(f"{run_directory()}/agent.sock"):
        return Refused(
            "the graftd that runs serves root alone", hint="root may renew it: graftd --replace", code="EPROTO"
        )
    return _none_runs()


def _none_runs() -> Failure:
    how = "start it: graftd" if os.geteuid() == 0 else f"root may start it: {START}"
    return Failure("graftd is not running", hint=how, code="ECONNREFUSED")


def connect(*, start: bool) -> socket.socket:
    """A connection to the admin socket, or a user's to the user socket, for one request. graftd has answered `hello`.

    So graftd has checked this process before it gets a filter, and it may send its request from inside a container.
    With @start, graftd is started if none runs. If one is just ending, this waits for the next one.

    Raises Failure, and Refused without permission.
    """
    path = f"{run_directory()}/{'user' if is_user() else 'graftd'}.sock"
    deadline = time.monotonic() + START_TIMEOUT
    starts = 0
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _dial(sock, path)
            exchange(sock, "hello", {})
            return sock
        except OSError as error:
            sock.close()
            if not start or error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise _unreachable(error, path) from None
            if starts == STARTS_MAX:
                raise Failure(f"graftd ends at once: {_last_log_line()}", hint="run 'graft doctor'") from None
            if start_daemon():
                starts += 1
                deadline = time.monotonic() + START_TIMEOUT
        except GraftError as error:
            sock.close()
            if error.code != "EPIPE":
                raise
        if time.monotonic() > deadline:
            raise Failure("graftd did not start", hint=f"see {run_directory()}/graftd.log")
        time.sleep(0.01)


def _dial(sock: socket.socket, path: str) -> None:
    """Connect to a socket of graftd's. Raises OSError: EAGAIN if it has no room for DIAL_SECONDS.

    A socket with a timeout of Python's would not wait for room: a unix socket has no connection in progress.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, DIAL_SECONDS.to_bytes(8, "little") + bytes(8))
    sock.connect(path)
    sock.settimeout(REPLY_TIMEOUT)


def connect_agent(*, start: bool) -> socket.socket:
    """A connection to the agent socket, which anyone may use. With @start, root starts graftd if none runs.

    Raises Failure, with the code ECONNREFUSED if graftd is not running.
    """
    path = f"{run_directory()}/agent.sock"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            _dial(sock, path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED) or not start or os.geteuid() != 0:
                raise
            connect(start=True).close()
            _dial(sock, path)
    except OSError as error:
        sock.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            none = _none_runs()
            none.hint += f"; in a container, mount {path}"
            raise none from None
        raise Failure(f"connect to graftd at {path}: {error.strerror}") from None
    return sock


def ask_agent(document: dict[str, Any]) -> Any:
    """Ask the agent socket something that changes nothing, so that it can be repeated if graftd is just ending.

    Returns the value of "ok". Raises GraftError.
    """
    for last in (False, False, True):
        with connect_agent(start=True) as asking:
            try:
                return converse(asking, document)
            except Failure as error:
                if last or error.code != "EPIPE":
                    raise
        time.sleep(0.05)
    raise AssertionError


def _last_log_line() -> str:
    try:
        with open(f"{run_directory()}/graftd.log", errors="replace") as log:
            lines = log.read()[-4096:].splitlines()
    except OSError as error:
        return str(error.strerror)
    return lines[-1].removeprefix("graftd: ").removeprefix("graft-keeper: ") if lines else "its log is empty"


def start_daemon() -> bool:
    """Start the keeper in the background, and wait until its sockets take connections; False if another one runs.

    Raises Failure: for anyone but root, and with the last line of its log if it ends.
    """
    if os.geteuid() != 0:
        raise _none_runs()
    import subprocess

    directory = run_directory()
    os.makedirs(directory, mode=0o755, exist_ok=True)
    ready, told = os.pipe()
    from graft.interpreter import python_command

    # The machine's graftd belongs in the namespaces of process 1, wherever it is started from: 'ip netns exec NS
    # graft ...' has another network and another /sys. One with a run directory of its own (tests) stays here.
    # It is forked twice, because the caller becomes the user's command, which must not have a child it did not start.
    entry = "import os; os.fork() and os._exit(0); os.setsid(); from graft.process.keeper import main"
    entry = f"{entry}; main(int(sys.argv[2]))"
    if "GRAFT_RUN_DIR" not in os.environ:
        entry = f"from graft.kernel.netns import enter_initial; enter_initial(); {entry}"
    with open(f"{directory}/graftd.log", "ab") as log:
        started = subprocess.Popen(
            [*python_command(entry), str(told)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(told,),
            cwd="/",
            env={**os.environ, "GRAFT_IDLE_EXIT": "1"},
        )
    started.wait()
    os.close(told)
    began = os.read(ready, 1)
    os.close(ready)
    if not began:
        raise Failure(f"graftd ends at once: {_last_log_line()}", hint="run 'graft doctor'")
    return began == b"1"


def exchange(sock: socket.socket, op: str, fields: dict[str, Any], fds: tuple[int, ...] = ()) -> Any:
    """Send one request to the admin socket and return the value of "ok". Raises the GraftError that graftd sent."""
    return converse(sock, {"op": op, "version": __version__, **fields}, fds)


def converse(
    sock: socket.socket, document: dict[str, Any], fds: tuple[int, ...] = (), received: list[int] | None = None
) -> Any:
    """As `exchange`, but with a whole document; descriptors that come with the reply are added to @received.

    Raises also Failure: EPIPE if graftd closed the connection, ETIMEDOUT after REPLY_TIMEOUT.
    """
    message = json.dumps(document, ensure_ascii=False).encode(errors="replace") + b"\n"
    try:
        if fds:
            sent = socket.send_fds(sock, [message], fds)
            message = message[sent:]
        if message:  # even an empty send() fails with EPIPE once graftd has answered and closed
            sock.sendall(message)
        reply = bytearray()
        while not reply.endswith(b"\n"):
            data = sock.recv(65536) if received is None else _receive(sock, received)
            if not data or len(reply) > REPLY_MAX:
                raise Failure("graftd closed the connection", hint=f"see {run_directory()}/graftd.log", code="EPIPE")
            reply += data
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise Failure(f"graftd did not answer within {REPLY_TIMEOUT:.0f} s", code="ETIMEDOUT") from None
        raise Failure(f"connection to graftd: {error.strerror}", code="EPIPE") from None
    answer = json.loads(reply)
    if "error" in answer:
        raise told(answer["error"])
    return answer["ok"]


def told(error: dict[str, Any]) -> GraftError:
    """The error that graftd has sent as @error."""
    return CLASSES.get(error["status"], Failure)(error["message"], hint=error["hint"], code=error["code"])


def _receive(sock: socket.socket, received: list[int]) -> bytes:
    data, fds, _, _ = socket.recv_fds(sock, 65536, 4)
    for fd in fds:
        os.set_inheritable(fd, False)
    received += fds
    return data


def follow(op: str, **fields: Any) -> Iterator[Any]:
    """Send a request whose answer is a list that goes on: yields what it has, and then each line that graftd sends.

    Ends never by itself. Raises GraftError, with the code EPIPE when graftd ends.
    """
    with connect(start=False) as sock:
        sock.sendall(json.dumps({"op": op, "version": __version__, **fields}).encode() + b"\n")
        lines = sock.makefile("rb")
        answer = json.loads(lines.readline() or b'{"ok": []}')
        if "error" in answer:
            raise told(answer["error"])
        yield from answer["ok"]
        sock.settimeout(None)
        for line in lines:
            yield json.loads(line)
        raise Failure("graftd has ended, or closed the connection", hint="try again", code="EPIPE")


def order(op: str, **fields: Any) -> Any:
    """Send one request without `hello`, to a graftd of any version, and start none. Returns the value of "ok".

    A graftd that is just ending by itself closes the connection: then it is asked once more. Raises GraftError, with
    the code ECONNREFUSED if graftd is not running.
    """
    try:
        return _order(op, fields)
    except Failure as error:
        if error.code != "EPIPE":
            raise
    time.sleep(1)
    return _order(op, fields)


def _order(op: str, fields: dict[str, Any]) -> Any:
    path = f"{run_directory()}/graftd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(REPLY_TIMEOUT)
        try:
            sock.connect(path)
        except OSError as error:
            raise _unreachable(error, path) from None
        return exchange(sock, op, fields)


def _unreachable(error: OSError, path: str) -> GraftError:
    if error.errno == errno.EACCES:
        return Refused(f"no permission for {path}", hint="be root or in the group 'graft'", code="EACCES")
    if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
        return Failure(f"connect to graftd at {path}: {error.strerror}")
    return _none_runs()


def call(op: str, *, start: bool = True, fds: tuple[int, ...] = (), **fields: Any) -> Any:
    """Send one request on a new connection, and return the value of "ok". Raises GraftError."""
    with connect(start=start) as sock:
        return exchange(sock, op, fields, fds)
