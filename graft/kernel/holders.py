"""The map `holders`: whose the addresses of the host's stack are, and the filter before it.

The program of sk_lookup runs for each new connection of the host and for each datagram to a socket that is not
connected. Nearly all of them are to no container's address. A look-up in a hash of 16-byte keys takes more than twice
the time of a test of one bit. So `owned` has a bit for each address in `holders`, by a hash of the address.
"""

import struct

from graft.kernel.maps import Map

OWNED_WORDS = 64  # of 64 bits
OWNED = struct.Struct(f"={OWNED_WORDS}Q")
KEY_SIZE = 16
_WORDS = struct.Struct("=IIII")


def bit(key: bytes) -> int:
    """The number of the bit of an address in `owned`, as may_be_owned() in csrc/listeners.bpf.h computes it."""
    first, second, third, fourth = _WORDS.unpack(key)
    folded: int = first ^ second ^ third ^ fourth
    return (folded * 0x9E3779B1 & 0xFFFFFFFF) >> 20


class Holders(Map):
    """The map, which keeps the filter true. Only one thread may change it."""

    def __init__(self, fd: int, value_size: int, owned: Map) -> None:
        super().__init__(fd, "holders", value_size)
        self._owned = owned
        self._known = set(self.keys(KEY_SIZE))
        self._write()

    def _write(self) -> None:
        words = [0] * OWNED_WORDS
        for key in self._known:
            words[bit(key) // 64] |= 1 << bit(key) % 64
        self._owned.update(bytes(4), OWNED.pack(*words))

    def update(self, key: bytes, value: bytes) -> None:
        """As Map.update()."""
        if key not in self._known:
            self._known.add(key)
            self._write()
        super().update(key, value)

    def delete(self, key: bytes) -> None:
        """As Map.delete()."""
        super().delete(key)
        if key in self._known:
            self._known.remove(key)
            self._write()
