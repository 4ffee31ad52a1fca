"""Users of the host: whose orders come by the user socket, and what is theirs.

Theory of operation

A process of a user namespace has its owner's uid, or one that was delegated to the owner (subuid(5)). SO_PEERCRED
tells it as the host has it, so whoever calls itself root there is known all the same. What is delegated counts as its
owner's: else one person had 65,536 shares.

A look into the account databases may block for long (nsswitch.conf(5): LDAP), so it is done in a thread. What was
found is kept for KEPT_SECONDS.
"""

import contextlib
import grp
import os
import pwd
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from graft.errors import Refused
from graft.kernel.netns import netns_owner
from graft.process.lines import Job, Lines, Then
from graft.process.loop import Loop
from graft.rules.subid import Delegated, read_delegated
from graft.tenants.registry import Registry
from graft.tenants.tenant import Table

SUBUID = "/etc/subuid"
KEPT_SECONDS = 60.0
KEPT_MAX = 1024
THREADS = 4
UNPRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


class Account(NamedTuple):
    """A user of the host."""

    uid: int
    gid: int  # the uid's number for one without an account
    name: str  # likewise, as text
    groups: tuple[str, ...] = ()


def account_of(uid: int) -> Account:
    """The user that @uid belongs to, as its own or as one that was delegated to it. May block."""
    with contextlib.suppress(KeyError):
        return _account(pwd.getpwuid(uid))
    owner = _delegator(uid)
    return _account(owner) if owner and owner.pw_uid else Account(uid, uid, str(uid))


def _account(entry: pwd.struct_passwd) -> Account:
    groups = []
    for gid in os.getgrouplist(entry.pw_name, entry.pw_gid):
        with contextlib.suppress(KeyError):
            groups.append(grp.getgrgid(gid).gr_name)
    return Account(entry.pw_uid, entry.pw_gid, entry.pw_name, tuple(groups))


def _delegator(uid: int) -> pwd.struct_passwd | None:
    """Who may use @uid in user namespaces, by subuid(5)."""
    for each in read_delegated(SUBUID):
        if each.has(uid):
            with contextlib.suppress(KeyError, OverflowError):
                return pwd.getpwuid(int(each.owner)) if each.owner.isdigit() else pwd.getpwnam(each.owner)
    return None


class Accounts:
    """Looks users up. All methods are for the loop's thread."""

    def __init__(self, loop: Loop) -> None:
        self._delegated: list[Delegated] = []
        self._delegated_until = 0.0
        self._lines = Lines(loop, THREADS, lambda: None)
        self._kept: dict[int, tuple[float, Account]] = {}

    def share_of(self, uid: int) -> tuple[str, int]:
        """What an unprivileged uid counts against, by a file alone: itself, or all that is delegated to its owner."""
        now = time.monotonic()
        if now > self._delegated_until:
            self._delegated, self._delegated_until = read_delegated(SUBUID), now + 1.0
        owner = next((each.owner for each in self._delegated if each.has(uid)), None)
        return ("uid", uid) if owner is None else (f"ids of {owner}", 0)

    def known(self, uid: int) -> Account | None:
        """The account of a uid that was looked up a short time ago."""
        until, account = self._kept.get(uid, (0.0, None))
        return account if time.monotonic() < until else None

    def find(self, uid: int, then: Callable[[Account], None]) -> None:
        """Have @then called with the account of @uid, by the loop."""
        self._lines.push(uid, partial(self._begin, uid, then))

    def _begin(self, uid: int, then: Callable[[Account], None]) -> Job | None:
        known = self.known(uid)
        if known:  # by the look-up before it in line
            then(known)
            return None

        def job() -> Then:
            return partial(self._found, uid, account_of(uid), then)

        return job

    def _found(self, uid: int, account: Account, then: Callable[[Account], None]) -> None:
        if len(self._kept) >= KEPT_MAX:
            self._kept.clear()
        self._kept[uid] = time.monotonic() + KEPT_SECONDS, account
        then(account)


def is_delegated(uid: int, account: Account) -> bool:
    """Is @uid the user's own, or one that was delegated to them?"""
    if uid == account.uid:
        return True
    entry = _delegator(uid) if uid else None
    return entry is not None and entry.pw_uid == account.uid


def check_netns(fd: int, account: Account) -> None:
    """Raise Refused (EPERM) unless the netns @fd is of a user namespace that @account's user has made."""
    if not is_delegated(netns_owner(fd), account):
        raise Refused(
            "this network namespace is not yours", hint="'graft run' makes one in a user namespace", code="EPERM"
        )


def user_table(registry: Registry, uid: int) -> Table:
    """The endpoint table of a user, for all of their containers; an empty one is made if there is none."""
    return registry.tables.setdefault(-uid, Table(-uid, 0, f"user {uid}"))


def unprivileged_port() -> int:
    """The first port of the host that any program may bind (ip(7), ip_unprivileged_port_start)."""
    try:
        return int(UNPRIVILEGED_PORTS.read_text())
    except (OSError, ValueError):
        return 1024
