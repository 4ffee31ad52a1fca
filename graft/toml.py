"""TOML files of the administrator (/etc/graft): read, and checked strictly.

What graft does not know it does not pass over: a word that is misspelt would be a rule that is not in force. So an
unknown key, a wrong type and a value outside its grammar are errors, of one line, with the file and the key. A file
that somebody else than root may write decides nothing either.
"""

import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graft.errors import Failure, UsageError

Check = Callable[[Any], Any]  # from the value in the file to the value that graft uses; raises UsageError
Schema = Mapping[str, "Check | Schema"]  # of each key its check, of a table the schema of what is in it


def read(path: Path, schema: Schema) -> dict[str, Any]:
    """The values of the file at @path as the checks of @schema return them; keys that the file lacks are not there.

    Raises Failure, which names the file and the key, and FileNotFoundError.
    """
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise _wrong(path, "others than root may write it", f"chown root {path}; chmod 644 {path}")
            document = tomllib.loads(file.read().decode())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _wrong(path, error.strerror or str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _wrong(path, str(error)) from None
    return _table(path, "", document, schema)


def _wrong(path: Path, what: str, hint: str = "") -> Failure:
    return Failure(f"{path}: {what}", hint=hint, code="EINVAL")


def _table(path: Path, prefix: str, document: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        check = schema.get(key)
        if check is None:
            known = ", ".join(f"{prefix}{k}" for k in schema)
            raise _wrong(path, f"unknown key '{name}'", known)
        if isinstance(check, Mapping):
            if not isinstance(value, dict):
                raise _wrong(path, f"{name}: not a table", f"[{name}]")
            found[key] = _table(path, f"{name}.", value, check)
            continue
        try:
            found[key] = check(value)
        except UsageError as error:
            raise _wrong(path, f"{name}: {error.message}", error.hint) from None
    return found


def flag(value: Any) -> bool:
    """Check true or false. Raises UsageError."""
    if not isinstance(value, bool):
        raise UsageError(f"{_shown(value)} is neither true nor false")
    return value


def text(value: Any) -> str:
    """Check a string. Raises UsageError."""
    if not isinstance(value, str):
        raise UsageError(f"{_shown(value)} is not a string", hint="write it in quotes")
    return value


def each(check: Check) -> Callable[[Any], tuple[Any, ...]]:
    """A check of an array, each value of which passes @check. Raises UsageError."""

    def check_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise UsageError(f"{_shown(value)} is not an array", hint="write it in brackets: [...]")
        return tuple(check(item) for item in value)

    return check_all


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
