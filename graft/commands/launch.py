"""`graft run` and the wrapper: install the seccomp filter, send the listener to graftd, exec the command.

`graft run` first enters a netns, then speaks to graftd's admin socket; for a user without root it enters a user
namespace before, and speaks to the user socket. The wrapper stays in its netns and speaks to the agent socket, where
a peer can say something about its own netns only.

No process of graft stays beside the command: this process becomes it by execve(2). So status, signals and terminal
are between the command and the shell. When the last process under the filter has ended, the listener hangs up
(seccomp_unotify(2), EPOLLHUP), and graftd cleans up.
"""

import errno
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from graft import client
from graft.errors import CommandNotFound, CommandNotRunnable, Failure, GraftError, Refused, UsageError, from_oserror
from graft.kernel import linux
from graft.rules.request import Request
from graft.rules.sysctl import carries
from graft.text import plain
from graft.trap import filter

SHIM = Path(__file__).parents[1] / "graft-shim.so"
SHOWN_MAX = 256  # `graft ps` shows at most so many words of a command, and so many characters of each


class User(NamedTuple):
    """The user that the command runs as."""

    uid: int
    gid: int
    name: str  # "" for a uid without an account
    home: str


class Plan(NamedTuple):
    """What the command line of `graft run` or the wrapper says."""

    argv: list[str]
    name: str | None = None
    netns: str | None = None
    user: User | None = None
    accel: bool = False
    force_ip: bool = False  # take the addresses of --ip, whoever has them
    request: Request = Request()


def _numeric(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(text: str) -> int:
    if len(text) > 10 or int(text) >= 1 << 32 - 1:
        raise UsageError(f"--user: {text} is not a user or group number")
    return int(text)


def find_user(text: str) -> User:
    """Look up @text, which is UID[:GID] or NAME[:GROUP]. Raises Refused if there is no such user or group.

    A uid needs no account. Raises UsageError for a number beyond 32 bits.
    """
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
    """Run @plan as `graft run`: become the command by execve(2). Raises GraftError if a step fails."""
    as_user = client.is_user()
    if not as_user and os.geteuid() != 0:
        raise client.no_door()
    if plan.accel and not SHIM.exists():
        raise Failure(f"--accel: {SHIM} is not built", hint="run 'make build'", code="ENOENT")
    executable = _find(plan.argv[0])
    traps_addresses = False
    request = plan.request
    if as_user and request.direct:
        raise Refused("only root may start a direct container", hint="omit --direct", code="EPERM")
    if request.ingress or request.egress or plan.netns:
        traps_addresses = _needs_traps(plan)
    if request.ip and not plan.force_ip and not as_user:
        from graft.commands import own_ip

        own_ip.check(request.ip)
    told = -1
    if request.learn:
        from graft.commands import learn

        told = learn.stay()
    connection = client.connect(start=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC) if request.direct else -1
    if as_user:
        _enter_as_user(plan)
    else:
        _enter_netns(plan.netns)
    follows = carries(request.sysctl)
    listener = _install_filter(traps_addresses=traps_addresses, direct=bool(request.direct), follows=follows)
    message = message_of(plan, traps_addresses=traps_addresses)
    netns = (os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC),) if request.direct else ()
    reply = client.exchange(connection, "run", message, (listener, *netns))
    connection.close()
    os.close(listener)
    if reply.get("names"):
        from graft.commands import live

        live.hide_name_services(as_user=as_user)
    if told >= 0:
        os.write(told, reply["name"].encode())
        os.close(told)
    if request.sysctl:
        from graft.kernel import sysctl

        sysctl.write(request.sysctl)
    if netns:
        from graft.commands import live

        live.enter(home, netns[0], reply["procfs"])
    if plan.user:
        _become(plan.user)
    if plan.accel:
        _preload(plan.user)
    _exec(executable, plan.argv)


def message_of(plan: Plan, *, traps_addresses: bool) -> dict[str, Any]:
    """The fields of the request by which the listener is handed over."""
    message = {"name": plan.name, "request": plan.request, "argv": _shown(plan.argv), "swap": traps_addresses}
    return {**message, "joins": True} if plan.netns is not None else message


