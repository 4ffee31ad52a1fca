"""The BPF programs seen from user space: load, attach and pin them, read and write their maps, read denials.

The system's libbpf does the loading, called through ctypes.

Maps and links are pinned in one directory of bpffs, so the policy holds while no graftd runs. A starting graftd
looks for those pins. If they belong to the same object file, it takes them over as they are. If they belong to
another one, it loads its own programs on the same maps, attaches them, and then removes the old links. libbpf refuses
that with EINVAL if a map has changed its shape.

Sources: libbpf.h, bpf(2), linux/bpf.h.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from graft import linux
from graft.errors import Failure
from graft.limits import Limits
from graft.linux import libc
from graft.log import log

OBJECT = Path(__file__).with_name("graft.bpf.o")
ABI = 4
MAPS = (
    "stamps",
    "families",
    "config",
    "tenants",
    "usage",
    "ingress",
    "egress",
    "services",
    "addresses",
    "clients",
    "dynamic",
    "served",
    "askers",
    "counters",
    "denials",
)

DRAIN_MAX = 256
NR_BPF = 321
BPF_MAP_LOOKUP_ELEM = 1
BPF_MAP_UPDATE_ELEM = 2
BPF_MAP_DELETE_ELEM = 3
BPF_MAP_GET_NEXT_KEY = 4
BPF_OBJ_PIN = 6
BPF_OBJ_GET = 7

CONFIG = struct.Struct("=QII")
TENANT = struct.Struct("=QIII4s16s")
USAGE = struct.Struct("=QQQQ")
PROBE = struct.Struct("=II")
COUNTER_KEY = struct.Struct("=IHH")
SERVED_KEY = struct.Struct("=16sI")
SERVED = struct.Struct("=II")
CLIENT_KEY = struct.Struct("=II")
DENIAL = struct.Struct("=IHHiI16sI16sI16s")
STAMP = struct.Struct("=III" + "16sI" * 4)
FAMILY_SIZE = 16 + 8 + 64 * 132

STAMP_INGRESS = 2
STAMP_V6ONLY = 8
STAMP_CONNECTED = 16
STAMP_FAMILY = 32
STAMP_NAMED = 64
STAMP_PERMIT = 128
GRAFT_LEVEL, GRAFT_PROBE = 254, 1  # getsockopt(): does the policy run for this socket? See Stamper.vouch()
OWN_TENANT = 0  # in the stamp of graftd's own sockets

OPS = ("bind", "connect", "send", "setsockopt", "listen", "guard")
REASONS = (
    "no ingress rule",
    "outside the egress rules",
    "bound to the private loopback",
    "bound to another address than the egress rule's",
    "two host addresses for one dual-stack socket",
    "nobody of this container listens there",
    "forbidden socket option",
    "listen() on an unbound socket",
    "another's private loopback",
    "the container's policy is gone",
    "an accepted socket put to another use",
    "the endpoint is in another namespace than the socket",
    "no endpoint 'default-source'",
    "another container is bound there",
    "an address of a network that the container is not in",
    "converted",
)
CONVERTED = REASONS[-1]


class Denial(NamedTuple):
    """One refused call, as the ring buffer reports it. For setsockopt, `port` is level << 16 | option.

    With the reason CONVERTED nothing was refused: the hook replaced the address, and `real` and `real_port` are the
    address that it became, or the one that the connection leaves from. Addresses are 16 bytes, IPv4 ones mapped.
    """

    tenant: int
    op: str
    reason: str
    error: int
    protocol: int
    address: bytes
    port: int
    real: bytes
    real_port: int
    comm: str


class Stamp(NamedTuple):
    """struct graft_stamp (csrc/graft.h): whose a socket is, in the kernel's socket storage.

    Each address is 16 bytes, IPv4 ones mapped, with a port in host order.
    """

    tenant: int
    flags: int = 0
    place: int = 0
    local: tuple[bytes, int] = (bytes(16), 0)
    local_real: tuple[bytes, int] = (bytes(16), 0)
    peer: tuple[bytes, int] = (bytes(16), 0)
    peer_real: tuple[bytes, int] = (bytes(16), 0)

    def pack(self) -> bytes:
        """The bytes of struct graft_stamp."""
        return STAMP.pack(
            self.tenant, self.flags, self.place, *self.local, *self.local_real, *self.peer, *self.peer_real
        )

    @classmethod
    def unpack(cls, raw: bytes) -> "Stamp":
        """The stamp in the bytes of struct graft_stamp. Raises struct.error for another size."""
        v = STAMP.unpack(raw)
        return cls(v[0], v[1], v[2], (v[3], v[4]), (v[5], v[6]), (v[7], v[8]), (v[9], v[10]))


class _Elem(ctypes.Structure):
    """union bpf_attr of BPF_MAP_*_ELEM and BPF_MAP_GET_NEXT_KEY (bpf(2))."""

    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _Obj(ctypes.Structure):
    """union bpf_attr of BPF_OBJ_PIN and BPF_OBJ_GET (bpf(2))."""

    _fields_ = (("pathname", ctypes.c_uint64), ("bpf_fd", ctypes.c_uint32), ("file_flags", ctypes.c_uint32))


def _bpf(command: int, attr: ctypes.Structure, what: str) -> int:
    result: int = libc.syscall(NR_BPF, command, ctypes.byref(attr), ctypes.c_uint32(ctypes.sizeof(attr)))
    if result < 0:
        raise linux.oserror(what)
    return result


class Map:
    """A BPF map by its descriptor. Keys and values are bytes, as long as the map says. Any thread may call it."""

    def __init__(self, fd: int, name: str, value_size: int) -> None:
        self.fd = fd
        self.name = name
        self.value_size = value_size

    def _elem(self, command: int, key: bytes, value: ctypes.Array[ctypes.c_char] | None, flags: int = 0) -> int:
        kept = ctypes.create_string_buffer(key, len(key))
        attr = _Elem(self.fd, 0, ctypes.addressof(kept), ctypes.addressof(value) if value else 0, flags)
        return _bpf(command, attr, f"BPF map {self.name}")

    def update(self, key: bytes, value: bytes) -> None:
        """Insert or replace an element. Raises OSError: E2BIG or ENOSPC if the map is full."""
        self._elem(BPF_MAP_UPDATE_ELEM, key, ctypes.create_string_buffer(value, len(value)))

    def delete(self, key: bytes) -> None:
        """Delete the element at @key, if there is one. Raises OSError."""
        try:
            self._elem(BPF_MAP_DELETE_ELEM, key, None)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def get(self, key: bytes) -> bytes | None:
        """The value at @key, `value_size` bytes; None if there is none. Raises OSError."""
        value = ctypes.create_string_buffer(self.value_size)
        try:
            self._elem(BPF_MAP_LOOKUP_ELEM, key, value)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return value.raw

    def keys(self, key_size: int) -> Iterator[bytes]:
        """All keys. Elements that are added or deleted during the iteration may be missed. Raises OSError."""
        current = ctypes.create_string_buffer(key_size)
        following = ctypes.create_string_buffer(key_size)
        attr = _Elem(self.fd, 0, 0, ctypes.addressof(following), 0)
        while True:
            try:
                _bpf(BPF_MAP_GET_NEXT_KEY, attr, f"BPF map {self.name}")
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise
            yield following.raw
            ctypes.memmove(current, following, key_size)
            attr.key = ctypes.addressof(current)


class _Update(threading.local):
    """One thread's buffers for Stamper.stamp(), allocated once because every trapped socket() needs them."""

    def __init__(self, map_fd: int) -> None:
        self.key = ctypes.c_int()
        self.value = ctypes.create_string_buffer(STAMP.size)
        self.attr = _Elem(map_fd, 0, ctypes.addressof(self.key), ctypes.addressof(self.value), 0)
        self.reference = ctypes.byref(self.attr)
        self.size = ctypes.c_uint32(ctypes.sizeof(self.attr))


