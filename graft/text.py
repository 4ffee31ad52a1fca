"""Foreign text made safe for a terminal and a log.

Containers choose the names of their commands, their arguments, labels and paths, and whoever reads them on a terminal
must not have it obey an escape sequence, see a line that nobody wrote, or text in another order than it is in.
"""

from collections.abc import Sequence

LENGTH = 400


def plain(text: str, length: int = LENGTH) -> str:
    """@text on one line, cut to @length characters: what is not printable is escaped, as Python writes it.

    That concerns control characters, line ends of every kind, characters that change the direction of writing or have
    no width, and bytes that are no UTF-8 (str.isprintable()).
    """
    shown = "".join(c if c.isprintable() else _escape(c) for c in text[:length])
    return shown if len(text) <= length else f"{shown}..."


def listed(names: Sequence[str]) -> str:
    """The first five of @names, for a message of one line."""
    return f"{', '.join(names[:5])}{', ...' * (len(names) > 5)}"


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