def _needs_traps(plan: Plan) -> bool:
    """Do its rules, or the names that it is told, stand for endpoints that need the traps of the swap path?

    Raises GraftError, but not for a namespace that is named alone: to enter it says what is wrong.
    """
    request = plan.request
    names = request.asks_graft
    asked = {"ingress": request.ingress, "egress": request.egress, "names": names, "netns": plan.netns}
    try:
        with client.connect(start=True) as asking:
            return bool(client.exchange(asking, "hello", asked)["swap"])
    except GraftError:
        if request.ingress or request.egress or names:
            raise
        return False


def _enter_as_user(plan: Plan) -> None:
    """Enter a new netns in a user namespace of the user's own, or those of a container of theirs."""
    from graft.commands import user_namespace

    if plan.netns is None:
        if os.geteuid() != 0:  # root in a user namespace of somebody's, such as that of podman unshare
            user_namespace.enter(plan.user and plan.user.uid, plan.user and plan.user.gid)
        _enter_netns(None)
        user_namespace.open_low_ports()
        return
    running = client.call("ps", start=False)
    pid = next((c["pid"] for c in running if plan.netns in (c["name"], str(c["pid"]))), None)
    if pid is None:
        raise Refused(f"no container named '{plan.netns}'", hint="'graft ps' lists them", code="ENOENT")
    try:
        spaces = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("user", "net")]
        if os.stat(f"/proc/{pid}/ns/user").st_ino != os.stat("/proc/self/ns/user").st_ino:
            linux.setns(spaces[0], linux.CLONE_NEWUSER)
        linux.setns(spaces[1], linux.CLONE_NEWNET)
        linux.unshare(linux.CLONE_NEWNS)
        _remount_sys()
    except OSError as error:
        raise from_oserror(f"join container '{plan.netns}'", error) from None


def _shown(argv: list[str]) -> list[str]:
    return [os.fsencode(word).decode(errors="replace")[:SHOWN_MAX] for word in argv[:SHOWN_MAX]]


def wrap(plan: Plan, *, verbose: bool) -> NoReturn:
    """Run @plan as the wrapper: become the command, under its rules. Raises GraftError if a step fails.

    @verbose: print each conversion on standard error, from a process of its own.
    """
    executable = _find(plan.argv[0])
    if plan.netns is not None:
        if os.geteuid() != 0:
            raise Refused("--netns needs root", hint="sudo graft --netns ...", code="EPERM")
        _enter_netns(plan.netns)
    rules = {"ingress": plan.request.ingress, "egress": plan.request.egress}
    traps_addresses = client.ask_agent({"op": "traps", **rules})["swap"]
    connection = client.connect_agent(start=True)
    begin = _print_apart(connection) if verbose else -1
    try:
        listener = _install_filter(traps_addresses=traps_addresses)
    except Failure as error:
        if error.code != "EBUSY":
            raise
        listener = -1  # inside a container of graft's or another wrapper, whose listener serves this process as well
    message = {
        "ociVersion": "1.0.2",
        "fds": ["seccompFd"] if listener >= 0 else [],
        "pid": os.getpid(),
        "metadata": json.dumps(
            {"wrapper": True, "verbose": verbose, "swap": traps_addresses, "argv": _shown(plan.argv), **rules}
        ),
        "state": {"ociVersion": "1.0.2", "id": "", "status": "creating", "pid": os.getpid(), "bundle": ""},
    }
    reply = client.converse(connection, message, (listener,) if listener >= 0 else ())
    if listener >= 0:
        os.close(listener)
    if reply["scope"]:
        from graft.trap import nested

        nested.enter(reply["scope"])
    if begin >= 0:
        os.write(begin, b"1")
        os.close(begin)
    connection.close()
    _exec(executable, plan.argv)


