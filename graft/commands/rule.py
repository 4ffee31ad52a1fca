"""`graft rule`: add, delete and list the rules of a running container."""

from typing import Any

import click

from graft.client import call
from graft.commands.move import hand_over, move_options
from graft.commands.options import CONTEXT, Command, complete_container, json_option, print_json, say
from graft.errors import UsageError
from graft.rules.request import Request, parse_request


@click.group(context_settings=CONTEXT)
def command() -> None:
    """Change the rules of a running container. A change applies to later binds and connects; open sockets stay.

    \b
    graft rule add web -p 8443:443
    graft rule add web -i 0.0.0.0:25=ep-mail -e 10.0.0.0/8=ep-out
    graft rule del web -p 8443:443
    graft rule move -p 8443:443 --from web --to web-2
    graft rule show web
    """


def rule_options(function: Command) -> Command:
    """Add CONTAINER and the options -p, -i and -e to a command."""
    for decorate in (
        click.option(
            "-e", "--egress", multiple=True, metavar="PREFIX/LEN=ENDPOINT", help="A rule for connections out."
        ),
        click.option("-i", "--ingress", multiple=True, metavar="ADDR:PORT[-PORT]=ENDPOINT", help="A rule for binds."),
        click.option(
            "-p", "--publish", multiple=True, metavar="[HADDR:]HPORT:PORT[/tcp|/udp]", help="A port of the host."
        ),
        click.argument("container", shell_complete=complete_container),
    ):
        function = decorate(function)
    return function


def _send(
    op: str, container: str, publish: tuple[str, ...], ingress: tuple[str, ...], egress: tuple[str, ...]
) -> None:
    if not (publish or ingress or egress):
        raise UsageError("no rule is given", hint="-p, -i or -e")
    parse_request(Request(publish=publish, ingress=ingress, egress=egress))
    call(op, netns=container, publish=publish, ingress=ingress, egress=egress)


@command.command("add", context_settings=CONTEXT)
@rule_options
def add(container: str, publish: tuple[str, ...], ingress: tuple[str, ...], egress: tuple[str, ...]) -> None:
    """Add rules to CONTAINER (its name, a PID in it, or its namespace): all are added, or none."""
    _send("rule-add", container, publish, ingress, egress)


@command.command("del", context_settings=CONTEXT)
@rule_options
def delete(container: str, publish: tuple[str, ...], ingress: tuple[str, ...], egress: tuple[str, ...]) -> None:
    """Delete rules of CONTAINER: all are deleted, or none."""
    _send("rule-del", container, publish, ingress, egress)


@command.command("move", context_settings=CONTEXT)
@move_options
@click.option(
    "-p",
    "--publish",
    multiple=True,
    required=True,
    metavar="[HADDR:]HPORT:PORT",
    help="The publication, as it was given.",
)
def move(publish: tuple[str, ...], source: str, target: str, seconds: float) -> None:
    """Hand publications over to another container that runs: all of them or none, and no connection is refused.

    Connections that begin from now on go to the server of --to. Those before stay where they are; the command ends
    when the server of --from has accepted them, so that it may be ended.
    """
    parse_request(Request(publish=publish))
    hand_over("rule-move", source, target, seconds, publish=publish)


@command.command("show", context_settings=CONTEXT)
@json_option
@click.argument("container", shell_complete=complete_container)
def show(container: str, as_json: bool) -> None:
    """List the rules of CONTAINER."""
    rules: dict[str, Any] = call("rule-show", netns=container)
    if as_json:
        print_json(rules)
        return
    for publication in rules["publish"]:
        say(f"publish {publication}")
    for rule in rules["ingress"]:
        moved = " moved" if rule["rule"].rpartition("=")[2] in rules["moved"] else ""
        say(f"ingress {rule['rule']} {','.join(rule['protocols'])}{moved}")
    for rule in rules["egress"]:
        say(f"egress {rule}")
    for name in rules["dangling"]:
        say(f"endpoint '{name}' is not there: what its rules match has no rule")
    for allowed in rules.get("allow", ()):
        say(f"allow {allowed}")
    say(f"egress default {rules['egress_default']}{' strict' if rules['strict'] else ''}")
