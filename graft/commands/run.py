"""`graft run`: check the options, and hand them to graft/commands/launch.py as a Plan."""

import click

from graft.commands.launch import Plan, find_user, run
from graft.commands.options import CONTEXT, netns_option
from graft.errors import UsageError
from graft.rules.endpoint import parse_egress, parse_ingress
from graft.rules.limits import Limits, parse_limits
from graft.rules.own_address import parse_own
from graft.rules.publication import parse_publication

RUN_CONTEXT = {**CONTEXT, "ignore_unknown_options": False, "allow_interspersed_args": False}


@click.command(context_settings=RUN_CONTEXT)
@click.option("--name", help="Name of the container; default: the command and a number.")
@netns_option
@click.option(
    "-p",
    "--publish",
    multiple=True,
    metavar="[HADDR:]HPORT:PORT[/tcp|/udp]",
    help="Publish PORT of the container as HPORT of the host; ranges as 9000-9010:9000-9010.",
)
@click.option(
    "-i",
    "--ingress",
    multiple=True,
    metavar="ADDR:PORT[-PORT]=ENDPOINT",
    help="A bind to ADDR:PORT becomes a bind to the endpoint.",
)
@click.option(
    "-e",
    "--egress-rule",
    "egress_rules",
    multiple=True,
    metavar="PREFIX/LEN=ENDPOINT",
    help="Connections to PREFIX leave from the endpoint; other destinations are refused.",
)
@click.option(
    "--egress",
    type=click.Choice(["host", "none"]),
    help="Connections out: as the host's (default), or none. With -e: for destinations without a rule.",
)
@click.option(
    "--ip",
    multiple=True,
    metavar="ADDR",
    help="The container's own address on the host's stack: wildcard binds use it, connections leave from it.",
)
@click.option(
    "--limit", multiple=True, metavar="sockets=N|udp=N", help="How many sockets it may have; default: graftd's limit."
)
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Run the command as this user.")
@click.option("--accel", is_flag=True, help="Preload a library that spares dynamic programs the trap of socket().")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    name: str | None,
    netns: str | None,
    publish: tuple[str, ...],
    ingress: tuple[str, ...],
    egress_rules: tuple[str, ...],
    egress: str | None,
    ip: tuple[str, ...],
    limit: tuple[str, ...],
    user: str | None,
    accel: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND in a network namespace with nothing but lo, and its sockets on the host's stack.

    127.0.0.1 and ::1 inside are private to the container. A server that binds the wildcard address can be
    reached from outside only at ports that -p publishes.

    \b
    graft run -p 8080:80 nginx -g 'daemon off;'
    graft run -p 127.0.0.1:5432:5432 -p '[::1]:5432:5432' postgres -D /srv/db
    graft run -p 53:53/udp -p 53:53 --user nobody dnsserver
    graft run --name db --egress none redis-server
    graft run --ip 10.88.0.5 nginx -g 'daemon off;'
    graft run --netns blue curl http://example.org/
    graft run --accel -p 8080:80 haproxy -f haproxy.cfg

    The exit status is COMMAND's; 125 if graft failed, 126 or 127 if COMMAND cannot run.
    """
    for option, texts, parse in (
        ("-p", publish, parse_publication),
        ("-i", ingress, parse_ingress),
        ("-e", egress_rules, parse_egress),
        ("--ip", ip, parse_own),
        ("--limit", limit, lambda text: parse_limits([text], Limits())),
    ):
        for text in texts:
            try:
                parse(text)
            except UsageError as error:
                raise UsageError(f"{option}: {error.message}", hint=error.hint) from None
    if not command[0]:
        raise UsageError("the command is empty", hint="graft run [OPTIONS] COMMAND ARG...")
    run(
        Plan(
            list(command),
            name=name,
            netns=netns,
            publish=publish,
            ingress=ingress,
            egress=egress_rules,
            egress_default=egress,
            user=find_user(user) if user is not None else None,
            accel=accel,
            ip=ip,
            limits=limit,
        )
    )
