"""`graft endpoint`: endpoints in the grammar of AF_GRAFT's `ip graft`, with its key words."""

from typing import Any

import click

from graft.commands.endpoint_requests import add_endpoints, delete_endpoints, describe, show_endpoints
from graft.commands.move import hand_over, move_options
from graft.commands.options import CONTEXT, complete_endpoint, json_option, netns_option, print_json, say
from graft.errors import UsageError
from graft.rules.endpoint import NAME_MAX, parse_endpoint_words, parse_name
from graft.rules.endpoint_names import SUFFIX

WORDS = "type {ipv4|ipv6} addr ADDR port {PORT|dynamic} | type unix path PATH | type local [netns NS]"
TABLE = "The network namespace (or container) whose table is meant; default: the caller's."


@click.group(context_settings=CONTEXT)
def command() -> None:
    """Add, delete and list endpoints: names for addresses of the host. Each network namespace has its own table.

    \b
    graft endpoint add ep-http type ipv4 addr 192.0.2.1 port 80
    graft endpoint add ep-out type ipv6 addr 2001:db8::7 port dynamic
    graft endpoint add ep-db type unix path /run/db/db.sock
    graft endpoint add ep-cache type local
    graft endpoint add ep-in4 type ipv4 addr 127.0.0.1 port 8080 netns 1
    graft endpoint show --netns blue
    graft endpoint move ep-http --from blue --to green
    graft endpoint del ep-http
    """


@command.command("add", context_settings=CONTEXT)
@netns_option(TABLE)
@click.argument("name")
@click.argument("words", nargs=-1, metavar=WORDS)
def add(name: str, words: tuple[str, ...], netns: str | None) -> None:
    """Add endpoint NAME (at most 15 bytes) to the table of the caller's namespace, or of --netns.

    The word netns names the namespace that the address is in, by PID, name or path; default: graftd's own,
    which is the host's. A unix endpoint's path is on the host. An endpoint of type local connects containers of
    this host without TCP: a server's bind and its clients' connects there use a unix socket.
    """
    parse_name(name)
    parse_endpoint_words(words)
    add_endpoints([(name, list(words))], netns)


@command.command("del", context_settings=CONTEXT)
@netns_option(TABLE)
@click.argument("name", shell_complete=complete_endpoint)
def delete(name: str, netns: str | None) -> None:
    """Delete endpoint NAME. New binds and connects through it are refused; open sockets stay."""
    parse_name(name)
    delete_endpoints([name], netns)


@command.command("move", context_settings=CONTEXT)
@move_options
@click.argument("name", shell_complete=complete_endpoint)
def move(name: str, source: str, target: str, seconds: float) -> None:
    """Hand endpoint NAME over: what a container has there becomes another's, and no connection is refused.

    Connections that begin from now on go to the server of --to. Those before stay where they are; the command ends
    when the server of --from has accepted them, so that it may be ended.
    """
    parse_name(name)
    hand_over("endpoint-move", source, target, seconds, name=name)


@command.command("show", context_settings=CONTEXT)
@netns_option(TABLE)
@json_option
@click.option("--hosts", is_flag=True, help="Print lines for hosts(5): the address that stands for each name.")
@click.argument("name", required=False, shell_complete=complete_endpoint)
def show(name: str | None, netns: str | None, as_json: bool, hosts: bool) -> None:
    """List the endpoints of a table, or the one called NAME."""
    if as_json and hosts:
        raise UsageError("--json and --hosts are two forms", hint="omit one")
    if name is not None and len(name.encode()) > NAME_MAX:
        parse_name(name)
    endpoints: list[dict[str, Any]] = show_endpoints(name, netns)
    if as_json:
        print_json(endpoints)
        return
    for endpoint in endpoints:
        if not hosts:
            say(describe(endpoint))
        elif "name_addr" in endpoint:
            say(f"{endpoint['name_addr']} {endpoint['name'].lower()}.{SUFFIX}")
