"""Recognise the listenerMetadata that graftd wrote, when an OCI runtime brings it back with a listener.

An OCI runtime sends its message to the agent socket and exits, so graftd can often not ask any more which process it
was. But only root can read the metadata, in the bundle and in the runtime's state. So graftd seals it with a key of
this host (HMAC-SHA-256): metadata with a valid seal comes from a runtime of the host, whatever process brings it.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

import msgspec

from graft.errors import UsageError
from graft.protocol import Metadata, decode_metadata

KEY_FILE = "seal.key"


def _key(directory: Path) -> bytes:
    """This host's key, 32 bytes, made at its first use. It is in a file because containers outlive graftd."""
    path = directory / KEY_FILE
    try:
        return path.read_bytes()
    except FileNotFoundError:
        temporary = directory / f"{KEY_FILE}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        temporary.rename(path)
        return path.read_bytes()


def _sign(metadata: Metadata, directory: Path) -> str:
    plain = msgspec.json.encode(msgspec.structs.replace(metadata, seal=""))
    return hmac.new(_key(directory), plain, hashlib.sha256).hexdigest()


def token(text: str, directory: Path) -> bytes:
    """32 bytes that only graftd can make for @text, by which it recognises what it has written. Raises OSError."""
    return hmac.new(_key(directory), b"token " + text.encode(), hashlib.sha256).digest()


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
