"""The command ip-graft: the grammar of `ip graft` in AF_GRAFT's iproute2, with the options of ip(8).

A command may be shortened to a prefix; -batch reads commands from a file; -netns names the namespace whose
endpoint table is used.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

from graft import __version__
from graft.commands.endpoint_requests import add_endpoints, delete_endpoints, describe, show_endpoints
from graft.commands.options import LINE_MAX, guarded, print_json
from graft.errors import GraftError, Refused, UsageError
from graft.rules.endpoint import parse_endpoint_words, parse_name
from graft.text import plain

USAGE = """\
Usage: ip-graft [ OPTIONS ] add NAME
          type { ipv4 | ipv6 } addr ADDR port { PORT | dynamic }
          type unix path PATH
          type local
          [ netns { PID | NETNSNAME } ]

       ip-graft del NAME

       ip-graft show [ NAME ]

       ip-graft [ -force ] -batch FILENAME

Where: NAME := STRING, at most 15 bytes
       ADDR := { IPv4_ADDRESS | IPv6_ADDRESS }
       PORT := { 0..65535 | dynamic }
       PATH := STRING
       OPTIONS := { -j[son] | -n[etns] { PID | NETNSNAME } | -V[ersion] | -h[elp] }
"""
COMMANDS = ("add", "delete", "show", "list", "help")
OPTIONS = {
    "json": ("-j", "-js", "-json"),
    "force": ("-f", "-force"),
    "netns": ("-n", "-net", "-netns"),
    "batch": ("-b", "-batch"),
    "help": ("-h", "-help"),
    "version": ("-V", "-Version", "-version"),
}
SPELLINGS = {spelling: name for name, spellings in OPTIONS.items() for spelling in spellings}


class Line(NamedTuple):
    """One command whose grammar has been checked. `number`: its line in the batch; 0 on the command line."""

    number: int
    command: str
    name: str
    words: list[str]


class Options(NamedTuple):
    """The options before the command."""

    netns: str | None = None
    json: bool = False
    batch: str | None = None
    force: bool = False


def parse_options(words: list[str]) -> tuple[Options, list[str]]:
    """Parse the options of ip(8), with one dash or two; returns them and the remaining words. Raises UsageError."""
    options = Options()
    while words and words[0].startswith("-"):
        word = words.pop(0)
        name = SPELLINGS.get("-" + word.lstrip("-"))
        if name == "json":
            options = options._replace(json=True)
        elif name == "force":
            options = options._replace(force=True)
        elif name in ("netns", "batch"):
            if not words:
                raise UsageError(f"'{word}' lacks its value", hint="see 'ip-graft help'")
            value = words.pop(0)
            options = options._replace(netns=value) if name == "netns" else options._replace(batch=value)
        elif name:
            return options, [name]
        else:
            raise UsageError(f"unknown option '{word}'", hint="see 'ip-graft help'")
    return options, words


def match(word: str) -> str:
    """Return the first command that begins with @word. Raises UsageError."""
    for command in COMMANDS:
        if word and command.startswith(word):
            return command
    raise UsageError(f"unknown command '{word}'", hint="add, del, show or help")


def check(number: int, words: Sequence[str]) -> Line:
    """Check the grammar of one command, which has at least one word. Raises UsageError."""
    command = match(words[0])
    rest = list(words[1:])
    if command in ("add", "delete"):
        if not rest:
            raise UsageError("the endpoint's NAME is missing", hint="see 'ip-graft help'")
        parse_name(rest[0])
        if command == "add":
            parse_endpoint_words(rest[1:])
        elif len(rest) > 1:
            raise UsageError(f"unknown word '{rest[1]}'", hint="del NAME")
    elif command in ("show", "list") and len(rest) > 1:
        raise UsageError(f"unknown word '{rest[1]}'", hint="show [ NAME ]")
    return Line(number, command, rest[0] if rest else "", rest[1:])


def carry_out(lines: Sequence[Line], options: Options) -> None:
    """Carry out @lines, which all have the same command. Raises GraftError."""
    command = lines[0].command
    if command == "add":
        add_endpoints([(line.name, line.words) for line in lines], options.netns)
    elif command == "delete":
        delete_endpoints([line.name for line in lines], options.netns)
    elif command == "help":
        print(USAGE, end="")
    else:
        for line in lines:
            endpoints = show_endpoints(line.name or None, options.netns)
            if options.json:
                print_json(endpoints)
            else:
                for endpoint in endpoints:
                    print(plain(describe(endpoint), LINE_MAX))


def read_batch(name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the commands of a batch file, each with its line number; `-` is standard input. Raises Refused.

    "#" begins a comment. A backslash at the end of a line continues the command on the next one.
    """
    try:
        source: TextIO = sys.stdin if name == "-" else open(name)  # noqa: SIM115 - closed below
    except OSError as error:
        raise Refused(f"batch file '{name}': {error.strerror}", code="ENOENT") from None
    with contextlib.nullcontext(source) if name == "-" else source:
        pending: list[str] = []
        try:
            for number, text in enumerate(source, 1):
                line = text.partition("#")[0].rstrip()
                pending += line.removesuffix("\\").split()
                if not line.endswith("\\") and pending:
                    yield number, pending
                    pending = []
        except (UnicodeDecodeError, OSError) as error:
            raise Refused(f"batch file '{name}': {error}") from None
        if pending:
            yield number, pending


def batch(options: Options) -> int:
    """Check every line of a batch, then carry them out. Returns the exit status; raises GraftError.

    The first line that fails ends the batch. With -force it goes on, and failures are printed at the end. Adjacent
    lines with the same command go to graftd in one message, which is carried out whole or not at all; with -force
    each line goes by itself.
    """
    assert options.batch is not None
    where = "standard input" if options.batch == "-" else options.batch
    lines: list[Line] = []
    failures: list[str] = []
    for number, words in read_batch(options.batch):
        try:
            lines.append(check(number, words))
        except UsageError as error:
            if not options.force:
                raise UsageError(f"{where}, line {number}: {error.message}", hint=error.hint) from None
            failures.append(f"{where}, line {number}: {error}")
    for group in _groups(lines, together=not options.force):
        try:
            carry_out(group, options)
        except GraftError as error:
            span = str(group[0].number) if len(group) == 1 else f"{group[0].number} to {group[-1].number}"
            if not options.force:
                raise type(error)(
                    f"{where}, line {span}: {error.message}", hint=error.hint, code=error.code
                ) from None
            failures.append(f"{where}, line {span}: {error}")
    for failure in failures:
        print(f"ip-graft: {plain(str(failure), LINE_MAX)}", file=sys.stderr)
    return int(bool(failures))


def _groups(lines: Sequence[Line], *, together: bool) -> Iterator[list[Line]]:
    group: list[Line] = []
    for line in lines:
        if group and (not together or group[0].command != line.command):
            yield group
            group = []
        group.append(line)
    if group:
        yield group


def run(words: list[str]) -> int:
    """Run one invocation; returns the exit status. Raises GraftError."""
    options, rest = parse_options(words)
    if rest == ["version"]:
        print(f"ip-graft {__version__}")
    elif options.batch is not None:
        if rest:
            raise UsageError(f"unknown word '{rest[0]}'", hint="-batch takes its commands from the file")
        return batch(options)
    elif not rest:
        raise UsageError("no command is given", hint="add, del, show or help")
    else:
        carry_out([check(0, rest)], options)
    return 0


def main() -> int:
    """Run `ip-graft`; returns the exit status."""
    words = [os.fsencode(word).decode(errors="surrogateescape") for word in sys.argv[1:]]
    return guarded("ip-graft", lambda: run(words))
