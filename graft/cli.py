"""The command line: groups, options that many commands share, and how errors end.

One line on standard error and an exit status: 2 usage, 1 refusal, 125 graft's own failure, 126 and 127 a
command that cannot run. Sub-commands are modules of graft/commands, imported when they are used.
"""

import errno
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from graft import __version__
from graft.errors import GraftError

Command = TypeVar("Command", bound=Callable[..., Any])

COMMANDS = {
    "run": "Run a command whose sockets live on the host's network stack.",
    "endpoint": "Endpoints: names for addresses of the host.",
    "rule": "Rules of a running container: publish, ingress, egress.",
    "ps": "List running containers.",
    "inspect": "Everything about one container, in JSON.",
    "install": "Make graft known to Docker, Podman or containerd.",
    "uninstall": "Undo that.",
    "bench": "Measure graft beside the host and everything that is installed.",
    "doctor": "What this machine has, lacks, and how to get it.",
    "completion": "Shell completion.",
}


class LazyGroup(click.Group):
    """Knows its commands by name and help line; imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"graft.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS:
            import difflib

            close = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean '{close[0]}'?" if close else "'graft --help' lists them"
            raise click.UsageError(f"unknown command '{name}' ({hint})", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


NETNS_COMMANDS = ("run", "endpoint")


@click.group(
    cls=LazyGroup,
    context_settings=CONTEXT,
    no_args_is_help=True,
    subcommand_metavar="COMMAND [ARGS]... | [-v] [-i RULE]... [-e RULE]... -- PROGRAM [ARGS]...",
)
@click.option("--netns", metavar="PID|NAME|PATH", help="The network namespace that is meant; default: the caller's.")
@click.version_option(__version__, "-V", "--version", message="graft %(version)s")
@click.pass_context
def graft(ctx: click.Context, netns: str | None) -> None:
    """Socket grafting: the container keeps a network namespace with nothing but lo, its sockets live on
    the host's network stack, behind endpoints that say which addresses and ports it may use.

    \b
    graft run -p 8080:80 nginx -g 'daemon off;'      port 80 inside is port 8080 of the host
    graft run --egress none ./job                     no connections out
    graft endpoint add ep type ipv4 addr 192.0.2.1 port 443
    graft run -i 0.0.0.0:443=ep ./server              that bind goes to the endpoint
    graft ps                                          what runs

    AF_GRAFT's wrapper, for a program in the current namespace (graft -i x -h says more):

    \b
    graft -i 0.0.0.0:443=ep -- ./server               that bind, and nothing else
    graft -v -e 0.0.0.0/0=ep-out -- ./client          connections leave from the endpoint
    """
    if netns is not None and ctx.invoked_subcommand not in NETNS_COMMANDS:
        raise click.UsageError(f"--netns does not go with '{ctx.invoked_subcommand}'", ctx)


def _default_netns(ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    given: str | None = ctx.find_root().params.get("netns")
    return given if value is None else value


def netns_option(function: Command) -> Command:
    """--netns, as every command has it; `graft --netns X COMMAND` is the same."""
    return click.option(
        "--netns",
        metavar="PID|NAME|PATH",
        callback=_default_netns,
        help="The network namespace (or container) that is meant; default: the caller's.",
    )(function)


def json_option(function: Command) -> Command:
    """-j, as in ip(8)."""
    return click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON.")(function)


def print_json(value: Any) -> None:
    """JSON for people and programs."""
    import json

    click.echo(json.dumps(value, indent=2))


def guarded(program: str, work: Callable[[], Any]) -> int:
    """Run @work; whatever goes wrong becomes one line and an exit status."""
    try:
        result = work()
        if sys.stdout:  # None where the caller closed it
            sys.stdout.flush()
        return int(result or 0)
    except GraftError as error:
        message, status = str(error), error.exit_status
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        return 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else program
        message = error.format_message().rstrip(".")
        if not message.endswith(")"):
            message += f" (see '{path} --help')"
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is buffered for a full disk would fail once more
    except Exception as error:
        if os.environ.get("GRAFT_DEBUG"):
            raise
        message, status = f"{type(error).__name__}: {error} (a fault of graft's: GRAFT_DEBUG=1 shows where)", 125
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    print(f"{program}: {line}", file=sys.stderr)
    return status


WRAPPER_OPTIONS = ("-i", "-e", "-v", "--ingress", "--egress-rule", "--verbose")


def is_wrapper(words: list[str]) -> bool:
    """Is this AF_GRAFT's wrapper: options of it, or `--`, before any command of ours?"""
    at = 0
    while at < len(words):
        word = words[at]
        if word == "--" or word.startswith(WRAPPER_OPTIONS):
            return True
        if word != "--netns" and not word.startswith("--netns="):
            return False
        at += 2 if word == "--netns" else 1
    return False


def main() -> int:
    """Entry point of `graft`."""
    if is_wrapper(sys.argv[1:]):
        from graft.commands.wrapper import command

        return guarded("graft", lambda: command.main(prog_name="graft", standalone_mode=False))
    return guarded("graft", lambda: graft.main(prog_name="graft", standalone_mode=False))
