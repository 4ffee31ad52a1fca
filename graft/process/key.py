"""The run directory's key: what graftd signs with, to know its own writing again."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

KEY_FILE = "seal.key"


def secret(directory: Path) -> bytes:
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


def token(text: str, directory: Path) -> bytes:
    """32 bytes that only graftd can make for @text, by which it recognises what it has written. Raises OSError."""
    return hmac.new(secret(directory), b"token " + text.encode(), hashlib.sha256).digest()
