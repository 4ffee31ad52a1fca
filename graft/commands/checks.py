"""The checks of `graft doctor`: what graft needs of this machine.

Each check tries the thing itself, in one function that undoes what it did. A check returns what it found, and raises
Lack if that is not what graft needs. CHECKS lists them; the ones marked as needed decide the exit status.
"""

import contextlib
import ctypes
import grp
import os
import platform
import pwd
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from graft import client
from graft.commands import checks_host
from graft.commands.checks_host import Lack
from graft.commands.launch import SHIM
from graft.daemon import relay
from graft.errors import Failure, GraftError, Refused
from graft.kernel import addresses, cgroup, direct, features, libbpf, linux
from graft.kernel.architecture import ARCHITECTURES, HERE
from graft.kernel.netns import netns_claimant
from graft.rules import slices
from graft.rules.configuration import configuration_path, endpoints_paths, read_configuration, read_endpoints
from graft.rules.grants import read_users, users_path
from graft.text import listed
from graft.trap import deputy, filter, sup

OLDEST = "6.1"  # the first Linux whose verifier takes graft's programs


class Finding(NamedTuple):
    """One line of the report. @needed: containers do not work without it. @good: it is there."""

    name: str
    needed: bool
    good: bool
    found: str
    remedy: str


def machine() -> str:
    """The machine's architecture and kernel. Raises Lack."""
    known = [architecture.machine for architecture in ARCHITECTURES]
    if HERE.machine not in known:
        raise Lack(HERE.machine, f"graft knows the system calls of {' and '.join(known)} only")
    return f"{HERE.machine}, Linux {platform.release()}"


def _root() -> str:
    if os.geteuid() != 0:
        raise Lack(f"uid {os.geteuid()}", "run as root: sudo graft ...")
    return "uid 0"


def in_child(probe: Callable[[], None]) -> None:
    """Run @probe in a forked child, and raise the OSError that it ended with, if any."""
    pid = os.fork()
    if pid == 0:
        try:
            probe()
            os._exit(0)
        except OSError as error:
            os._exit(min(error.errno or 255, 255))
        finally:
            os._exit(255)
    number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if number:
        raise OSError(number, os.strerror(number))


def _namespaces() -> str:
    try:
        in_child(lambda: linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWNS))
    except OSError as error:
        raise Lack(f"unshare: {error.strerror}", "needs CAP_SYS_ADMIN and CONFIG_NET_NS") from None
    return "can be created"


def _seccomp(*, wait_killable: bool) -> None:
    if os.geteuid() != 0:
        linux.no_new_privs()  # what a container has CAP_SYS_ADMIN in its user namespace for
    os.close(linux.seccomp_listener(filter.program(), wait_killable=wait_killable))


def notification() -> str:
    """Can a seccomp listener be made? Raises Lack, OSError."""
    try:
        in_child(lambda: _seccomp(wait_killable=False))
    except OSError as error:
        remedy = "run outside the other seccomp agent's container" if error.errno == 16 else "Linux 5.14 or newer"
        raise Lack(f"seccomp: {error.strerror}", remedy) from None
    return "works"


def _wait_killable() -> str:
    try:
        in_child(lambda: _seccomp(wait_killable=True))
    except OSError as error:
        raise Lack(
            error.strerror or "", "Linux 6.0 or newer: signals no longer restart a call that is being answered"
        ) from None
    return "works"


def _cgroup() -> str:
    try:
        root = cgroup.cgroup2_root()
    except GraftError as error:
        raise Lack(error.message, error.hint) from None
    if not os.access(root, os.W_OK):
        raise Lack(f"{root} is not writable", "mount it read-write, or be root")
    return str(root)


def _mount_privately() -> None:
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
    cgroup.mount_bpffs()


def _bpffs() -> str:
    if os.path.ismount(cgroup.BPFFS):
        return str(cgroup.BPFFS)
    try:
        in_child(_mount_privately)
    except OSError as error:
        raise Lack(f"{cgroup.BPFFS}: {error.strerror}", f"mount -t bpf bpf {cgroup.BPFFS}") from None
    return f"{cgroup.BPFFS}, mounted when graftd starts"


def _btf() -> str:
    path = Path("/sys/kernel/btf/vmlinux")
    if not path.exists():
        raise Lack(f"{path} is missing", "a kernel with CONFIG_DEBUG_INFO_BTF, which distributions have")
    return f"{path}, {path.stat().st_size >> 10} KiB"


def _libbpf() -> str:
    try:
        lib = ctypes.CDLL("libbpf.so.1")
    except OSError:
        raise Lack("libbpf.so.1 not found", "apt-get install libbpf1") from None
    lib.libbpf_version_string.restype = ctypes.c_char_p
    return f"libbpf {lib.libbpf_version_string().decode()}"


def _features() -> str:
    try:
        lacking = features.lacking(features.REQUIRED)
    except Failure as error:
        raise Lack(error.message, error.hint) from None
    if lacking:
        named = ", ".join(f"{one.name} (Linux {one.linux})" for one in lacking)
        raise Lack(f"without {named}", f"Linux {OLDEST} or newer")
    return f"the {len(features.REQUIRED)} newest of what graft needs"


