"""What graftd wrote into a container's listenerMetadata, known again when an OCI runtime brings it back.

A runtime sends its message and is gone: who its process was can often not be asked any more. The metadata is in the
bundle and in the runtime's state, where only root reads, so what carries graftd's seal comes from a runtime of the
host's, whoever brings it.
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
    """This host's key, made at its first use; it has to outlive graftd as containers do."""
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
    """32 bytes by which graftd knows again that it wrote @text somewhere itself."""
    return hmac.new(_key(directory), b"token " + text.encode(), hashlib.sha256).digest()


def seal(metadata: Metadata, directory: Path) -> str:
    """@metadata as the text of listenerMetadata, sealed with the key in @directory."""
    return msgspec.json.encode(msgspec.structs.replace(metadata, seal=_sign(metadata, directory))).decode()


def is_sealed(text: str, directory: Path) -> bool:
    """Did graftd write this listenerMetadata?"""
    try:
        metadata = decode_metadata(text)
    except UsageError:
        return False
    return bool(metadata.seal) and hmac.compare_digest(metadata.seal.encode(), _sign(metadata, directory).encode())
