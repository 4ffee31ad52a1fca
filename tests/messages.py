"""DNS messages that tests send."""

import struct


def query(name: str, kind: int = 1) -> bytes:
    """A query as a stub resolver sends it, RFC 1035."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack(">6H", 0x1234, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", kind, 1)