class Stamper:
    """Reads and writes the stamps of sockets. Any thread may call it. Its methods raise OSError."""

    def __init__(self, stamps: Map) -> None:
        self._stamps = stamps
        self._update = _Update(stamps.fd)

    def stamp(self, fd: int, tenant: int, flags: int, place: int = 0) -> None:
        """Stamp the new socket @fd with its tenant, STAMP_* @flags, and the number of the place (netns) it is in."""
        update = self._update
        update.key.value = fd
        struct.pack_into("=III", update.value, 0, tenant, flags, place)
        if libc.syscall(NR_BPF, BPF_MAP_UPDATE_ELEM, update.reference, update.size) < 0:
            raise linux.oserror("stamp a socket")

    def vouch(self, sock: socket.socket, tenant: int) -> None:
        """After stamp(): check that the policy runs for this socket, and count it among its tenant's sockets.

        Raises OSError: ENFILE beyond the tenant's limit, EIO if graft's programs are not attached where this process
        makes sockets.
        """
        try:
            stamped, over = PROBE.unpack(sock.getsockopt(GRAFT_LEVEL, GRAFT_PROBE, PROBE.size))
        except OSError as error:
            raise OSError(errno.EIO, "the policy is not attached") from error
        if stamped != tenant:
            raise OSError(errno.EIO, "another policy is attached")
        if over:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    def get(self, fd: int) -> Stamp | None:
        """The stamp of the socket @fd, None if it is not grafted."""
        value = self._stamps.get(struct.pack("=i", fd))
        return None if value is None else Stamp.unpack(value)

    def put(self, fd: int, stamp: Stamp) -> None:
        """Write the whole stamp of the socket @fd."""
        self._stamps.update(struct.pack("=i", fd), stamp.pack())

    def tenant_of(self, fd: int) -> int | None:
        """The tenant of the socket @fd, None if it is not grafted."""
        value = self._stamps.get(struct.pack("=i", fd))
        return None if value is None else int.from_bytes(value[:4], "little")


