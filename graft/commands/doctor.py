"""`graft doctor`: print the findings of graft/commands/checks.py."""

import click

from graft import client
from graft.commands import checks_user
from graft.commands.checks import examine
from graft.commands.options import CONTEXT, json_option, print_json, say


@click.command(context_settings=CONTEXT)
@json_option
def command(as_json: bool) -> int:
    """Check what graft needs of this machine, and say how to get what is missing.

    As an ordinary user: what is needed for that, and what root has granted.

    The exit status is 1 if 'graft run' would fail, or if a container that runs has lost its supervisor.

    \b
    graft doctor
    graft doctor -j | jq '.[] | select(.good | not)'
    """
    client.act_as_user()
    findings = checks_user.examine() if checks_user.applies() else examine()
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        for f in findings:
            mark = "ok     " if f.good else "MISSING" if f.needed else "note   "
            say(f"{mark}  {f.name:<27}{f.found}")
            if f.remedy:
                say(f"{'':9}{'':27}-> {f.remedy}")
    return int(any(f.needed and not f.good for f in findings))
