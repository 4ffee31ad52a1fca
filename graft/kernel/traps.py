"""What is trapped and what is refused: one table, from which all that has to know it is made.

Two filters are made of it, because a process has one seccomp listener, and who installs its filter differs:

- FILTER, the classic BPF program of `graft run` (graft/trap/filter.py). It can test anything.
- PROFILE, the rules that are merged into the OCI seccomp profile of an engine's container (graft/engines/profile.py).
  The runtime's libseccomp makes a filter of it. Each further condition there multiplies the rules of its call, and
  there are no rules for one architecture alone. So it tests less of AF_GRAFT, and more options.

The supervisor (graft/trap/supervisor.py) has one handler for each of CALLS. scripts/traps.py prints the table for
docs/security.md, and a test compares the two.

What is not in the table is never trapped, and takes no look at its arguments, so that it stays in seccomp's bitmap of
calls that are always allowed. close, fcntl, write and sendmsg must not come in: a container runtime makes those after
it has installed the filter and before it has handed over the listener, so it would hang.

The module is pure, and `graft run` pays for its import.
"""

import errno
import socket
from typing import Literal, NamedTuple

from graft.kernel import linux
from graft.kernel.architecture import HERE, Architecture

Range = tuple[int, int]  # first and last value, both included
Form = Literal["filter", "profile"]
When = Literal["always", "addresses", "otherwise"]

FILTER: Form = "filter"
PROFILE: Form = "profile"
BOTH: tuple[Form, ...] = (FILTER, PROFILE)

TOP = (1 << 32) - 1

# On these descriptors sockets of AF_GRAFT are put (graft/trap/family.py). Below 1024, the usual soft limit of
# descriptors; above what all but programs with many connections use.
FAMILY_FIRST = 960
FAMILY_LAST = 1023
SOCKADDR_GR = 18  # sizeof(struct sockaddr_gr), include/graft.h


class Condition(NamedTuple):
    """Is one half of an argument in one of @ranges?

    @argument: its index, from 0. @ranges: ascending, or single values in the order in which they are tried. @shown:
    the same in words. @mask: what is compared of the half. @upper: the upper 32 bits count, not the lower ones.
    """

    argument: int
    ranges: tuple[Range, ...]
    shown: str
    mask: int = TOP
    upper: bool = False

    def holds(self, args: tuple[int, ...]) -> bool:
        """Does it hold for a call with these registers?"""
        value = args[self.argument] >> (32 if self.upper else 0) & self.mask
        return any(first <= value <= last for first, last in self.ranges)


class Trap(NamedTuple):
    """Calls of one name that are trapped: those for which all @conditions hold.

    @forms: the filters that trap them. @when: "always"; "addresses", if the container's rules name an endpoint that
    needs another socket than the one that socket() gave (type unix, or in another netns), in a profile also if it
    asks for AF_GRAFT (`graft.family=on`); or "otherwise", if neither is so. @why: the reason, a sentence without its
    full stop. @family: it is for sockets of AF_GRAFT. @direct: it is for direct containers alone, whose internet
    sockets are made by the programs themselves; False: for all others; None: for both.
    """

    call: str
    conditions: tuple[Condition, ...]
    forms: tuple[Form, ...]
    when: When
    why: str
    family: bool = False
    direct: bool | None = None

    def holds(self, args: tuple[int, ...]) -> bool:
        """Do all conditions hold for a call with these registers?"""
        return all(condition.holds(args) for condition in self.conditions)


class Call(NamedTuple):
    """A call that is trapped, and how it is answered. @compat: it is trapped in the 32-bit ABI, too."""

    name: str
    answer: str
    compat: bool = False

    @property
    def number(self) -> int:
        """Its number in the machine's own ABI."""
        return HERE.numbers[self.name]


class Refusal(NamedTuple):
    """A call that a filter refuses with the errno @error, without asking anybody. @error 0: the process is killed.

    @abi: "native", "compat" (the 32-bit one), "x32" or "other". @call: "" for all calls of that ABI. A profile
    refuses by the name, in every ABI. @direct: only of direct containers.
    """

    abi: str
    call: str
    error: int
    forms: tuple[Form, ...]
    why: str
    direct: bool = False

    def number(self, architecture: Architecture = HERE) -> int | None:
        """The call's number there; None for all calls of the ABI, and for one that the ABI does not have."""
        abi = architecture.compat.numbers if self.abi == "compat" else architecture.numbers
        return abi.get(self.call)

    def known(self, architecture: Architecture = HERE) -> bool:
        """Has that architecture the ABI, and the call in it?"""
        if self.abi == "x32":
            return bool(architecture.x32)
        return not self.call or self.number(architecture) is not None


