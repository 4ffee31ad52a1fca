"""`graft run` and the wrapper: install the filter, hand the listener to graftd, become the command.

`graft run` enters a namespace first and speaks to the admin socket; the wrapper stays where it is and speaks to the
agent socket, which takes what is said there for the peer's own namespace alone.

There is no process beside the command: this one execs it, so its status, signals and terminal are the
shell's own, and nothing has to survive it. graftd sees the end of the last process under the filter as a
hang-up of the listener, and cleans up then.
"""

import errno
import json
import os
import signal
import socket
from pathlib import Path
from typing import NamedTuple, NoReturn

from graft import client, filter, linux, scope
from graft.errors import CommandNotFound, CommandNotRunnable, Failure, GraftError, Refused, UsageError, from_oserror

SHIM = Path(__file__).with_name("graft-shim.so")
SHOWN_MAX = 256  # words, and characters of each, that `graft ps` may be asked to show


class User(NamedTuple):
    """Whom the command runs as."""

    uid: int
    gid: int
    name: str  # "" for a number without an account
    home: str


class Plan(NamedTuple):
    """What `graft run` was asked for; the lists are the texts of the command line."""

    argv: list[str]
    name: str | None = None
    netns: str | None = None
    publish: tuple[str, ...] = ()
    ingress: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()
    egress_default: str | None = None
    user: User | None = None
    accel: bool = False
    ip: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


def _numeric(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(text: str) -> int:
    if len(text) > 10 or int(text) >= 1 << 32 - 1:
        raise UsageError(f"--user: {text} is not a user or group number")
    return int(text)


def find_user(text: str) -> User:
    """UID[:GID] or NAME[:GROUP]. Raises Refused if there is none."""
    import grp
    import pwd

    owner, colon, group = text.partition(":")
    try:
        entry = pwd.getpwuid(_number(owner)) if _numeric(owner) else pwd.getpwnam(owner)
        uid, gid, name, home = entry.pw_uid, entry.pw_gid, entry.pw_name, entry.pw_dir
    except KeyError:
        if not _numeric(owner):
            raise Refused(f"--user {text}: no user '{owner}'", code="ENOENT") from None
        uid, gid, name, home = _number(owner), _number(owner), "", "/"
    if colon:
        try:
            gid = _number(group) if _numeric(group) else grp.getgrnam(group).gr_gid
        except KeyError:
            raise Refused(f"--user {text}: no group '{group}'", code="ENOENT") from None
    return User(uid, gid, name, home)


def run(plan: Plan) -> NoReturn:
    """Become the command. Raises GraftError where that fails."""
    if os.geteuid() != 0:
        raise Refused("graft run needs root", hint="sudo graft run ...", code="EPERM")
    if plan.accel and not SHIM.exists():
        raise Failure(f"--accel: {SHIM} is not built", hint="run 'make build'", code="ENOENT")
    executable = _find(plan.argv[0])
    swap = False
    if plan.ingress or plan.egress:
        rules = {"ingress": plan.ingress, "egress": plan.egress, "netns": plan.netns}
        with client.connect(start=True) as asking:
            swap = client.exchange(asking, "hello", rules)["swap"]
    connection = client.connect(start=True)
    _enter_netns(plan.netns)
    listener = _install_filter(swap=swap)
    client.exchange(
        connection,
        "run",
        {
            "name": plan.name,
            "publish": plan.publish,
            "ingress": plan.ingress,
            "egress": plan.egress,
            "egress_default": plan.egress_default,
            "argv": _shown(plan.argv),
            "swap": swap,
            "ip": plan.ip,
            "limits": plan.limits,
        },
        (listener,),
    )
    connection.close()
    os.close(listener)
    if plan.user:
        _become(plan.user)
    if plan.accel:
        _preload(plan.user)
    _exec(executable, plan.argv)


def _shown(argv: list[str]) -> list[str]:
    return [os.fsencode(word).decode(errors="replace")[:SHOWN_MAX] for word in argv[:SHOWN_MAX]]


def wrap(plan: Plan, *, verbose: bool) -> NoReturn:
    """Become the command under the wrapper's conversions. Raises GraftError where that fails."""
    executable = _find(plan.argv[0])
    if plan.netns is not None:
        if os.geteuid() != 0:
            raise Refused("--netns needs root", hint="sudo graft --netns ...", code="EPERM")
        _enter_netns(plan.netns)
    rules = {"ingress": plan.ingress, "egress": plan.egress}
    swap = client.ask_agent({"op": "traps", **rules})["swap"]
    connection = client.connect_agent(start=True)
    begin = _print_apart(connection) if verbose else -1
    try:
        listener = _install_filter(swap=swap)
    except Failure as error:
        if error.code != "EBUSY":
            raise
        listener = -1  # inside a container of graft's, or another wrapper: its listener serves us as well
    message = {
        "ociVersion": "1.0.2",
        "fds": ["seccompFd"] if listener >= 0 else [],
        "pid": os.getpid(),
        "metadata": json.dumps(
            {"wrapper": True, "verbose": verbose, "swap": swap, "argv": _shown(plan.argv), **rules}
        ),
        "state": {"ociVersion": "1.0.2", "id": "", "status": "creating", "pid": os.getpid(), "bundle": ""},
    }
    reply = client.converse(connection, message, (listener,) if listener >= 0 else ())
    if listener >= 0:
        os.close(listener)
    if reply["scope"]:
        scope.enter(reply["scope"])
    if begin >= 0:
        os.write(begin, b"1")
        os.close(begin)
    connection.close()
    _exec(executable, plan.argv)


def _print_apart(connection: socket.socket) -> int:
    """A process, nobody's child, that prints what graftd tells of the conversions, until their end.

    Returns the descriptor to write a byte to, once the first answer has been read from @connection; closed
    without, the process ends.
    """
    wait, begin = os.pipe()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(wait)
        return begin
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.close(begin)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        if os.read(wait, 1):
            connection.settimeout(None)
            for line in connection.makefile("rb"):
                os.write(2, b"graft: " + line)
    finally:
        os._exit(0)


def _find(command: str) -> str:
    """The file that execvp(3) would run; a bad command is refused before anything else happens."""
    if "/" in command:
        candidates = [command]
    else:
        candidates = [os.path.join(d or ".", command) for d in os.environ.get("PATH", os.defpath).split(":")]
    found = [path for path in candidates if os.path.exists(path)]
    for path in found:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    if found:
        reason = "is a directory" if os.path.isdir(found[0]) else "is not executable"
        raise CommandNotRunnable(f"command '{command}' {reason}", code="EACCES")
    raise CommandNotFound(f"command '{command}' not found", code="ENOENT")


def _enter_netns(name: str | None) -> None:
    try:
        if name is None:
            linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWNS)
        else:
            fd = _open_netns(name)
            linux.setns(fd, linux.CLONE_NEWNET)
            os.close(fd)
            linux.unshare(linux.CLONE_NEWNS)
        linux.loopback_up()
        _remount_sys()
    except OSError as error:
        raise from_oserror("enter a network namespace", error, hint="'graft doctor' says what is missing") from None


