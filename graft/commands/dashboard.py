"""`graft dashboard`: a page for a browser, as long as the command runs."""

import click

from graft.client import follow
from graft.commands.options import CONTEXT, say
from graft.errors import UsageError

AT = "127.0.0.1:9436"


@click.command(context_settings=CONTEXT)
@click.option("--at", metavar="ADDR:PORT|PATH", default=AT, help=f"Where; default: {AT}.")
@click.option("--at-public", is_flag=True, help="With --at: also at an address beyond the loopback.")
def command(at: str, at_public: bool) -> int:
    """Serve a page that shows the containers, who talks to whom, and what is refused, until an interrupt.

    Print the address to open, with the token that it needs. The page changes nothing.
    """
    if at_public and at == AT:
        raise UsageError("--at-public goes with --at")
    try:
        for line in follow("dashboard", at=at, public=at_public):
            say(line)
    except KeyboardInterrupt:
        return 130
    return 0