def _values(*values: int) -> tuple[Range, ...]:
    return tuple((int(value), int(value)) for value in values)


def _except(*values: int) -> tuple[Range, ...]:
    """What is none of @values, which ascend."""
    ranges = []
    first = 0
    for value in map(int, values):
        if first < value:
            ranges.append((first, value - 1))
        first = value + 1
    return (*ranges, (first, TOP))


FAMILY = Condition(
    0, _values(socket.AF_INET, socket.AF_INET6, linux.AF_GRAFT), "the family is AF_INET, AF_INET6 or AF_GRAFT"
)
TYPE = Condition(1, _values(socket.SOCK_STREAM, socket.SOCK_DGRAM), "its type is SOCK_STREAM or SOCK_DGRAM", mask=0xF)
# What a direct container's programs make themselves: TCP and UDP. All other sockets are trapped there.
INTERNET = (socket.AF_INET, socket.AF_INET6)
OTHER_FAMILY = Condition(0, _except(*INTERNET), "the family is neither AF_INET nor AF_INET6")
OTHER_TYPE = Condition(1, ((0, 0), (3, 0xF)), "its type is neither SOCK_STREAM nor SOCK_DGRAM", mask=0xF)
STREAM = Condition(1, _values(socket.SOCK_STREAM), "its type is SOCK_STREAM", mask=0xF)
NOT_TCP = Condition(2, _except(0, socket.IPPROTO_TCP), "the protocol is not TCP")
DGRAM = Condition(1, _values(socket.SOCK_DGRAM), "its type is SOCK_DGRAM", mask=0xF)
NOT_UDP = Condition(2, _except(0, socket.IPPROTO_UDP), "the protocol is not UDP")
FLAGS = (0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
OTHER_TYPES = Condition(  # without a mask, for profiles
    1,
    _except(*(kind | flags for flags in FLAGS for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM))),
    "its type is neither SOCK_STREAM nor SOCK_DGRAM",
)
IS_INTERNET = Condition(0, _values(*INTERNET), "the family is AF_INET or AF_INET6")
# TUNSETIFF, PPPIOCNEWUNIT, PPPIOCATTACH, PPPIOCATTCHAN (linux/if_tun.h, linux/ppp-ioctl.h)
TUNNELS = (0x400454CA, 0xC004743E, 0x4004743D, 0x40047438)
TUNNEL = Condition(1, _values(*TUNNELS), "the request is TUNSETIFF, PPPIOCNEWUNIT, PPPIOCATTACH or PPPIOCATTCHAN")
# SIOC* beyond those of the socket alone, and wireless extensions (linux/sockios.h, linux/wireless.h)
DEVICES: tuple[Range, ...] = ((0x8908, 0x89FF), (0x8B00, 0x8BFF))
# Families that the kernel gives in any netns and that know none (af_vsock.c, af_qrtr.c, rds/ib.c, mISDN/socket.c),
# and one whose sockets have internet sockets in them (smc/af_smc.c)
BEYOND = Condition(
    0,
    _values(socket.AF_RDS, linux.AF_ISDN, socket.AF_VSOCK, socket.AF_QIPCRTR, linux.AF_SMC),
    "the family is AF_RDS, AF_ISDN, AF_VSOCK, AF_QIPCRTR or AF_SMC",
)
DEVICE = Condition(1, DEVICES, "the request is 0x8908-0x89ff or 0x8b00-0x8bff")
DEVICE_LOW = Condition(1, DEVICES, "the low 16 bits of the request are 0x8908-0x89ff or 0x8b00-0x8bff", mask=0xFFFF)
NAME_LENGTH = Condition(2, _values(SOCKADDR_GR), f"the address has {SOCKADDR_GR} bytes")
SEND_LENGTH = Condition(5, _values(SOCKADDR_GR), f"the address has {SOCKADDR_GR} bytes")
SEND_LOW = Condition(4, _except(0), "the low half of the address's pointer is not 0")
SEND_HIGH = Condition(4, _except(0), "its high half is not 0", upper=True)
NUMBER = Condition(0, ((FAMILY_FIRST, FAMILY_LAST),), f"the descriptor is {FAMILY_FIRST}-{FAMILY_LAST}")
GRAFT_LEVEL = Condition(1, _values(linux.IPPROTO_GRAFT), f"the level is IPPROTO_GRAFT ({linux.IPPROTO_GRAFT})")
STREAM_LEVELS = Condition(
    1,
    _values(socket.IPPROTO_IP, socket.IPPROTO_TCP, socket.IPPROTO_IPV6),
    "the level is IPPROTO_IP, IPPROTO_TCP or IPPROTO_IPV6",
)
IP_LEVEL = Condition(1, _values(socket.IPPROTO_IP), "the level is IPPROTO_IP")
SOCKET_LEVEL = Condition(1, _values(socket.SOL_SOCKET), "the level is SOL_SOCKET")
SOCKET_OPTIONS = Condition(
    2, ((1, 1), (12, 12), (16, 19), (22, 65), (68, TOP)), "the option is none of 0, 2-11, 13-15, 20-21, 66-67"
)
TCP_LEVEL = Condition(1, _values(socket.IPPROTO_TCP), "the level is IPPROTO_TCP")
TCP_OPTIONS = Condition(2, ((16, 31),), "the option is 16-31 (TCP_REPAIR and its neighbours)")
IPV6_LEVEL = Condition(1, _values(socket.IPPROTO_IPV6), "the level is IPPROTO_IPV6")
IPV6_OPTIONS = Condition(2, _except(socket.IPV6_V6ONLY), "the option is not IPV6_V6ONLY")
# netfilter's, multicast routing's and IPVS's, as in csrc/options.bpf.h
FIREWALL = Condition(2, ((64, TOP),), "the option is 64 or above")
FIREWALL6 = Condition(2, ((64, 65), (68, 69), (79, TOP)), "the option is 64-65, 68-69, or 79 or above")
# Those of them that Linux 6.18 has: iptables', SO_ORIGINAL_DST, ipset's, arptables', ebtables', MRT_*, IPVS's
FIREWALL_HAS = ((64, 67), (80, 80), (83, 83), (96, 99), (128, 131), (200, 212), (1152, 1167))
FIREWALL6_HAS = ((64, 65), (68, 69), (80, 80), (200, 212))