def _newer() -> str:
    lacking = features.lacking(features.OPTIONAL)
    if lacking:
        named = ", ".join(f"{one.name} (Linux {one.linux})" for one in lacking)
        raise Lack(f"without {named}", "; ".join(f"{one.name}: {one.why}" for one in lacking))
    return f"{', '.join(one.name for one in features.OPTIONAL)}"


def _programs() -> str:
    if not libbpf.OBJECT.exists():
        raise Lack(f"{libbpf.OBJECT} is not built", "make build")
    try:
        count = libbpf.try_load()
    except (OSError, Failure) as error:
        said = libbpf.verdict()
        remedy = f"Linux {OLDEST} or newer, root; lockdown(7) may say why" + (
            f"; the verifier: {said}" if said else ""
        )
        raise Lack(str(error), remedy) from None
    return f"{count} programs load"


def _ip() -> str:
    path = shutil.which("ip")
    if not path:
        raise Lack("'ip' is not installed", "apt-get install iproute2")
    return path


def _helper() -> str:
    if not sup.available():
        raise Lack(f"{sup.PROGRAM} is not built", "'make build'; without it graftd answers socket(), slower")
    return str(sup.PROGRAM)


def _deputy() -> str:
    if not os.access(deputy.PROGRAM, os.X_OK):
        raise Lack(
            f"{deputy.PROGRAM} is not built", "'make build'; without it no program connects to a unix endpoint"
        )
    return str(deputy.PROGRAM)


def _relay() -> str:
    if not relay.available():
        raise Lack(
            f"{relay.PROGRAM} is not built",
            "'make build'; without it nobody in a container's netns reaches its servers",
        )
    return str(relay.PROGRAM)


def _direct() -> str:
    try:
        parent = direct.roots_own(direct.directory_of(cgroup.cgroup_of(os.getpid())))
        made = direct.make(parent, f"doctor-{os.getpid()}", os.getpid())
        made.rmdir()
        in_child(lambda: linux.unshare(linux.CLONE_NEWCGROUP | linux.CLONE_NEWNS))
    except GraftError as error:
        raise Lack(error.message, error.hint or "graft run without --direct") from None
    except OSError as error:
        raise Lack(f"{error.strerror}", "graft run without --direct needs no cgroup namespace") from None
    return f"can be started, below {parent}"


def _shim() -> str:
    if not SHIM.exists():
        raise Lack(f"{SHIM} is not built", "'make build'; 'graft run --accel' needs it")
    return str(SHIM)


def _ipv6() -> str:
    if not addresses.has_ipv6():
        raise Lack("off on this host", "sysctl net.ipv6.conf.all.disable_ipv6=0; IPv4 works without it")
    return "on"


def _sync_wake_up() -> str:
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    if release < (6, 6):
        raise Lack(platform.release(), "Linux 6.6 or newer halves the cost of a trapped call")
    return "works"


def _route_localnet() -> str:
    on = [p.parent.name for p in Path("/proc/sys/net/ipv4/conf").glob("*/route_localnet") if p.read_text() == "1\n"]
    if on:
        raise Lack(
            f"route_localnet is on for {', '.join(sorted(on))}",
            "neighbours on that link can reach 127.0.0.0/8: drop that in the firewall, or set route_localnet to 0",
        )
    return "127.0.0.0/8 cannot be reached from the wire"


def _port_range() -> str:
    low, high = addresses.ephemeral_ports()
    if high >= slices.SLICE_PORT_BASE:
        raise Lack(
            f"net.ipv4.ip_local_port_range is {low}-{high}",
            f"private ports are {slices.SLICE_PORT_BASE} and up: "
            "sysctl net.ipv4.ip_local_port_range='32768 60999' avoids rare clashes",
        )
    return f"{low}-{high}, below the private ports"


def _daemon() -> str:
    try:
        status = client.call("status", start=False)
    except (Refused, Failure) as error:
        if error.code == "ECONNREFUSED":
            other = netns_claimant() if os.geteuid() == 0 else 0
            if other:
                raise Lack(
                    f"pid {other} supervises this namespace, and is not at {client.run_directory()}",
                    f"GRAFT_RUN_DIR names it; nsenter --target {other} --mount leads to its /run",
                ) from None
            return "not running; graft run starts it"
        raise Lack(error.message, error.hint) from None
    keeper = "" if status["kept"] else ", without a keeper for its descriptors"
    return f"version {status['version']}, pid {status['pid']}, {status['containers']} containers{keeper}"


def _containers() -> str:
    try:
        rows = client.call("ps", start=False)
    except (Refused, Failure):
        return "no graftd runs that would know of any"
    lost = sorted(row["name"] for row in rows if row["status"] == "unsupervised")
    if lost:
        raise Lack(
            f"{len(lost)} of {len(rows)} unsupervised: {listed(lost)}",
            "restart them (in Kubernetes: delete the pod): their new sockets fail with ENOSYS",
        )
    return f"{len(rows)}, all supervised"


