"""Stamped sockets without graftd: the real BPF object in a fresh netns and cgroup, in a forked child.

`isolated` runs a test body there and brings its failure back; whatever it made is gone when it returns.
"""

import contextlib
import functools
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graft.kernel import addresses, cgroup, linux, netns
from graft.kernel.programs import TENANT, Kernel
from graft.kernel.stamps import STAMP_LATE, Stamper
from graft.rules import tables
from graft.rules.address import parse_address
from graft.rules.limits import Limits
from graft.tenants.tenant import OWNER_BASE
from graft.trap.sockets import IP_BIND_ADDRESS_NO_PORT
from tests.conftest import need_root

TENANT_ID = 4242
SLOT = 77  # as of a tenant of an earlier graftd
WIDE = 80
PORTS = 14116  # that the kernel may choose for all tenants


class World:
    """One tenant's policy in the kernel."""

    def __init__(self, name: str) -> None:
        self.root = cgroup.cgroup2_root()
        self.cgroup = self.root / name
        self.kernel = Kernel(cgroup.BPFFS / name)
        self.slot = SLOT

    def __enter__(self) -> "World":
        linux.unshare(linux.CLONE_NEWNET)
        linux.loopback_up()
        cgroup.mount_bpffs()
        self.cgroup.mkdir()
        try:
            (self.cgroup / "cgroup.procs").write_text("0")
            self.kernel.install(self.cgroup, self.root)
            self.kernel.configure(netns.netns_cookie(), PORTS)
            addresses.add_slice_route()
            self.stamper = Stamper(self.kernel.maps["stamps"])
            self.kernel.limit(TENANT_ID, Limits())
            self.kernel.maps["slices"].update(SLOT.to_bytes(4, "little"), TENANT_ID.to_bytes(4, "little"))
            self.tenant(tables.TENANT_EGRESS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kernel.uninstall(self.cgroup)
        cgroup.leave_cgroup(self.root, remove=False)
        self.cgroup.rmdir()

    def know(self) -> None:
        """Tell the programs which addresses this netns has, as graftd does: but those of containers."""
        owned = set(self.kernel.maps["holders"].keys(16))
        found = map(parse_address, addresses.addresses())
        self.kernel.know_locals({address for address in found if address.raw not in owned})

    def tenant(self, flags: int, own4: str = "0.0.0.0", own6: str = "::") -> None:
        """Set the tenant's flags and its own addresses."""
        value = TENANT.pack(0, self.slot, flags, 0, parse_address(own4).raw[12:], parse_address(own6).raw)
        self.kernel.maps["tenants"].update(TENANT_ID.to_bytes(4, "little"), value)

    def widen(self) -> None:
        """Give the tenant a slice with further addresses of the loopback."""
        self.kernel.maps["slices"].delete(self.slot.to_bytes(4, "little"))
        self.slot = WIDE
        self.kernel.maps["slices"].update(WIDE.to_bytes(4, "little"), TENANT_ID.to_bytes(4, "little"))
        self.kernel.widen(TENANT_ID)
        self.tenant(tables.TENANT_EGRESS)

    def own(self, address: str, *, flags: int = 0, number: int = 0, network: int = 0, holder: int = TENANT_ID) -> None:
        """Give @holder an address, and put it on lo."""
        raw = parse_address(address).raw
        self.kernel.maps["holders"].update(raw, tables.OWNER.pack(holder, network, flags, number))
        addresses.add_address(parse_address(address))

    def egress(self, prefix: str, bits: int, source: str | None = None) -> None:
        """Allow a destination."""
        address = parse_address(prefix)
        family = tables.INET if address.v4 else tables.INET6
        total = tables.EGRESS_FIXED_BITS + bits + (96 if address.v4 else 0)
        key = tables.EGRESS_KEY.pack(total, TENANT_ID, family, address.raw)
        leave = parse_address(source or ("0.0.0.0" if address.v4 else "::"))
        self.kernel.maps["egress"].update(key, tables.EGRESS_VALUE.pack(leave.raw, 0, 0))
        self.know()

    def ingress(
        self, port: int, address: str, host_port: int, *, at: str = "", protocol: int = socket.IPPROTO_TCP
    ) -> None:
        """Publish a port of the address @at, or of the wildcard one."""
        real = parse_address(address)
        asked = parse_address(at or ("0.0.0.0" if real.v4 else "::"))
        key = tables.INGRESS_KEY.pack(
            tables.INGRESS_FIXED_BITS + 16,
            TENANT_ID,
            protocol,
            tables.INET if real.v4 else tables.INET6,
            0,
            asked.raw,
            port.to_bytes(2, "big"),
        )
        self.kernel.maps["ingress"].update(key, tables.INGRESS_VALUE.pack(real.raw, host_port, port, 0, 0, 1))
        self.know()

    def sock(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0, *, vouched: bool = True) -> socket.socket:
        """A stamped socket. @vouched: as it is when a program gets it."""
        sock = socket.socket(family, kind, protocol)
        sock.settimeout(5)
        self.stamper.stamp(sock.fileno(), TENANT_ID, 0)
        os.fchown(sock.fileno(), OWNER_BASE + self.slot, -1)  # as graftd does: SO_REUSEPORT is for sockets that have it
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, linux.IPV6_FREEBIND, 1)
        if vouched:
            self.stamper.vouch(sock, TENANT_ID)
        return sock

    def late(self, family: int = socket.AF_INET) -> socket.socket:
        """A TCP socket whose bind waits, as graft-sup makes it."""
        sock = self.sock(family, vouched=False)
        self.stamper.stamp(sock.fileno(), TENANT_ID, STAMP_LATE)
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        self.stamper.vouch(sock, TENANT_ID)
        return sock

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Make sockets as the host does: in another cgroup."""
        (self.root / "cgroup.procs").write_text("0")
        try:
            yield
        finally:
            (self.cgroup / "cgroup.procs").write_text("0")

    def real(self, what: str = "-tln") -> str:
        """ss(8): what the stack has."""
        import subprocess

        return subprocess.run(("ss", "-H", "-n", what), capture_output=True, text=True).stdout


def isolated(test: Callable[[World], None]) -> Callable[[], None]:
    """Run @test in a child of its own with a World."""

    @functools.wraps(test)
    def run() -> None:
        need_root()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            status: Any = None
            try:
                with World(f"graft-probe-{os.getpid()}") as world:
                    test(world)
            except BaseException:  # it goes to the parent whole
                status = traceback.format_exc()
            os.write(write, pickle.dumps(status)[-60000:])
            sys.stdout.flush()
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            outcome = pickle.loads(pipe.read())
        os.waitpid(pid, 0)
        left = Path("/sys/fs/bpf", f"graft-probe-{pid}")
        assert outcome is None, outcome
        assert not left.exists()

    del run.__wrapped__  # pytest would ask for a fixture named world
    return run