# The order is that of the filter's comparisons: what programs call often comes first.
_ADDRESS = "graftd %s the endpoint, puts another socket in place, or lets it proceed"
_NAME = "graftd writes the name that the program expects"
_OPTIONS = "graftd carries out AF_GRAFT's, ignores a unix socket's, lets others proceed"
_READS = "graftd carries out AF_GRAFT's, ignores a unix socket's, refuses the host's firewall, lets others proceed"
CALLS = (
    Call(
        "socket",
        "graft-sup or graftd injects a stamped socket of the host's netns; the families beyond: EAFNOSUPPORT; what "
        "the programs of a direct container do not make themselves is made in the container's netns",
    ),
    Call("socketpair", "graftd makes the pair in the container's netns, and injects both"),
    Call("ioctl", "graftd asks the container's netns, and refuses what is no question", compat=True),
    Call("listen", "graftd binds an unbound socket to the private loopback, and listens"),
    Call("bind", f"graft-sup sets what a direct container's socket lacks; else {_ADDRESS % 'binds to'}"),
    Call("connect", _ADDRESS % "connects to"),
    Call("setsockopt", _OPTIONS),
    Call("getsockopt", _READS),
    Call("getsockname", _NAME),
    Call("getpeername", _NAME),
    Call("sendto", _ADDRESS % "sends to"),
)