def _configuration() -> str:
    path = configuration_path()
    _configured()
    files = [str(each) for each in endpoints_paths() if each.exists()]
    return "; ".join([f"{path}{'' if path.exists() else ', which is not there: the defaults'}", *files])


def _configured() -> dict[str, Any]:
    try:
        read_endpoints()
        return read_configuration().document()
    except Failure as error:
        raise Lack(error.message, error.hint or "graft config check") from None


def _in_force() -> str:
    try:
        status = client.call("status", start=False)
    except (Refused, Failure):
        return _described(_configured())
    told, path = status["configuration"], status["configured_by"]
    try:
        differs = path == str(configuration_path()) and _configured() != told
    except Lack as lack:
        raise Lack(_described(told), f"{lack}; until it is right, this stays in force") from None
    if status["faults"]:
        raise Lack(_described(told), "; ".join(status["faults"]))
    if differs:
        raise Lack(_described(told), f"{path} says something else now: graftd takes it in 2 seconds, or logs why not")
    return _described(told)


def _users() -> str:
    """Whom users.toml names: a name that is misspelt grants nothing, and nobody would be told."""
    try:
        users = read_users()
    except Failure as error:
        raise Lack(error.message, error.hint) from None
    nobody = [f"[users.{name}]" for name in users.users if not _is_user(name)]
    nobody += [f"[groups.{name}]" for name in users.groups if not _is_group(name)]
    if nobody:
        raise Lack(f"{users_path()}: nobody is meant by {', '.join(nobody)}", "correct the name, or add the account")
    if not (users.users or users.groups or users.default):
        return f"as ordinary programs of theirs: nothing is said in {users_path()}"
    return f"{users_path()}: {len(users.users)} users, {len(users.groups)} groups"


def _is_user(name: str) -> bool:
    if name.isdigit():
        return True  # a uid without an account is named so
    with contextlib.suppress(KeyError, ValueError):
        return pwd.getpwnam(name).pw_uid != 0  # root is no user, whom something could be granted
    return False


def _is_group(name: str) -> bool:
    with contextlib.suppress(KeyError, ValueError):
        return bool(grp.getgrnam(name))
    return False


def _described(configuration: dict[str, Any]) -> str:
    pods = ", ".join(configuration["pods"]["annotations"]) or "nothing that takes"
    resolvers = ", ".join(configuration["pods"]["resolvers"])
    names = f", names of {resolvers} without egress" if resolvers else ""
    ranges = ", ".join(configuration["addresses"]) or "none"
    ports = ", ".join(configuration["reserved_ports"]) or "none"
    listening = ", and what listens when graftd begins" if configuration["reserve_listening"] else ""
    others = [f"limits: {configuration['limits']}"]
    if configuration["metrics"]["listen"]:
        others.append(f"metrics: {configuration['metrics']['listen']}")
    if configuration["run"]["direct"]:
        others.append("graft run: direct")
    told = f"pods: {pods}{names}; addresses: {ranges}; reserved ports: {ports}{listening}"
    return "; ".join([told, *others])


CHECKS: tuple[tuple[str, bool, Callable[[], str]], ...] = (
    ("machine", True, machine),
    ("permission", True, _root),
    ("namespaces", True, _namespaces),
    ("seccomp notification", True, notification),
    ("cgroup2", True, _cgroup),
    ("bpffs", True, _bpffs),
    ("kernel BTF", True, _btf),
    ("libbpf", True, _libbpf),
    ("kernel features", True, _features),
    ("BPF programs", True, _programs),
    ("iproute2", True, _ip),
    ("configuration", True, _configuration),
    ("graftd", True, _daemon),
    ("containers", True, _containers),
    ("in force", False, _in_force),
    ("users", False, _users),
    ("IPv6", False, _ipv6),
    ("graft-sup", False, _helper),
    ("graft-deputy", False, _deputy),
    ("graft-relay", False, _relay),
    ("direct containers", False, _direct),
    ("preload library", False, _shim),
    ("wait-killable notification", False, _wait_killable),
    ("synchronous wake-up", False, _sync_wake_up),
    ("newer kernel features", False, _newer),
    ("loopback routing", False, _route_localnet),
    ("ephemeral ports", False, _port_range),
    ("kernel tunnels", False, checks_host.tunnels),
    ("uids of sockets", False, checks_host.owners),
    ("peers of devices", False, checks_host.peers),
    ("packet marks", False, checks_host.marks),
    ("users' routes", False, checks_host.uids),
)


def run_checks(checks: Iterable[tuple[str, bool, Callable[[], str]]]) -> list[Finding]:
    """Run @checks, each with its name and whether it is needed; returns their findings in order."""
    findings = []
    for name, needed, check in checks:
        try:
            findings.append(Finding(name, needed, True, check(), ""))
        except Lack as lack:
            findings.append(Finding(name, needed, False, lack.found, lack.remedy))
        except OSError as error:
            findings.append(Finding(name, needed, False, error.strerror or str(error), ""))
    return findings


def examine() -> list[Finding]:
    """Run all checks; returns their findings in the order of CHECKS."""
    return run_checks(CHECKS)
