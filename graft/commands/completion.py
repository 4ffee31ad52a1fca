"""`graft completion`: print the script that click generates for a shell."""

import click
from click.shell_completion import get_completion_class

from graft.commands.options import CONTEXT


@click.command(context_settings=CONTEXT)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    graft completion bash > /etc/bash_completion.d/graft
    graft completion zsh > "${fpath[1]}/_graft"
    """
    completion = get_completion_class(shell)
    assert completion is not None
    root = ctx.find_root().command
    click.echo(completion(root, {}, "graft", "_GRAFT_COMPLETE").source())
