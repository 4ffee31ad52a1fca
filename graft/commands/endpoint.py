"""graft endpoint: the grammar of AF_GRAFT's `ip graft`, key words and all."""

from typing import Any

import click

from graft.cli import CONTEXT, json_option, netns_option, print_json
from graft.client import call
from graft.endpoint import NAME_MAX, parse_address, parse_endpoint_port, parse_name
from graft.errors import UsageError

ADD_FORM = "graft endpoint add NAME type {ipv4|ipv6} addr ADDR port {PORT|dynamic}"
TYPES = ("ipv4", "ipv6")


@click.group(context_settings=CONTEXT)
def command() -> None:
    """Endpoints: names for addresses of the host, one table for each network namespace.

    \b
    graft endpoint add ep-http type ipv4 addr 192.0.2.1 port 80
    graft endpoint add ep-out type ipv6 addr 2001:db8::7 port dynamic
    graft endpoint show --netns blue
    graft endpoint del ep-http
    """


def parse_words(words: tuple[str, ...]) -> dict[str, str]:
    """KEY VALUE pairs after the name: type, addr and port, each once, in any order. Raises UsageError."""
    found: dict[str, str] = {}
    for at in range(0, len(words), 2):
        key = words[at]
        if key not in ("type", "addr", "port"):
            raise UsageError(f"unknown word '{key}'", hint=ADD_FORM)
        if key in found:
            raise UsageError(f"'{key}' is given twice", hint=ADD_FORM)
        if at + 1 == len(words):
            raise UsageError(f"'{key}' lacks its value", hint=ADD_FORM)
        found[key] = words[at + 1]
    for key in ("type", "addr", "port"):
        if key not in found:
            raise UsageError(f"'{key}' is missing", hint=ADD_FORM)
    if found["type"] not in TYPES:
        raise UsageError(f"endpoint type '{found['type']}' is unknown", hint="ipv4 or ipv6")
    return found


@command.command("add", context_settings=CONTEXT)
@netns_option
@click.argument("name")
@click.argument("words", nargs=-1, metavar="type {ipv4|ipv6} addr ADDR port {PORT|dynamic}")
def add(name: str, words: tuple[str, ...], netns: str | None) -> None:
    """Add endpoint NAME (at most 15 bytes) to the table of the caller's namespace, or of --netns."""
    parse_name(name)
    fields = parse_words(words)
    parse_address(fields["addr"], kind=fields["type"])
    parse_endpoint_port(fields["port"])
    call("endpoint-add", netns=netns, name=name, type=fields["type"], addr=fields["addr"], port=fields["port"])


@command.command("del", context_settings=CONTEXT)
@netns_option
@click.argument("name")
def delete(name: str, netns: str | None) -> None:
    """Delete endpoint NAME: no new bind or connect through it, open sockets stay."""
    parse_name(name)
    call("endpoint-del", netns=netns, name=name)


@command.command("show", context_settings=CONTEXT)
@netns_option
@json_option
@click.argument("name", required=False)
def show(name: str | None, netns: str | None, as_json: bool) -> None:
    """List the table, or one endpoint."""
    if name is not None and len(name.encode()) > NAME_MAX:
        parse_name(name)
    endpoints: list[dict[str, Any]] = call("endpoint-show", netns=netns, name=name)
    if as_json:
        print_json(endpoints)
        return
    for e in endpoints:
        click.echo(f"{e['name']} type {e['type']} addr {e['addr']} port {e['port']}")
