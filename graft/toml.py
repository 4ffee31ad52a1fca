"""TOML files of the administrator (/etc/graft): read, and checked strictly.

What graft does not know it does not pass over: a word that is misspelt would be a rule that is not in force. So an
unknown key, a wrong type and a value outside its grammar are errors, of one line, with the file and the key. A file
that somebody else than root may write decides nothing either.
"""

import difflib
import errno
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from graft.errors import Failure, UsageError
from graft.text import plain

Check = Callable[[Any], Any]  # from the value in the file to the value that graft uses; raises UsageError
Schema = Mapping[str, "Check | Schema"]  # of each key its check, of a table the schema of what is in it
Opened = Mapping[Path, int]  # files that are open already: their descriptors by their paths; others are not there
T = TypeVar("T")

SIZE_MAX = 1 << 20  # bytes of a file: what is beyond would hold graftd's loop up,
DOTS_MAX = 16  # and so would more in the keys of a line, for which tomllib takes the square of their number
ITEMS_MAX = 1000  # of an array
FAULTS_MAX = 20  # of a file are told
NEAR = 0.6  # how alike two keys are, so that one may be meant by the other (difflib)
BYTE_ORDER_MARK = "\ufeff"
LOST_LINK = "a symbolic link that leads nowhere"  # a file that is meant, and not one that is not there

HEADER = re.compile(r"\s*\[{1,2}([^][]+)\]")  # [table], [[table]]
KEY = re.compile(r"""\s*("[^"\\]*"|'[^']*'|[^\s=#"']+)\s*=""")
STRING = re.compile(r"""\"(?:[^"\\]|\\.)*(?:\"|$)|'[^']*(?:'|$)""")  # one that is not closed goes to the line's end
PLACE = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)  # in tomllib's errors


class ItemError(UsageError):
    """One value of an array is wrong: `item`. `others`: further ones of it."""

    def __init__(self, error: UsageError, item: Any) -> None:
        super().__init__(error.message, hint=error.hint, code=error.code)
        self.item = item
        self.others: list[ItemError] = []


class Faults(Failure):
    """What is wrong with files, for `graft config check`. The message is the first of `found`: a log has one line."""

    def __init__(self, found: list[Failure]) -> None:
        super().__init__(found[0].message, hint=found[0].hint, code=found[0].code)
        self.found = found


def read(path: Path, schema: Schema, opened: Opened | None = None, *, anybodys: bool = False) -> dict[str, Any]:
    """The values of the file at @path as the checks of @schema return them; keys that the file lacks are not there.

    @opened: None to open the file. @anybodys: others than root may write it, because root has named it. Raises
    Failure, which names the file, the line and the key, and FileNotFoundError.
    """
    return parse(path, text_of(path, opened, anybodys=anybodys), schema)


def parse(path: Path, text: str, schema: Schema) -> dict[str, Any]:
    """As read(), for the @text of the file at @path."""
    faults: list[Failure] = []
    found = _table(_Source(path, text), "", _document(path, text), schema, tuple(_names(schema)), faults)
    if faults:
        raise Faults(faults)
    return found


def read_names(
    path: Path, check: Callable[[str, Any], T], opened: Opened | None = None, among: "Names | None" = None
) -> dict[str, T]:
    """What @check makes of each key of the file at @path and its value, by the key. As read().

    @among: the names of files that were read before, of which none may come again; those of this one are added.
    """
    text = text_of(path, opened)
    source = _Source(path, text)
    found: dict[str, T] = {}
    faults: list[Failure] = []
    for key, value in _document(path, text).items():
        first = among.sources.setdefault(key, source) if among else source
        try:
            if first is not source:
                raise UsageError(f"it stands in {first.where(key)} as well", hint="remove one of the two")
            found[key] = check(key, value)
        except UsageError as error:
            source.note(faults, key, error)
    if faults:
        raise Faults(faults)
    return found


def place(path: Path, key: str) -> str:
    """The file at @path and the line of @key in it, the latter if that can be told."""
    try:
        return _Source(path, text_of(path, anybodys=True)).where(key)
    except (Failure, FileNotFoundError):
        return str(path)


class Whole(dict[str, "Check | Schema"]):
    """The schema of a table whose values have to fit together."""

    def __init__(self, schema: Schema, key: str, check: Callable[[Mapping[str, Any]], Any]) -> None:
        """@check gets the values of the table, and raises UsageError, which is told of @key."""
        super().__init__(schema)
        self.key = key
        self.check = check


class Names:
    """The names that files have, each in one of them."""

    def __init__(self) -> None:
        self.sources: dict[str, _Source] = {}