def _libbpf() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise Failure("libbpf.so.1 is not installed", hint="apt-get install libbpf1") from None
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("bpf_object__open_file", pointer, (text, pointer)),
        ("bpf_object__load", ctypes.c_int, (pointer,)),
        ("bpf_object__close", None, (pointer,)),
        ("bpf_object__find_map_by_name", pointer, (pointer, text)),
        ("bpf_object__next_program", pointer, (pointer, pointer)),
        ("bpf_map__set_pin_path", ctypes.c_int, (pointer, text)),
        ("bpf_map__value_size", ctypes.c_uint32, (pointer,)),
        ("bpf_program__name", text, (pointer,)),
        ("bpf_program__attach_cgroup", pointer, (pointer, ctypes.c_int)),
        ("bpf_link__pin", ctypes.c_int, (pointer, text)),
        ("bpf_link__destroy", ctypes.c_int, (pointer,)),
        ("libbpf_set_print", pointer, (pointer,)),
        ("ring_buffer__new", pointer, (ctypes.c_int, pointer, pointer, pointer)),
        ("ring_buffer__epoll_fd", ctypes.c_int, (pointer,)),
        ("ring_buffer__consume", ctypes.c_int, (pointer,)),
        ("ring_buffer__free", None, (pointer,)),
    ):
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    return lib


_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_complaints: deque[str] = deque(maxlen=100)


def _collect(level: int, text: bytes, arguments: int) -> int:
    if level == 0:  # LIBBPF_WARN; the verifier's log comes with this level
        line = ctypes.create_string_buffer(65536)
        libc.vsnprintf(line, ctypes.c_size_t(len(line)), text, ctypes.c_void_p(arguments))
        _complaints.extend(line.value.decode(errors="replace").splitlines())
    return 0


_print = _PRINT(_collect)


def object_hash() -> str:
    """The first 16 hex digits of the SHA-256 of the compiled object. Raises Failure if it is not built."""
    if not OBJECT.exists():
        raise Failure(f"{OBJECT} is not built", hint="run 'make build'")
    return hashlib.sha256(OBJECT.read_bytes()).hexdigest()[:16]


def try_load() -> int:
    """Load the programs, attach and pin nothing, and return how many there are. Raises Failure or OSError."""
    lib = _libbpf()
    lib.libbpf_set_print(_print)
    handle = lib.bpf_object__open_file(os.fsencode(OBJECT), None)
    if not handle:
        raise Failure(f"{OBJECT} is not a BPF object", hint="run 'make clean build'")
    try:
        result = lib.bpf_object__load(handle)
        if result:
            raise OSError(-result, f"the kernel refuses the BPF programs: {os.strerror(-result)}")
        count, program = 0, None
        while program := lib.bpf_object__next_program(handle, program):
            count += 1
        return count
    finally:
        lib.bpf_object__close(handle)


