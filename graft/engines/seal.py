"""Recognise the listenerMetadata that graftd wrote, when an OCI runtime brings it back with a listener.

An OCI runtime sends its message to the agent socket and exits, so graftd can often not ask any more which process it
was. But only root can read the metadata, in the bundle and in the runtime's state. So graftd seals it with a key of
this host (HMAC-SHA-256): metadata with a valid seal comes from a runtime of the host, whatever process brings it.

The seal is made of the text's own fields, in the order in which they stand there, and not of what this release would
write: so it holds as well for a container that an older release made.
"""

import hashlib
import hmac
from pathlib import Path
from typing import Any

import msgspec

from graft.errors import UsageError
from graft.process.key import secret
from graft.protocol import Metadata, decode_metadata, metadata_document


def _sign(document: dict[str, Any], directory: Path) -> str:
    plain = msgspec.json.encode({**document, "seal": ""})
    return hmac.new(secret(directory), plain, hashlib.sha256).hexdigest()


def seal(metadata: Metadata, directory: Path) -> str:
    """The text of listenerMetadata: @metadata as JSON, sealed with the key in @directory. Raises OSError."""
    document = metadata_document(metadata)
    return msgspec.json.encode({**document, "seal": _sign(document, directory)}).decode()


def is_sealed(text: str, directory: Path) -> bool:
    """Did graftd write this listenerMetadata? Compares the seal with the key in @directory. Raises OSError."""
    try:
        given = decode_metadata(text).seal
    except UsageError:
        return False
    if not given:
        return False
    return hmac.compare_digest(given.encode(), _sign(msgspec.json.decode(text), directory).encode())
