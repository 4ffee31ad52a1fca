"""`graft policy`: policy files, before somebody runs by them."""

from pathlib import Path

import click

from graft.commands.options import CONTEXT, say
from graft.rules.policy import AllowedName, parse_allow
from graft.rules.policy_file import read_policy


@click.group(context_settings=CONTEXT)
def command() -> None:
    """Check policy files: which destinations a container may reach.

    \b
    graft policy check build.toml
    graft run --policy build.toml -- make
    """


@command.command("check", context_settings=CONTEXT)
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Check FILE, and say what it allows.

    \b
    allow = ["pypi.org:443", "*.pythonhosted.org:443", "10.0.0.0/8"]
    """
    allowed = [parse_allow(entry) for entry in read_policy(file, anybodys=True)]
    for one in allowed:
        kind = ("all names below" if one.below else "name") if isinstance(one, AllowedName) else "address"
        say(f"{kind:<16}{one}{'' if one.port else ', all ports'}")
    say(f"{file}: {len(allowed)} destination{'' if len(allowed) == 1 else 's'}; everything else is refused")