def _print_apart(connection: socket.socket) -> int:
    """Fork a process that prints what graftd reports of the conversions, until the connection ends.

    It is forked twice, so that the command does not have a child that it does not know. Returns a descriptor. Write a
    byte to it when graftd's first answer has been read from @connection: printing starts then. Close it without, and
    the process ends.
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
                os.write(2, f"graft: {plain(line.decode(errors='replace').rstrip())}\n".encode())
    finally:
        os._exit(0)


def _find(command: str) -> str:
    """Return the file that execvp(3) would run, so that a bad command is refused before anything is changed.

    Raises CommandNotFound or CommandNotRunnable.
    """
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
    """Open the netns of a PID, of a container or ip-netns(8) name, or at a path; returns a descriptor."""
    from graft.kernel.direct import contains
    from graft.kernel.netns import open_netns

    if "/" not in name:
        running = client.call("ps")
        inside = _cgroup_of(name) if name.isdigit() else ""
        named = (c for c in running if c["name"] == name or contains(c["cgroup"], inside))
        name = next((c["netns_path"] for c in named), name)
    fd, _ = open_netns(name)
    return fd


def _cgroup_of(pid: str) -> str:
    """The path of a process's cgroup; "" if it has ended, which is for who opens its netns to say."""
    from graft.kernel.cgroup import cgroup_of

    try:
        return cgroup_of(int(pid))
    except OSError:
        return ""


def _remount_sys() -> None:
    """Mount the sysfs of the new netns, as ip-netns(8) does, and keep the mounts below /sys/fs/cgroup."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
    cgroup = os.open("/sys/fs/cgroup", os.O_PATH | os.O_CLOEXEC)
    flags = linux.MS_RDONLY if os.statvfs("/sys").f_flag & os.ST_RDONLY else 0
    try:
        linux.mount("sysfs", "/sys", "sysfs", flags)
    except PermissionError:  # in a user namespace, where something of the host's is hidden under a mount
        if os.geteuid() == 0 and not client.is_user():
            raise
        os.close(cgroup)
        return
    linux.mount(f"/proc/self/fd/{cgroup}", "/sys/fs/cgroup", None, linux.MS_BIND | linux.MS_REC)
    os.close(cgroup)


def _install_filter(*, traps_addresses: bool, direct: bool = False, follows: bool = False) -> int:
    program = filter.program(swap=traps_addresses, direct=direct, follows=follows)
    try:
        try:
            return linux.seccomp_listener(program, wait_killable=True)
        except PermissionError:  # no CAP_SYS_ADMIN: the kernel wants no_new_privs, so set-user-ID has no effect
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
    with open("/proc/self/setgroups") as file:
        may_set_groups = file.read().strip() == "allow"  # not with a user's own ids alone (user_namespaces(7))
    try:
        if may_set_groups and user.name:
            os.initgroups(user.name, user.gid)
        elif may_set_groups:
            os.setgroups([])
        os.setgid(user.gid)
        os.setuid(user.uid)
    except OSError as error:
        raise from_oserror(f"become user {user.name or user.uid}", error) from None
    os.environ["HOME"] = user.home
    if user.name:
        os.environ["USER"] = os.environ["LOGNAME"] = user.name


def _preload(user: User | None) -> None:
    """Put the library of --accel into LD_PRELOAD (ld.so(8)). Statically linked programs ignore it. Raises Failure."""
    if not os.access(SHIM, os.R_OK):
        who = f"user {user.name or user.uid}" if user else "this user"
        raise Failure(
            f"--accel: {who} may not read {SHIM}", hint="'make install' puts it where all users may", code="EACCES"
        )
    before = os.environ.get("LD_PRELOAD", "")
    os.environ["LD_PRELOAD"] = f"{SHIM}:{before}" if before else str(SHIM)


def _exec(executable: str, argv: list[str]) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and execve(2) would keep that
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(executable, argv)  # noqa: S606 - to exec the user's command is the purpose
    except OSError as error:
        if error.errno == errno.ENOEXEC:  # a script without #!: run it by sh, as execvp(3) does
            os.execv("/bin/sh", ["/bin/sh", executable, *argv[1:]])  # noqa: S606 - the same
        raise not_executed(argv[0], error) from None


def not_executed(command: str, error: OSError) -> GraftError:
    """Why execve(2) has not run @command."""
    reason: type[GraftError] = CommandNotFound if error.errno == errno.ENOENT else CommandNotRunnable
    return reason(f"command '{command}': {error.strerror}", code=errno.errorcode.get(error.errno or 0, ""))
