"""Sysctls of network namespaces: read, written, and refused where they would act on nothing.

A file below /proc/sys/net is that of the netns of the thread that opens it (net/sysctl_net.c), in whatever /proc.
"""

import errno
import socket
from collections.abc import Iterable
from pathlib import Path

from graft.errors import Refused
from graft.rules import sysctl
from graft.rules.sysctl import Option

BACKLOG_MAX = (1 << 31) - 1
ALLOWED_CONGESTION = "net.ipv4.tcp_allowed_congestion_control"


def _path(name: str) -> Path:
    return Path("/proc/sys", *(part.replace("/", ".") for part in name.split(".")))


def read(name: str) -> str:
    """The value in this thread's netns, with one blank between its words; "" if there is none."""
    try:
        return " ".join(_path(name).read_text().split())
    except OSError:
        return ""


def write(texts: Iterable[str]) -> None:
    """Set sysctls, each `NAME=VALUE`, of this thread's netns. Raises Refused, and what was set before stays."""
    for name, value in sysctl.parse_sysctls(texts).items():
        try:
            _path(name).write_text(value)
        except OSError as error:
            raise Refused(
                f"--sysctl {name}={value}: {error.strerror}", code=errno.errorcode.get(error.errno or 0, "")
            ) from None


def check(texts: tuple[str, ...], ephemeral: tuple[int, int]) -> None:
    """Refuse the first sysctl that would act on nothing: no socket option carries it, and the host has another value.

    @texts as in Request.sysctl; with `ignore` among them nothing is refused. @ephemeral: the host's ports, of which
    the kernel chooses. To be called in the netns where the sockets are made. Raises Refused, UsageError.
    """
    for name, value in sysctl.parse_sysctls(texts).items():
        reason = "" if sysctl.IGNORE in texts else _obstacle(name, value, ephemeral)
        if reason:
            raise Refused(
                f"sysctl {name}={value}: {reason}",
                hint="leave it out, or set the host's; graft.sysctl=ignore, or --sysctl ignore, lets it pass",
                code="EINVAL",
            )


def follow_listening(sock: socket.socket, backlog: int, texts: tuple[str, ...]) -> int:
    """The backlog with which a socket of a container that asked for the sysctls @texts is to listen.

    A socket that connects sends SYNs as often as TCP_SYNCNT says, and one that listens answers as often. So the
    option is set anew, unless the program has set another value than it had from the start. Raises OSError.
    """
    values = sysctl.parse_sysctls(texts) if texts else {}
    if sysctl.SYN_RETRIES in values or sysctl.SYNACK_RETRIES in values:
        before, answers = (
            sysctl.number_in(values.get(name) or read(name), 1, 127)
            for name in (sysctl.SYN_RETRIES, sysctl.SYNACK_RETRIES)
        )
        if answers and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT) == before:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, answers)
    bound = sysctl.number_in(values.get(sysctl.SOMAXCONN, ""), *sysctl.LISTENING[sysctl.SOMAXCONN])
    wanted = backlog if backlog >= 0 else BACKLOG_MAX  # the kernel reads it unsigned, Python makes 0 of it
    return wanted if bound is None else min(wanted, bound)


def _obstacle(name: str, value: str, ephemeral: tuple[int, int]) -> str:
    """Why the sysctl would act on nothing; "" if it acts, or if the host's own value does what it says."""
    host = read(name)
    if value == host:
        return ""
    options = sysctl.options_for(name, value, ephemeral)
    bounds = _bounds(name, ephemeral)
    if options is None and bounds:
        return f"a container's may be {bounds}; beyond, the host's value acts ({host or 'it has none'})"
    if options is None:
        return f"it acts on no socket: those are the host's, {_told(host)}"
    if name == sysctl.SOMAXCONN and int(value) > int(host or 0):
        return f"the host's bound acts as well, which is lower ({host})"
    if name == sysctl.CONGESTION and value not in read(ALLOWED_CONGESTION).split():
        return f"the host allows a container {read(ALLOWED_CONGESTION)} (sysctl {ALLOWED_CONGESTION})"
    if not all(map(_supported, options)):
        return f"this kernel has no socket option for it; the sockets are the host's, {_told(host)}"
    return ""


def _told(host: str) -> str:
    return f"whose value is {host}" if host else "which has no such sysctl"


def _bounds(name: str, ephemeral: tuple[int, int]) -> str:
    """Which values an option can carry, in words; "" if it carries none, or any."""
    if name == sysctl.PORT_RANGE:
        low, high = sysctl.range_bounds(ephemeral)
        return (
            f"{sysctl.PORTS_LEAST} ports or more within {low} and {high}, from {sysctl.last_begin(ephemeral)} at most"
        )
    if name in sysctl.LISTENING:
        return "{} to {}".format(*sysctl.LISTENING[name])
    carrier = sysctl.CARRIERS.get(name)
    return f"{carrier.least} to {carrier.most}" if carrier else ""


def _supported(option: Option) -> bool:
    """Does the kernel take this option of a socket, with its value?"""
    family = socket.AF_INET if option.kinds & (sysctl.TCP4 | sysctl.UDP4) else socket.AF_INET6
    kind = socket.SOCK_STREAM if option.kinds & sysctl.TCP else socket.SOCK_DGRAM
    try:
        with socket.socket(family, kind) as probe:
            if option.name == sysctl.IP_LOCAL_PORT_RANGE:  # the option hook lets the maker of a grafted socket set it
                probe.getsockopt(option.level, option.name)
            else:
                probe.setsockopt(option.level, option.name, option.raw)
    except OSError:
        return False
    return True