_LENGTH = "an address of this length is a sockaddr_gr"
_NUMBER = "sockets of AF_GRAFT are put at these descriptors, and no register tells them from others otherwise"
_OPTION = "these are the options of AF_GRAFT"
_ANY_NAME = "the address may mean an endpoint that needs another socket"
_SHOWN = "a unix socket that stands for an internet one shows the address that the program asked for"
_IGNORED = "a unix socket that stands for an internet one has none of these options"
_32BIT = (
    "a 32-bit setsockopt() skips cgroup/setsockopt: the native call proceeds to it, the supervisor refuses the other"
)
_FIREWALL = (
    "these read the firewall, and real addresses: cgroup/getsockopt refuses them on a grafted socket when the kernel "
    "has written its answer to the program's memory already"
)
_FAMILIES_BEYOND = (
    (socket.AF_VSOCK, "AF_VSOCK",
     "it is refused: it reaches the hypervisor, and the host's virtual machines, from any netns; Docker's profile "
     "refuses it as well"),
    (socket.AF_QIPCRTR, "AF_QIPCRTR", "it is refused: it reaches the host's modem and its services from any netns"),
    (linux.AF_ISDN, "AF_ISDN", "it is refused: it reaches the host's ISDN devices, and renames them, from any netns"),
    (socket.AF_RDS, "AF_RDS",
     "it is refused: over InfiniBand it has the addresses of the host's netns, and no hook sees what it sends"),
    (linux.AF_SMC, "AF_SMC",
     "it is refused: the kernel makes a TCP socket for it in the container's netns, past the trap, and may use the "
     "host's RDMA devices"),
)  # fmt: skip
_WHOLE = _IGNORED + "; AF_GRAFT's level and descriptors would take too many rules"
TRAPS = (
    Trap("socket", (FAMILY, TYPE), (FILTER,), "always",
         "the socket is made in the host's netns; its arguments are registers, so nothing changes between check and "
         "use; raw ones stay in the container's netns, because no hook sees what they send", direct=False),
    Trap("socket", (FAMILY,), (PROFILE,), "always",
         "the same; a test of the type would multiply the rules, so the supervisor lets other types proceed",
         direct=False),
    Trap("socket", (OTHER_FAMILY,), BOTH, "always",
         "the program lives in the host's netns, and has these in its container's own", direct=True),
    Trap("socket", (OTHER_TYPE,), (FILTER,), "always", "the same", direct=True),
    Trap("socket", (STREAM, NOT_TCP), (FILTER,), "always", "the same; MPTCP becomes TCP", direct=True),
    Trap("socket", (DGRAM, NOT_UDP), (FILTER,), "always", "the same", direct=True),
    Trap("socket", (IS_INTERNET, OTHER_TYPES), (PROFILE,), "always",
         "the same; a test of the protocol would take too many rules: cgroup/sock_create refuses what is neither TCP "
         "nor UDP", direct=True),
    *(Trap("socket", (BEYOND._replace(ranges=_values(family), shown=f"the family is {name}"),), BOTH, "always", why)
      for family, name, why in _FAMILIES_BEYOND),
    Trap("socketpair", (), BOTH, "always",
         "a unix socket of the host's netns could be bound and connected to abstract names there", direct=True),
    Trap("ioctl", (TUNNEL,), BOTH, "always",
         "it is refused: it would make or take a device in the netns of whoever calls, the host's", direct=True),
    Trap("ioctl", (DEVICE_LOW,), (FILTER,), "always",
         "on a grafted socket it would read or change the host's devices, and no hook exists for it; 0x8901-0x8907 "
         "concern the socket alone"),
    Trap("ioctl", (DEVICE,), (PROFILE,), "always",
         "the same; the kernel knows no device request with other bits set, and pieces of a profile have no mask"),
    Trap("listen", (), BOTH, "always", "no bind hook runs for a socket that was never bound"),
    Trap("bind", (), BOTH, "always",
         "what graft-sup sets on a socket that it makes is set now, and the call proceeds", direct=True),
    Trap("bind", (NAME_LENGTH,), (FILTER,), "otherwise", _LENGTH, family=True),
    Trap("bind", (NUMBER,), (FILTER,), "otherwise", _NUMBER, family=True),
    Trap("bind", (), BOTH, "addresses", _ANY_NAME),
    Trap("connect", (NAME_LENGTH,), (FILTER,), "otherwise", _LENGTH, family=True),
    Trap("connect", (NUMBER,), (FILTER,), "otherwise", _NUMBER, family=True),
    Trap("connect", (), BOTH, "addresses", _ANY_NAME),
    Trap("setsockopt", (GRAFT_LEVEL,), (FILTER,), "always", _OPTION, family=True),
    Trap("setsockopt", (STREAM_LEVELS,), (FILTER,), "addresses", _IGNORED),
    Trap("setsockopt", (NUMBER,), (FILTER,), "always", _NUMBER, family=True),
    Trap("setsockopt", (IP_LEVEL,), (PROFILE,), "otherwise", _32BIT),
    Trap("setsockopt", (SOCKET_LEVEL, SOCKET_OPTIONS), (PROFILE,), "otherwise",
         "the same; buffers, timeouts and the like reach nothing, and programs set them often"),
    Trap("setsockopt", (TCP_LEVEL, TCP_OPTIONS), (PROFILE,), "otherwise",
         "the same; the other options of TCP reach nothing"),
    Trap("setsockopt", (IPV6_LEVEL, IPV6_OPTIONS), (PROFILE,), "otherwise",
         "the same; Go sets IPV6_V6ONLY on every socket"),
    Trap("setsockopt", (), (PROFILE,), "addresses", _WHOLE),
    Trap("getsockopt", (GRAFT_LEVEL,), (FILTER,), "always", _OPTION, family=True),
    Trap("getsockopt", (STREAM_LEVELS,), (FILTER,), "addresses", _IGNORED),
    Trap("getsockopt", (NUMBER,), (FILTER,), "always", _NUMBER, family=True),
    Trap("getsockopt", (IP_LEVEL, FIREWALL), (FILTER,), "always", _FIREWALL),
    Trap("getsockopt", (IPV6_LEVEL, FIREWALL6), (FILTER,), "always", _FIREWALL),
    Trap("getsockopt", (FIREWALL,), (PROFILE,), "otherwise",
         "the same, of every level: two conditions would make a hundred rules"),
    Trap("getsockopt", (), (PROFILE,), "addresses", _WHOLE),
    Trap("getsockname", (NUMBER,), (FILTER,), "otherwise",
         _NUMBER + "; a trap on all would cost Go and Java one for each connection", family=True),
    Trap("getsockname", (), BOTH, "addresses", _SHOWN),
    Trap("getpeername", (), BOTH, "addresses", _SHOWN),
    Trap("sendto", (SEND_LENGTH,), (FILTER,), "otherwise", _LENGTH, family=True),
    Trap("sendto", (SEND_LOW,), BOTH, "addresses", _ANY_NAME + "; a send without an address is not trapped"),
    Trap("sendto", (SEND_HIGH,), (FILTER,), "addresses",
         "the same, for a pointer whose low half is 0; rules of a profile compare low halves, so there such a call "
         "goes to the hook, which knows no other endpoint"),
)  # fmt: skip

