"""`graft inspect`: one container as a JSON document."""

import click

from graft.client import call
from graft.commands.options import CONTEXT, complete_container, print_json


@click.command(context_settings=CONTEXT)
@click.argument("name", shell_complete=complete_container)
def command(name: str) -> None:
    """Print everything about one container in JSON: addresses, rules, and what was refused, with counters.

    \b
    graft inspect web | jq .refused
    """
    print_json(call("inspect", start=False, name=name))