class Kernel:
    """The loaded programs, their links and their maps. Only the loop's thread calls it; Map has no such limit."""

    def __init__(self, pins: Path) -> None:
        self.pins = pins
        self.lib = _libbpf()
        self.lib.libbpf_set_print(_print)
        self.maps: dict[str, Map] = {}
        self.links: dict[Path, int] = {}  # kept open: the programs stay attached if the pins are removed
        self._ring: int | None = None
        self._drained = 0
        self._sample: Callable[..., int] | None = None

    def install(self, policy_cgroup: Path, root_cgroup: Path) -> bool:
        """Attach the policy to @policy_cgroup, where graftd makes sockets, and the guard to @root_cgroup.

        Returns True if pins of the same object file were taken over as they are. Raises Failure or OSError.
        """
        identity = f"{object_hash()} {policy_cgroup.stat().st_ino} {root_cgroup.stat().st_ino}"
        links = self.pins / f"links-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        if (links / "graft_bind4").exists() and (links / "guard_sendmsg6").exists():
            self._open_pinned()
            for path in links.iterdir():
                self.links[path] = self._open_pin(path)
            return True
        self._load(links, policy_cgroup, root_cgroup)
        for old in self.pins.glob("links-*"):
            if old != links:
                shutil.rmtree(old)
        return False

    def _open_pinned(self) -> None:
        sizes = {
            "stamps": STAMP.size,
            "families": FAMILY_SIZE,
            "tenants": TENANT.size,
            "counters": 8,
            "addresses": 8,
            "usage": USAGE.size,
            "clients": 4,
            "dynamic": 4,
            "served": SERVED.size,
        }
        for name in MAPS:
            self.maps[name] = Map(self._open_pin(self.pins / name), name, sizes.get(name, 0))

    @staticmethod
    def _open_pin(path: Path) -> int:
        name = ctypes.create_string_buffer(os.fsencode(path))
        return _bpf(BPF_OBJ_GET, _Obj(ctypes.addressof(name), 0, 0), f"open {path}")

    def is_pinned(self) -> bool:
        """Are all pins in place that the next graftd will look for?"""
        return all(path.exists() for path in self.links)

    def pin_again(self) -> None:
        """Pin again what somebody has removed; the open descriptors kept it alive. Raises OSError."""
        for directory in {self.pins, *(path.parent for path in self.links)}:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        held = {self.pins / name: kept.fd for name, kept in self.maps.items()} | self.links
        for path, fd in held.items():
            if not path.exists():
                name = ctypes.create_string_buffer(os.fsencode(path))
                _bpf(BPF_OBJ_PIN, _Obj(ctypes.addressof(name), fd, 0), f"pin {path}")

    def _load(self, links: Path, policy_cgroup: Path, root_cgroup: Path) -> None:
        self.pins.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = self.lib.bpf_object__open_file(os.fsencode(OBJECT), None)
        if not handle:
            raise Failure(f"{OBJECT} is not a BPF object", hint="run 'make clean build'")
        found = {}
        for name in MAPS:
            entry = self.lib.bpf_object__find_map_by_name(handle, name.encode())
            self.lib.bpf_map__set_pin_path(entry, os.fsencode(self.pins / name))
            found[name] = entry
        result = self.lib.bpf_object__load(handle)
        if result:
            for line in _complaints:
                log.error("%s", line)
            raise Failure(
                f"the kernel refused graft's BPF programs: {os.strerror(-result)}",
                hint="'graft doctor' says what is missing",
                code=errno.errorcode.get(-result, ""),
            )
        self._open_pinned()
        links.mkdir(mode=0o700, exist_ok=True)
        program = None
        while program := self.lib.bpf_object__next_program(handle, program):
            name = self.lib.bpf_program__name(program).decode()
            self._attach(program, name, root_cgroup if name.startswith("guard") else policy_cgroup, links / name)
        self.lib.bpf_object__close(handle)

    def _attach(self, program: int, name: str, cgroup: Path, pin: Path) -> None:
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            link = self.lib.bpf_program__attach_cgroup(program, fd)
            if not link:
                raise linux.oserror(f"attach {name} to {cgroup}")
            pin.unlink(missing_ok=True)
            result = self.lib.bpf_link__pin(link, os.fsencode(pin))
            if result:
                raise OSError(-result, f"pin {name}: {os.strerror(-result)}")
            self.lib.bpf_link__destroy(link)  # closes only libbpf's own descriptor; the pin keeps the link
            self.links[pin] = self._open_pin(pin)
        finally:
            os.close(fd)

    def configure(self, host_cookie: int) -> None:
        """Tell the guard in which netns grafted sockets live; @host_cookie is its SO_NETNS_COOKIE. Raises OSError."""
        self.maps["config"].update(bytes(4), CONFIG.pack(host_cookie, ABI, 0))

    def denials(self, callback: Callable[[Denial], None]) -> int:
        """Open the ring buffer of denials; drain() hands them to @callback. Returns the descriptor to poll.

        Raises OSError.
        """

        def sample(_context: int, data: int, size: int) -> int:
            if size >= DENIAL.size:
                (tenant, op, reason, error, protocol, address, port, real, real_port, comm) = DENIAL.unpack(
                    ctypes.string_at(data, DENIAL.size)
                )
                text = comm.split(b"\0", 1)[0].decode(errors="replace")
                callback(
                    Denial(tenant, OPS[op], REASONS[reason], error, protocol, address, port, real, real_port, text)
                )
            self._drained += 1
            return -1 if self._drained >= DRAIN_MAX else 0

        self._sample = _SAMPLE(sample)
        self._ring = self.lib.ring_buffer__new(self.maps["denials"].fd, self._sample, None, None)
        if not self._ring:
            raise linux.oserror("open the ring buffer of denials")
        epoll_fd: int = self.lib.ring_buffer__epoll_fd(self._ring)
        return epoll_fd

    def drain(self) -> None:
        """Pass at most DRAIN_MAX denials to the callback. A container may fill the ring faster than it is read."""
        self._drained = 0
        self.lib.ring_buffer__consume(self._ring)

    def limit(self, tenant: int, limits: Limits) -> None:
        """Set how many sockets a tenant may have. It keeps what it has beyond that. Raises OSError."""
        key = tenant.to_bytes(4, "little")
        kept = self.maps["usage"].get(key)
        sockets, udp, *before = USAGE.unpack(kept) if kept else (0, 0)
        if before != list(limits):  # a write may undo what the programs count meanwhile, so write only on a change
            self.maps["usage"].update(key, USAGE.pack(sockets, udp, *limits))

    def used(self, tenant: int) -> Limits:
        """How many sockets a tenant has, in all and of UDP."""
        kept = self.maps["usage"].get(tenant.to_bytes(4, "little"))
        return Limits(*USAGE.unpack(kept)[:2]) if kept else Limits(0, 0)

    def counters(self, tenant: int) -> dict[tuple[str, str], int]:
        """How many calls of a tenant were refused, by (operation, reason): names of OPS and REASONS."""
        counts = {}
        for key in self.maps["counters"].keys(COUNTER_KEY.size):
            (owner, op, reason) = COUNTER_KEY.unpack(key)
            value = self.maps["counters"].get(key) if owner == tenant else None
            if value:
                counts[OPS[op], REASONS[reason]] = int.from_bytes(value, "little")
        return counts

    def forget(self, tenant: int) -> None:
        """Delete a removed tenant's usage and counters, and the addresses that it served."""
        self.maps["usage"].delete(tenant.to_bytes(4, "little"))
        for key in list(self.maps["served"].keys(SERVED_KEY.size)):
            value = self.maps["served"].get(key)
            if value and SERVED.unpack(value)[0] == tenant:
                self.maps["served"].delete(key)
        for key in list(self.maps["counters"].keys(COUNTER_KEY.size)):
            if COUNTER_KEY.unpack(key)[0] == tenant:
                self.maps["counters"].delete(key)

    def uninstall(self) -> None:
        """Detach the programs and remove the pins; the kernel frees maps when their last descriptor is closed."""
        for fd in self.links.values():
            os.close(fd)
        self.links.clear()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.pins)