_INTERNET32 = (
    "it would make or use an internet socket, and setsockopt() here skips cgroup/setsockopt; a profile traps it by "
    "its name, and the supervisor refuses it"
)
REFUSED = (
    Refusal("native", "io_uring_setup", errno.EPERM, BOTH,
            "io_uring's operations evade every seccomp filter; Docker's profile refuses it as well"),
    Refusal("compat", "socketcall", errno.ENOSYS, BOTH,
            "it has all socket calls behind a pointer, and libseccomp adds each rule for socket() to it as well"),
    Refusal("compat", "socket", errno.ENOSYS, (FILTER,), _INTERNET32),
    Refusal("compat", "bind", errno.ENOSYS, (FILTER,), _INTERNET32),
    Refusal("compat", "connect", errno.ENOSYS, (FILTER,), _INTERNET32),
    Refusal("compat", "listen", errno.ENOSYS, (FILTER,), _INTERNET32),
    Refusal("compat", "getsockopt", errno.ENOSYS, (FILTER,), _INTERNET32),
    Refusal("compat", "setsockopt", errno.ENOSYS, (FILTER,), _INTERNET32),
    Refusal("compat", "socketpair", errno.ENOSYS, (FILTER,), "as for the native one, which is trapped", direct=True),
    Refusal("compat", "io_uring_setup", errno.ENOSYS, (FILTER,),
            "as for the native one; a profile refuses it by its name, with EPERM"),
    Refusal("x32", "", errno.ENOSYS, (FILTER,),
            "nothing is built for it, so no trap is worth its numbers; under a profile, the supervisor refuses what "
            "is trapped"),
    Refusal("other", "", 0, (FILTER,), "this machine has no other; a profile has the engine's architectures"),
)  # fmt: skip


def active(
    form: Form, *, addresses: bool, direct: bool = False, follows: bool = False
) -> dict[str, tuple[Trap, ...]]:
    """The traps of one filter by call, in the order of CALLS. @addresses: "addresses" is so, see Trap.when.

    @direct: of a direct container. @follows: its sockets follow sysctls by options, so that graftd makes all of them.
    """
    now = ("always", "addresses" if addresses else "otherwise")
    modes = {None, direct, direct and not follows}
    rows = [t for t in TRAPS if form in t.forms and t.when in now and t.direct in modes]
    by_call = {call.name: tuple(trap for trap in rows if trap.call == call.name) for call in CALLS}
    return {name: traps for name, traps in by_call.items() if traps}


def reads_firewall(args: tuple[int, ...]) -> bool:
    """Would getsockopt() with these registers read the firewall of the socket's netns?"""
    return any(
        level.holds(args) and name.holds(args) for level, name in ((IP_LEVEL, FIREWALL), (IPV6_LEVEL, FIREWALL6))
    )


def firewall_has(args: tuple[int, ...]) -> bool:
    """Has the kernel the option that reads_firewall() is true for? Programs may try any number."""
    ranges = FIREWALL_HAS if IP_LEVEL.holds(args) else FIREWALL6_HAS
    return any(low <= args[2] & TOP <= high for low, high in ranges)


def trapped(arch: int, number: int) -> str:
    """The name of the call in CALLS with this AUDIT_ARCH_* and number; "" for one that has no handler."""
    return _BY_NUMBER.get((arch, number), "")


_BY_NUMBER = {(HERE.audit, call.number): call.name for call in CALLS} | {
    (HERE.compat.audit, HERE.compat.numbers.get(call.name)): call.name for call in CALLS if call.compat
}
