"""The BPF programs seen from user space: load, attach and pin them, read and write their maps.

The system's libbpf does the loading, called through ctypes.

Maps and links are pinned in one directory of bpffs, so the policy holds while no graftd runs. A starting graftd
looks for those pins. If they belong to the same object file, it takes them over as they are. If they belong to
another one, it loads its own programs on the same maps, attaches them, and then removes the old links. libbpf refuses
that with EINVAL if a map has changed its shape. Links to another cgroup than this graftd's stay while sockets of that
cgroup live. What stays with sockets when graftd has ended is in graft/kernel/links.py.

Sources: libbpf.h, bpf(2), linux/bpf.h.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import struct
from collections.abc import Collection
from pathlib import Path

from graft.errors import Failure
from graft.kernel import direct, linux
from graft.kernel.denials import OPS, REASONS
from graft.kernel.direct import Programs, direct_programs
from graft.kernel.holders import OWNED, Holders
from graft.kernel.libbpf import (
    OBJECT,
    TUNNELS_OBJECT,
    complaints,
    libbpf_functions,
    object_hash,
    open_object,
    print_callback,
)
from graft.kernel.links import Attachable, attached, leave, program_number, take_back
from graft.kernel.listening import TABLE
from graft.kernel.maps import BPF_OBJ_GET, BPF_OBJ_PIN, Map, ObjAttr, bpf
from graft.kernel.reports import REPORTS, Reports
from graft.kernel.stamps import FAMILY_SIZE, OWN_TENANT, STAMP
from graft.kernel.traffic import DATAGRAMS, TRAFFIC
from graft.log import log
from graft.rules.address import Address
from graft.rules.limits import Limits
from graft.rules.slices import SLICE_LOOPBACKS
from graft.rules.sysctl import NUMBERS_WORDS, PRIVATE_PORTS, taken_ports
from graft.rules.tables import ENDPOINT, LED, OWNER, PIN

ABI = 4
WORDS = (  # the maps whose values are numbers of 32 bits
    *("locals", "prepared", "settling", "slices", "reserved", "allowed", "learnt", "direct_cgroups", "rates"),
    *("udp_ports", "client_ports", "dynamic_ports", "abroad_ports"),
)
MAPS = (
    "stamps",
    "families",
    "config",
    "pidns_of_graftd",
    "tenants",
    "usage",
    "ingress",
    "egress",
    "allowed",
    "pinned",
    "endpoints",
    "learnt",
    "services",
    "holders",
    "owned",
    "shared",
    "locals",
    "slices",
    "loopbacks",
    "listeners",
    "listening",
    "listed",
    "udp_ports",
    "udp_place",
    "reserved",
    "client_ports",
    "dynamic_ports",
    "served_ports",
    "led",
    "led_ports",
    "asker_tables",
    "budgets",
    "ports",
    "numbers",
    "held",
    "claims",
    "claiming",
    "claimed",
    "prepared",
    "settling",
    "abroad",
    "abroad_place",
    "abroad_ports",
    "peers",
    "told",
    "met",
    "called",
    "asked",
    "counters",
    "denials",
    "reports",
    "traffic",
    "datagrams",
    "rates",
    "forwards",
    "direct",
    "leashes",
    "direct_cgroups",
)

# maps whose shape or use has changed under another name
EARLIER = ("clients", "dynamic", "served", "askers", "addresses", "preparing")
DYNAMIC_KEY_SIZE = 8
ABROAD_KEY_SIZE = 24

LOOKUP = "guard_lookup"  # the program of sk_lookup, which is attached to the host's netns
# attached to cgroups of direct containers alone (graft/kernel/direct.py), with their attach types
DIRECT_ONLY = {"graft_sock_create": 2, "graft_sysctl": 18}  # BPF_CGROUP_INET_SOCK_CREATE, BPF_CGROUP_SYSCTL
FORWARD = "graft_forward"  # is attached to nothing: it is in the map `forwards` (graft/kernel/entrance.py)

CONFIG = struct.Struct("=QIHH")
TENANT = struct.Struct("=QIII4s16s")
USAGE = struct.Struct("=QQQQ")
COUNTER_KEY = struct.Struct("=IHH")
SERVED_KEY = struct.Struct("=16sI")
SERVED = struct.Struct("=II")
CLIENT_KEY = struct.Struct("=II")
PORTS = struct.Struct("=QQQ")
LOOPBACKS_SIZE = 8 * SLICE_LOOPBACKS
NUMBERS_KINDS = 4
NUMBERS = struct.Struct("=II")
ASKERS_SETS, ASKERS_WAYS = 480, 4
ASKERS = struct.Struct(f"=Q{8 * ASKERS_SETS * ASKERS_WAYS}s")
NUMBERS_SIZE = NUMBERS.size + 8 * NUMBERS_WORDS * NUMBERS_KINDS


class Kernel:
    """The loaded programs, their links and their maps. Only the loop's thread calls it, but for used() and counters.

    Map has no such limit.
    """

    def __init__(self, pins: Path) -> None:
        self.pins = pins
        self.lib = libbpf_functions()
        self.lib.libbpf_set_print(print_callback)
        self.maps: dict[str, Map] = {}
        self.direct_only: dict[str, int] = {}  # descriptors of DIRECT_ONLY
        self.links: dict[Path, int] = {}  # kept open: the programs stay attached if the pins are removed
        self._host_cookie = 0
        self._watched = self._counts = False

    def install(self, policy_cgroup: Path, root_cgroup: Path) -> bool:
        """Attach the policy to @policy_cgroup, where graftd makes sockets, the guard to @root_cgroup, and the look-up
        of what arrives to this netns.

        Returns True if pins of the same object file were taken over as they are. Raises Failure or OSError.
        """
        where = f"{policy_cgroup.stat().st_ino} {root_cgroup.stat().st_ino} {linux.netns_inode()}"
        identity = f"{object_hash()} {where}"
        links = self.pins / f"links-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        known = all(pin.exists() for pin in (links / "graft_bind4", links / LOOKUP, *self._direct_pins()))
        if known:
            self._open_pinned()
            for path in links.iterdir():
                self.links[path] = self._open_pin(path)
            self.direct_only = {pin.name: self._open_pin(pin) for pin in self._direct_pins()}
        else:
            self._load(links, policy_cgroup, root_cgroup)
        self.reports = Reports(self.lib, self.maps)
        self._remove_old_links(policy_cgroup)
        take_back(self._policy_links(), policy_cgroup)
        return known

    def _policy_links(self) -> list[int]:
        return [fd for path, fd in self.links.items() if not _is_guard(path)]

    def _remove_old_links(self, policy_cgroup: Path) -> bool:
        """Remove the links of earlier graftds, but those whose cgroup has sockets that no other program judges.

        @policy_cgroup: where this graftd's programs are attached. Returns True if some stay. Raises OSError.
        """
        here = policy_cgroup.stat().st_ino if policy_cgroup.exists() else 0
        kept = False
        for old in {path for path in self.pins.glob("links-*/*") if path not in self.links}:
            fd = self._open_pin(old)
            stays = not _is_guard(old) and attached(fd).cgroup not in (0, here)
            os.close(fd)
            kept |= stays
            if not stays:
                old.unlink()
        for directory in self.pins.glob("links-*"):
            with contextlib.suppress(OSError):
                directory.rmdir()
        return kept

    def _open_pinned(self) -> None:
        sizes = dict.fromkeys(WORDS, 4) | {
            "stamps": STAMP.size,
            "families": FAMILY_SIZE,
            "tenants": TENANT.size,
            "counters": 8,
            "owned": OWNED.size,
            "loopbacks": LOOPBACKS_SIZE,
            "listeners": 8,
            "listening": TABLE.size,
            "usage": USAGE.size,
            "served_ports": SERVED.size,
            "led": LED.size,
            "led_ports": 8,
            "ports": PORTS.size,
            "numbers": NUMBERS_SIZE,
            "pinned": PIN.size,
            "endpoints": ENDPOINT.size,
            "direct": direct.VALUE.size,
            "leashes": direct.LEASH.size,
            "asker_tables": ASKERS.size,
            "reports": REPORTS.size,
            "traffic": TRAFFIC.size,
            "datagrams": DATAGRAMS.size,
        }
        for name in MAPS:
            self.maps[name] = Map(self._open_pin(self.pins / name), name, sizes.get(name, 0))
        self.maps["holders"] = Holders(self.maps["holders"].fd, OWNER.size, self.maps["owned"])

    @staticmethod
    def _open_pin(path: Path) -> int:
        name = ctypes.create_string_buffer(os.fsencode(path))
        return bpf(BPF_OBJ_GET, ObjAttr(ctypes.addressof(name), 0, 0), f"open {path}")

    def is_pinned(self) -> bool:
        """Are all pins in place that the next graftd will look for?"""
        return all(path.exists() for path in (*self.links, *self._direct_pins()))

    def _direct_pins(self) -> list[Path]:
        return [self.pins / name for name in DIRECT_ONLY]

    def pin_again(self) -> None:
        """Pin again what somebody has removed; the open descriptors kept it alive. Raises OSError."""
        for directory in {self.pins, *(path.parent for path in self.links)}:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        held = {self.pins / name: kept.fd for name, kept in self.maps.items()} | self.links
        held |= {self.pins / name: fd for name, fd in self.direct_only.items()}
        for path, fd in held.items():
            if not path.exists():
                name = ctypes.create_string_buffer(os.fsencode(path))
                bpf(BPF_OBJ_PIN, ObjAttr(ctypes.addressof(name), fd, 0), f"pin {path}")

    def _load(self, links: Path, policy_cgroup: Path, root_cgroup: Path) -> None:
        self.pins.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = open_object(self.lib, OBJECT)
        found = {}
        for name in MAPS:
            entry = self.lib.bpf_object__find_map_by_name(handle, name.encode())
            self.lib.bpf_map__set_pin_path(entry, os.fsencode(self.pins / name))
            found[name] = entry
        result = self.lib.bpf_object__load(handle)
        if result:
            for line in complaints:
                log.error("%s", line)
            raise Failure(
                f"the kernel refused graft's BPF programs: {os.strerror(-result)}",
                hint="'graft doctor' says what is missing",
                code=errno.errorcode.get(-result, ""),
            )
        self._open_pinned()
        self._leave_earlier()
        links.mkdir(mode=0o700, exist_ok=True)
        program = None
        while program := self.lib.bpf_object__next_program(handle, program):
            name = self.lib.bpf_program__name(program).decode()
            if name == FORWARD:
                continue
            if name in DIRECT_ONLY:
                self._pin_program(program, self.pins / name)
                continue
            if name == LOOKUP:
                self._attach(program, name, Path("/proc/self/ns/net"), links / name)
            else:
                self._attach(program, name, root_cgroup if name.startswith("guard") else policy_cgroup, links / name)
        self.lib.bpf_object__close(handle)
        self._attach_modifiers(links)

    def _attach_modifiers(self, links: Path) -> None:
        """Attach the programs that keep kernel tunnels and other uids from containers' sockets, where the kernel has
        programs of their type (BPF_MODIFY_RETURN, Linux 5.7; arm64: 6.4) and lets this process load them. `graft
        doctor` says so if not.
        """
        handle = open_object(self.lib, TUNNELS_OBJECT)
        try:
            result = self.lib.bpf_object__load(handle)
            if result:
                log.info("no guard against kernel tunnels and fchown(): %s", os.strerror(-result))
                return
            program = None
            while program := self.lib.bpf_object__next_program(handle, program):
                name = self.lib.bpf_program__name(program).decode()
                link = self.lib.bpf_program__attach(program)
                if not link:
                    log.info("no program %s: %s", name, linux.oserror("attach it"))
                    continue
                self._pin(link, links / name)
        finally:
            complaints.clear()  # they are of this object, which graft can do without
            self.lib.bpf_object__close(handle)

    def _leave_earlier(self) -> None:
        """Take over what running servers have in a map of an earlier release, and remove the pins of such maps."""
        with contextlib.suppress(FileNotFoundError):
            before = Map(self._open_pin(self.pins / "dynamic"), "dynamic", 4)
            for key in list(before.keys(DYNAMIC_KEY_SIZE)):
                self.maps["dynamic_ports"].update(key, before.get(key) or bytes(4))
            os.close(before.fd)
        for name in EARLIER:
            (self.pins / name).unlink(missing_ok=True)
        for key in list(self.maps["tenants"].keys(4)):  # they count from the first call on
            usage = self.maps["usage"].get(key)
            if usage and self.maps["ports"].get(key) is None:
                sockets, udp = USAGE.unpack(usage)[2:]
                self.limit(int.from_bytes(key, "little"), Limits(sockets, udp))

    def _attach(self, program: int, name: str, target: Path, pin: Path) -> None:
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        attach = self.lib.bpf_program__attach_netns if name == LOOKUP else self.lib.bpf_program__attach_cgroup
        try:
            link = attach(program, fd)
            if not link:
                raise linux.oserror(f"attach {name} to {target}")
            self._pin(link, pin)
        finally:
            os.close(fd)

    def _pin_program(self, program: int, pin: Path) -> None:
        pin.unlink(missing_ok=True)
        result = self.lib.bpf_program__pin(program, os.fsencode(pin))
        if result:
            raise OSError(-result, f"pin {pin.name}: {os.strerror(-result)}")
        self.direct_only[pin.name] = self._open_pin(pin)

    def for_direct(self) -> Programs:
        """What is attached to the cgroup of a direct container. Raises OSError."""
        found = [Attachable(what.program, what.type) for what in map(attached, self._policy_links())]
        found += [Attachable(program_number(fd), DIRECT_ONLY[name]) for name, fd in self.direct_only.items()]
        return direct_programs(found, self.maps["direct"], self.maps["direct_cgroups"])

    def _pin(self, link: int, pin: Path) -> None:
        pin.unlink(missing_ok=True)
        result = self.lib.bpf_link__pin(link, os.fsencode(pin))
        if result:
            raise OSError(-result, f"pin {pin.name}: {os.strerror(-result)}")
        self.lib.bpf_link__destroy(link)  # closes only libbpf's own descriptor; the pin keeps the link
        self.links[pin] = self._open_pin(pin)

    def configure(self, host_cookie: int, ports: int) -> None:
        """Tell the programs in which netns grafted sockets live, @host_cookie is its SO_NETNS_COOKIE, and how many
        ports the kernel may choose for all of them together, see Limits. Raises OSError.
        """
        self._host_cookie = host_cookie
        self.tell()
        self._limit_ports(OWN_TENANT, ports)

    def tell(self, *, watched: bool | None = None, counts: bool | None = None) -> None:
        """Say whether a tenant is to report what it is allowed (csrc/watch.bpf.h), and whether datagrams are counted
        (csrc/datagrams.bpf.h); None: as before. Raises OSError.
        """
        self._watched = self._watched if watched is None else watched
        self._counts = self._counts if counts is None else counts
        self.maps["config"].update(bytes(4), CONFIG.pack(self._host_cookie, ABI, self._watched, self._counts))

    def know_locals(self, addresses: Collection[Address]) -> None:
        """Let the containers bind where they are published at these addresses of the host's. Raises OSError."""
        keys = {address.raw for address in addresses}
        known = set(self.maps["locals"].keys(16))
        for key in known - keys:
            self.maps["locals"].delete(key)
        for key in keys - known:
            self.maps["locals"].update(key, bytes(4))

    def reserve(self, ports: Collection[int]) -> None:
        """Let no container bind these UDP ports at an address of its own. Raises OSError."""
        keys = {port.to_bytes(4, "little") for port in ports}
        for key in set(self.maps["reserved"].keys(4)) - keys:
            self.maps["reserved"].delete(key)
        for key in keys:
            self.maps["reserved"].update(key, bytes(4))

    def limit(self, tenant: int, limits: Limits, private: tuple[int, int] = PRIVATE_PORTS) -> None:
        """Set how many sockets and ports a tenant may have. It keeps what it has beyond that. Raises OSError.

        @private: the first and the last of the ports that a bind to port 0 may get on its loopback.
        """
        key = tenant.to_bytes(4, "little")
        kept = self.maps["usage"].get(key)
        sockets, udp, *before = USAGE.unpack(kept) if kept else (0, 0)
        wanted = [limits.sockets, limits.udp]
        if before != wanted:  # a write may undo what the programs count meanwhile, so write only on a change
            self.maps["usage"].update(key, USAGE.pack(sockets, udp, *wanted))
        self._limit_ports(tenant, limits.ports)
        if limits.rate:
            self.maps["rates"].update(key, limits.rate.to_bytes(4, "little"))
        self.reports.allow(tenant)
        if self.maps["traffic"].get(key) is None:
            self.maps["traffic"].update(key, bytes(TRAFFIC.size))
            self.maps["datagrams"].update(key, bytes(DATAGRAMS.size))
        if self.maps["numbers"].get(key) is None:
            start = NUMBERS.pack(secrets.randbelow(64 * NUMBERS_WORDS), 0)
            self.maps["numbers"].update(key, start + taken_ports(private) * NUMBERS_KINDS)
        if self.maps["asker_tables"].get(key) is None:
            self.maps["asker_tables"].update(key, ASKERS.pack(secrets.randbits(64), b""))

    def widen(self, tenant: int) -> None:
        """Give a tenant the further addresses of its loopback, which are in the slice numbers behind its own."""
        key = tenant.to_bytes(4, "little")
        if self.maps["loopbacks"].get(key) is None:
            self.maps["loopbacks"].update(key, bytes(LOOPBACKS_SIZE))

    def _limit_ports(self, tenant: int, most: int) -> None:
        key = tenant.to_bytes(4, "little")
        kept = self.maps["ports"].get(key)
        used, before, served = PORTS.unpack(kept) if kept else (0, 0, 0)
        if before != most:
            self.maps["ports"].update(key, PORTS.pack(used, most, served))

    def used(self, tenant: int) -> Limits:
        """How many sockets a tenant has, in all and of UDP, and ports that the kernel chose."""
        key = tenant.to_bytes(4, "little")
        kept, ports = self.maps["usage"].get(key), self.maps["ports"].get(key)
        sockets, udp = USAGE.unpack(kept)[:2] if kept else (0, 0)
        return Limits(sockets, udp, PORTS.unpack(ports)[0] if ports else 0)

    def counters(self, tenant: int) -> dict[tuple[str, str], int]:
        """How many calls of a tenant were refused, by (operation, reason): names of OPS and REASONS."""
        return self.all_counters().get(tenant, {})

    def all_counters(self) -> dict[int, dict[tuple[str, str], int]]:
        """counters() of all tenants that were refused anything."""
        counts: dict[int, dict[tuple[str, str], int]] = {}
        for key in self.maps["counters"].keys(COUNTER_KEY.size):
            owner, op, reason = COUNTER_KEY.unpack(key)
            value = self.maps["counters"].get(key)
            if value:
                counts.setdefault(owner, {})[OPS[op], REASONS[reason]] = int.from_bytes(value, "little")
        return counts

    def forget(self, tenant: int) -> None:
        """Delete a removed tenant's usage, budget, numbers and counters, and the addresses that it served."""
        gone = "usage budgets ports numbers asker_tables listening loopbacks claiming reports traffic datagrams rates"
        for name in gone.split():
            self.maps[name].delete(tenant.to_bytes(4, "little"))
        for name, size in (("dynamic_ports", DYNAMIC_KEY_SIZE), ("abroad", ABROAD_KEY_SIZE)):
            for key in list(self.maps[name].keys(size)):
                if key[:4] == tenant.to_bytes(4, "little"):
                    self.maps[name].delete(key)
        for key in list(self.maps["served_ports"].keys(SERVED_KEY.size)):
            value = self.maps["served_ports"].get(key)
            if value and SERVED.unpack(value)[0] == tenant:
                self.maps["served_ports"].delete(key)
        for key in list(self.maps["counters"].keys(COUNTER_KEY.size)):
            if COUNTER_KEY.unpack(key)[0] == tenant:
                self.maps["counters"].delete(key)

    def uninstall(self, policy_cgroup: Path) -> None:
        """Detach the programs from the host and remove the pins; they stay with sockets that live on (links.leave()).

        No tenant is left for them, so that they refuse everything. The kernel frees maps and programs when nothing
        uses them. Raises OSError; the pins stay then.
        """
        tenants = self.maps["tenants"]
        for key in list(tenants.keys(4)):
            tenants.delete(key)
        found = policy_cgroup.stat().st_ino if policy_cgroup.exists() else 0
        leave([fd for fd in self._policy_links() if attached(fd).cgroup == found], policy_cgroup)
        for fd in self.links.values():
            os.close(fd)
        self.links.clear()
        if not self._remove_old_links(policy_cgroup):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.pins)
            return
        for name in (*MAPS, *DIRECT_ONLY):
            (self.pins / name).unlink(missing_ok=True)
        log.warning(
            "%s keeps links: sockets of a cgroup that is gone live on; the next graftd looks again", self.pins
        )


def _is_guard(link: Path) -> bool:
    return link.name.startswith("guard")
