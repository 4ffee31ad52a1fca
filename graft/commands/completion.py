"""`graft completion`: print the script that click generates for a shell."""

import click
from click.shell_completion import get_completion_class

from graft.commands.options import CONTEXT


@click.command(context_settings=CONTEXT)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.argument("program", type=click.Choice(["graft", "graftd"]), default="graft")
def command(shell: str, program: str) -> None:
    """Print the completion script of PROGRAM, graft or graftd, for SHELL.

    \b
    graft completion bash > /etc/bash_completion.d/graft
    graft completion zsh > "${fpath[1]}/_graft"
    graft completion fish graftd > ~/.config/fish/completions/graftd.fish
    """
    completion = get_completion_class(shell)
    assert completion is not None
    # the program itself says what there is, when the script asks it
    click.echo(completion(command, {}, program, f"_{program.upper()}_COMPLETE").source())
