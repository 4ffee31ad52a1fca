"""The command line: the group `graft`, options that commands share, and the exit status of errors.

An error is one line on standard error and an exit status: 1 a refusal, 2 wrong usage, 125 a failure of graft itself,
126 a command that cannot be executed, 127 a command that is not found (as env(1) has them), 130 an interrupt. Each
sub-command is a module of graft/commands, and is imported only when it is used, so that the others start fast.
"""

import importlib
import sys

import click

from graft import __version__
from graft.commands.options import CONTEXT, complete_netns, guarded
from graft.errors import UsageError

COMMANDS = {
    "run": "Run a command whose sockets live on the host's network stack.",
    "endpoint": "Add, delete and list endpoints: names for addresses of the host.",
    "rule": "Change the rules of a running container: publish, ingress, egress.",
    "config": "Check the files in /etc/graft before graftd reads them.",
    "policy": "Check policy files: which destinations a container may reach.",
    "ps": "List running containers.",
    "log": "Print what was refused, and with -f what is decided as it is decided.",
    "sockets": "List the open sockets of containers, as ss(8) does the host's.",
    "stats": "Print what containers have carried and been refused so far.",
    "top": "Show what containers do now, by rate, on a screen that goes on.",
    "dashboard": "Serve a page for a browser: containers, who talks to whom, what is refused.",
    "inspect": "Print everything about one container, in JSON.",
    "install": "Set up Docker, Podman or containerd to use graft.",
    "uninstall": "Undo 'graft install'.",
    "bench": "Measure graft against the host's stack and other networking that is installed.",
    "doctor": "Check what graft needs of this machine, and say how to get what is missing.",
    "completion": "Print the shell completion script.",
}


class LazyGroup(click.Group):
    """A group that has names and help lines in COMMANDS, and imports a command's module when it is called."""

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
            raise UsageError(f"unknown command '{name}'", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


NETNS_COMMANDS = ("run", "endpoint")


@click.group(
    cls=LazyGroup,
    context_settings=CONTEXT,
    no_args_is_help=True,
    subcommand_metavar="COMMAND [ARGS]... | [-v] [-i RULE]... [-e RULE]... -- PROGRAM [ARGS]...",
)
@click.option(
    "--netns",
    metavar="PID|NAME|PATH",
    shell_complete=complete_netns,
    help="The network namespace to work on; default: the caller's.",
)
@click.version_option(__version__, "-V", "--version", message="graft %(version)s")
@click.pass_context
def graft(ctx: click.Context, netns: str | None) -> None:
    """Socket grafting: a container has a network namespace that leads nowhere. Its sockets are on the
    host's network stack, and endpoints say which addresses and ports of the host they may use.

    \b
    graft run -p 8080:80 nginx -g 'daemon off;'      port 80 inside is port 8080 of the host
    graft run --egress none ./job                     no connections out
    graft endpoint add ep type ipv4 addr 192.0.2.1 port 443
    graft run -i 0.0.0.0:443=ep ./server              a bind to port 443 goes to the endpoint
    graft ps                                          list running containers

    The wrapper, as AF_GRAFT has it, is for a program in the current namespace ('graft -i x -h' says more):

    \b
    graft -i 0.0.0.0:443=ep -- ./server               allow that bind, and nothing else
    graft -v -e 0.0.0.0/0=ep-out -- ./client          connections leave from the endpoint
    """
    if netns is not None and ctx.invoked_subcommand not in NETNS_COMMANDS:
        raise click.UsageError(f"--netns does not go with '{ctx.invoked_subcommand}'", ctx)


ENGINE = "--engine"  # what rootless engines call (graft/engines/prepare.py); no user does
WRAPPER_OPTIONS = ("-i", "-e", "-v", "--ingress", "--egress-rule", "--verbose")


def is_wrapper(words: list[str]) -> bool:
    """Return whether the command line calls AF_GRAFT's wrapper: its options, or `--`, come before any sub-command."""
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
    """Run `graft`; returns the exit status."""
    if sys.argv[1:2] == [ENGINE]:
        from graft.engines.prepare import main as prepare

        return prepare(sys.argv[2:])
    if is_wrapper(sys.argv[1:]):
        from graft.commands.wrapper import command

        return guarded("graft", lambda: command.main(prog_name="graft", standalone_mode=False))
    return guarded("graft", lambda: graft.main(prog_name="graft", standalone_mode=False))