def _open_netns(name: str) -> int:
    """By PID, by the name of a namespace or of a container, or by path."""
    from graft import host

    if "/" not in name and not name.isdigit():
        running = {c["name"]: c["pid"] for c in client.call("ps")}
        name = str(running.get(name, name))
    fd, _ = host.open_netns(name)
    return fd


def _remount_sys() -> None:
    """A sysfs of the new netns, as ip-netns(8) mounts it, with the mounts below /sys/fs/cgroup kept."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
    cgroup = os.open("/sys/fs/cgroup", os.O_PATH | os.O_CLOEXEC)
    flags = linux.MS_RDONLY if os.statvfs("/sys").f_flag & os.ST_RDONLY else 0
    linux.mount("sysfs", "/sys", "sysfs", flags)
    linux.mount(f"/proc/self/fd/{cgroup}", "/sys/fs/cgroup", None, linux.MS_BIND | linux.MS_REC)
    os.close(cgroup)


def _install_filter(*, swap: bool) -> int:
    program = filter.program(swap=swap)
    try:
        try:
            return linux.seccomp_listener(program, wait_killable=True)
        except PermissionError:  # without CAP_SYS_ADMIN: set-user-ID programs lose their meaning, as the kernel wants
            linux.no_new_privs()
            return linux.seccomp_listener(program, wait_killable=True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return linux.seccomp_listener(program, wait_killable=False)  # before Linux 6.0
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Failure(
                "this process is under a seccomp listener already",
                hint="graft run does not nest, nor run inside a container with a seccomp agent",
                code="EBUSY",
            ) from None
        raise from_oserror("install the seccomp filter", error, hint="'graft doctor' says what is missing") from None


def _become(user: User) -> None:
    try:
        if user.name:
            os.initgroups(user.name, user.gid)
        else:
            os.setgroups([])
        os.setgid(user.gid)
        os.setuid(user.uid)
    except OSError as error:
        raise from_oserror(f"become user {user.name or user.uid}", error) from None
    os.environ["HOME"] = user.home
    if user.name:
        os.environ["USER"] = os.environ["LOGNAME"] = user.name


def _preload(user: User | None) -> None:
    """LD_PRELOAD, see ld.so(8): statically linked programs do without."""
    if not os.access(SHIM, os.R_OK):
        who = f"user {user.name or user.uid}" if user else "this user"
        raise Failure(
            f"--accel: {who} may not read {SHIM}", hint="'make install' puts it where all may", code="EACCES"
        )
    before = os.environ.get("LD_PRELOAD", "")
    os.environ["LD_PRELOAD"] = f"{SHIM}:{before}" if before else str(SHIM)


def _exec(executable: str, argv: list[str]) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a program expects the default
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(executable, argv)  # noqa: S606 - that is what we are for
    except OSError as error:
        if error.errno == errno.ENOEXEC:  # a script without #!, as execvp(3) has it
            os.execv("/bin/sh", ["/bin/sh", executable, *argv[1:]])  # noqa: S606 - that is what we are for
        reason: type[GraftError] = CommandNotFound if error.errno == errno.ENOENT else CommandNotRunnable
        raise reason(
            f"command '{argv[0]}': {error.strerror}", code=errno.errorcode.get(error.errno or 0, "")
        ) from None
