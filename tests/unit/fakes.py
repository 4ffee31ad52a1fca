"""The kernel's maps as dictionaries, the host's addresses as a set, and a registry that has both: no root needed."""

import errno
import os
import socket
from typing import Any

import pytest

from graft.errors import Refused
from graft.rules.address import parse_address
from graft.rules.tables import KEY_SIZES
from graft.tenants import attachments, leads, publish, registry
from graft.tenants.registry import Registry
from graft.tenants.tenant import Table


class FakeMap:
    """A map of the kernel's with room for @room entries; what is done to it goes into @log as well."""

    fd = -1  # to the kernel it is none

    def __init__(self, name, log, room=1 << 16):
        self.name = name
        self.log = log
        self.room = room
        self.entries = {}

    def update(self, key, value):
        if key not in self.entries and len(self.entries) >= self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.entries[bytes(key)] = bytes(value)
        self.log.append(("update", self.name, bytes(key)))

    def delete(self, key):
        self.entries.pop(bytes(key), None)
        self.log.append(("delete", self.name, bytes(key)))

    def get(self, key):
        return self.entries.get(bytes(key))

    def keys(self, key_size):
        assert all(len(key) == key_size for key in self.entries)
        yield from list(self.entries)


class FakeKernel:
    """What the registry uses of graft.kernel.programs.Kernel."""

    def __init__(self):
        self.log: list[Any] = []
        names = [name for name, _ in KEY_SIZES]
        self.maps = {name: FakeMap(name, self.log) for name in (*names, "tenants", "stamps", "led", "led_ports")}
        self.limits = {}

    def limit(self, tenant, limits, _private):
        self.limits[tenant] = limits
        self.log.append(("limit", tenant))

    def widen(self, tenant):
        self.log.append(("widen", tenant))

    def forget(self, tenant):
        self.limits.pop(tenant, None)
        self.log.append(("forget", tenant))

    def entries(self):
        """All that the maps hold, but for empty ones."""
        return {name: each.entries for name, each in self.maps.items() if each.entries}


class FakeStamper:
    """Stamps nothing: a host without graft's programs has no policy to exempt a probe from."""

    def __init__(self, stamps):
        pass

    def stamp(self, fd, tenant, flags, place=0):
        pass


class FakeHost:
    """The addresses on the host's stack. @own: those that it has for itself."""

    def __init__(self, monkeypatch, own=()):
        self.addresses = {parse_address(text) for text in own}
        self.ended = []  # addresses whose connections were ended
        self.marked = []  # those that bear graft's mark
        for module, name in (
            (registry, "add_address"), (registry, "remove_address"), (registry, "marked_addresses"), (attachments, "has_address"), (attachments, "end_connections")
        ):  # fmt: skip
            monkeypatch.setattr(module, name, getattr(self, name))

    def add_address(self, address):
        new = address not in self.addresses
        self.addresses.add(address)
        return new

    def remove_address(self, address):
        self.addresses.discard(address)

    def marked_addresses(self):
        return [address for address in self.marked if address in self.addresses]

    def has_address(self, address):
        return address in self.addresses

    def end_connections(self, address):
        self.ended.append(address)

    def __contains__(self, text):
        return parse_address(text) in self.addresses


def make_registry(monkeypatch, directory):
    """A registry on a fake kernel, of a host that has IPv4 alone, with its state in @directory."""
    for module in (publish, leads):
        monkeypatch.setattr(module, "Stamper", FakeStamper)
    monkeypatch.setattr(registry, "has_ipv6", lambda: False)
    kernel: Any = FakeKernel()
    return Registry(kernel, directory / "state.json")


def make_tenant(reg, name="web", netns=1000, **attributes):
    """A container that is admitted and installed, in a namespace of its own."""
    table = reg.tables.setdefault(netns, Table(netns, netns + 1, f"/run/netns/{name}"))
    tenant = reg.admit(table, name, [name])
    for key, value in attributes.items():
        setattr(tenant, key, value)
    reg.install(tenant)
    return tenant


def free_port(kind=socket.SOCK_STREAM):
    """A port of 127.0.0.1 that nobody has at this moment."""
    with socket.socket(type=kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refused(code, work, *words):
    """@work raises Refused with this errno's name, and says each of @words."""
    with pytest.raises(Refused) as found:
        work()
    assert found.value.code == code
    for word in words:
        assert word in str(found.value)
