"""`graft log`: what containers asked for, and what became of it."""

import json
import time
from typing import Any

import click

from graft.client import call, follow
from graft.commands.options import CONTEXT, complete_container, json_option, say

COMMAND_WIDTH = 22


@click.command(context_settings=CONTEXT)
@click.argument("name", required=False, shell_complete=complete_container)
@click.option("-f", "--follow", "follows", is_flag=True, help="Go on with what is decided from now on.")
@click.option("-a", "--all", "every", is_flag=True, help="With -f: what is allowed as well as what is refused.")
@json_option
def command(name: str | None, follows: bool, every: bool, as_json: bool) -> int:
    """Print what was refused to container NAME, or to all: the last ones of each.

    \b
    graft log web
    graft log -f --all
    graft log -fj | jq -r 'select(.op == "connect") | .asked'
    """
    if every and not follows:
        raise click.UsageError("--all needs -f: what is allowed is not kept")
    if not follows:
        for line in call("log", start=False, name=name):
            _print(line, as_json)
        return 0
    try:
        for line in follow("log", name=name, follow=True, every=every):
            if "ended" in line:
                return 0
            _print(line, as_json)
    except KeyboardInterrupt:
        return 130
    return 0


def _print(line: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(line))
    else:
        say(text_of(line))


def text_of(line: dict[str, Any]) -> str:
    """One line of the log as people read it. @line: what graftd has sent."""
    if "lost" in line:
        return f"({line['lost']} lines are missing: they were not read fast enough)"
    at = time.strftime("%H:%M:%S", time.localtime(line["time"])) + f"{line['time'] % 1:.3f}"[1:]
    who = line["container"] or "-"
    if "dropped" in line:
        return f"{at} {who} ({line['dropped']} calls more, too many to be told)"
    command = f"{line['command'] or '-'}[{line['pid'] or '-'}]"
    what = " ".join(filter(None, (line["op"], line["protocol"], line["asked"])))
    what += f" ({line['name']})" if line["name"] else ""
    if line["became"] and line["became"] != line["asked"]:
        what += f" -> {line['became']}"
    if line["endpoint"] or line["source"]:
        way = "by" if line["op"] in ("bind", "listen") else "from"
        known = f"{line['endpoint']} ({line['source']})" if line["endpoint"] and line["source"] else ""
        what += f" {way} {known or line['endpoint'] or line['source']}"
    verdict = f"refused {line['errno']}" if line["verdict"] == "refused" else line["verdict"]
    return f"{at} {who:<12} {command:<{COMMAND_WIDTH}} {what}: {verdict}{', ' * bool(line['rule'])}{line['rule']}"
