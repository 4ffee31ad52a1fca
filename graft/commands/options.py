"""Options that several commands share, how JSON is printed, and how errors end.

One line on standard error and an exit status: 2 usage, 1 refusal, 125 graft's own failure, 126 and 127 a command that
cannot run.
"""

import contextlib
import errno
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from graft.errors import GraftError
from graft.text import plain

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

LINE_MAX = 8192  # of a line that a command prints
Command = TypeVar("Command", bound=Callable[..., Any])


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _default_netns(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    given: str | None = ctx.find_root().params.get("netns")
    named = given if value is None else value
    if named == "":  # of a shell's variable that is not set: to take the default then is not what was meant
        raise click.BadParameter("the name is empty", ctx, param)
    return named


def complete_netns(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete a network namespace: of a running container, or of ip-netns(8) (click's `shell_complete`)."""
    from graft.client import call

    named: list[str] = []
    with contextlib.suppress(OSError):
        named = sorted(name for name in os.listdir("/run/netns") if name.startswith(incomplete))
    return [*_beginning(incomplete, lambda: call("ps", start=False)), *named]


def complete_command(ctx: click.Context, param: click.Parameter, incomplete: str) -> list["CompletionItem"]:
    """Complete a command, as the shell does: its name by PATH, then files (click's `shell_complete`)."""
    from click.shell_completion import CompletionItem

    if "/" in incomplete or ctx.params.get(param.name or ""):
        return [CompletionItem(incomplete, type="file")]
    found: set[str] = set()
    for directory in os.get_exec_path():
        with contextlib.suppress(OSError):
            found.update(
                entry.name
                for entry in os.scandir(directory)
                if entry.name.startswith(incomplete) and os.access(entry.path, os.X_OK) and not entry.is_dir()
            )
    return [CompletionItem(name) for name in sorted(found)]


def netns_option(text: str) -> Callable[[Command], Command]:
    """Add the option --netns to a command, with @text as its help. `graft --netns X COMMAND` means the same."""
    return click.option(
        "--netns", metavar="PID|NAME|PATH", callback=_default_netns, help=text, shell_complete=complete_netns
    )


def json_option(function: Command) -> Command:
    """Add the option -j to a command, as ip(8) has it."""
    return click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON.")(function)


def _beginning(incomplete: str, ask: Callable[[], list[dict[str, Any]]]) -> list[str]:
    """The names among what graftd answers that begin with @incomplete; none where it does not answer."""
    try:
        found = [one["name"] for one in ask()]
    except GraftError:
        return []
    return [name for name in found if name.startswith(incomplete)]


def complete_container(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of a running container (click's `shell_complete`)."""
    from graft.client import call

    return _beginning(incomplete, lambda: call("ps", start=False))


def complete_endpoint(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the name of an endpoint in the table that --netns names (click's `shell_complete`)."""
    from graft.client import call

    return _beginning(incomplete, lambda: call("endpoint-show", start=False, netns=ctx.params.get("netns")))


class Seconds(click.FloatRange):
    """An option's number of seconds. `nan` is in no range, which click's comparisons do not find."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse @value. Raises click.BadParameter."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return seconds


def print_json(value: Any) -> None:
    """Print @value as indented JSON on standard output."""
    import json

    click.echo(json.dumps(value, indent=2))


def say(line: str) -> None:
    """Print a line on standard output, in which a container may have chosen words."""
    click.echo(plain(line, LINE_MAX))


def say_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its head first: each column but the last as wide as its widest cell."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]) - 1)]
    for row in rows:
        say("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))


# click 8.2 and later; 8.1, which Debian has, prints the help itself
NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


def guarded(program: str, work: Callable[[], Any]) -> int:
    """Run @work and return its exit status; an error becomes one line on standard error, and a status.

    @program: the command's name, for that line. With GRAFT_DEBUG in the environment, unexpected errors are raised.
    """
    try:
        result = work()
        if sys.stdout:  # None where the caller closed it
            sys.stdout.flush()
        return int(result or 0)
    except GraftError as error:
        message, status = str(error), error.exit_status
    except NO_ARGUMENTS as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        return 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else program
        message = f"{error.format_message().rstrip('.')} (see '{path} --help')"
        status = 2
    except (click.Abort, KeyboardInterrupt):
        message, status = "interrupted", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        if os.environ.get("GRAFT_DEBUG"):
            raise
        code = errno.errorcode.get(error.errno or 0, "")
        where = f" {error.filename}" if error.filename else ""
        message, status = f"{error.strerror or error}{where} {f'[{code}]' if code else ''}".strip(), 125
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # to flush what is buffered for a full disk would fail again
    except Exception as error:
        if os.environ.get("GRAFT_DEBUG"):
            raise
        message, status = f"{type(error).__name__}: {error} (a bug in graft: GRAFT_DEBUG=1 shows where)", 125
    print(f"{program}: {plain(' '.join(message.split()), LINE_MAX)}", file=sys.stderr)
    return status
