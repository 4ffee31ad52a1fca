"""TOML files of the administrator (/etc/graft): read, and checked strictly.

What graft does not know it does not pass over: a word that is misspelt would be a rule that is not in force. So an
unknown key, a wrong type and a value outside its grammar are errors, of one line, with the file and the key. A file
that somebody else than root may write decides nothing either.
"""

import errno
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from graft.errors import Failure, UsageError
from graft.text import plain

Check = Callable[[Any], Any]  # from the value in the file to the value that graft uses; raises UsageError
Schema = Mapping[str, "Check | Schema"]  # of each key its check, of a table the schema of what is in it
T = TypeVar("T")

SIZE_MAX = 1 << 20  # bytes of a file: what is beyond would hold graftd's loop up,
DOTS_MAX = 16  # and so would more in the keys of a line, for which tomllib takes the square of their number
ITEMS_MAX = 1000  # of an array
BY_PATH, NO_FILE = -1, -2  # instead of a descriptor

HEADER = re.compile(r"\s*\[([^][]+)\]")  # [table]
KEY = re.compile(r"\s*([^\s=#]+)\s*=")
STRING = re.compile(r"""\"(?:[^"\\]|\\.)*\"|'[^']*'""")


def read(path: Path, schema: Schema, descriptor: int = BY_PATH, *, anybodys: bool = False) -> dict[str, Any]:
    """The values of the file at @path as the checks of @schema return them; keys that the file lacks are not there.

    @descriptor: the file, if it is open already; NO_FILE: there is none. @anybodys: others than root may write it,
    because root has named it. Raises Failure, which names the file, the
    line and the key, and FileNotFoundError.
    """
    text, document = _load(path, descriptor, anybodys=anybodys)
    return _table(_Source(path, text), "", document, schema)


def read_names(path: Path, check: Callable[[str, Any], T], descriptor: int = BY_PATH) -> dict[str, T]:
    """What @check makes of each key of the file at @path and its value, by the key. As read()."""
    text, document = _load(path, descriptor)
    source = _Source(path, text)
    found: dict[str, T] = {}
    for key, value in document.items():
        try:
            found[key] = check(key, value)
        except UsageError as error:
            raise source.wrong(key, error.message, error.hint) from None
    return found


def at_once(path: str, flags: int) -> int:
    """open(2) that waits for nobody: a FIFO has no other end. Raises OSError."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _load(path: Path, descriptor: int, *, anybodys: bool = False) -> tuple[str, dict[str, Any]]:
    if descriptor == NO_FILE:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    try:
        source = os.dup(descriptor) if descriptor >= 0 else at_once(str(path), os.O_RDONLY)
        try:
            text = _text(path, source, anybodys=anybodys)
        finally:
            os.close(source)
        _check_dots(path, text)
        return text, tomllib.loads(text)
    except (FileNotFoundError, Failure):
        raise
    except OSError as error:
        raise _wrong(path, error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise _wrong(path, f"not text in UTF-8 (byte {error.start + 1})") from None
    except (ValueError, RecursionError) as error:  # the first also for a number of more digits than Python takes
        raise _wrong(path, str(error)) from None


def _text(path: Path, source: int, *, anybodys: bool) -> str:
    found = os.fstat(source)
    if not stat.S_ISREG(found.st_mode):
        raise _wrong(path, "not a file")
    others = found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others and not anybodys:
        raise _wrong(path, "others than root may write it", f"chown root {path}; chmod 644 {path}")
    if found.st_size > SIZE_MAX:
        raise _wrong(path, f"more than {SIZE_MAX >> 20} MiB")
    with open(source, "rb", closefd=False) as file:
        return file.read(SIZE_MAX).decode()


def _check_dots(path: Path, text: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > DOTS_MAX and STRING.sub("", line).partition("#")[0].count(".") > DOTS_MAX:
            raise _wrong(f"{path}, line {number}", f"more than {DOTS_MAX} dots outside of strings")


def _wrong(where: Path | str, what: str, hint: str = "") -> Failure:
    return Failure(f"{where}: {plain(what)}", hint=hint, code="EINVAL")


class _Source:
    """A file and its text: where a key stands in it. tomllib does not say."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text

    def line(self, name: str) -> int:
        """The line of the key or table @name; 0 if it is not written in the plain form."""
        table = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            header, key = HEADER.match(line), KEY.match(line)
            if header:
                table = header[1].strip()
            if header and table.startswith(f"{name}."):
                return number
            if name == (table if header else f"{table}.{_bare(key[1])}".lstrip(".") if key else ""):
                return number
        return 0

    def wrong(self, name: str, what: str, hint: str = "") -> Failure:
        """What is wrong about the key @name, with the file and the line."""
        line = self.line(name)
        where = f"{self.path}, line {line}" if line else str(self.path)
        return _wrong(where, f"{name}: {what}" if what else f"unknown key '{name}'", hint)


def _bare(key: str) -> str:
    return key[1:-1] if key[0] in "'\"" and key[-1] == key[0] and len(key) > 1 else key


def _table(source: _Source, prefix: str, document: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        check = schema.get(key)
        if check is None:
            known = ", ".join(f"{prefix}{k}" for k in schema)
            raise source.wrong(name, "", known)
        if isinstance(check, Mapping):
            if not isinstance(value, dict):
                raise source.wrong(name, "not a table", f"[{name}]")
            found[key] = _table(source, f"{name}.", value, check)
            continue
        try:
            found[key] = check(value)
        except UsageError as error:
            raise source.wrong(name, error.message, error.hint) from None
    return found


def flag(value: Any) -> bool:
    """Check true or false. Raises UsageError."""
    if not isinstance(value, bool):
        raise UsageError(f"{shown(value)} is neither true nor false")
    return value


def text(value: Any) -> str:
    """Check a string. Raises UsageError."""
    if not isinstance(value, str):
        raise UsageError(f"{shown(value)} is not a string", hint="write it in quotes")
    return value


def each(check: Check) -> Callable[[Any], tuple[Any, ...]]:
    """A check of an array, each value of which passes @check. Raises UsageError."""

    def check_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise UsageError(f"{shown(value)} is not an array", hint="write it in brackets: [...]")
        if len(value) > ITEMS_MAX:
            raise UsageError(f"an array of more than {ITEMS_MAX} values")
        return tuple(check(item) for item in value)

    return check_all


def shown(value: Any) -> str:
    """A value of a file for a message: short, whatever it is."""
    if isinstance(value, bool | str):
        return f"'{value}'" if isinstance(value, str) else str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else "this number"  # Python prints no number of any length
    return "a table" if isinstance(value, dict) else "an array" if isinstance(value, list) else str(value)
