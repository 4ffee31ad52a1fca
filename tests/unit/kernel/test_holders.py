"""The filter before the map `holders`."""

from typing import cast

from graft.kernel.holders import OWNED, Holders, bit
from graft.kernel.maps import Map
from graft.rules.address import parse_address


class FakeMap:
    """What Holders writes to the filter, and the kernel's map, which it calls by its descriptor."""

    def __init__(self):
        self.entries = {}

    def update(self, key, value):
        self.entries[key] = value


def bits(owned):
    return {64 * n + m for n, word in enumerate(OWNED.unpack(owned.entries[bytes(4)])) for m in range(64) if word >> m & 1}


def test_the_filter_has_what_the_map_has(monkeypatch):
    """Also two addresses of one bit, of which one goes, and what an earlier graftd has left."""
    raw = [parse_address(f"10.{n >> 8}.{n & 255}.5").raw for n in range(3000)]
    twin = next((a, b) for n, a in enumerate(raw) for b in raw[:n] if bit(a) == bit(b))
    other = parse_address("fd88::5").raw
    present = [other]
    monkeypatch.setattr("graft.kernel.maps.Map.keys", lambda _self, _size: iter(present))
    for name in ("update", "delete"):
        monkeypatch.setattr(f"graft.kernel.maps.Map.{name}", lambda *_: None)
    owned = FakeMap()
    holders = Holders(-1, 16, cast(Map, owned))
    assert bits(owned) == {bit(other)}
    for key in twin:
        holders.update(key, bytes(16))
    assert bits(owned) == {bit(other), bit(twin[0])}
    holders.delete(twin[0])
    holders.delete(twin[0])
    assert bits(owned) == {bit(other), bit(twin[0])}
    holders.delete(twin[1])
    holders.delete(other)
    assert bits(owned) == set()