def is_lost(path: Path) -> bool:
    """Is @path, which is not there, or the directory in which it should be, a link that leads nowhere?"""
    return path.is_symlink() or (path.parent.is_symlink() and not path.parent.exists())


def at_once(path: str, flags: int) -> int:
    """open(2) that waits for nobody: a FIFO has no other end. Raises OSError."""
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if is_lost(Path(path)):
            raise OSError(errno.ENOLINK, LOST_LINK, path) from None
        raise


def size(path: Path) -> int:
    """The bytes of the file at @path. Raises Failure for a link that leads nowhere, and FileNotFoundError."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        if is_lost(path):
            raise _wrong(path, LOST_LINK) from None
        raise


def is_others(found: os.stat_result) -> bool:
    """May somebody else than root, or the user who asks, write this file or directory?"""
    return found.st_uid not in (0, os.geteuid()) or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def text_of(path: Path, opened: Opened | None = None, *, anybodys: bool = False) -> str:
    """The text of the file at @path. As read()."""
    try:
        source = at_once(str(path), os.O_RDONLY) if opened is None else os.dup(opened[path])
        try:
            return _text(path, source, anybodys=anybodys)
        finally:
            os.close(source)
    except KeyError:
        raise FileNotFoundError(str(path)) from None
    except (FileNotFoundError, Failure):
        raise
    except OSError as error:
        raise _wrong(path, error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _wrong(f"{path}, line {line}", f"not text in UTF-8 (byte {error.start + 1})") from None


def _document(path: Path, text: str) -> dict[str, Any]:
    _check_dots(path, text)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise _most(path, text, "tables or arrays too deep in one another", r"[\[{]") from None
    except ValueError as error:
        raise _misread(path, text, str(error)) from None


def _most(path: Path, text: str, what: str, mark: str) -> Failure:
    """What is wrong in the line that has most of @mark, a regular expression: tomllib says no place."""
    counts = [len(re.findall(mark, line)) for line in text.split("\n")]
    return _wrong(f"{path}, line {counts.index(max(counts)) + 1}", what)


def _misread(path: Path, text: str, told: str) -> Failure:
    """What tomllib has not understood. It says the place at the end, but of a number that int() does not take."""
    place = PLACE.fullmatch(told)
    if not place:
        return _most(path, text, "a number of too many digits", r"\d")
    line, column = place[2] or str(text.rstrip("\n").count("\n") + 1), place[3]
    return _wrong(f"{path}, line {line}", f"{place[1]} ({f'column {column}' if column else 'the file ends here'})")


def _text(path: Path, source: int, *, anybodys: bool) -> str:
    found = os.fstat(source)
    if not stat.S_ISREG(found.st_mode):
        raise _wrong(path, "not a file")
    if is_others(found) and not anybodys:
        raise _wrong(path, "others than root may write it", f"chown root {path}; chmod 644 {path}")
    if not anybodys and is_others(path.parent.stat()):  # who could put another file of root's there, or none
        at = path.parent
        raise _wrong(path, f"others than root may write in {at}", f"chown root {at}; chmod 755 {at}")
    if found.st_size > SIZE_MAX:
        raise _wrong(path, f"more than {SIZE_MAX >> 20} MiB")
    with open(source, "rb", closefd=False) as file:
        text = file.read(SIZE_MAX).decode()
    if text.startswith(BYTE_ORDER_MARK):
        raise _wrong(f"{path}, line 1", "a byte order mark, which TOML has not", "save it as UTF-8 without one")
    return text


def _check_dots(path: Path, text: str) -> None:
    for number, line in enumerate(text.split("\n"), 1):
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
        for number, line in enumerate(self.text.split("\n"), 1):
            header, key = HEADER.match(line), KEY.match(line)
            if header:
                table = header[1].strip()
            here = table if header else f"{table}.{_bare(key[1])}".lstrip(".") if key else None
            if here is not None and f"{here}.".startswith(f"{name}."):  # itself, or what it has
                return number
        return 0

    def _nearest_line(self, name: str, item: Any) -> int:
        """The line of @item in the array @name, else of the key, else of the table that has it; 0 if all fails."""
        line = self.line(name)
        while not line and "." in name:
            name = name.rpartition(".")[0]
            line = self.line(name)
        if not line or item is None:
            return line
        word = re.escape(item if isinstance(item, str) else shown(item))
        told = re.compile(rf"[\"']{word}[\"']" if isinstance(item, str) else rf"(?<![\w.\"']){word}(?![\w.\"'])")
        lines = enumerate(self.text.split("\n")[line - 1 :], line)
        return next((number for number, text in lines if _uncommented(told, text)), line)

    def where(self, name: str, item: Any = None) -> str:
        """The file, and the line of the key @name, or of @item in its array."""
        line = self._nearest_line(name, item)
        return f"{self.path}, line {line}" if line else str(self.path)

    def wrong(self, name: str, what: str, hint: str = "", item: Any = None) -> Failure:
        """What is wrong about the key @name, with the file and the line. @item: the value in its array that is."""
        return _wrong(self.where(name, item), f"{name}: {what}" if what else f"unknown key '{name}'", hint)

    def note(self, faults: list[Failure], name: str, error: UsageError) -> None:
        """Add what is wrong about the key @name to @faults, while these are few: each costs a look at the file."""
        for each in (error, *error.others) if isinstance(error, ItemError) else (error,):
            if len(faults) < FAULTS_MAX:
                item = each.item if isinstance(each, ItemError) else None
                faults.append(self.wrong(name, each.message, each.hint, item))


def _uncommented(told: re.Pattern[str], text: str) -> bool:
    """Does @told match in a line before its comment? A "#" in a string begins none."""
    end = STRING.sub(lambda found: "s" * len(found[0]), text).find("#")
    return bool(told.search(text if end < 0 else text[:end]))


def _bare(key: str) -> str:
    return key[1:-1] if key[0] in "'\"" and key[-1] == key[0] and len(key) > 1 else key


def _names(schema: Schema, prefix: str = "") -> Iterator[str]:
    """The keys of @schema, those of tables with the table before them."""
    for key, check in schema.items():
        yield f"{prefix}{key}"
        if isinstance(check, Mapping):
            yield from _names(check, f"{prefix}{key}.")


def _meant(name: str, here: list[str], everywhere: tuple[str, ...]) -> str:
    """Which key was probably meant by the unknown @name: one of its own table rather than one of another's.

    If none is alike, those of its table.
    """
    if name in everywhere:  # a key with a dot in it, and not one of a table
        return f"without quotes: {name} = ..."
    last = name.rpartition(".")[2]
    for known in (here, everywhere):
        lasts = {key.rpartition(".")[2]: key for key in reversed(known)}
        close = difflib.get_close_matches(last, lasts, 1, NEAR)
        if close:
            return f"did you mean '{lasts[close[0]]}'?"
    return ", ".join(here)


def _table(
    source: _Source,
    prefix: str,
    document: Mapping[str, Any],
    schema: Schema,
    known: tuple[str, ...],
    faults: list[Failure],
) -> dict[str, Any]:
    """@known: the keys of the whole file. @faults: what is wrong is added to it."""
    before = len(faults)
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        check = schema.get(key)
        try:
            if check is None and len(faults) >= FAULTS_MAX:  # it is not told, and what is meant takes time to find
                continue
            if check is None:
                raise UsageError("", hint=_meant(name, [f"{prefix}{k}" for k in schema], known))
            if not isinstance(check, Mapping):
                found[key] = check(value)
            elif isinstance(value, dict):
                found[key] = _table(source, f"{name}.", value, check, known, faults)
            else:
                raise UsageError("not a table", hint=f"[{name}]")
        except UsageError as error:
            source.note(faults, name, error)
    if isinstance(schema, Whole) and len(faults) == before:
        try:
            schema.check(found)
        except UsageError as error:
            source.note(faults, f"{prefix}{schema.key}", error)
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
        found, faults = [], list[ItemError]()
        for item in value:
            try:
                found.append(check(item))
            except UsageError as error:
                faults.append(ItemError(error, item))
        if faults:
            faults[0].others = faults[1:]
            raise faults[0]
        return tuple(found)

    return check_all


def number(least: int, most: int) -> Check:
    """A check of a number from @least to @most. Raises UsageError."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UsageError(f"{shown(value)} is not a number from {least} to {most}")
        return value

    return check


def one_of(*words: str) -> Check:
    """A check of a string that is one of @words. Raises UsageError."""

    def check(value: Any) -> str:
        word = text(value)
        if word not in words:
            close = difflib.get_close_matches(word, words, 1, NEAR)
            raise UsageError(
                f"'{word}' is unknown", hint=f"did you mean '{close[0]}'?" if close else " or ".join(words)
            )
        return word

    return check


def shown(value: Any) -> str:
    """A value of a file for a message: short, whatever it is."""
    if isinstance(value, bool | str):
        return f"'{value}'" if isinstance(value, str) else str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else "this number"  # Python prints no number of any length
    return "a table" if isinstance(value, dict) else "an array" if isinstance(value, list) else str(value)
