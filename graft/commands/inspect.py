"""graft inspect."""

import click

from graft.cli import CONTEXT, print_json
from graft.client import call


@click.command(context_settings=CONTEXT)
@click.argument("name")
def command(name: str) -> None:
    """Everything about one container, in JSON: addresses, rules, and what was refused it, with counters.

    \b
    graft inspect web | jq .refused
    """
    print_json(call("inspect", start=False, name=name))
