"""The checks of `graft doctor` as an ordinary user: what `graft run` needs without root, and what is granted."""

import os
import shutil
from collections.abc import Callable
from typing import Any

from graft import client
from graft.commands import user_namespace
from graft.commands.checks import Finding, in_child, machine, notification, run_checks
from graft.commands.checks_host import Lack
from graft.errors import Failure, Refused
from graft.kernel import linux
from graft.rules.limits import rate_text


def _namespaces() -> str:
    flags = linux.CLONE_NEWUSER | linux.CLONE_NEWNET | linux.CLONE_NEWNS
    try:
        in_child(lambda: linux.unshare(flags))
    except OSError as error:
        remedy = user_namespace.how_to_allow()
        raise Lack(error.strerror or str(error), remedy or "see user_namespaces(7)") from None
    return "user, network and mount namespaces can be made"


def _ids() -> str:
    lacking = [tool for tool in ("newuidmap", "newgidmap") if not shutil.which(tool)]
    if lacking:
        raise Lack(f"no {' and no '.join(lacking)}: your own ids alone", "root may install them (Debian: uidmap)")
    counts = {kind: sum(count for _, count in user_namespace.subordinate(kind)) for kind in ("uid", "gid")}
    if not all(counts.values()):
        raise Lack("none: your own ids alone", user_namespace.how_to_delegate())
    return f"{counts['uid']} uids, {counts['gid']} gids"


def _status() -> dict[str, Any]:
    try:
        status: dict[str, Any] = client.call("status", start=False)
    except (Refused, Failure) as error:
        raise Lack(error.message, error.hint) from None
    if "granted" not in status:
        raise Lack(f"{client.run_directory()} is that of a graftd that you administrate", "unset GRAFT_RUN_DIR")
    return status


def _daemon() -> str:
    if not client.is_user():
        no_door = client.no_door()
        raise Lack(no_door.message, no_door.hint)
    status = _status()
    return f"version {status['version']}, pid {status['pid']}, {status['containers']} containers of yours"


def _granted(describe: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    return lambda: describe(_status())


def _ports(status: dict[str, Any]) -> str:
    granted = status["granted"]["ports"]
    words = [
        f"from {status['unprivileged']} on{w.removeprefix('unprivileged')}" if "unpriv" in w else w for w in granted
    ]
    return ", ".join(words) or "none"


def _connections(status: dict[str, Any]) -> str:
    granted = status["granted"]
    names = f"; endpoints of the host: {', '.join(granted['endpoints'])}" if granted["endpoints"] else ""
    return f"{'as the host' if granted['egress'] == 'host' else 'none'}{names}"


def _numbers(status: dict[str, Any]) -> str:
    granted = status["granted"]
    most = {name: rate_text(value) if name == "rate" else value for name, value in granted["limits"].items()}
    limits = "".join(f", {value} {name} each" for name, value in most.items())
    return f"{granted['containers']} containers, {granted['slices']} private loopbacks{limits}"


def _addresses(status: dict[str, Any]) -> str:
    return ", ".join(status["granted"]["addresses"]) or "none but the host's"


def _file(status: dict[str, Any]) -> str:
    return status["granted_by"] or "nobody has said anything: as an ordinary program of yours"


CHECKS: tuple[tuple[str, bool, Callable[[], str]], ...] = (
    ("machine", True, machine),
    ("user namespaces", True, _namespaces),
    ("seccomp notification", True, notification),
    ("graftd", True, _daemon),
    ("subordinate ids", False, _ids),
)
GRANTED: tuple[tuple[str, bool, Callable[[], str]], ...] = (
    ("granted by", False, _granted(_file)),
    ("granted ports", False, _granted(_ports)),
    ("granted connections", False, _granted(_connections)),
    ("granted addresses", False, _granted(_addresses)),
    ("granted numbers", False, _granted(_numbers)),
)


def examine() -> list[Finding]:
    """Run all checks; returns their findings in order. What is granted is told if graftd is there, which knows."""
    found = run_checks(CHECKS)
    there = all(one.good for one in found if one.name == "graftd")
    return [*found, *run_checks(GRANTED)] if there else found


def applies() -> bool:
    """Is this a user without root, who has not the rights of the group graft either?"""
    return client.is_user() or os.geteuid() != 0
