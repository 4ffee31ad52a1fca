"""The user namespace of `graft run` by an ordinary user, in which the container's netns may be made.

The command goes on as the user that it is, as without graft. Where the user has subordinate ids (subuid(5)), they are
mapped around the user's own, so that `--user` may name another: by newuidmap(1) and newgidmap(1), which are
set-user-ID root. Without, the user's own ids are the only ones. With `--user 0` the user is root there, and
subordinate ids come after.

Source: user_namespaces(7).
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from graft.errors import Failure, GraftError, Refused, from_oserror
from graft.kernel import linux
from graft.rules.subid import read_delegated

SUBORDINATE = {"uid": "/etc/subuid", "gid": "/etc/subgid"}
FIRST_ID, IDS = 100000, 65536  # as useradd(8) delegates them (login.defs(5), SUB_UID_MIN and SUB_UID_COUNT)
SWITCHES = (  # where a system forbids user namespaces: file, what it holds then, how root allows them
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0",
    ),
)


class Range(NamedTuple):
    """A line of a map: @size ids from @inside on stand for those from @outside on."""

    inside: int
    outside: int
    size: int


def subordinate(kind: str) -> list[tuple[int, int]]:
    """First and count of each range of ids that the user has in subuid(5) or subgid(5). @kind: "uid" or "gid"."""
    import pwd

    uid = os.getuid()
    names = {str(uid)}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(uid).pw_name)
    return [(each.first, each.size) for each in read_delegated(SUBORDINATE[kind]) if each.owner in names]


def how_to_delegate() -> str:
    """How root gives the user subordinate ids: the first that nobody has."""
    import pwd

    first = FIRST_ID
    for other in sorted(each for path in SUBORDINATE.values() for each in read_delegated(path)):
        if other.first < first + IDS and first < other.first + other.size:
            first = other.first + other.size
    uid, span = os.getuid(), f"{first}-{first + IDS - 1}"
    user = str(uid)
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(uid).pw_name
    return f"usermod --add-subuids {span} --add-subgids {span} {user}"


def ranges(own: int, inside: int, further: list[tuple[int, int]]) -> list[Range]:
    """The map that shows @own as @inside, and the subordinate ids of @further at the other numbers, from 0 on."""
    found = [Range(inside, own, 1)]
    at = 0
    for first, count in further:
        while count > 0:
            if at == inside:
                at += 1
            room = min(count, inside - at) if at < inside else count
            found.append(Range(at, first, room))
            at, first, count = at + room, first + room, count - room
    return sorted(found)


def is_mapped(number: int, mapped: list[Range]) -> bool:
    """Is the id @number there?"""
    return any(entry.inside <= number < entry.inside + entry.size for entry in mapped)


def enter(uid: int | None, gid: int | None) -> None:
    """Enter a new user namespace, in which this process may take @uid and @gid. Raises GraftError."""
    as_root = uid == 0
    tools = all(shutil.which(tool) for tool in ("newuidmap", "newgidmap"))
    wanted: dict[str, list[Range]] = {}
    for kind, own in (("uid", os.getuid()), ("gid", os.getgid())):
        further = subordinate(kind) if tools else []
        wanted[kind] = ranges(own, 0 if as_root else own, further)
    for kind, number in (("uid", uid), ("gid", gid)):
        if number is not None and not is_mapped(number, wanted[kind]):
            raise Refused(f"--user: {kind} {number} is not among your ids", hint=_why_few(tools), code="EPERM")
    if max(len(entries) for entries in wanted.values()) == 1:
        _unshare()
        _write_alone(wanted)
    else:
        _map_by_tools(wanted)


def open_low_ports() -> None:
    """Let any program of the container bind its low ports, as engines do: who may publish them is graftd's to say."""
    with contextlib.suppress(OSError):  # a read-only /proc/sys: then it takes CAP_NET_BIND_SERVICE
        Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").write_text("0")


def _why_few(tools: bool) -> str:
    if not tools:
        return "root may install newuidmap (Debian: uidmap)"
    return f"root may give you some: {how_to_delegate()}"


def how_to_allow() -> str:
    """How root may allow user namespaces on this host; "" if nothing is known to forbid them."""
    for path, forbids, remedy in SWITCHES:
        with contextlib.suppress(OSError):
            if Path(path).read_text().strip() == forbids:
                return f"root may allow them: {remedy}"
    return ""


def _unshare() -> None:
    try:
        linux.unshare(linux.CLONE_NEWUSER)
    except OSError as error:
        remedy = how_to_allow()
        if remedy:
            raise Refused("this host allows no user namespaces", hint=remedy, code="EPERM") from None
        raise from_oserror("enter a user namespace", error, hint="'graft doctor' says what is missing") from None


def _write_alone(wanted: dict[str, list[Range]]) -> None:
    """Map the user's own ids, which needs no right."""
    Path("/proc/self/setgroups").write_text("deny")
    for kind, entries in wanted.items():
        Path(f"/proc/self/{kind}_map").write_text("".join(f"{e.inside} {e.outside} {e.size}\n" for e in entries))


def _map_by_tools(wanted: dict[str, list[Range]]) -> None:
    """Have newuidmap(1) and newgidmap(1) write the maps, from outside of the new namespace. Raises GraftError."""
    target = os.getpid()
    begin, told = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(told)
            if os.read(begin, 1):
                for kind, entries in wanted.items():
                    words = [str(number) for entry in entries for number in entry]
                    subprocess.run([f"new{kind}map", str(target), *words], check=True, stdin=subprocess.DEVNULL)
                status = 0
        except (OSError, subprocess.CalledProcessError):
            pass  # they have said why
        finally:
            os._exit(status)
    os.close(begin)
    try:
        _unshare()
        os.write(told, b"1")
    except GraftError:
        os.close(told)
        os.waitpid(child, 0)
        raise
    os.close(told)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise Failure(
            "newuidmap has not mapped your subordinate ids", hint="see /etc/subuid and /etc/subgid", code="EPERM"
        )
