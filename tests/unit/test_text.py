"""Text that a container chose, on a terminal and in a log."""

from typing import Any

import pytest

from graft.commands.options import LINE_MAX, say
from graft.daemon.verbose import Teller
from graft.errors import Refused
from graft.kernel.denials import CONVERTED, Event
from graft.text import LENGTH, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, with é and 漢", "plain text, with é and 漢"),
        ("a\nforged: line\x1b[2J\0", "a\\x0aforged: line\\x1b[2J\\x00"),
        ("\r\t\v\f\x7f\x85\x9b31m", "\\x0d\\x09\\x0b\\x0c\\x7f\\x85\\x9b31m"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("abc\u202edcba\u2066\u200f", "abc\\u202edcba\\u2066\\u200f"),
        ("\u200bzero\ufeff\u00ad", "\\u200bzero\\ufeff\\xad"),
        ("\udcff", "\\udcff"),  # a byte that is no UTF-8, as os.fsdecode() gives it
        ("\U000e0041\U0010ffff", "\\U000e0041\\U0010ffff"),
        ("", ""),
    ],
)
def test_plain(text, shown):
    assert plain(text) == shown
    assert plain(text).isprintable()
    plain(text).encode()


@pytest.mark.parametrize("character", ["x", "\x1b", "\U0010ffff"])
def test_long_text(character):
    shown = plain(character * 100000)
    assert shown.endswith("...")
    assert len(shown) <= 10 * LENGTH + 3
    assert plain("x" * LENGTH) == "x" * LENGTH
    assert plain("x" * 20, 10) == "x" * 10 + "..."


def test_what_commands_print(capsys):
    say("web\x1b[2J\nforged")
    assert capsys.readouterr().out == "web\\x1b[2J\\x0aforged\n"
    say("x" * 100000)
    assert len(capsys.readouterr().out) == LINE_MAX + 4


def test_an_error_is_one_safe_line(capsys):
    from graft.commands.options import guarded

    def fails():
        raise Refused("no container '\u202e\x1b]0;title\x07'\nforged: line")

    assert guarded("graft", fails) == 1
    assert capsys.readouterr().err == "graft: no container '\\u202e\\x1b]0;title\\x07' forged: line\n"


def test_ps_shows_no_control_character(monkeypatch, capsys):
    from graft.commands import ps

    odd = "\x1b[31m\u202e\n" + "y" * 1000
    row = {
        "name": odd, "pid": 1, "status": "running", "started": 0, "command": ["sh", odd],
        "addresses": [odd], "publish": [odd], "named_endpoints": [odd],
    }  # fmt: skip
    monkeypatch.setattr(ps, "call", lambda *_a, **_k: [row])
    ps.command.main([], standalone_mode=False)
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)


def test_verbose_names_are_safe():
    """A command's name is 15 bytes of its own choice (prctl(2), PR_SET_NAME)."""
    told = []

    class Connection:
        def tell(self, line):
            told.append(plain(line))

    class Tenant:
        ingress = egress = ()
        endpoints = {}  # noqa: RUF012

    fields: dict[str, Any] = dict.fromkeys(Event._fields, 0)
    fields |= {"comm": "\x1b[2J\nx: bind", "op": "connect", "reason": CONVERTED, "address": bytes(16), "real": bytes(16)}
    Teller(Tenant(), Connection()).tell(Event(**fields))  # type: ignore[arg-type]
    assert len(told) == 1
    assert told[0].isprintable()
