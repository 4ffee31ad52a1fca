"""Recognise the listenerMetadata that graftd wrote, when an OCI runtime brings it back with a listener.

An OCI runtime sends its message to the agent socket and exits, so graftd can often not ask any more which process it
was. But only root can read the metadata, in the bundle and in the runtime's state. So graftd seals it with a key of
this host (HMAC-SHA-256): metadata with a valid seal comes from a runtime of the host, whatever process brings it.
"""

import hashlib
import hmac
from pathlib import Path

import msgspec

from graft.errors import UsageError
from graft.process.key import secret
from graft.protocol import Metadata, decode_metadata


def _sign(metadata: Metadata, directory: Path) -> str:
    plain = msgspec.json.encode(msgspec.structs.replace(metadata, seal=""))
    return hmac.new(secret(directory), plain, hashlib.sha256).hexdigest()


def seal(metadata: Metadata, directory: Path) -> str:
    """The text of listenerMetadata: @metadata as JSON, sealed with the key in @directory. Raises OSError."""
    return msgspec.json.encode(msgspec.structs.replace(metadata, seal=_sign(metadata, directory))).decode()


def is_sealed(text: str, directory: Path) -> bool:
    """Did graftd write this listenerMetadata? Compares the seal with the key in @directory. Raises OSError."""
    try:
        metadata = decode_metadata(text)
    except UsageError:
        return False
    return bool(metadata.seal) and hmac.compare_digest(metadata.seal.encode(), _sign(metadata, directory).encode())
